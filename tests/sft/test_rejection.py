"""Rejection sampling against a scripted server: what passes, what is hard, what is never a zero."""

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from attending.endpoint import EndpointOptions
from attending.errors import ConfigError, EndpointError, UsageError
from attending.evaluate.judging import JudgeSetup
from attending.evaluate.run import ModelSetup, Run
from attending.evaluate.sample import Answer, Example, Grade, Sample
from attending.evaluate.store import Store
from attending.sft.rejection import (
    RejectionConfig,
    answer_to,
    build,
    by_consensus,
    majority,
    outcome_of,
    sample,
)
from tests.evaluate.healthbench_cases import write_lines
from tests.evaluate.test_run import serving
from tests.hallway.test_endpoint import Call

pytestmark = pytest.mark.anyio
FAST = EndpointOptions(backoff_base_seconds=0.0, timeout_seconds=5.0, max_tries=2)
DRUG = {"kind": "exact", "answer": "ibuprofen"}
RIGHT, WRONG = "The answer is ibuprofen.", "The answer is aspirin."
OPTIONS = {"A": "rest", "B": "run"}


class Fake:
    """Models at one address; the answers to a prompt are listed by model and prompt."""

    def __init__(self, answers: dict[tuple[str, str], list[str]]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, str, int]] = []
        self.judged = 0
        self.dies_after = 10**9
        self.is_malformed = False
        self.thoughts = ""
        self.finish = "stop"
        self.hangs_after = 10**9
        self.is_hanging = asyncio.Event()

    async def behave(self, call: Call) -> None:
        if call.path.endswith("/models"):
            await call.send(200, {"data": [{"id": name} for name in "mnoj"]})
            return
        model, text = call.body["model"], call.body["messages"][-1]["content"]
        if model == "j":
            await self.judge(call, text)
        elif (model, text) not in self.answers:
            await self.say(call, "yes")  # to what measures the speed
        else:
            number = call.body.get("seed", 0)
            self.asked.append((model, text, number))
            if len(self.asked) > self.hangs_after:
                self.is_hanging.set()
                await asyncio.sleep(60)
            own = self.answers[model, text]
            said = own[number % len(own)]
            if len(self.asked) > self.dies_after or said == "fails":
                await call.send(500, {"error": {"message": "gone"}})
            else:
                await self.say(call, said, self.thoughts)

    async def judge(self, call: Call, text: str) -> None:
        """Met is a criterion whose last word is in the answer."""
        self.judged += "# Criterion" in text
        answer = text.rpartition("assistant: ")[2].partition("\n")[0]
        met = ("rest" in text.rpartition("# Criterion")[2]) <= ("Rest" in answer) and (
            ("when" in text.rpartition("# Criterion")[2]) <= ("when" in answer)
        )
        is_broken = self.is_malformed and "when" in answer
        await self.say(call, "certainly" if is_broken else json.dumps({"criteria_met": met}))

    async def say(self, call: Call, text: str, thoughts: str = "") -> None:
        message = {"content": text, "reasoning_content": thoughts}
        choices = [{"message": message, "finish_reason": self.finish}]
        usage = {"prompt_tokens": 10, "completion_tokens": 2}
        await call.send(200, {"model": call.body["model"], "choices": choices, "usage": usage})


def row(name: str, **told: Any) -> dict[str, Any]:
    return {"id": name, "messages": [{"role": "user", "content": name}], **told}


