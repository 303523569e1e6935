"""Intervals: by hand, over conversations, in pairs, beside chance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attending.evaluate.intervals import beside_chance, bootstrap, clipped, paired, ratio

HOW = {"seed": 3, "resamples": 2000}


def of(values: list[float], clusters: list[int] | None = None) -> list[tuple[float, float]]:
    return [(value, 1.0) for value in values]


def test_a_share_has_wilsons_interval() -> None:
    found = bootstrap(of([1.0] * 8 + [0.0] * 2), range(10), ratio, **HOW)
    # Wilson (1927): 8 of 10 at 95 %, as textbooks have it
    assert found.interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
    none = bootstrap(of([0.0] * 20), range(20), ratio, **HOW)
    assert none.interval is not None
    assert none.low == 0.0 and none.high == pytest.approx(0.1611, abs=1e-4)


def test_one_conversation_has_no_interval() -> None:
    assert bootstrap(of([0.3, 0.5]), [7, 7], ratio, **HOW).interval is None
    assert bootstrap(of([1.0]), [7], ratio, **HOW).interval is None


def test_conversations_that_are_all_alike_have_no_interval() -> None:
    assert bootstrap(of([0.6] * 8), range(8), ratio, **HOW).interval is None


def test_repeats_of_a_conversation_do_not_narrow_the_interval() -> None:
    values = [0.1, 0.9, 0.4, 0.7, 0.2, 0.8]
    once = bootstrap(of(values), range(6), ratio, **HOW)
    often = bootstrap(of(values * 10), [*range(6)] * 10, ratio, **HOW)
    apart = bootstrap(of(values * 10), range(60), ratio, **HOW)
    assert often[:4] == pytest.approx(once[:4])
    assert apart.std < once.std / 2.5


def test_the_deviation_of_a_mean_is_the_textbooks() -> None:
    values = np.random.default_rng(0).normal(size=400).tolist()
    found = bootstrap(of(values), range(400), ratio, **HOW)
    wanted = np.std(values) / 20
    assert found.std == pytest.approx(wanted, rel=0.06)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * wanted, rel=0.08)


def test_only_means_are_clipped() -> None:
    found = bootstrap(of([-3.0, 1.0, 1.0]), range(3), clipped, **HOW)
    assert (found.value, found.low, found.high) == (0.0, 0.0, 1.0)


def test_a_weighted_mean_is_that_of_all_weight() -> None:
    found = bootstrap([(2.0 * 10, 10.0), (1.0 * 30, 30.0)], [0, 1], ratio, **HOW)
    assert found.value == 50 / 40


@given(st.lists(st.floats(-2, 1), min_size=1, max_size=8), st.integers(0, 9))
def test_a_seed_gives_the_same_interval(values: list[float], seed: int) -> None:
    made = [bootstrap(of(values), range(len(values)), ratio, seed=seed, resamples=50)] * 2
    again = bootstrap(of(values), range(len(values)), ratio, seed=seed, resamples=50)
    assert made[0] == again


def test_pairs_see_a_difference_that_two_intervals_hide() -> None:
    rng = np.random.default_rng(1)
    base = rng.normal(size=200)
    a = {str(i): [(float(v), 1.0)] for i, v in enumerate(base)}
    b = {str(i): [(float(v) + 0.05, 1.0)] for i, v in enumerate(base)}
    found = paired(a, b, ratio, **HOW)
    assert found is not None
    assert found.value == pytest.approx(0.05) and found.low > 0.04  # the same conversations
    alone = [bootstrap([v for [v] in own.values()], own, ratio, **HOW) for own in (a, b)]
    assert alone[0].high > alone[1].low


def test_pairs_are_of_what_both_have() -> None:
    a = {"x": [(1.0, 1.0), (0.0, 1.0)], "y": [(0.0, 1.0)], "only a": [(9.0, 1.0)]}
    b = {"x": [(1.0, 1.0)], "y": [(0.5, 1.0)], "only b": [(9.0, 1.0)]}
    found = paired(a, b, ratio, **HOW)
    assert found is not None
    assert found.value == pytest.approx(1.5 / 2 - 1 / 3) and found.n == 2  # as the rows show it
    assert paired({"x": [(1.0, 1.0)]}, {"y": [(1.0, 1.0)]}, ratio, **HOW) is None


def test_few_that_all_fail_are_no_certainty() -> None:
    found = bootstrap(of([0.0] * 4), [0, 0, 1, 1], ratio, **HOW)
    assert found.high > 0.5 and beside_chance(found, 0.25) == "at chance"


def test_differences_of_shares_keep_their_sign() -> None:
    a = {str(i): [(0.0, 1.0)] for i in range(30)}
    b = {str(i): [(float(i < 15), 1.0)] for i in range(30)}
    found = paired(a, b, ratio, **HOW)
    back = paired(b, a, ratio, **HOW)
    assert found is not None and back is not None
    assert found.value == 0.5 and back.value == -0.5
    assert found.low > 0.2 and back.high < -0.2


def test_two_of_two_right_are_no_proof() -> None:
    assert beside_chance(bootstrap(of([1.0] * 2), range(2), ratio, **HOW), 0.25) == "at chance"
    assert beside_chance(bootstrap(of([1.0] * 3), range(3), ratio, **HOW), 0.25) == "above chance"
    assert beside_chance(bootstrap(of([0.0] * 9), range(9), ratio, **HOW), 0.25) == "at chance"


@pytest.mark.parametrize(
    ("right", "says"), [(25, "at chance"), (40, "above chance"), (10, "below chance")]
)
def test_beside_chance(right: int, says: str) -> None:
    found = bootstrap(of([1.0] * right + [0.0] * (100 - right)), range(100), ratio, **HOW)
    assert beside_chance(found, 0.25) == says
    assert beside_chance(found, None) == ""
