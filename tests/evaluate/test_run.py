"""A run against endpoints that fail: nothing is lost, nothing is scored wrongly, it goes on."""

import asyncio
import errno
import io
import json
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, suppress
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from attending.artifact import Record
from attending.endpoint import EndpointOptions
from attending.errors import AttendingError, CheckFailed, CheckpointError, EndpointError, UsageError
from attending.evaluate import results
from attending.evaluate.judging import JudgeSetup
from attending.evaluate.recipe import EvalConfig
from attending.evaluate.run import ModelSetup, Run, carry_out
from attending.evaluate.store import Store
from attending.evaluate.tasks import build
from tests.evaluate.healthbench_cases import write_lines
from tests.hallway.test_endpoint import Behave, Call, Server

pytestmark = pytest.mark.anyio
CANARY = "invented:0000-1111"
FAST = EndpointOptions(backoff_base_seconds=0.0, timeout_seconds=5.0, max_tries=2)


def rows(count: int = 6) -> list[dict[str, Any]]:
    criteria = [("Advises rest.", 5), ("Advises to run.", -4), ("Asks since when.", 5)]
    return [
        {
            "prompt_id": f"p{number}",
            "prompt": [{"role": "user", "content": f"My knee number {number} hurts."}],
            "rubrics": [
                {"criterion": c, "points": p, "tags": ["axis:accuracy"]} for c, p in criteria
            ],
            "example_tags": ["theme:hedging"],
            "canary": CANARY,
        }
        for number in range(count)
    ]


class Fake:
    """A model and a judge at one address; what it does is said by call."""

    def __init__(self) -> None:
        self.judged: list[str] = []
        self.asked: list[str] = []
        self.dies_after = 10**9
        self.answer = "<think>run!</think>Rest."
        self.model = "m"
        self.versions: Iterator[str] = repeat("m")
        self.breaks: Callable[[str], bool] = lambda text: False

    async def behave(self, call: Call) -> None:
        if call.path.endswith("/models"):
            await call.send(200, {"data": [{"id": "m", "max_model_len": 4096}, {"id": "j"}]})
            return
        text = call.body["messages"][-1]["content"]
        if call.body["model"] == "before":
            await self.say(call, "#### 9", "before")
        elif call.body["model"] == "m":
            self.asked.append(text)
            if len(self.asked) > self.dies_after:
                await call.send(500, {"error": {"message": "gone"}})
            else:
                await self.say(call, self.answer, next(self.versions))
        elif "# Criterion" in text:
            self.judged.append(text)
            met = "Advises rest." in text or "Asks" in text
            word = "certainly" if self.breaks(text) else json.dumps({"criteria_met": met})
            await self.say(call, word, self.model)
        else:
            await self.say(call, "yes", self.model)

    async def say(self, call: Call, text: str, model: str) -> None:
        choices = [{"message": {"content": text}, "finish_reason": "stop"}]
        usage = {"prompt_tokens": 10, "completion_tokens": 2}
        await call.send(200, {"model": model, "choices": choices, "usage": usage})


@asynccontextmanager
async def serving(behave: Behave) -> Any:
    server = Server(behave)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):  # a client that left before it asked
            await server.serve(reader, writer)

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    async with asyncio.timeout(30), listener:
        yield server.url


def made(
    url: str,
    folder: Path,
    *,
    resume: bool = False,
    judge_id: str | None = "j",
    cache: Path | None = None,
    repeats: int = 1,
    price: tuple[float, float] | None = None,
    allow_self: bool = False,
    notes: list[str] | None = None,
    **config: Any,
) -> Run:
    data = folder.parent / "rows.jsonl"
    if not data.exists():
        write_lines(data, rows())
    sampling = {"temperature": 0.5} if repeats > 1 else {}
    task = {"kind": "healthbench", "data": str(data), "repeats": repeats, "sampling": sampling}
    built = EvalConfig.build({"tasks": {"hb": task}, "concurrency": 2, **config})
    tasks = [build(one, None) for one in built.tasks.values()]
    options = FAST.replace(cache=str(cache) if cache else None, price_per_million=price)
    how = {"options": options}
    setup = judge_id and JudgeSetup(url, {"model_id": judge_id, **how}, allow_self=allow_self)
    model = ModelSetup("m", url, {"model_id": "m", **how})
    store = Store(folder, resume=resume)
    note = [].append if notes is None else notes.append
    return Run(built, tasks, [model], setup or None, store, lambda *_: None, note)


