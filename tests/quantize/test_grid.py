"""Rounding by hand, and what holds for every weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attending.errors import UsageError
from attending.quantize.grid import MIN_SCALE, Grid, Steps

GRIDS = st.builds(
    Grid,
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([None, 32, 64, 128]),
    symmetric=st.booleans(),
    full_range=st.booleans(),
    whole_zeros=st.booleans(),
    half=st.booleans(),
)


def drawn(seed: int, spread: float = 1.0, outputs: int = 3, inputs: int = 128) -> Tensor:
    """Heavy tails, another mean and size a row."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64) ** 3
    shift, size = torch.randn(2, outputs, 1, generator=generator, dtype=torch.float64)
    return (values + shift) * size.exp() * spread


def test_the_largest_magnitude_takes_minus_eight() -> None:
    weight = torch.tensor([[4.0, -1.0, 0.3, -3.9], [-4.0, 1.0, -0.3, 3.9]])
    found = Grid(4, None).plain(weight)
    assert found.scales.tolist() == [[-0.5], [0.5]]
    assert found.zeros.tolist() == [[8.0], [8.0]]
    # 4 / -0.5 = -8; 2; -0.6 to -1; 7.8 is past 7.
    assert found.values.tolist() == [[0, 10, 7, 15], [0, 10, 7, 15]]
    assert found.weight().tolist() == [[4.0, -1.0, 0.5, -3.5], [-4.0, 1.0, -0.5, 3.5]]


def test_without_the_full_range_scales_are_positive() -> None:
    weight = torch.tensor([[3.5, -1.0, 0.2, -3.5]])
    found = Grid(4, None, full_range=False).plain(weight)
    assert found.scales.tolist() == [[0.5]]
    assert found.values.tolist() == [[15, 6, 8, 1]]  # 7, -2, 0.4, -7
    found = Grid(8, None, full_range=False).plain(torch.tensor([[-127.0, 63.6]]))
    assert found.values.tolist() == [[1, 192]]


def test_asymmetric_by_hand() -> None:
    weight = torch.tensor([[-1.0, 6.5, 0.0, 2.2]])
    found = Grid(4, None, symmetric=False).plain(weight)
    assert found.scales.tolist() == [[0.5]] and found.zeros.tolist() == [[2.0]]
    assert found.values.tolist() == [[0, 15, 2, 6]]  # -2, 13, 0, 4.4 above the zero
    raised = Grid(4, None, symmetric=False).plain(torch.tensor([[3.0, 7.5]]))
    assert raised.zeros.tolist() == [[0.0]]  # the range takes 0 in


def test_any_zero_makes_q4_1_exact() -> None:
    levels = torch.arange(16.0).repeat(2)[None]
    weight = 0.375 * levels + 1.25  # float16 holds scale and minimum
    found = Grid(4, 32, symmetric=False, whole_zeros=False).plain(weight)
    assert torch.equal(found.values, levels.to(torch.uint8))
    assert torch.allclose(found.weight(), weight, rtol=1e-6)


def test_groups_have_their_own_scales() -> None:
    weight = torch.cat([torch.full((1, 32), 8.0), torch.full((1, 32), -0.8)], 1)
    found = Grid(4, 32, half=False).plain(weight)
    assert found.scales.tolist() == [[-1.0, pytest.approx(0.1)]]
    assert found.groups.tolist() == [0] * 32 + [1] * 32
    assert torch.allclose(found.weight(), weight)


@given(GRIDS, st.integers(0, 10_000), st.sampled_from([1e-7, 1e-3, 1.0, 30.0]))
def test_errors_are_half_a_step_within_the_range(grid: Grid, seed: int, spread: float) -> None:
    weight = drawn(seed, spread)
    found = grid.plain(weight)
    steps = found.scales[:, found.groups].abs()
    ends = [found.scales * (end - found.zeros) for end in (float(grid.bottom), float(grid.top))]
    low, high = (pick(*ends)[:, found.groups] for pick in (torch.minimum, torch.maximum))
    beyond = torch.maximum(low - weight, weight - high).clamp_min(0)
    error = (weight - found.weight()).abs()
    assert (error <= torch.maximum(steps / 2, beyond) + 1e-9 * spread).all()
    assert found.values.min() >= grid.bottom and found.values.max() <= grid.top
    assert (steps >= MIN_SCALE * 0.99).all()
    # Rounded scales and zeros cost some hundredths of a step; the full range one at its top.
    worst = 1.0 if grid.symmetric and grid.full_range else 0.5
    assert (beyond <= worst * steps + 0.1 * steps).all() or (
        not grid.symmetric and grid.whole_zeros and (beyond <= 0.6 * steps).all()
    )


@given(GRIDS, st.integers(0, 10_000))
def test_halves_are_representable_and_rounding_again_changes_nothing(grid: Grid, seed: int) -> None:
    found = grid.plain(drawn(seed))
    if grid.half:
        assert torch.equal(found.scales.half().double(), found.scales)
    again = grid.onto(found.weight(), Steps(found.scales, found.zeros))
    assert torch.equal(again.values, found.values)


@given(GRIDS, st.integers(0, 10_000), st.sampled_from([1, 2, 7, 20]))
def test_a_search_never_adds_weighted_error(grid: Grid, seed: int, search: int) -> None:
    weight = drawn(seed)
    importance = drawn(seed + 1, outputs=1)[0].square() + 0.01

    def error(search: int, counts: Tensor | None) -> Tensor:
        found = grid.plain(weight, counts, search)
        squares = (found.weight() - weight).square() * (1 if counts is None else counts)
        return squares.reshape(3, found.scales.shape[1], -1).sum(-1)

    for counts in (None, importance):
        assert (error(search, counts) <= error(0, counts) * (1 + 1e-9)).all()


def test_a_search_finds_the_clip() -> None:
    weight = torch.cat([torch.full((1, 31), 1.0), torch.tensor([[9.0]])], 1)
    counts = torch.ones(32)
    counts[-1] = 1e-6  # the outlier feeds on nothing
    plain, sought = (Grid(4, None).plain(weight, counts, search) for search in (0, 40))
    assert (plain.weight()[0, 0] - 1).abs() > 0.1 > 10 * (sought.weight()[0, 0] - 1).abs()


def test_a_group_of_zeros_stays_zero() -> None:
    for grid in (Grid(4, 32), Grid(8, None), Grid(4, 32, symmetric=False)):
        assert not grid.plain(torch.zeros(2, 64)).weight().any()


def test_a_width_that_the_group_does_not_divide() -> None:
    with pytest.raises(UsageError, match="128 do not divide 576 inputs: choose 32 or 64 or per ch"):
        Grid(4, 128).plain(torch.zeros(1, 576))


def test_half_precision_weights_are_rounded_in_float32() -> None:
    weight = drawn(0).bfloat16()
    assert torch.equal(Grid(4, 32).plain(weight).values, Grid(4, 32).plain(weight.float()).values)
