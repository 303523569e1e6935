"""`attending consult` and `attending judge` as commands, with a doctor on loopback."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attending import cli
from attending.errors import AttendingError, CheckFailed, ConfigError, UsageError
from attending.verifier.judge.ask import CAUTION

SCRIPT = ["Where does it hurt?", "You have acute appendicitis. Go to the hospital today."]


@contextmanager
def doctor(
    script: list[str], served: tuple[str, ...] = ("scripted",), seen: list[Any] | None = None
) -> Iterator[str]:
    """An endpoint that says these, one after another, and then fails; its `judge` says yes."""
    left = list(script)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": name} for name in served]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if seen is not None:
                seen.append((body["model"], self.headers["authorization"]))
            if body["model"] == "judge":
                form = body["response_format"]["json_schema"]["schema"]["properties"]
                left.insert(0, json.dumps({name: name != "explanation" or "why" for name in form}))
            if not left:
                self.reply(400, {"error": {"message": "no more"}})
                return
            choice = {"message": {"content": left.pop(0)}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 20, "completion_tokens": 5}
            self.reply(200, {"model": "scripted", "choices": [choice], "usage": usage})

        def reply(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def test_consult_writes_a_trace_and_pure_json(tmp_path: Path) -> None:
    with doctor(SCRIPT) as url:
        to = str(tmp_path / "out")
        done = run("consult", "appendicitis", url, "--judge", "none", "--json", "--out", to)
    assert done.exit_code == 0, done.exception
    result = json.loads(done.stdout)
    assert (result["turns"], result["output_tokens"], result["error"]) == (2, 10, "")
    rows = [json.loads(line) for line in (tmp_path / "out/trace.jsonl").read_text().splitlines()]
    assert rows[0]["models"] == {"doctor": "scripted", "patient": "embedded", "judge": ""}
    assert [row["text"] for row in rows if row.get("speaker") == "doctor"] == SCRIPT
    assert (tmp_path / "out/trace.html").is_file()
    assert "no person" in done.stderr


def test_without_json_the_conversation_is_shown(tmp_path: Path) -> None:
    with doctor([SCRIPT[1] + " [bold]x[/]"]) as url:
        done = run("consult", "appendicitis", url, "--judge", "none", "--out", str(tmp_path))
    assert done.exit_code == 0
    assert "doctor You have acute appendicitis" in done.stdout and "[bold]x[/]" in done.stdout
    assert "trace.html" in done.stdout


def test_a_doctor_that_fails_leaves_what_was_said(tmp_path: Path) -> None:
    with doctor(SCRIPT[:1]) as url:
        done = run("consult", "appendicitis", url, "--judge", "none", "--out", str(tmp_path))
    assert isinstance(done.exception, AttendingError) and "status 400" in str(done.exception)
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 5
    assert "It broke off" in (tmp_path / "trace.html").read_text()


def test_what_is_wrong_is_said_before_anything_is_asked(tmp_path: Path) -> None:
    criterion = {"criterion": "Names appendicitis.", "points": 5, "tags": []}
    row = {"prompt_id": "r", "prompt": [{"role": "user", "content": "x"}]}
    twice = tmp_path / "twice.jsonl"
    twice.write_text(json.dumps(row | {"rubrics": [criterion, criterion]}))
    zero = tmp_path / "zero.jsonl"
    zero.write_text(json.dumps(row | {"rubrics": [criterion | {"points": 11}]}))
    two, none = tmp_path / "two.jsonl", tmp_path / "none.jsonl"
    two.write_text(2 * (json.dumps(row | {"rubrics": [criterion]}) + "\n"))
    none.write_text("\n")
    with doctor([]) as url:
        for options, error, text in (
            (["--rubric", str(twice)], ConfigError, "Each statement counts once"),
            (["--rubric", str(zero)], ConfigError, "zero.jsonl:1: criterion .* has 11 points"),
            (["--rubric", str(two)], UsageError, "two.jsonl has 2 rows: .* one row"),
            (["--rubric", str(none)], UsageError, "none.jsonl has 0 rows"),
            (["--judge-price", "3", "--judge", url], UsageError, "'3'.*IN,OUT"),
            (["--model-price", "1,x"], UsageError, "'1,x'.*IN,OUT"),
            (["--model-price", "1,-2"], ConfigError, "greater than or equal to 0"),
            (["--model-key-variable", "NO_KEY_HERE"], UsageError, "NO_KEY_HERE is not set"),
            (["--cache", str(tmp_path / "c")], UsageError, "name one with --judge"),
            (["--judge", "embedded", "--judge-id", "x"], UsageError, "name one with --judge"),
            (["--patient-price", "1,2"], UsageError, "name one with --patient"),
            (["--judge", url], UsageError, "it would grade itself"),
            (["--patient", url], UsageError, "would be doctor and patient"),
        ):
            done = run("consult", "appendicitis", url, "--out", str(tmp_path / "out"), *options)
            assert isinstance(done.exception, error)
            with pytest.raises(error, match=text):
                raise done.exception
    for option, value in (("--max-turns", "0"), ("--rubric", str(tmp_path / "absent.jsonl"))):
        done = run("consult", "appendicitis", "default", option, value)
        assert done.exit_code == 2 and "Invalid value" in done.stderr
    done = run("consult", "apendicitis", "default")
    assert isinstance(done.exception, UsageError) and "appendicitis" in str(done.exception)


def test_without_the_judges_base_nothing_is_judged_and_it_is_said(tmp_path: Path) -> None:
    with doctor(SCRIPT[1:]) as url:
        done = run("consult", "appendicitis", url, "--json", "--out", str(tmp_path))
        assert done.exit_code == 0 and "Nothing is judged" in done.stderr
        assert "score" not in json.loads(done.stdout)
        done = run("consult", "appendicitis", url, "--judge", "embedded", "--out", str(tmp_path))
        assert isinstance(done.exception, AttendingError) and "pull judge" in str(done.exception)


def test_hosted_models_have_ids_keys_prices_and_the_judge_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCTORS_KEY", "sk-doctor")
    monkeypatch.setenv("JUDGES_KEY", "sk-judge")
    criterion = {"criterion": "Names appendicitis.", "points": 5, "tags": []}
    row = {"prompt_id": "r", "prompt": [{"role": "user", "content": "x"}], "rubrics": [criterion]}
    (tmp_path / "own.jsonl").write_text(json.dumps(row))
    cache = tmp_path / "new" / "verdicts.sqlite"
    asked = list[list[Any]]()
    for as_json in (["--json"], []):
        asked.append([])
        with doctor(SCRIPT[1:], ("scripted", "judge"), asked[-1]) as url:
            named = [f"--judge={url}", "--judge-id=judge", "--judge-key-variable=JUDGES_KEY"]
            named += ["--model-id=scripted", "--model-key-variable=DOCTORS_KEY"]
            named += ["--model-price=1000,2000", "--judge-price=0,0", f"--cache={cache}"]
            named += [f"--rubric={tmp_path / 'own.jsonl'}", f"--out={tmp_path}", *as_json]
            done = run("consult", "appendicitis", url, *named)
        assert done.exit_code == 0, done.exception
        assert CAUTION in done.stderr
        if as_json:
            result = json.loads(done.stdout)
            assert (result["score"], result["caution"]) == (1.0, CAUTION)
            assert result["cost"] == pytest.approx(20 / 1e3 + 2 * 5 / 1e3)
    assert CAUTION in done.stdout.splitlines()  # whole, in a terminal of 80 columns
    assert asked[0] == [("scripted", "Bearer sk-doctor"), ("judge", "Bearer sk-judge")]
    assert asked[1] == asked[0][:1]  # the verdict was kept
    with doctor([], ("scripted", "judge")) as url:
        done = run("consult", "appendicitis", url, "--judge", "none", f"--out={tmp_path}")
        assert isinstance(done.exception, UsageError) and "as the model id" in str(done.exception)


def test_a_judge_that_talks_prose_fails_the_check_and_leaves_the_trace(tmp_path: Path) -> None:
    with doctor(SCRIPT[1:]) as url, doctor(["It is fine."] * 200) as judge:
        options = ("--judge", judge, "--allow-self", "--out", str(tmp_path))
        done = run("consult", "appendicitis", url, *options)
    assert isinstance(done.exception, CheckFailed) and done.exception.exit_code == 3
    assert "criteria are unscored" in str(done.exception)
    assert '"unscored"' in (tmp_path / "trace.jsonl").read_text()


def test_runs_do_not_overwrite_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with doctor(SCRIPT[1:]) as url:
            assert run("consult", "appendicitis", url, "--judge", "none").exit_code == 0
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["consult-appendicitis", "consult-appendicitis-1"]
    taken = tmp_path / "file"
    taken.write_text("")
    done = run("consult", "appendicitis", "default", "--judge", "none", "--out", str(taken))
    assert isinstance(done.exception, UsageError) and "is a file" in str(done.exception)