def made(
    url: str,
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    kind: str = "prompts",
    models: str = "m",
    resume: bool = False,
    repeats: int = 4,
    **config: Any,
) -> Run:
    data = folder.parent / "data"
    data.mkdir(exist_ok=True)
    (data / "rows.jsonl").unlink(missing_ok=True)
    write_lines(data / "rows.jsonl", rows)
    task = {"kind": kind, "data": "rows.jsonl", "repeats": repeats}
    task["sampling"] = {"temperature": 0.8 if repeats > 1 else 0.0}
    judge = {"max_unscored_share": 1.0}
    limits = {"max_failures": 0}
    built = RejectionConfig.build(
        {"tasks": {"t": task}, "concurrency": 2, "judge": judge, "limits": limits, **config}
    )
    setups = [ModelSetup(name, url, {"model_id": name, "options": FAST}) for name in models]
    judging = JudgeSetup(url, {"model_id": "j", "options": FAST}) if kind != "prompts" else None
    store = Store(folder, resume=resume)
    return Run(built, build(built, data), setups, judging, store, lambda *_: None, [].append)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


def said(text: str, score: float | None, *, rule: Any = DRUG, finish: str = "stop") -> Sample:
    example = Example("p", ({"role": "user", "content": "p"},), {"rule": rule} if rule else {})
    return Sample(example, Answer("p", 0, text, finish), Grade(score))


def config(**told: Any) -> RejectionConfig:
    task = {"kind": "prompts", "data": "rows.jsonl"}
    return RejectionConfig.build({"tasks": {"t": task}, **told})


async def test_what_passes_is_kept_and_what_does_not_is_hard(tmp_path: Path) -> None:
    again, other = "The answer is IBUPROFEN!", "It is known. The answer is ibuprofen."
    fake = Fake(
        {
            ("m", "p1"): [WRONG, RIGHT, again, other],
            ("m", "p2"): [WRONG],
            ("m", "p3"): [WRONG, "The answer is rest.", WRONG, WRONG],
        }
    )
    rows = [row(name, rule=DRUG) for name in ("p1", "p2", "p3")]
    async with serving(fake.behave) as url:
        counts = await sample(made(url, tmp_path / "run", rows, keep=2))
    assert counts == {"kept": 1, "defective": 1, "hard": 1, "answers": 2, "unscored_answers": 0}
    kept = lines(tmp_path / "run", "kept")
    assert [one["messages"][-1] for one in kept] == [
        {"role": "assistant", "content": text} for text in (RIGHT, other)
    ]
    assert kept[0] == {
        "id": "t/p1",
        "pass_rate": 0.75,
        "messages": [{"role": "user", "content": "p1"}, kept[0]["messages"][1]],
        "score": 1.0,
    }
    hard = lines(tmp_path / "run", "hard")
    assert [(one["id"], one["route"], one["rule"]) for one in hard] == [
        ("t/p2", "review", DRUG),
        ("t/p3", "sft", DRUG),
    ]
    told = lines(tmp_path / "run", "prompts")
    assert [(one["pass_rate"], one["fate"], one["kept"]) for one in told] == [
        (0.75, "kept", 2),
        (0.0, "defective", 0),
        (0.0, "hard", 0),
    ]
    assert len(fake.asked) == len({*fake.asked}) == 12  # each with a seed of its own


async def test_thinking_is_kept_apart_and_hard_reasoning_is_for_rl(tmp_path: Path) -> None:
    inline = f"<think>\nDid the last one help?\n</think>\n\n{RIGHT}"
    fake = Fake({("m", "p1"): [RIGHT], ("m", "p2"): [inline], ("m", "p3"): ["no", "yes"]})
    rows = [row(name, rule=DRUG) for name in ("p1", "p2", "p3")]
    async with serving(fake.behave) as url:
        fake.thoughts = ""
        run = made(url, tmp_path / "a", rows, reasoning=["t"], repeats=2)
        await sample(run)
        assert [one["route"] for one in lines(tmp_path / "a", "hard")] == ["rl"]
        last = lines(tmp_path / "a", "kept")[1]["messages"][-1]
        assert last["reasoning_content"] == "Did the last one help?" and last["content"] == RIGHT
        fake.thoughts = "Not aspirin."
        await sample(made(url, tmp_path / "b", rows[:1], repeats=2))
        last = lines(tmp_path / "b", "kept")[0]["messages"][-1]
    assert last == {
        "role": "assistant",
        "content": RIGHT,
        "reasoning_content": "Not aspirin.",
    }


