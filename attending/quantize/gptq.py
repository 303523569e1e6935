"""GPTQ: round one input column after another, and let the rest make up for each error.

Frantar 2022, arXiv 2210.17323. For a linear layer y = W x it lessens tr((W - Q) H (W - Q)^T), where
H = 2 E x x^T over calibration inputs: twice the mean squared error of y, summed over outputs.

Shapes: N outputs, K inputs, T calibration tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from attending.errors import UsageError
from attending.quantize.grid import Grid, Quantised, Steps


class Hessian:
    """H = 2 E x x^T, accumulated as inputs come."""

    def __init__(
        self,
        inputs: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """`inputs` is K; K^2 values are held, so 27,648 take 3 GB in float32."""
        self._sum = torch.zeros(inputs, inputs, dtype=dtype, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Inputs [..., K] of any leading shape."""
        rows = x.reshape(-1, x.shape[-1]).to(self._sum.dtype)
        self._sum.addmm_(rows.T, rows)
        self.tokens += len(rows)

    def matrix(self) -> Tensor:
        """[K, K]."""
        return self._sum * (2 / max(1, self.tokens))


class Solved(NamedTuple):
    """What GPTQ found."""

    quantised: Quantised
    targets: Tensor
    """[N, K]: each weight with what it had to make up for, just before it was rounded."""


def solve(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    act_order: bool = True,
    static_groups: bool = True,
    damping: float = 0.01,
    search: int = 0,
    block: int = 128,
) -> Solved:
    """Quantise [N, K].

    Inputs that were zero in every calibration token are rounded plainly; the paper's code sets
    their weights to zero, which is right for no other text.

    Args:
        weight: [N, K].
        hessian: [K, K]; its dtype is computed in.
        grid: What to round to.
        act_order: Inputs of the largest diag(H) first, while there is much left to make up.
        static_groups: Groups are neighbouring inputs, their scales those of the weights as given.
            Otherwise a group is what follows in the order of rounding, scaled when its turn comes;
            with `act_order` that is what checkpoints call `desc_act`.
        damping: Added to diag(H), as a share of its mean.
        search: Of the scales, see `Grid.steps`; squared errors count by diag(H).
        block: Columns whose updates of later ones are done at once.

    Raises:
        UsageError: H has no Cholesky factor or is not finite.
    """
    inputs, width = weight.shape[1], grid.width(weight.shape[1])
    importance = hessian.diagonal()
    order = torch.arange(inputs, device=weight.device)
    if act_order:
        order = importance.argsort(descending=True, stable=True)
    root = inverse_root(hessian[order][:, order], damping)
    # Columns lie in rows, so that each is contiguous.
    left = weight.to(hessian.dtype)[:, order].T.contiguous()
    values = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
    groups = torch.empty_like(order)
    groups[order] = order // width if static_groups else grid.groups(inputs, order.device)
    found: list[Steps] = []
    if static_groups:
        found = [grid.steps(weight.to(hessian.dtype), importance, search)]
    stride = -(-block // width) * width if width < inputs else block
    for start in range(0, inputs, stride):
        part, corner = left[start : start + stride], root[start : start + stride, start:]
        errors = torch.empty_like(part)
        for i in range(len(part)):
            at = start + i
            if not static_groups and at % width == 0:
                ahead = left[at : at + width].T
                found.append(grid.steps(ahead, importance[order[at : at + width]], search))
            steps, column = (found[0], groups[order[at]]) if static_groups else (found[-1], 0)
            scales, zeros = steps.scales[:, column], steps.zeros[:, column]
            rounded = grid.nearest(part[i], scales, zeros)
            values[at] = rounded.to(torch.uint8)
            errors[i] = (part[i] - scales * (rounded - zeros)) / corner[i, i]
            part[i + 1 :].addr_(corner[i, i + 1 : len(part)], errors[i], alpha=-1)
        left[start + len(part) :].addmm_(corner[:, len(part) :].T, errors, alpha=-1)
    back = order.argsort()
    steps = Steps(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))
    return Solved(Quantised(values[back].T.contiguous(), *steps, groups), left[back].T.contiguous())


def inverse_root(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U^T U = (H + damping mean(diag H) I)^-1; an unused input counts 1.

    One Cholesky factor from the last column up, H = R R^T, and U = R^-1: no inverse is formed.

    Raises:
        UsageError: There is none.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal += torch.where(diagonal == 0, 1.0, damping * diagonal.mean())
    lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed or not lower.isfinite().all():
        raise UsageError(
            f"the inputs' Hessian [{len(hessian)}, {len(hessian)}] has no Cholesky factor at "
            f"damping {damping:g}: raise the damping, or look for NaN in the layer's inputs."
        )
    eye = torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
    root: Tensor = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
    return root


def output_error(weight: Tensor, other: Tensor, hessian: Tensor) -> Tensor:
    """tr((W - Q) H (W - Q)^T), a scalar."""
    delta = (weight - other).to(hessian.dtype)
    error: Tensor = (delta @ hessian * delta).sum()
    return error