async def scored(run: Run) -> dict[str, Any]:
    samples = await carry_out(run)
    return results.report(run, "hb", samples)


async def test_a_whole_run_is_scored_and_written(tmp_path: Path) -> None:
    fake = Fake()
    async with serving(fake.behave) as url:
        run = made(url, tmp_path / "run", notes=(notes := list[str]()))
        report = await scored(run)
    [row] = report["rows"]
    assert (row["score"], row["n"], row["unscored"], row["bounds"]) == (1.0, 6, 0.0, (1.0, 1.0))
    assert row["parts"]["theme:hedging"]["n"] == 6
    assert report["canary"] == CANARY
    for name in ("examples/hb.jsonl", "m/hb.answers.jsonl", "m/hb.grades.jsonl"):
        assert all(CANARY in line for line in (tmp_path / "run" / name).open())
    assert report["judge"]["version"] == "m"  # what answered under the name j
    assert notes[0].startswith("judge: 18 requests") and notes[1].startswith("m: 6 requests")
    asked = "\n".join(fake.judged)
    assert "run!" not in asked and "assistant: Rest." in asked  # thinking is not judged
    assert len(fake.judged) == 18
    assert row["path"]["model"] == "m" and row["path"]["kv"] == "not told"
    assert row["path"]["answered_by"] == "m"


async def test_an_endpoint_that_stops_half_way_loses_nothing(tmp_path: Path) -> None:
    fake = Fake()
    fake.dies_after = 6  # three of them are the estimate's
    async with serving(fake.behave) as url:
        with pytest.raises(EndpointError, match="--resume"):
            await scored(made(url, tmp_path / "run", limits={"max_failures": 1}))
        kept = (tmp_path / "run/m/hb.answers.jsonl").read_text("utf-8").splitlines()
        assert len(kept) == 3
        with (tmp_path / "run/m/hb.answers.jsonl").open("a") as file:
            file.write('{"id": "p5", "te')  # cut by a crash
        fake.dies_after, fake.asked = 10**9, []
        report = await scored(made(url, tmp_path / "run", resume=True))
    assert report["rows"][0]["score"] == 1.0
    knees = [text for text in fake.asked if "knee" in text]
    assert len(knees) == len({*knees}) == 3  # those that were answered are not asked again


async def test_what_has_no_answer_is_unscored_with_bounds(tmp_path: Path) -> None:
    fake = Fake()
    fake.dies_after = 7
    async with serving(fake.behave) as url:
        report = await scored(made(url, tmp_path / "run", limits={"max_failures": 9}))
    [row] = report["rows"]
    assert row["n"] == 4 and row["score"] == 1.0
    assert row["unscored"] == pytest.approx(2 / 6)
    assert row["bounds"] == pytest.approx(((4 - 2 * 0.4) / 6, 1.0))
    with pytest.raises(CheckFailed, match="no score"):
        results.check(report, 0.0)
    results.check(report, 0.5)