async def test_changing_what_is_kept_asks_nothing_again(tmp_path: Path) -> None:
    fake = Fake({("m", "p1"): [RIGHT, f"Well. {RIGHT}"]})
    rows = [row("p1", rule=DRUG)]
    async with serving(fake.behave) as url:
        await sample(made(url, tmp_path / "run", rows))
        assert len(lines(tmp_path / "run", "kept")) == 1
        fake.asked = []
        await sample(made(url, tmp_path / "run", rows, keep=3, resume=True))
    assert len(lines(tmp_path / "run", "kept")) == 2 and not fake.asked


async def test_a_dead_endpoint_says_resume_and_nothing_is_asked_twice(tmp_path: Path) -> None:
    names = [f"p{number}" for number in range(4)]
    fake = Fake({("m", name): [RIGHT, WRONG, f"So. {RIGHT}"] for name in names})
    rows = [row(name, rule=DRUG) for name in names]
    async with serving(fake.behave) as url:
        whole = await sample(made(url, tmp_path / "whole", rows, repeats=3))
        fake.asked, fake.dies_after = [], 5
        with pytest.raises(EndpointError, match="--resume"):
            await sample(made(url, tmp_path / "run", rows, repeats=3))
        answered = {*fake.asked[:5]}
        fake.asked, fake.dies_after = [], 10**9
        again = await sample(made(url, tmp_path / "run", rows, repeats=3, resume=True))
    assert not answered & {*fake.asked} and len(answered) + len(fake.asked) == 12
    assert again == whole == {"kept": 4, "answers": 4, "unscored_answers": 0}
    for name in ("kept", "hard", "prompts"):
        assert lines(tmp_path / "run", name) == lines(tmp_path / "whole", name)


async def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    names = [f"p{number}" for number in range(3)]
    fake = Fake({("m", name): [RIGHT] for name in names})
    rows = [row(name, rule=DRUG) for name in names]
    async with serving(fake.behave) as url:
        fake.hangs_after = 3
        task = asyncio.create_task(sample(made(url, tmp_path / "run", rows, repeats=2)))
        await fake.is_hanging.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        done = {*fake.asked[:3]}
        fake.asked, fake.hangs_after = [], 10**9
        counts = await sample(made(url, tmp_path / "run", rows, repeats=2, resume=True))
    assert counts["kept"] == 3
    kept = len((tmp_path / "run/m/t.answers.jsonl").read_text("utf-8").splitlines())
    assert kept == 6 and len(fake.asked) <= 4 and len(done | {*fake.asked}) == 6


async def test_a_reply_that_failed_is_unscored_and_no_zero(tmp_path: Path) -> None:
    fake = Fake({("m", "p1"): [RIGHT, "fails", WRONG], ("m", "p2"): ["fails"]})
    rows = [row(name, rule=DRUG) for name in ("p1", "p2")]
    async with serving(fake.behave) as url:
        limits = {"max_failures": 9}
        counts = await sample(made(url, tmp_path / "run", rows, repeats=3, limits=limits))
    assert counts == {"kept": 1, "unscored": 1, "answers": 1, "unscored_answers": 4}
    told = lines(tmp_path / "run", "prompts")
    assert [(one["pass_rate"], one["unscored"]) for one in told] == [(0.5, 1), (None, 3)]
    assert lines(tmp_path / "run", "hard") == []


async def test_another_model_or_recipe_is_refused_with_both_named(tmp_path: Path) -> None:
    fake = Fake({(name, "p1"): [RIGHT] for name in "mn"})
    rows = [row("p1", rule=DRUG)]
    async with serving(fake.behave) as url:
        await sample(made(url, tmp_path / "run", rows))
        with pytest.raises(UsageError, match="--resume"):
            made(url, tmp_path / "run", rows)
        with pytest.raises(UsageError, match='was "m" and is "n"'):
            await sample(made(url, tmp_path / "run", rows, models="n", resume=True))
        with pytest.raises(UsageError, match=r"repeats was 4 and is 5"):
            await sample(made(url, tmp_path / "run", rows, repeats=5, resume=True))


