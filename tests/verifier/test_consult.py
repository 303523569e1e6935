"""Consultations: one trace that a clinician can read, and nothing lost where something fails."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from attending.endpoint import Endpoint
from attending.errors import UsageError
from attending.verifier.consult import Trace, case_rubric, consult
from attending.verifier.judge.verdict import Verdict
from attending.verifier.patient.find import find_case
from attending.verifier.rubric.schema import Criterion, Rubric
from tests.hallway.test_endpoint import Call, asking

pytestmark = pytest.mark.anyio
SCRIPT = (
    "Where exactly does it hurt?",
    "<think>hm</think>Have you vomited?",
    "I'd like to examine your abdomen.",
    "You have acute appendicitis. <b>Go</b> to the hospital today.",
)
CASE = find_case("appendicitis")


class Scripted:
    """A judge that meets what it is told to."""

    name, caution, endpoints = "scripted", "A judge for tests.", ()

    def __init__(self, *met: bool | None) -> None:
        self.met, self.seen = met, list[tuple[Rubric, str]]()

    async def __call__(self, rubric: Rubric, answer: str) -> list[Verdict]:
        self.seen.append((rubric, answer))
        return [Verdict(met, f"why {met}") for met in self.met]


async def interview(script: tuple[str, ...] = SCRIPT, **how: Any) -> tuple[Trace, list[Call]]:
    async def behave(call: Call) -> None:
        if call.number < len(script):
            await call.answer(script[call.number])
        else:
            await call.send(400, {})

    async with asking(behave) as (server, endpoint):
        return await consult(CASE, endpoint, **how), server.calls


OWN = Rubric(
    "own",
    ({"role": "user", "content": "x"},),
    (
        Criterion("Names appendicitis.", 6),
        Criterion("Gives penicillin.", -6),
        Criterion("Is kind.", 2),
    ),
)


async def test_a_whole_consultation(tmp_path: Path) -> None:
    judge = Scripted(True, False, None)
    heard: list[str] = []
    trace, calls = await interview(
        judge=judge,
        rubric=OWN,
        heard=lambda trace: heard.append(trace.said[-1].speaker),
        temperature=0.0,
    )
    assert [said.speaker for said in trace.said] == heard == ["patient", *["doctor", "patient"] * 4]
    assert trace.said[3].text == "Have you vomited?"  # without its thoughts
    revealed = [turn.revealed for turn in trace.turns]
    assert revealed == [("pain",), ("moved",), ("nausea",), ("abdomen",), ()]
    assert trace.turns[-1].end == "diagnosis"
    first = calls[0].body["messages"]
    assert first[0]["role"] == "system" and "physician" in first[0]["content"]
    assert [message["role"] for message in calls[3].body["messages"]] == [
        "system", "user", *["assistant", "user"] * 3,
    ]  # fmt: skip
    rubric, answer = judge.seen[0]
    assert answer == SCRIPT[-1] and rubric.criteria == OWN.criteria
    assert rubric.conversation[-1]["content"].startswith("[Findings]")
    measures = trace.measures()
    told = [fact for fact in CASE.facts if fact.access.value == "tell" and fact.present]
    assert measures["elicited_share"] == 3 / len(told) and measures["turns"] == 4
    assert measures["examined_share"] == 1 / 5 and measures["privacy"] == measures["fact"] == 1.0
    assert trace.scores() == {
        "score": None, "affine_score": None, "bounds": (6 / 8, 1.0), "unscored": 1,
    }  # fmt: skip

    trace.write(tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out/trace.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["case", *["message"] * 9, *["criterion"] * 3, "result"]
    assert rows[1]["turn"]["revealed"] == ["pain"] and rows[2]["output_tokens"] == 10
    assert [row["met"] for row in rows[10:13]] == [True, False, None]
    assert rows[-1]["output_tokens"] == 40 and rows[-1]["caution"] == "A judge for tests."
    assert "no person" in rows[0]["note"]
    page = (tmp_path / "out/trace.html").read_text()
    assert "<b>Go</b>" not in page and "&lt;b&gt;Go" in page  # what a model writes stays text
    assert not re.search(r"(?:src|href)=|https?://", page)
    for words in ("Revealed: He is nauseated", "why True", "unscored", "A judge for tests.", "+6"):
        assert words in page


async def test_what_was_said_is_kept_where_the_doctor_fails(tmp_path: Path) -> None:
    trace, _ = await interview(SCRIPT[:2], judge=Scripted(True))
    assert len(trace.said) == 5 and trace.error.startswith("judge at 127.0.0.1")
    assert trace.rubric is None and trace.scores() == {}
    trace.write(tmp_path)
    assert "It broke off" in (tmp_path / "trace.html").read_text()
    result = json.loads((tmp_path / "trace.jsonl").read_text().splitlines()[-1])
    assert result["error"] == trace.error and "score" not in result


async def test_an_interruption_leaves_what_was_said(tmp_path: Path) -> None:
    def heard(trace: Trace) -> None:
        trace.write(tmp_path)
        if len(trace.said) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await interview(heard=heard)
    rows = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and rows[-1]["error"] == "it was interrupted."


async def test_a_doctor_that_never_ends_is_ended() -> None:
    trace, calls = await interview(("Any fever?",) * 9, max_turns=3)
    assert (trace.turns[-1].end, len(calls)) == ("turns", 3)
    assert trace.turns[-1].revealed == ("fever",)  # its last answer is said nevertheless


async def test_what_was_never_concluded_is_not_judged() -> None:
    judge = Scripted(True)
    trace, _ = await interview(("Any fever?",) * 9, max_turns=3, judge=judge, rubric=OWN)
    assert judge.seen == [] and trace.scores() == {} and not trace.error


async def test_a_case_without_anything_to_judge_by_is_refused_before_it_costs() -> None:
    bare = CASE.replace(diagnosis="", reference="")

    async def behave(call: Call) -> None:
        raise AssertionError("asked")

    async with asking(behave) as (server, endpoint):
        trace = await consult(bare, endpoint, judge=Scripted(True))
    assert "neither a diagnosis nor a reference" in trace.error and server.calls == []


async def test_an_empty_answer_of_the_doctor_is_an_error_of_the_trace() -> None:
    for said in ("<think>only thoughts</think>", "<think>You have appendicitis. I should"):
        trace, _ = await interview((said,), judge=Scripted(True), rubric=OWN)
        assert "only thoughts" in trace.error and trace.scores() == {}


async def test_one_model_as_doctor_and_patient_is_refused() -> None:
    doctor = Endpoint("http://127.0.0.1:9", "same")
    with pytest.raises(UsageError, match="would be doctor and patient"):
        await consult(CASE, doctor, fluent=Endpoint("http://127.0.0.1:9", "same"))


def test_a_cases_rubric_wants_its_reference_and_no_contradiction() -> None:
    rubric = case_rubric(CASE, ({"role": "user", "content": "x"},))
    positive = " ".join(one.text for one in rubric.criteria if one.points > 0)
    assert "acute appendicitis" in positive and "penicillin" in positive
    assert any(one.points < 0 for one in rubric.criteria)
    chinese = case_rubric(find_case("肺炎"), ({"role": "user", "content": "x"},))
    assert "社区获得性肺炎" in chinese.criteria[0].text