async def test_a_malformed_verdict_is_unscored_and_judged_again(tmp_path: Path) -> None:
    fake = Fake()
    fake.breaks = lambda text: "knee number 3" in text and "Asks" in text
    judge = {"max_unscored_share": 1.0}
    async with serving(fake.behave) as url:
        [row] = (await scored(made(url, tmp_path / "run", judge=judge)))["rows"]
        assert (row["n"], row["more"]["criteria_unscored"]) == (5, 1)
        assert row["bounds"] == pytest.approx(((5 + 0.5) / 6, 1.0))
        fake.breaks, fake.judged = lambda text: False, []
        again = made(url, tmp_path / "run", resume=True, judge=judge)
        [row] = (await scored(again))["rows"]
    assert row["score"] == 1.0 and row["unscored"] == 0.0
    assert len(fake.judged) == 3  # that answer's criteria, nothing else


async def test_a_judge_that_changes_in_the_middle_stops_the_run(tmp_path: Path) -> None:
    fake = Fake()
    fake.model = "j-2026-01"
    calls = 0

    def changes(text: str) -> bool:
        nonlocal calls
        calls += 1
        fake.model = "j-2026-02" if calls > 4 else "j-2026-01"
        return False

    fake.breaks = changes
    cache = tmp_path / "verdicts.sqlite"
    async with serving(fake.behave) as url:
        with pytest.raises(CheckFailed, match="was j-2026-01 and is j-2026-02 now"):
            await scored(made(url, tmp_path / "run", cache=cache))
        fake.model, fake.breaks, fake.judged = "j-2026-01", lambda text: False, []
        report = await scored(made(url, tmp_path / "run", resume=True, cache=cache))
    assert report["rows"][0]["score"] == 1.0
    assert len(fake.judged) >= 14  # of the other version nothing was kept


async def test_a_model_that_changes_in_the_middle_stops_the_run(tmp_path: Path) -> None:
    fake = Fake()
    fake.versions = iter(["m-1"] * 6 + ["m-2"] * 9)
    async with serving(fake.behave) as url:
        with pytest.raises(CheckFailed, match="was m-1 and m-2"):
            await scored(made(url, tmp_path / "run"))
        fake.versions = repeat("m-3")
        with pytest.raises(UsageError, match=r'version of m: .*"m-1" and is "m-3"'):
            await scored(made(url, tmp_path / "run", resume=True))


async def test_a_grade_is_of_the_text_that_was_judged(tmp_path: Path) -> None:
    fake = Fake()
    async with serving(fake.behave) as url:
        await scored(made(url, tmp_path / "run"))
        file = tmp_path / "run/m/hb.answers.jsonl"
        first, *rest = file.read_text("utf-8").splitlines(keepends=True)
        file.write_text("".join([first.replace("Rest.", "Ice."), *rest]), encoding="utf-8")
        fake.judged = []
        await scored(made(url, tmp_path / "run", resume=True))
        assert len(fake.judged) == 3 and "assistant: Ice." in fake.judged[0]
        (tmp_path / "run/plan.json").unlink()
        with pytest.raises(UsageError, match=r"no plan\.json"):
            Store(tmp_path / "run", resume=False)
        (tmp_path / "run/plan.json").write_text('{"recipe": ')
        with pytest.raises(CheckpointError, match="damaged"):
            await scored(made(url, tmp_path / "run", resume=True))


async def test_what_could_not_be_judged_is_found_before_anything_is_asked(tmp_path: Path) -> None:
    fake = Fake()
    async with serving(fake.behave) as url:
        run = made(url, tmp_path / "run")
        for setup in (
            JudgeSetup(url, {"model_id": "j", "options": FAST}, template="no-such-file"),
            JudgeSetup("http://127.0.0.1:9/v1", {"model_id": "j", "options": FAST}),
            JudgeSetup("no-such-model", {"options": FAST}),
        ):
            run.judge = setup
            with pytest.raises(AttendingError):
                await carry_out(run)
        with pytest.raises(UsageError, match="needs the price"):
            made(url, tmp_path / "run", resume=True, limits={"max_cost": 1.0})
    assert not fake.asked


