"""The example of the module, and what is refused."""

import math
from dataclasses import replace

import pytest

from attending.errors import ConfigError, ReplyError
from attending.rl.batch import collate, passes
from attending.rl.types import Case, Sample, Verdict
from attending.verifier.rubric.schema import Criterion
from tests.rl.making import groups_of, rollout

ASK = ({"role": "user", "content": "2+2="},)


def sample(*ids: int, advantage: float = 0.5) -> Sample:
    return Sample(rollout(ids=ids, logprobs=[-one / 8 for one in ids]), 1.0, advantage)


def test_the_example() -> None:
    batch = collate([[sample(8, 2), sample(9, advantage=-0.5)]], {"case": 3})
    assert batch.ids.tolist() == [5, 6, 7, 8] and batch.groups == [[3, 1, 0]]
    assert batch.at.tolist() == [2, 3, 2] and batch.targets.tolist() == [8, 2, 9]
    assert batch.answers.tolist() == [0, 0, 1] and batch.group.tolist() == [0, 0, 0]
    assert batch.advantages.tolist() == [0.5, 0.5, -0.5] and batch.kinds.tolist() == [3, 3, 3]
    assert batch.sampler.tolist() == [-1, -0.25, -1.125] and batch.old is None
    assert batch.lengths == [3, 1, 0] and batch.cases == ["case"]


def test_the_next_group_stands_behind() -> None:
    other = replace(rollout((1,), (4, 3)), case="b")
    batch = collate([[sample(8, 2)], [Sample(other, None, 0.0)]], {"case": 0, "b": 1})
    assert batch.ids.tolist() == [5, 6, 7, 8, 1, 4] and batch.groups == [[3, 1], [1, 1]]
    assert batch.at.tolist() == [2, 3, 4, 5] and batch.group.tolist() == [0, 0, 1, 1]
    assert batch.kinds.tolist() == [0, 0, 1, 1] and batch.answers.tolist() == [0, 0, 1, 1]


def test_a_group_has_one_prompt() -> None:
    other = Sample(rollout((5, 6)), 1.0, 0.5)
    with pytest.raises(ValueError, match="case 'case' have another prompt"):
        collate([[sample(8, 2), other]], {"case": 0})


def test_passes_keep_groups_whole() -> None:
    groups = groups_of([[4, 3, 3], [4, 1], [2, 9], [1, 1]], vocab=9)  # rows 8, 4, 10, 1
    assert passes(groups, 12) == [groups[:2], groups[2:]]
    assert passes(groups, 1) == [groups[:1], groups[1:2], groups[2:3], groups[3:]]


def test_a_case_is_judged_by_one_thing() -> None:
    criteria = (Criterion("is right", 1),)
    with pytest.raises(ConfigError, match="'a' has neither"):
        Case("a", ASK, "maths")
    with pytest.raises(ConfigError, match="'a' has a rule and criteria"):
        Case("a", ASK, "maths", {"kind": "exact", "answer": "4"}, criteria)
    assert Case("a", ASK, "maths", criteria=criteria).rubric.criteria == criteria


@pytest.mark.parametrize("logprobs", [[-1.0], [-1.0, math.nan], [-math.inf, -1.0]])
def test_a_rollout_has_a_number_for_each_token(logprobs: list[float]) -> None:
    with pytest.raises(ReplyError, match="rollout of case 'case'"):
        rollout(ids=(8, 2), logprobs=logprobs)


def test_a_rollout_is_not_empty() -> None:
    with pytest.raises(ReplyError, match="0 sampled ids"):
        rollout(ids=())


@pytest.mark.parametrize("score", [-0.1, 1.1, math.nan])
def test_a_score_lies_in_its_interval(score: float) -> None:
    with pytest.raises(ValueError, match="expected 0 to 1"):
        Verdict(score)
