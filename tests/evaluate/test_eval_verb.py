"""`attending eval` and `attending report` as a user types them, beside a fake endpoint."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from attending.cli import app
from attending.cli.evaluating import _with_parent
from attending.errors import AttendingError, CheckFailed, ConfigError, UsageError
from attending.sources import Resolved
from tests.evaluate.healthbench_cases import write_lines
from tests.evaluate.test_run import CANARY, Fake, rows
from tests.hallway.test_endpoint import Server


@pytest.fixture
def served() -> Iterator[tuple[Fake, str]]:
    """A fake model `m` and judge `j`, in a thread of their own."""
    fake, loop = Fake(), asyncio.new_event_loop()
    server = Server(fake.behave)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    started = asyncio.run_coroutine_threadsafe(
        asyncio.start_server(server.serve, "127.0.0.1", 0), loop
    )
    listener = started.result(5)
    yield fake, f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    loop.call_soon_threadsafe(listener.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)


def run(*words: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, words)])


def healthbench(url: str, folder: Path, *more: Any) -> Result:
    data = folder.parent / "rows.jsonl"
    if not data.exists():
        write_lines(data, rows(3))
    told = ["--rows", data, "--judge", f"{url}#j", "--out", folder, *more]
    limit = ["--set", "tasks.healthbench.sampling.max_tokens=99"]
    return run("eval", "healthbench", f"{url}#m", *told, *limit)


def test_a_score_and_its_worth_are_printed_and_written(
    served: tuple[Fake, str], tmp_path: Path
) -> None:
    _, url = served
    out = healthbench(url, tmp_path / "run", "--judge-price", "1,1", "--model-price", "1,2")
    assert out.exit_code == 0, out.output
    assert "not measured" in out.stdout and "1.000" in out.stdout
    assert "at most" in out.stderr
    report = json.loads((tmp_path / "run/report.json").read_text("utf-8"))
    assert report["canary"] == CANARY and report["rows"][0]["judge"] == "j"
    page = (tmp_path / "run/report.html").read_text("utf-8")
    assert CANARY in page
    told = json.loads((tmp_path / "run/run.json").read_text("utf-8"))
    assert told["verb"] == "eval" and told["metrics"] == {"eval/m/healthbench": 1.0}
    everything = "".join(
        path.read_text("utf-8") for path in (tmp_path / "run").rglob("*.json") if path.is_file()
    )
    assert str(tmp_path) not in everything  # no path of this machine


def test_json_is_all_that_stands_on_standard_output(
    served: tuple[Fake, str], tmp_path: Path
) -> None:
    _, url = served
    out = healthbench(url, tmp_path / "run", "--json")
    printed = json.loads(out.stdout)
    assert printed["overall"] == printed["score"] == 1.0
    assert printed["judge"]["name"] == "j" and printed["rows"][0]["judge"] == "j"


def test_two_runs_are_compared_and_another_judge_is_not(
    served: tuple[Fake, str], tmp_path: Path
) -> None:
    fake, url = served
    healthbench(url, tmp_path / "a")
    fake.answer = "Run."
    healthbench(url, tmp_path / "b")
    out = run("report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both")
    assert out.exit_code == 0, out.output
    both = json.loads((tmp_path / "both/report.json").read_text("utf-8"))
    assert [one["name"] for one in both["models"]] == ["m (a)", "m (b)"]
    assert (tmp_path / "both/report.html").is_file()
    fake.model = "another"
    healthbench(url, tmp_path / "c")
    refused = run("report", tmp_path / "a", tmp_path / "c", "--out", tmp_path / "no")
    assert isinstance(refused.exception, UsageError)
    assert run("report", tmp_path / "a").exit_code == 0


def test_what_stood_in_training_text_is_told_and_a_canary_ends_it(
    served: tuple[Fake, str], tmp_path: Path
) -> None:
    _, url = served
    long = "My knee has hurt on the left side since I fell from a ladder two weeks ago, doctor."
    told = rows(3)
    told[0]["prompt"][0]["content"] = long
    write_lines(tmp_path / "rows.jsonl", told)
    write_lines(tmp_path / "train.jsonl", [{"text": f"Forum. {long} Answers follow."}])
    out = healthbench(url, tmp_path / "run", "--against", tmp_path / "train.jsonl", "--json")
    row = json.loads(out.stdout)["rows"][0]
    assert row["contamination"] == {"n": 1, "share": pytest.approx(1 / 3), "score_without": 1.0}
    write_lines(tmp_path / "train.jsonl", [{"text": f"BENCHMARK DATA {CANARY.upper()}"}])
    out = healthbench(url, tmp_path / "run2", "--against", tmp_path / "train.jsonl")
    assert isinstance(out.exception, CheckFailed) and "canary" in str(out.exception)
    assert (tmp_path / "run2/report.html").is_file()


@pytest.mark.parametrize(
    ("words", "kind", "says"),
    [
        (["healthbnch", "m"], ConfigError, "Did you mean 'healthbench'"),
        (["healthbench"], UsageError, "name a MODEL"),
        (["healthbench", "m", "--set", "tasks.healthbench.repeat=2"], ConfigError, "repeats"),
        (["medqa", "m", "--rows", "x"], UsageError, "--rows is for HealthBench"),
        (["healthbench-physicians", "m"], UsageError, "stand in the data"),
        (["healthbench", "m", "--judge-id", "x"], UsageError, "no model is the judge"),
        (["healthbench", "no-such-model", "--judge", "embedded"], AttendingError, "no-such-model"),
        (["gsm8k", "m"], UsageError, "--data"),
        (["retention", "m"], UsageError, "--before"),
    ],
)
def test_mistakes_are_told_before_anything_is_asked(
    words: list[str], kind: type[Exception], says: str, tmp_path: Path
) -> None:
    told = rows(2)
    told[0]["ideal_completions_data"] = {
        "ideal_completion": "Rest.",
        "ideal_completions_group": "Group 1",
        "ideal_completions_ref_completions": None,
    }
    write_lines(tmp_path / "rows.jsonl", told)
    if words[0].startswith("healthbench"):
        words = [*words, "--rows", str(tmp_path / "rows.jsonl")]
    if words[0] in ("medqa", "retention"):
        words = [*words, "--data", str(tmp_path)]
        question = {"id": "1", "question": "?", "options": {"A": "a", "B": "b"}, "answer_idx": "A"}
        write_lines(tmp_path / "medqa_us_4opt_test.jsonl", [question])
        write_lines(tmp_path / "gsm8k_test.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
        prompt = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"]}
        write_lines(tmp_path / "ifeval_541.jsonl", [{**prompt, "kwargs": [{}]}])
        write_lines(tmp_path / "general_openstax.jsonl", [{"text": "A text."}])
    out = run("eval", *words, "--out", tmp_path / "run")
    assert isinstance(out.exception, kind), out.exception
    assert says in str(out.exception)


def test_retention_compares_with_what_the_model_was_trained_from(
    served: tuple[Fake, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, url = served
    fake.answer = "#### 2"
    suite = tmp_path / "retention.toml"
    suite.write_text('[tasks.maths]\nkind = "maths"\ndata = "sums.jsonl"\n')
    sums = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(4)]
    write_lines(tmp_path / "sums.jsonl", sums)
    how = ["--data", tmp_path, "--before", f"{url}#before"]
    fake.names = ["before", "m"]
    out = run("eval", suite, f"{url}#m", *how, "--out", tmp_path / "run", "--json")
    assert out.exit_code == 0, out.output
    [pair] = json.loads(out.stdout)["pairs"]
    assert (pair["a"], pair["b"], pair["difference"], pair["n"]) == ("before", "m", 0.25, 4)
    assert "gained" in (tmp_path / "run/report.html").read_text("utf-8")
    model = tmp_path / "tuned"
    model.mkdir()
    parent = {"uri": "default", "sha256": "ab"}
    (model / "run.json").write_text(json.dumps({"parents": [parent]}))
    monkeypatch.chdir(tmp_path)
    assert _with_parent(["tuned"], None, "other") == ["tuned"]
    for sha256 in ("ab", "cd"):
        monkeypatch.setattr(
            "attending.sources.resolve", lambda s, of=sha256: Resolved(Path(s), s, s, sha256=of)
        )
        if sha256 == "ab":
            assert _with_parent(["tuned"], None, "retention") == ["default", "tuned"]
        else:
            with pytest.raises(UsageError, match="sha256 is another"):
                _with_parent(["tuned"], None, "retention")
    assert _with_parent(["tuned"], "x", "any") == ["x", "tuned"]


def test_physicians_texts_are_judged_without_a_model(
    served: tuple[Fake, str], tmp_path: Path
) -> None:
    fake, url = served
    told = rows(2)
    told[1]["ideal_completions_data"] = {
        "ideal_completion": "Rest.",
        "ideal_completions_group": "Group 2",
        "ideal_completions_ref_completions": ["a", "b", "c", "d"],
    }
    write_lines(tmp_path / "rows.jsonl", told)
    files = ["--rows", tmp_path / "rows.jsonl", "--judge", url, "--judge-id", "j"]
    out = run("eval", "healthbench-physicians", *files, "--out", tmp_path / "run", "--json")
    assert out.exit_code == 0, out.output
    report = json.loads(out.stdout)
    assert report["n"] == 1 and report["parts"]["group:Group 2"]["score"] == 1.0
    more = ["--set", "tasks.healthbench.answers=references", "--out", tmp_path / "references"]
    out = run("eval", "healthbench-physicians", *files, *more, "--json")
    assert json.loads(out.stdout)["n_answers"] == 4
    assert not fake.asked
