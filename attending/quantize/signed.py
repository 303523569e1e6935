"""Rounding learned by signed gradients: AutoRound (Cheng 2023, arXiv 2309.05516).

Of all linear layers of a block at once, what is rounded becomes W / s + V with V in [-0.5, 0.5],
and the range that decides s is multiplied by alpha (its lower end) and beta (its upper end). All
follow the sign of the gradient of the block's squared output error, straight through the rounding.

Differs from AutoRound, which keeps the best step by its own minibatch: that one, the last and the
start are compared on the same samples, `compared` of them, so that what comes out is never worse
there than the start. A symmetric grid has one multiplier, that of its scale, whose sign stays.
Rounding may start elsewhere, e.g. from what GPTQ left to round.

Shapes: S samples of T tokens, D hidden size; N, K, G as in `grid`.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from attending.config import Config
from attending.errors import UsageError
from attending.quantize.grid import Grid, Quantised, Steps

Forward = Callable[[Tensor], Tensor]


class SignedRounding(Config):
    """How long and how fast to learn."""

    steps: int = Field(200, ge=1)
    """Of signed descent a block; each costs a forward and a backward of `batch` samples."""
    batch: int = Field(8, ge=1)
    """Samples a step."""
    compared: int = Field(32, ge=1)
    """Samples, evenly among all, by which what is kept is chosen; at most all."""
    rate: float | None = Field(None, gt=0)
    """First step's size, in steps of the grid and of the multipliers; falls linearly to 0. None:
    1 / `steps`, so that half a step of the grid is just within reach."""
    range_rate: float | None = Field(None, ge=0)
    """The same for the multipliers alone; None: as `rate`. 0 keeps the ranges, which is what a
    start from GPTQ needs: its integers fit its scales."""


class Start(NamedTuple):
    """Where a layer's rounding starts."""

    weight: Tensor
    """[N, K], to be rounded."""
    steps: Steps
    """Each [N, G], groups in order."""


class Fitted(NamedTuple):
    """Of one block."""

    layers: dict[str, Quantised]
    before: float
    """Mean squared error of the block's output at the start, over the samples compared."""
    after: float
    """Of what is returned; at most `before`."""


def fit(
    block: nn.Module,
    forward: Forward,
    inputs: Tensor,
    targets: Tensor,
    layers: Sequence[str],
    grid: Grid,
    config: SignedRounding,
    *,
    seed: int = 0,
    starts: Mapping[str, Start] | None = None,
    search: int = 0,
    progress: Callable[[int, float], object] | None = None,
) -> Fitted:
    """Quantise some linear layers of a block; the block itself is left as it is.

    Args:
        block: Any module.
        forward: Calls it: [batch, T, D] -> what is compared with the targets.
        inputs: [S, T, D], from the blocks before, quantised or not.
        targets: [S, T, D], the block's outputs in full precision.
        layers: Names of linear modules within it.
        grid: What to round to.
        config: See there.
        seed: Of the order of samples; the same seed gives the same bits on the same machine.
        starts: By layer; otherwise its weight as it is and the scales of `Grid.steps`.
        search: Of those scales, see there.
        progress: Called with the step and its minibatch's mean squared error.

    Raises:
        UsageError: No layers are named, or an output is not finite.
    """
    roundings = _roundings(block, layers, grid, starts or {}, search)
    rate = config.rate or 1 / config.steps
    range_rate = rate if config.range_rate is None else config.range_rate
    rates = [(item.offset, rate) for item in roundings.values()]
    if range_rate:
        rates += [(part, range_rate) for item in roundings.values() for part in item.multipliers]
    called = Called(block, forward)

    def errors(weights: Mapping[str, Tensor], samples: Tensor) -> Tensor:
        """Of each sample, [len(samples)]."""
        lent = {f"block.{name}.weight": weight for name, weight in weights.items()}
        found: Tensor = functional_call(called, lent, (inputs[samples],))
        return (found - targets[samples]).square().flatten(1).mean(1)

    chosen = torch.linspace(0, len(inputs) - 1, min(config.compared, len(inputs))).round().long()

    @torch.no_grad()
    def compared(layers: Mapping[str, Quantised]) -> float:
        weights = {name: part.weight().to(inputs.dtype) for name, part in layers.items()}
        found = [errors(weights, samples) for samples in torch.split(chosen, config.batch)]
        return float(torch.cat(found).mean())

    def rounded() -> dict[str, Quantised]:
        return {name: item.quantised() for name, item in roundings.items()}

    candidates, least = [rounded()] * 2, math.inf
    before = compared(candidates[0])
    if not math.isfinite(before):
        raise UsageError("the block's output is not finite: look for NaN in its weights or inputs.")
    order = batches(len(inputs), config.batch, seed)
    for step in range(config.steps):
        samples = next(order)
        loss = errors({name: item.weight() for name, item in roundings.items()}, samples).sum()
        error = loss.item() / len(samples)
        if error < least:
            least, candidates[1] = error, rounded()
        gradients = torch.autograd.grad(loss, [part for part, _ in rates])
        with torch.no_grad():
            for (part, size), gradient in zip(rates, gradients, strict=True):
                part.sub_(gradient.sign_(), alpha=size * (1 - step / config.steps))
            for item in roundings.values():
                item.offset.clamp_(-0.5, 0.5)
        if progress is not None:
            progress(step + 1, error)
    candidates.append(rounded())
    means = [before, *map(compared, candidates[1:])]
    best = min(range(3), key=lambda i: means[i] if math.isfinite(means[i]) else math.inf)
    return Fitted(candidates[best], before, means[best])


