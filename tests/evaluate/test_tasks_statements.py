"""K-QA's statements: what a judge is asked, and what its verdicts are worth."""

from pathlib import Path
from typing import Any

import pytest

from attending.evaluate.sample import Sample
from attending.verifier.judge.verdict import Verdict
from tests.evaluate.toy import graded, said, task

ROW: dict[str, Any] = {
    "Question": "What is Lexapro?",
    "Free_form_answer": "An SSRI.",
    "Must_have": ["Lexapro is an antidepressant", "Lexapro can cause headache."],
    "Nice_to_have": ["Hm", "Lexapro is taken once a day"],
}
MET, NOT, NONE = Verdict(True, "there"), Verdict(False, "absent"), Verdict(None, "silent")


def test_a_judge_is_asked_for_statements_and_their_contradictions(tmp_path: Path) -> None:
    one = task(tmp_path, "statements", ROW)
    rubric = one.rubric(one.examples[0])
    assert [(c.text, c.points, c.tags[0]) for c in rubric.criteria] == [
        ("States: Lexapro is an antidepressant.", 1, "must"),
        ("States: Lexapro can cause headache.", 1, "must"),
        ("States: Hm.", 1, "nice"),
        ("States: Lexapro is taken once a day.", 1, "nice"),
        ("States: Lexapro is not an antidepressant.", -1, "contradiction"),
        ("States: Lexapro cannot cause headache.", -1, "contradiction"),
        ("States: Lexapro is not taken once a day.", -1, "contradiction"),
    ]
    assert rubric.conversation == ({"role": "user", "content": "What is Lexapro?"},)
    assert one.examples[0].data["reference"] == "An SSRI."


def test_the_score_is_the_share_of_must_haves(tmp_path: Path) -> None:
    one = task(tmp_path, "statements", ROW)
    grade = graded(one, "An SSRI.", (MET, NOT, NOT, MET, NOT, MET, NOT))
    assert grade.score == 0.5 and grade.bounds is None and grade.reason == "1 of 2 must-haves"
    parts = {"must_have": 0.5, "nice_to_have": 0.5, "contradicted": 1 / 3}
    assert grade.parts == pytest.approx(parts)
    assert grade.verdicts[0]["met"] is True and grade.verdicts[4]["points"] == -1
    assert grade.verdicts[1]["explanation"] == "absent"


def test_a_missing_verdict_leaves_bounds_and_the_other_parts(tmp_path: Path) -> None:
    one = task(tmp_path, "statements", ROW)
    grade = graded(one, "An SSRI.", (MET, NONE, NOT, MET, NOT, NONE, NOT))
    assert grade.score is None and grade.bounds == (0.5, 1.0)
    assert grade.parts == {"nice_to_have": 0.5}


def test_nothing_said_states_nothing_and_contradicts_nothing(tmp_path: Path) -> None:
    one = task(tmp_path, "statements", ROW)
    for text in ("", " ", "<think>Lexapro is an SSRI"):
        for verdicts in ((), (MET,) * 7):
            grade = graded(one, text, verdicts)
            assert grade.score == 0.0 and set(grade.parts.values()) == {0.0}


def test_a_question_without_must_haves_is_left_out_and_counted(tmp_path: Path) -> None:
    bare = ROW | {"Must_have": [" "]}
    one = task(tmp_path, "statements", bare, ROW)
    assert [example.id for example in one.examples] == ["1"] and one.chance is None
    sample = Sample(one.examples[0], said("x"), graded(one, "x", (MET,) * 7))
    told = {"statements": 4, "with_contradiction": 3, "without_must_have": 1}
    assert one.more([sample]) == told
