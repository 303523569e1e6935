"""Rewards to advantages, by hand and by property."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attending.errors import TrainingError
from attending.rl.advantage import (
    METHODS,
    Method,
    advantages,
    group_mean,
    group_std,
    spar,
    step_factor,
)

# Steps of 1/16, so that sums are exact and equal rewards stay equal when all are shifted.
worths = st.one_of(st.none(), st.integers(0, 32).map(lambda n: n / 16))
drawn = st.lists(st.tuples(st.sampled_from("abc"), worths), min_size=1, max_size=12)


def test_two_groups_of_three_by_hand() -> None:
    cases, rewards = ["a", "b", "a", "b", "a", "b"], [1.0, 0.5, 0.0, 0.5, 0.5, 2.0]
    found = advantages(cases, rewards)
    # a: 1, 0, 0.5 about 0.5; b: 0.5, 0.5, 2 about 1
    assert found.values.tolist() == [0.5, -0.5, -0.5, -0.5, 0.0, 1.0]
    assert found[1:] == (2, 0, 0, 0) and found.zero_share == 0


def test_grpo_divides_by_the_samples_deviation() -> None:
    found = advantages("aaa", [1.0, 0.0, 0.5], group_std)  # deviation 0.5
    assert found.values.tolist() == pytest.approx([0.5 / 0.5001, -0.5 / 0.5001, 0.0])


def test_spar_by_hand() -> None:
    # raw mean 0.5 and deviation 0.5, whatever the factors; 0.1 * 1 - 0.5, 0 - 0.5, 0.9 * 0.5 - 0.5
    found = advantages("aaa", [1.0, 0.0, 0.5], spar, np.array([0.1, 1.0, 0.9]))
    assert found.values.tolist() == pytest.approx([-0.4 / 0.5001, -0.5 / 0.5001, -0.05 / 0.5001])


def test_spar_of_several_steps_by_hand() -> None:
    factors = np.array([[1.0, 0.1], [1.0, 1.0]])
    found = advantages("aa", [1.0, 0.0], spar, factors)  # mean 0.5, deviation sqrt(0.5)
    scale = math.sqrt(0.5) + 1e-4
    assert found.values == pytest.approx(np.array([[0.5, -0.4], [-0.5, -0.5]]) / scale)


def test_a_steps_factor_is_its_worst_violations() -> None:
    assert step_factor([]) == 1.0 and step_factor([0.9, 0.1, 0.9]) == 0.1


@pytest.mark.parametrize("name", METHODS)
def test_lone_and_flat_groups_are_nought_and_counted(name: str) -> None:
    cases, rewards = [*"abbccdd"], [1.0, 0.3, 0.1 + 0.2, None, 0.7, None, None]
    factors = np.full(7, 0.5)
    found = advantages(cases, rewards, METHODS[name], factors)
    assert not found.values.any()
    # a alone, c with one scored, d with none; b flat up to a rounding error
    assert found[1:] == (4, 3, 1, 3) and found.zero_share == 1


def test_unscored_ones_are_neutral() -> None:
    found = advantages("aaa", [1.0, None, 0.5])
    assert found.values.tolist() == [0.25, 0.0, -0.25] and found.num_unscored == 1


@pytest.mark.parametrize("worth", [math.nan, math.inf, -math.inf])
def test_no_number_is_an_error_that_names_the_case(worth: float) -> None:
    with pytest.raises(TrainingError, match=f"'chest pain' is {worth}"):
        advantages(["fever", "chest pain"], [1.0, worth])


@pytest.mark.parametrize("method", METHODS.values())
@given(rows=drawn)
def test_a_groups_advantages_sum_to_nought(
    method: Method, rows: list[tuple[str, float | None]]
) -> None:
    cases, rewards = zip(*rows, strict=True)
    found = advantages(cases, rewards, method).values
    for case in cases:
        assert sum(found[[one == case for one in cases]]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("method", METHODS.values())
@given(rows=drawn, shift=st.integers(1, 40).map(lambda n: n / 8))
def test_shifted_rewards_have_the_same_advantages(
    method: Method, rows: list[tuple[str, float | None]], shift: float
) -> None:
    cases, rewards = zip(*rows, strict=True)
    moved = [None if one is None else one + shift for one in rewards]
    found, wanted = (advantages(cases, told, method).values for told in (moved, rewards))
    assert found == pytest.approx(wanted, abs=1e-9)


@given(rows=drawn, data=st.data())
def test_the_order_of_answers_does_not_matter(
    rows: list[tuple[str, float | None]], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    cases, rewards = zip(*rows, strict=True)
    found = advantages([cases[i] for i in order], [rewards[i] for i in order], group_mean)
    assert found.values == pytest.approx(advantages(cases, rewards).values[order], abs=1e-12)