class Called(nn.Module):
    """So that `functional_call` lends the block its weights while the caller's function runs."""

    def __init__(self, block: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.block = block
        self._run = functools.partial(forward)  # bare, a module would be registered twice

    def forward(self, x: Tensor) -> Tensor:
        """As the caller's."""
        return self._run(x)


class _Rounding:
    """One layer's V, alpha and beta, and the weight that they make."""

    def __init__(self, start: Start, grid: Grid) -> None:
        self._grid, self._dtype = grid, start.weight.dtype
        scales, zeros = start.steps
        self._cut = start.weight.to(scales.dtype).reshape(*scales.shape, -1)
        self._start = Steps(scales[..., None], zeros[..., None])
        self.offset = torch.zeros_like(self._cut, requires_grad=True)
        ends = 1 if grid.symmetric else 2
        self.multipliers = [
            torch.ones_like(self._start.scales, requires_grad=True) for _ in range(ends)
        ]

    def weight(self) -> Tensor:
        """[N, K], dequantised; gradients go straight through."""
        values, scales, zeros = self._parts()
        return ((values - zeros) * scales).flatten(1).to(self._dtype)

    @torch.no_grad()
    def quantised(self) -> Quantised:
        values, scales, zeros = self._parts()
        groups = self._grid.groups(values[0].numel(), values.device)
        values = values.flatten(1).to(torch.uint8)
        return Quantised(values, scales[..., 0], zeros[..., 0], groups)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Integers [N, G, K / G]; scales and zeros [N, G, 1]."""
        grid, (scales, zeros) = self._grid, self._start
        if grid.symmetric:
            scales = _through(grid.stored, scales * self.multipliers[0])
        else:
            alpha, beta = self.multipliers
            low, high = -scales * zeros * alpha, scales * (grid.top - zeros) * beta
            scales = _through(grid.stored, (high - low) / grid.top)
            zeros = -low / scales
            zeros = _through(torch.round, zeros) if grid.whole_zeros else zeros
        position = self._cut / scales + self.offset + zeros
        return _through(torch.round, position).clamp(grid.bottom, grid.top), scales, zeros


def _through(rounding: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Rounded, with the gradient of x itself (straight through: Bengio 2013, arXiv 1308.3432)."""
    exact = x.detach()
    return x + (rounding(exact) - exact) if x.requires_grad else rounding(x)


def _roundings(
    block: nn.Module,
    layers: Sequence[str],
    grid: Grid,
    starts: Mapping[str, Start],
    search: int,
) -> dict[str, _Rounding]:
    if not layers:
        raise UsageError("no layers to quantise: the names matched none of the block's modules.")
    found = {}
    for name in layers:
        weight = block.get_submodule(name).weight
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise UsageError(f"{name} has no matrix: name linear layers only.")
        start = starts.get(name)
        if start is None:
            start = Start(weight.detach(), grid.steps(weight.detach(), None, search))
        found[name] = _Rounding(start, grid)
    return found


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Samples without end, each as often as any other; a pass's last batch may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.split(torch.randperm(count, generator=generator), size)