async def test_verdicts_are_cached_by_judge_version(tmp_path: Path) -> None:
    fake = Fake()
    cache = tmp_path / "verdicts.sqlite"
    async with serving(fake.behave) as url:
        for number, (model, asked) in enumerate([("a", 18), ("a", 0), ("b", 18)]):
            fake.model, fake.judged = model, []
            run = made(url, tmp_path / str(number), cache=cache)
            assert (await scored(run))["rows"][0]["score"] == 1.0
            assert len(fake.judged) == asked
    assert b"knee" not in cache.read_bytes()  # a hash and the verdict, no text


async def test_another_judge_or_recipe_does_not_go_on_with_a_run(tmp_path: Path) -> None:
    fake = Fake()
    async with serving(fake.behave) as url:
        await scored(made(url, tmp_path / "run"))
        with pytest.raises(UsageError, match="--resume"):
            Store(tmp_path / "run", resume=False)
        with pytest.raises(UsageError, match=r"repeats was 1 and is 2"):
            await scored(made(url, tmp_path / "run", resume=True, repeats=2))
        fake.model = "another"
        with pytest.raises(UsageError, match="version was"):
            await scored(made(url, tmp_path / "run", resume=True))
        (tmp_path / "rows.jsonl").unlink()
        write_lines(tmp_path / "rows.jsonl", rows(5))
        with pytest.raises(UsageError, match=r"data\.hb was"):
            await scored(made(url, tmp_path / "run", resume=True))


class FullDisk(io.FileIO):
    """A file that takes three lines."""

    lines = 0

    def write(self, data: Any) -> int:
        FullDisk.lines += 1
        if FullDisk.lines > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


async def test_a_full_disk_says_so_and_keeps_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, plain = Fake(), Path.open

    def opened(path: Path, mode: str = "r", *more: Any, **how: Any) -> Any:
        return FullDisk(path, mode) if mode == "ab" else plain(path, mode, *more, **how)

    async with serving(fake.behave) as url:
        run = made(url, tmp_path / "run")
        monkeypatch.setattr(Path, "open", opened)
        with pytest.raises(CheckpointError, match="disk is full"):
            await scored(run)
        monkeypatch.undo()
        kept = (tmp_path / "run/m/hb.answers.jsonl").read_text("utf-8").splitlines()
        assert len(kept) == 3
        report = await scored(made(url, tmp_path / "run", resume=True))
    assert report["rows"][0]["score"] == 1.0


@pytest.mark.parametrize(
    "limits", [{"max_tokens": 60}, {"max_cost": 0.000_05}, {"max_seconds": 1e-6}]
)
async def test_a_limit_stops_the_run_and_more_goes_on(
    tmp_path: Path, limits: dict[str, Any]
) -> None:
    fake = Fake()
    async with serving(fake.behave) as url:
        with pytest.raises(CheckFailed, match=f"limits.{next(iter(limits))}"):
            await scored(made(url, tmp_path / "run", limits=limits, price=(1.0, 1.0)))
        asked = len(fake.asked)
        assert asked < 8
        notes: list[str] = []
        again = made(url, tmp_path / "run", resume=True, price=(1.0, 1.0), notes=notes)
        report = await scored(again)
    assert report["rows"][0]["score"] == 1.0
    assert report["spent"]["cost"] == pytest.approx(report["spent"]["tokens"] / 1e6)
    assert report["spent"]["tokens"] >= 12 * (6 + 18)  # both parts of the run
    assert "the prices' currency" in notes[-1]


async def test_who_judges_is_named_and_is_not_judged(tmp_path: Path) -> None:
    fake = Fake()
    async with serving(fake.behave) as url:
        with pytest.raises(UsageError, match="--judge"):
            made(url, tmp_path / "a", judge_id=None)
        with pytest.raises(UsageError, match="grade itself"):
            await scored(made(url, tmp_path / "b", judge_id="m"))
    assert not fake.asked