async def test_a_rubric_is_judged_and_a_malformed_verdict_is_unscored(tmp_path: Path) -> None:
    criteria = [("Advises rest", 5), ("Asks since when", 5)]
    rubrics = [{"criterion": text, "points": points, "tags": []} for text, points in criteria]
    rows = [{"prompt_id": "p1", "prompt": row("p1")["messages"], "rubrics": rubrics}]
    fake = Fake({("m", "p1"): ["Rest.", "Rest. Since when?"]})
    how: dict[str, Any] = {"kind": "healthbench", "repeats": 2}
    async with serving(fake.behave) as url:
        fake.is_malformed = True
        counts = await sample(made(url, tmp_path / "run", rows, threshold=0.9, **how))
        assert counts == {"hard": 1, "answers": 0, "unscored_answers": 1}
        [told] = lines(tmp_path / "run", "prompts")
        assert (told["pass_rate"], told["unscored"]) == (0.0, 1)
        assert lines(tmp_path / "run", "hard")[0]["rubrics"] == rubrics  # as RL needs them
        fake.is_malformed, fake.asked, fake.judged = False, [], 0
        run = made(url, tmp_path / "run", rows, threshold=0.9, resume=True, **how)
        counts = await sample(run)
        assert counts == {"kept": 1, "answers": 1, "unscored_answers": 0}
        assert (fake.asked, fake.judged) == ([], 2)  # that answer's two criteria
        run = made(url, tmp_path / "run", rows, threshold=0.5, keep=2, resume=True, **how)
        assert (await sample(run))["answers"] == 2
    kept = lines(tmp_path / "run", "kept")
    assert [(one["score"], one["pass_rate"]) for one in kept] == [(1.0, 1.0), (0.5, 1.0)]


async def test_models_vote_on_what_has_no_rule(tmp_path: Path) -> None:
    five, seven = "The answer is 5 mg.", "The answer is 7 mg."
    fake = Fake(
        {
            ("m", "q1"): ["The answer is A.", "The answer is A.", "The answer is B."],
            ("n", "q1"): ["**A. rest**"],
            ("o", "q1"): ["The answer is B."],
            **{("m", "q2"): [five], ("n", "q2"): ["Well.\nAnswer: 5mg"], ("o", "q2"): [seven]},
            **{("m", "q3"): [five], ("n", "q3"): [seven], ("o", "q3"): ["The answer is 1 g."]},
            **{("m", "q4"): [five], ("n", "q4"): [five], ("o", "q4"): ["fails"]},
            ("m", "p1"): [RIGHT],
        }
    )
    rows = [row("q1", options=OPTIONS), row("q2"), row("q3"), row("q4"), row("p1", rule=DRUG)]
    async with serving(fake.behave) as url:
        with pytest.raises(UsageError, match="two or more models"):
            await sample(made(url, tmp_path / "alone", rows, repeats=3))
        limits = {"max_failures": 9}
        run = made(url, tmp_path / "run", rows, repeats=3, models="mno", limits=limits)
        counts = await sample(run)
        assert counts == {"kept": 3, "unscored": 2, "answers": 3, "unscored_answers": 6}
        told = lines(tmp_path / "run", "prompts")
        assert [one["pass_rate"] for one in told] == [2 / 3, 1.0, None, None, 1.0]
        assert {text for model, text, _ in fake.asked if model != "m"} == {"q1", "q2", "q3", "q4"}
        fake.answers["o", "q4"], fake.asked = [five], []
        run = made(url, tmp_path / "run", rows, repeats=3, models="mno", resume=True)
        assert (await sample(run))["kept"] == 4
    assert [(model, text) for model, text, _ in fake.asked] == [("o", "q4")]


