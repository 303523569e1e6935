"""GPTQ against a loop that follows the paper, against every rounding there is, and against RTN."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attending.errors import UsageError
from attending.quantize.gptq import Hessian, inverse_root, output_error, solve
from attending.quantize.grid import Grid

DOUBLE = torch.float64


def problem(seed: int, outputs: int = 6, inputs: int = 64, tokens: int = 256) -> tuple[Tensor, ...]:
    """Weights and the Hessian of correlated inputs of unlike sizes; both float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    x = normal(tokens, inputs // 4) @ normal(inputs // 4, inputs) + 0.3 * normal(tokens, inputs)
    hessian = Hessian(inputs, DOUBLE)
    hessian.add(x * normal(inputs).exp())
    return normal(outputs, inputs), hessian.matrix()


def naive(weight: Tensor, hessian: Tensor, grid: Grid, order: Tensor, damping: float) -> Tensor:
    """Eq. 2 and 3 of the paper, with H^-1 shrunk anew for each column; static groups."""
    steps, groups = grid.steps(weight), grid.groups(weight.shape[1])
    eye = torch.eye(len(hessian), dtype=DOUBLE)
    inverse = torch.linalg.inv(hessian + damping * hessian.diagonal().mean() * eye)
    left, result = weight.clone(), torch.zeros_like(weight)
    for at in order.tolist():
        scales, zeros = steps.scales[:, groups[at]], steps.zeros[:, groups[at]]
        result[:, at] = scales * (grid.nearest(left[:, at], scales, zeros) - zeros)
        error = (left[:, at] - result[:, at]) / inverse[at, at]
        left -= error[:, None] * inverse[at]
        inverse = inverse - inverse[:, at, None] * inverse[at] / inverse[at, at]
        inverse[at, at] = 1.0  # gone; never used again
        inverse[at, :at] = inverse[at, at + 1 :] = inverse[:at, at] = inverse[at + 1 :, at] = 0.0
    return result


def test_hessian_is_twice_the_mean_square_in_any_pieces() -> None:
    hessian = Hessian(2)
    hessian.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    assert hessian.matrix().tolist() == [[10.0, 2.0], [2.0, 4.0]]  # 2/2 (1 + 9, 2; 2, 4)
    hessian.add(torch.zeros(2, 1, 2))
    assert hessian.matrix().tolist() == [[5.0, 1.0], [1.0, 2.0]] and hessian.tokens == 4


def test_inverse_root() -> None:
    hessian = problem(0)[1]
    hessian[3], hessian[:, 3] = 0, 0
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(64, dtype=DOUBLE)
    damped[3, 3] = 1.0
    root = inverse_root(hessian, 0.01)
    assert torch.equal(root, root.triu())
    assert torch.allclose(root.T @ root, torch.linalg.inv(damped), rtol=1e-9)


def test_two_inputs_by_hand() -> None:
    """Two inputs that always agree: what one errs, the other makes up for."""
    hessian = torch.ones(2, 2, dtype=DOUBLE)
    grid = Grid(4, None, full_range=False, half=False)
    weight = torch.tensor([[0.4, 0.3, 7.0]], dtype=DOUBLE)
    hessian = torch.block_diag(hessian, torch.ones(1, 1, dtype=DOUBLE))
    found = solve(weight, hessian, grid, damping=1e-6)  # the scale is 1
    # 0.4 to 0, an error of 0.4; 0.3 + 0.4 to 1. Plain rounding has 0 and 0, and errs by 0.7.
    assert (found.quantised.values.int() - 8).tolist() == [[0, 1, 7]]
    assert found.targets[0].tolist() == pytest.approx([0.4, 0.7, 7.0], abs=1e-5)
    assert float(output_error(weight, found.quantised.weight(), hessian)) == pytest.approx(0.09)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("block", [1, 20, 32, 128])
@pytest.mark.parametrize("group", [None, 32])
def test_blocks_and_cholesky_equal_the_papers_loop(
    act_order: bool, block: int, group: int | None
) -> None:
    for seed in range(2):
        weight, hessian = problem(seed)
        order = torch.arange(64)
        if act_order:
            order = hessian.diagonal().argsort(descending=True)
        for grid in (Grid(4, group), Grid(4, group, symmetric=False)):
            found = solve(weight, hessian, grid, act_order=act_order, block=block, damping=0.05)
            wanted = naive(weight, hessian, grid, order, 0.05)
            assert torch.allclose(found.quantised.weight(), wanted, rtol=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_a_diagonal_hessian_leaves_plain_rounding(seed: int, act_order: bool) -> None:
    weight, hessian = problem(seed)
    for grid in (Grid(4, 32), Grid(8, None), Grid(4, 64, symmetric=False)):
        found = solve(weight, hessian.diagonal().diag(), grid, act_order=act_order)
        assert torch.equal(found.quantised.values, grid.plain(weight).values)
        assert torch.equal(found.targets, weight)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static_groups", [False, True])
def test_it_errs_less_than_plain_rounding(act_order: bool, static_groups: bool) -> None:
    """No law, but so for every one of these; on average by far."""
    shares = []
    for seed in range(30):
        weight, hessian = problem(seed)
        grid = Grid(4, 32)
        options = {"act_order": act_order, "static_groups": static_groups}
        found = solve(weight, hessian, grid, **options).quantised.weight()
        plain = output_error(weight, grid.plain(weight).weight(), hessian)
        shares.append(float(output_error(weight, found, hessian) / plain))
    assert max(shares) < 1.0 and sum(shares) / 30 < 0.4


def test_it_is_near_the_best_of_all_roundings() -> None:
    """All 16^4 of each row, on its scale."""
    grid, ratios, plain = Grid(4, None, half=False), [], []
    every = torch.tensor(list(itertools.product(range(16), repeat=4)), dtype=DOUBLE)
    for seed in range(40):
        weight, hessian = problem(seed, outputs=1, inputs=4, tokens=32)
        steps = grid.steps(weight)
        delta = steps.scales * (every - steps.zeros) - weight
        best = float((delta @ hessian * delta).sum(1).min())
        found = solve(weight, hessian, grid, damping=1e-4).quantised.weight()
        ratios.append(float(output_error(weight, found, hessian)) / best)
        plain.append(float(output_error(weight, grid.plain(weight).weight(), hessian)) / best)
    assert min(plain) >= 1.0 - 1e-9 and min(ratios) >= 1.0 - 1e-9
    middle, middle_plain = (float(torch.tensor(part).median()) for part in (ratios, plain))
    assert middle < 1.5 < middle_plain, (middle, middle_plain)


def test_groups_of_the_order_of_rounding() -> None:
    weight, hessian = problem(3)
    order = hessian.diagonal().argsort(descending=True)
    found = solve(weight, hessian, Grid(4, 32), static_groups=False).quantised
    assert found.groups[order].tolist() == [0] * 32 + [1] * 32
    assert found.scales.shape == (6, 2)
    first = Grid(4, 32).steps(weight[:, order[:32]]).scales[:, 0]
    assert torch.equal(found.scales[:, 0], first)  # nothing to make up for yet
    ordered = solve(weight, hessian, Grid(4, 32), static_groups=False, act_order=False)
    assert torch.equal(ordered.quantised.groups, Grid(4, 32).groups(64))
    inside = ordered.targets[:, 32:]
    assert (
        not torch.equal(ordered.quantised.scales[:, 1], Grid(4, 32).steps(weight).scales[:, 1])
        and torch.isfinite(inside).all()
    )


def test_unused_inputs_are_rounded_plainly() -> None:
    weight, hessian = problem(4)
    hessian[:, 5:7] = hessian[5:7] = 0
    found = solve(weight, hessian, Grid(4, 32)).quantised
    assert torch.equal(found.values[:, 5:7], Grid(4, 32).plain(weight).values[:, 5:7])


def test_float32_does_as_well() -> None:
    weight, hessian = problem(5, inputs=128)
    errors = [
        output_error(weight, solve(weight, hessian.to(t), Grid()).quantised.weight(), hessian)
        for t in (torch.float32, DOUBLE)
    ]
    assert float(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.1)


def test_nan_in_the_inputs_is_an_error() -> None:
    weight, hessian = problem(6)
    hessian[0, 1] = hessian[1, 0] = torch.nan
    with pytest.raises(UsageError, match="no Cholesky factor at damping"):
        solve(weight, hessian, Grid(4, 32))