async def test_answers_longer_than_the_context_are_refused_before_they_cost(
    tmp_path: Path,
) -> None:
    fake = Fake()
    async with serving(fake.behave) as url:
        data = tmp_path / "rows.jsonl"
        write_lines(data, rows())
        run = made(url, tmp_path / "run")
        told = run.config.model_dump(mode="json")
        told["tasks"]["hb"]["sampling"]["max_tokens"] = 4096
        run.config = EvalConfig.build(told)
        with pytest.raises(UsageError, match=r"tasks\.hb\.sampling\.max_tokens=N"):
            await carry_out(run)
    assert not fake.asked


async def test_repeats_of_greedy_answers_are_refused(tmp_path: Path) -> None:
    run = made("http://127.0.0.1:9/v1", tmp_path / "run")
    told = run.config.model_dump(mode="json")
    told["tasks"]["hb"]["repeats"] = 4
    with pytest.raises(UsageError, match="temperature"):
        Run(EvalConfig.build(told), run.tasks, run.models, run.judge, run.store, print, print)


async def test_repeats_are_one_conversation_each_and_give_worst_at_k(tmp_path: Path) -> None:
    fake = Fake()
    async with serving(fake.behave) as url:
        [row] = (await scored(made(url, tmp_path / "run", repeats=3)))["rows"]
    assert (row["n"], row["n_answers"]) == (6, 18)
    assert row["more"]["worst_at_k"] == {1: 1.0, 2: 1.0, 3: 1.0}


async def test_a_meta_evaluation_is_the_judges_agreement(tmp_path: Path) -> None:
    fake = Fake()
    labels = [[True, True], [False, True]]
    told = [
        {
            "prompt_id": "p",
            "completion_id": "c",
            "prompt": [{"role": "user", "content": "My knee hurts."}],
            "completion": "Rest.",
            "rubric": rubric,
            "category": "cluster:hedging_any",
            "binary_labels": own,
        }
        for rubric, own in zip(["Advises rest.", "Mentions a doctor."], labels, strict=True)
    ]
    write_lines(tmp_path / "meta.jsonl", told)
    config = EvalConfig.build(
        {"tasks": {"meta": {"kind": "meta", "data": str(tmp_path / "meta.jsonl")}}}
    )
    tasks = [build(one, None) for one in config.tasks.values()]
    async with serving(fake.behave) as url:
        setup = JudgeSetup(url, {"model_id": "j", "options": FAST})
        store = Store(tmp_path / "run", resume=False)
        silent = lambda *_: None  # noqa: E731
        run = Run(config, tasks, [ModelSetup("data", None)], setup, store, silent, silent)
        report = results.report(run, "meta", await carry_out(run))
        [row] = report["rows"]
        # judge: met, not met; pairs (T, T), (T, T), (F, F), (F, T)
        assert row["score"] == pytest.approx((2 * 2 / (2 * 2 + 1) + 2 / (2 + 1)) / 2)
        assert row["parts"]["theme:hedging"]["score"] == row["score"]
        assert "[1]" not in fake.judged[0]  # no points are shown here
        results.write(run, report, Record("eval", {}, 0, []))
        told_setup = JudgeSetup(
            url, {"model_id": "j", "options": FAST}, agreement=tmp_path / "run/report.json"
        )
        later = made(url, tmp_path / "hb")
        later.judge = told_setup
        assert (await scored(later))["judge"]["agreement"]["value"] == row["score"]
        fake.model = "other"
        worse = made(url, tmp_path / "hb2")
        worse.judge = told_setup
        with pytest.raises(UsageError, match="measured the judge"):
            await scored(worse)


async def test_two_processes_do_not_write_to_one_folder(tmp_path: Path) -> None:
    fake = Fake()
    async with serving(fake.behave) as url:
        run = made(url, tmp_path / "run")
        with run.store.alone(), pytest.raises(UsageError, match="another process writes"):
            await carry_out(run)
        assert not fake.asked
        assert (await scored(run))["rows"][0]["score"] == 1.0