def test_a_majority_is_more_than_half_and_says_something() -> None:
    assert majority(["a", "a", "b"]) == "a"
    assert majority(["a", "b"]) == majority(["a", "a", "b", "b"]) == majority(["", "", "a"]) == ""
    own = [said("5 mg", None, rule=None), said("7 mg", None, rule=None)]
    assert [one.grade.score for one in by_consensus(own, ["5mg", "5mg"])] == [1.0, 0.0]
    assert [one.grade.score for one in by_consensus(own, ["5mg", None])] == [None, None]


def test_equal_answers_are_equal_however_they_are_written() -> None:
    texts = [
        "The answer is **5 mg**.",
        "5mg",
        "<think>7 mg?</think>\n#### 5 mg",
        "Answer: 5 mg. So.",
    ]
    assert {answer_to(said(text, None, rule=None)) for text in texts} == {"5mg"}
    assert answer_to(said("First line.\nSecond line.", None, rule=None)) == ""
    assert answer_to(said("The answer is 5 mg", None, rule=None, finish="length")) == ""
    choice = {"kind": "choice", "options": OPTIONS, "answer": "A"}
    assert [answer_to(said(t, 0.0, rule=choice)) for t in ("B", "run", "A or B")] == ["B", "B", ""]


def test_outcomes_by_hand() -> None:
    assert outcome_of([said(RIGHT, 1.0), said(WRONG, 0.0)], config())[:3] == ("kept", 0.5, 0)
    assert outcome_of([said(RIGHT, 1.0, finish="length")], config())[:2] == ("hard", 0.0)
    assert outcome_of([said(WRONG, 0.0)], config()).fate == "hard"  # one is no agreement
    assert outcome_of([said(WRONG, 0.0), said(WRONG, None)], config())[:3] == ("hard", 0.0, 1)
    assert outcome_of([said(WRONG, 0.0)] * 2, config()).fate == "defective"
    assert outcome_of([said("Hm.\nNo.", 0.0)] * 2, config()).fate == "hard"  # no answer at all
    cut = [said(WRONG, 0.0), said(WRONG, 0.0, finish="length")]
    assert outcome_of(cut, config()).fate == "hard"
    best = outcome_of([said("a", 0.8), said("b", 0.9), said("B!", 1.0)], config(threshold=0.8))
    assert [one.answer.text for one in best.kept] == ["B!"] and best.pass_rate == 1.0


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"messages": [{"role": "assistant", "content": "a"}]}, "end with the user's"),
        ({"messages": []}, "end with the user's"),
        ({"messages": [{"role": "user", "content": None}]}, "no texts"),
        ({"messages": ["a"]}, "no texts"),
        ({"rule": {"kind": "exakt"}}, "row 1: unknown kind of rule 'exakt'. Did you mean 'exact'"),
        ({"rule": "ibuprofen"}, "wrong kind"),
    ],
)
def test_prompts_that_could_not_be_decided(told: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        made("http://127.0.0.1:9/v1", tmp_path / "run", [row("p1", **told)])


def test_tests_and_likelihoods_are_no_training_data(tmp_path: Path) -> None:
    rubrics = [{"criterion": "c", "points": 1, "tags": []}]
    canary = {"prompt_id": "p", "prompt": row("p")["messages"], "rubrics": rubrics, "canary": "x:1"}
    with pytest.raises(UsageError, match="canary"):
        made("http://127.0.0.1:9/v1", tmp_path / "run", [canary], kind="healthbench")
    with pytest.raises(UsageError, match="method=generation"):
        made("http://127.0.0.1:9/v1", tmp_path / "run", [row("p")], kind="choice")
    with pytest.raises(ConfigError, match="kind"):
        made("http://127.0.0.1:9/v1", tmp_path / "run", [row("p")], kind="text")
