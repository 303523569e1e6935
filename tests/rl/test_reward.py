"""Verdicts to rewards, by hand."""

import pytest

from attending.errors import ConfigError
from attending.rl.reward import answer_length, by_rubric, by_rule, combine, length_rewards
from attending.rl.types import Case, Verdict
from attending.verifier.rubric.schema import Criterion
from attending.verifier.rules import check

ASK = ({"role": "user", "content": "I have a cough"},)
CRITERIA = (
    Criterion("asks how long", 6, ("axis:context_awareness",)),
    Criterion("names a red flag", 4, ("axis:accuracy",)),
    Criterion("invents a finding", -10, ("axis:accuracy", "level:example")),
)
NEGATIVE = (Criterion("invents a finding", -6), Criterion("is rude", -2))


def case(criteria: tuple[Criterion, ...]) -> Case:
    return Case("cough", ASK, "consultation", criteria=criteria)


def test_the_length_reward_by_hand() -> None:
    # sorted 0, 0.5, 0.5, 0.8, 1: place 0.2 * 4 = 0.8 lies at 0 + 0.8 * 0.5 = 0.4
    scores, lengths = [0.5, 1.0, 0.0, 0.8, 0.5], [16, 100, 4, 64, 1600]
    assert length_rewards(scores, lengths, threshold=0.3) == [1.0, 0.4, 0.0, 0.5, 0.1]
    assert length_rewards(scores, lengths, threshold=0.4) == [0.0] * 5  # must be above it


def test_published_magnitudes() -> None:
    found = [length_rewards([1.0], [n], 0.5)[0] for n in (1000, 3200, 4000, 6000)]
    assert found == pytest.approx([0.126, 0.071, 0.063, 0.052], abs=5e-4)


def test_the_quantile_itself_is_rewarded() -> None:
    # place 0.2 * 5 = 1 is the second smallest
    assert length_rewards([0.1, 0.6, 0.7, 0.7, 0.7, 0.7], [4] * 6, 0.5) == [0.0, *[2.0] * 5]


def test_unscored_and_empty_answers_get_no_length_reward() -> None:
    assert length_rewards([None, 0.9, 0.8], [4, 0, 4], 0.5) == [0.0, 0.0, 0.0]  # 0.82 is the least
    assert length_rewards([None, 0.8, 0.8], [4, 0, 4], 0.5) == [0.0, 0.0, 2.0]
    assert length_rewards([None, None], [4, 4], -1.0) == [0.0, 0.0]


def test_combined_by_hand() -> None:
    verdicts = [Verdict(0.9), Verdict(None, "timeout"), Verdict(0.6)]
    # 0.6 + 0.2 * 0.3 = 0.66 is the least
    assert combine(verdicts, [16, 4, 4], 0.5, 4.0) == [1.9, None, 0.6]
    assert combine(verdicts, [16, 4, 4], 0.5, 0.4) == pytest.approx([1.0, None, 0.6])
    assert combine(verdicts, [16, 4, 4], None, 4.0) == [0.9, None, 0.6]


def test_lengths_with_and_without_thinking() -> None:
    ids, close = [7, 8, 9, 8, 9, 5, 6], (8, 9)
    assert answer_length(ids, close, count_thinking=True) == 7
    assert answer_length(ids, close, count_thinking=False) == 2
    assert answer_length(ids[:5], close, count_thinking=False) == 0  # nothing behind it
    assert answer_length([7, 8], close, count_thinking=False) == 2  # it does not end
    assert answer_length(ids, (), count_thinking=False) == 7  # the model does not think


def test_rubrics_by_hand() -> None:
    met = (True, False, True)
    # affine (6 - 10 + 10) / 20; accuracy alone (0 - 10 + 10) / 14; clipped -4 / 10
    found = by_rubric(case(CRITERIA), met)
    assert found.score == pytest.approx(0.3)
    assert found.parts == {"axis:context_awareness": 1.0, "axis:accuracy": 0.0}
    assert by_rubric(case(CRITERIA), met, "clipped").score == 0.0
    assert by_rubric(case(CRITERIA), (True, False, False), "clipped").score == pytest.approx(0.6)
    assert by_rubric(case(CRITERIA), (True, True, False), "affine").score == 1.0


def test_only_negative_points_by_hand() -> None:
    # (-6 + 8) / 8 with the first one met
    assert by_rubric(case(NEGATIVE), (True, False)).score == 0.25
    assert by_rubric(case(NEGATIVE), (False, False)).score == 1.0
    with pytest.raises(ConfigError, match=r"case 'cough': none of its 2 criteria .* \"affine\""):
        by_rubric(case(NEGATIVE), (True, False), "clipped")


@pytest.mark.parametrize("form", ["affine", "clipped"])
def test_a_missing_judgement_is_unscored_not_nought(form: str) -> None:
    found = by_rubric(case(CRITERIA), (True, None, None), form)
    assert found.score is None and found.reason == "2 of 3 criteria are unscored"


def test_rules_are_named_by_their_kind() -> None:
    rule = {"kind": "exact", "answer": "yes"}
    assert by_rule("exact", check(rule, "yes")).parts == {"exact": 1.0}
    assert by_rule("exact", check(rule, "no")).score == 0.0
