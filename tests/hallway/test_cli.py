"""The command line as a user meets it: streams, exit codes, a conversation, interruption."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from attending.cli.terminal import UNPRINTABLE
from tests.engine.folders import write_model

COMMAND = [sys.executable, "-m", "attending.cli"]


def run(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True, input=stdin)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny"))


def test_one_question_prints_the_answer_alone_on_standard_output(model: str) -> None:
    words = ("chat", "fever?", "-m", model, "--temperature", "0", "--max-tokens", "5")
    said = run(*words)
    assert said.returncode == 0, said.stderr
    assert said.stdout.strip() and "seed" not in said.stdout
    assert "tiny" in said.stderr and "not a medical device" in said.stderr
    assert "5 tokens" in said.stderr and "cut at 5" in said.stderr
    as_json = json.loads(run(*words, "--json").stdout)
    assert UNPRINTABLE.sub("", as_json["text"]) == said.stdout.removesuffix("\n")
    assert as_json["finish_reason"] == "length" and as_json["output_tokens"] == 5


def test_a_verb_without_its_extra_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['datatrove'] = None\n")
    words = [*COMMAND, "corpus", "folder", "--set", f"root={tmp_path}", "--dry-run"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    said = subprocess.run(words, capture_output=True, text=True, env=env)
    assert said.returncode == 2 and "Traceback" not in said.stderr
    told = " ".join(said.stderr.split())
    assert "datatrove is not installed: pip install -e '.[train,corpus,verify]'" in told


def test_a_question_can_come_from_a_pipe(model: str) -> None:
    words = ("-m", model, "--temperature", "0", "--max-tokens", "5")
    assert run("chat", "-", *words, stdin="fever?").stdout == run("chat", "fever?", *words).stdout


def test_a_conversation_remembers_resets_and_ends(model: str) -> None:
    words = ("chat", "-m", model, "--temperature", "0", "--max-tokens", "5")
    said = run(*words, stdin="one\ntwo\n/reset\none\n/exit\nnot asked\n")
    assert said.returncode == 0, said.stderr
    first, second, again = said.stdout.splitlines()
    assert first == again != second
    assert run(*words, stdin="one\n").returncode == 0  # the end of the input ends it


def test_a_question_that_does_not_fit_does_not_end_the_conversation(model: str) -> None:
    words = ("chat", "-m", model, "--temperature", "0", "--max-tokens", "5")
    said = run(*words, stdin="fever " * 400 + "\none\n")
    assert said.returncode == 0 and "tokens with its frame" in said.stderr
    assert said.stdout == run(*words, stdin="one\n").stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("chat", "hi", "-m", "nowhere"), 1, "'nowhere' does not exist"),
        (("chat", "hi"), 1, "attending pull default"),
        (("chat", " ", "-m", "MODEL"), 2, "message is empty"),
        (("chat", "--json", "-m", "MODEL"), 2, "--json needs a message"),
        (("chat", "hi", "-m", "MODEL", "--temperature", "-1"), 2, "temperature"),
        (("chat", "hi", "-m", "MODEL", "--context", "9999"), 2, "takes 1 to 256"),
        (("chat", "hi", "-m", "MODEL", "--temprature", "1"), 2, "--temperature"),
        (("plan", "MODEL", "--card", "rtx409"), 2, "rtx4090"),
        (("report", "MODEL"), 1, "metrics.jsonl"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_wrong_use_is_one_clear_error_without_a_traceback(
    model: str, words: tuple[str, ...], code: int, message: str
) -> None:
    said = run(*(model if word == "MODEL" else word for word in words))
    assert (said.returncode, said.stdout) == (code, "")
    assert message in said.stderr and "Traceback" not in said.stderr


def test_debug_shows_the_traceback() -> None:
    assert "Traceback" in run("--debug", "chat", "hi", "-m", "nowhere").stderr


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(model: str) -> None:
    words = ("chat", "fever?", "-m", model, "--max-tokens", "240", "--temperature", "0")
    process = subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0 and "stopped" in errors and "Traceback" not in errors


def test_escape_sequences_of_a_model_do_not_reach_the_terminal() -> None:
    assert UNPRINTABLE.sub("", "a\x1b[2Jb\rc\x9bd\te\n") == "a[2Jbcd\te\n"


def test_reading_only_the_beginning_of_the_output_is_not_a_crash(model: str) -> None:
    shell = f"{' '.join(COMMAND)} --help | head -1; exit ${{PIPESTATUS[0]}}"
    said = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert "Traceback" not in said.stderr


def test_a_terminal_conversation_can_be_interrupted_at_the_prompt(model: str) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [*COMMAND, "chat", "-m", model, "--max-tokens", "3"])
    seen = b""
    deadline = time.monotonic() + 40
    sent = 0
    while time.monotonic() < deadline:
        try:
            seen += os.read(terminal, 4096)
        except OSError:
            break
        if seen.endswith(b"> ") and sent < 2:
            time.sleep(0.5)  # Python misses an interrupt between the prompt and its wait for input
            os.write(terminal, [b"\x03", b"\x04"][sent])
            sent += 1
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0 and b"Ctrl-D ends" in seen
    assert b"Traceback" not in seen


def test_a_plan_needs_only_the_configuration(model: str, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text((Path(model) / "config.json").read_text())
    said = run("plan", str(config), "--card", "24GiB", "--json")
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)


def test_keys_are_made_listed_and_revoked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTENDING_CONFIG", str(tmp_path))
    made = run("serve", "--new-key", "ward")
    assert re.fullmatch(r"atd-[\w-]{43}\n", made.stdout) and "ward" in made.stderr
    listed = json.loads(run("serve", "--list-keys", "--json").stdout)
    assert listed["new_key"] is None and [key["name"] for key in listed["keys"]] == ["ward"]
    assert made.stdout.strip() not in (tmp_path / "keys.json").read_text()
    assert run("serve", "--new-key", "").returncode == 2  # an empty variable makes no server
    assert run("serve", "--revoke-key", "nobody").returncode == 2
    assert run("serve", "--revoke-key", "ward").returncode == 0
    assert json.loads(run("serve", "--list-keys", "--json").stdout)["keys"] == []
