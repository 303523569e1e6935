import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attending.train.schedule import (
    Norms,
    Phase,
    Rates,
    SkipRule,
    adaptive_update,
    learning_rate,
)

M1 = Rates(peak=4e-4, final=2e-5)
PHASES = [Phase(6000, "constant"), Phase(3000, "constant"), Phase(1000, "cosine")]
RULE = SkipRule()


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 4e-4 / 2000),
        (999, 2e-4),
        (1999, 4e-4),
        (2000, 4e-4),
        (8999, 4e-4),
        (9000, 4e-4),
        (9250, 2e-5 + 3.8e-4 * (1 + math.cos(math.pi / 4)) / 2),
        (9500, 2.1e-4),
        (9999, 2e-5 + 3.8e-4 * (1 + math.cos(math.pi * 0.999)) / 2),
        (10_000, 2e-5),
        (20_000, 2e-5),
    ],
)
def test_warm_up_stable_decay(step: int, rate: float) -> None:
    assert learning_rate(step, PHASES, 2000, M1) == pytest.approx(rate, rel=1e-12)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert learning_rate(0, PHASES, 0, M1) == 4e-4


def test_a_constant_phase_after_a_cosine_has_the_peak_again() -> None:
    phases = [Phase(10, "cosine"), Phase(10, "constant")]
    assert learning_rate(10, phases, 0, M1) == 4e-4


def test_a_cosine_goes_on_from_where_the_warm_up_ended() -> None:
    phases = [Phase(100, "cosine")]
    rates = [learning_rate(step, phases, 30, Rates(1.0, 0.1)) for step in range(101)]
    assert rates[29] == rates[30] == 1.0 and rates[100] == 0.1
    assert rates[65] == pytest.approx(0.55)
    assert rates[30:] == sorted(rates[30:], reverse=True)


@given(st.integers(0, 30_000))
def test_the_rate_stays_between_zero_and_the_peak(step: int) -> None:
    assert 0 < learning_rate(step, PHASES, 2000, M1) <= 4e-4


def run(values: list[float], norms: Norms = Norms(), rule: SkipRule = RULE) -> list[bool]:  # noqa: B008
    made = []
    for value in values:
        is_made, norms = adaptive_update(norms, value, rule)
        made.append(is_made)
    return made


def test_the_first_hundred_steps_are_never_skipped() -> None:
    assert run([1.0] * 99 + [50.0, 1.0]) == [True] * 101


def test_the_bound_is_by_mean_and_margin_and_belongs_to_the_update() -> None:
    full = Norms((1.0,) * 100)
    assert run([1.2 * 1.0 + 0.1], full) == [True]
    assert run([1.3000001], full) == [False]


def test_a_second_spike_in_a_row_is_taken_and_a_third_is_not() -> None:
    # By hand: the second enters the window, so the bound rises to 1.2 * (99 + 10) / 100 + 0.1.
    assert run([10.0, 10.0, 10.0, 1.0, 10.0], Norms((1.0,) * 100)) == [
        False,
        True,
        False,
        True,
        False,
    ]


def test_a_skipped_norm_is_not_remembered_and_a_made_one_pushes_the_oldest_out() -> None:
    full = Norms(tuple(float(n) for n in range(100)))
    made, after = adaptive_update(full, 1000.0, RULE)
    assert not made and after == Norms(full.window, 1)
    made, after = adaptive_update(after, 3.0, RULE)
    assert made and after == Norms((*full.window[1:], 3.0), 0)


def test_a_window_of_none_turns_the_rule_off() -> None:
    off = SkipRule(length=0)
    assert run([1.0, 1e9, 1.0, 1e9], rule=off) == [True] * 4
    assert adaptive_update(Norms(), 5.0, off) == (True, Norms())


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=60), st.integers(1, 5))
def test_never_more_skips_in_a_row_than_allowed(values: list[float], most: int) -> None:
    rule = SkipRule(length=3, max_skips=most)
    text = "".join("." if made else "s" for made in run(values, rule=rule))
    assert "s" * (most + 1) not in text
    assert text[:3] == "..."[: len(text)]
