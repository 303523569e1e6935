"""Grids of integers, and rounding onto them: what every method of this room does in the end.

A weight w becomes an integer q in 0..2^bits - 1, and for each row and group of inputs there are a
scale s and a zero z: w ~ s (q - z). Formats may store q or q - 2^(bits - 1), and z or not at all.

Shapes: N outputs, K inputs, G groups of an output's inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attending.errors import UsageError

MIN_SCALE = 1e-5
"""Of |s|, as AutoRound has it; a group of zeros needs some scale, and float16 holds this one."""
SLICE_VALUES = 1 << 22  # searched at once: the temporaries take some 20 bytes each
WIDEST, NARROWEST = 1.15, 0.6  # of the plain scale, or range, when the best is searched for


class Steps(NamedTuple):
    """Scales and zeros; each [N, G], or what broadcasts with the weights."""

    scales: Tensor
    """May be negative, see `Grid.full_range`; never zero."""
    zeros: Tensor


class Quantised(NamedTuple):
    """A matrix on a grid."""

    values: Tensor
    """[N, K] uint8."""
    scales: Tensor
    """[N, G], of the dtype that was computed in; representable in float16 if the grid says so."""
    zeros: Tensor
    """[N, G], whole numbers unless the grid says otherwise."""
    groups: Tensor
    """[K] int64: each input's group."""

    def weight(self) -> Tensor:
        """Dequantise: s (q - z), [N, K]."""
        zeros, scales = self.zeros[:, self.groups], self.scales[:, self.groups]
        return scales * (self.values.to(scales.dtype) - zeros)


@dataclass(frozen=True, slots=True)
class Grid:
    """Which integers, and what shares a scale."""

    bits: int = 4
    group: int | None = 128
    """Inputs that share a scale; None: all of an output (per channel)."""
    symmetric: bool = True
    """Zero is the middle, 2^(bits - 1); otherwise the grid runs from the smallest weight to the
    largest."""
    full_range: bool = True
    """Symmetric grids only. The weight of largest magnitude takes the lowest integer, -8 in 4 bits,
    so the scale is negative where that weight is positive (llama.cpp's Q4_0, AutoRound's default).
    Otherwise scales are positive and 2^bits - 1 integers are used, -7..7: what QQQ's kernel and a
    W8A8 product take."""
    whole_zeros: bool = True
    """Asymmetric grids only: z is one of the integers, so 0 is exact. Otherwise s z is any number,
    as in Q4_1 and HQQ."""
    half: bool = True
    """Scales are rounded to float16 before anything is rounded onto them."""

    @property
    def top(self) -> int:
        """The largest integer."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero of a symmetric grid."""
        return 1 << self.bits - 1

    @property
    def bottom(self) -> int:
        """The smallest integer."""
        return int(self.symmetric and not self.full_range)

    def width(self, inputs: int) -> int:
        """Inputs of a group.

        Raises:
            UsageError: The group does not divide them.
        """
        group = self.group or inputs
        if inputs % group:
            fit = [str(size) for size in (32, 64, 128) if inputs % size == 0]
            raise UsageError(
                f"groups of {group} do not divide {inputs} inputs: choose "
                f"{' or '.join([*fit, 'per channel'])}."
            )
        return group

    def groups(self, inputs: int, device: torch.device | str = "cpu") -> Tensor:
        """[K] int64: each input's group, in order."""
        return torch.arange(inputs, device=device) // self.width(inputs)

    def between(self, low: Tensor, high: Tensor) -> Steps:
        """Of groups whose smallest and largest weights are `low` and `high`, any one shape."""
        if self.symmetric:
            peak = torch.where(high > -low, high, low)
            scales = peak / -self.middle if self.full_range else peak.abs() / (self.middle - 1)
            return Steps(self.stored(scales), torch.full_like(low, self.middle))
        if self.whole_zeros:
            low, high = low.clamp_max(0), high.clamp_min(0)
        scales = self.stored((high - low) / self.top)
        zeros = -low / scales
        return Steps(scales, zeros.round().clamp(0, self.top) if self.whole_zeros else zeros)

    def stored(self, scales: Tensor) -> Tensor:
        """Scales as the format will hold them, never zero."""
        floor = torch.full_like(scales, MIN_SCALE).copysign(scales)
        scales = torch.where(scales.abs() < MIN_SCALE, floor, scales)
        return scales.half().to(scales.dtype) if self.half else scales

    def steps(self, weight: Tensor, importance: Tensor | None = None, search: int = 0) -> Steps:
        """Scales and zeros of a matrix, each [N, G].

        Args:
            weight: [N, K].
            importance: [K], what an input's squared errors count; None: all alike.
            search: Candidates besides the plain range, which clip or stretch it (a symmetric one
                with either sign); the one of least squared error is taken. 0: the plain range.
        """
        width = self.width(weight.shape[1])
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        cut = wide.reshape(len(wide), -1, width)
        counts = None if importance is None else importance.to(wide.dtype).reshape(-1, width)
        rows = max(1, SLICE_VALUES // weight.shape[1])
        found = [self._least(part, counts, search) for part in torch.split(cut, rows)]
        return Steps(*(torch.cat(parts) for parts in zip(*found, strict=True)))

    def _least(self, cut: Tensor, importance: Tensor | None, search: int) -> Steps:
        """Of [N, G, inputs of a group]."""
        low, high = cut.amin(-1), cut.amax(-1)
        best = self.between(low, high)
        if not search:
            return best

        def error(steps: Steps) -> Tensor:
            scales, zeros = (part[..., None] for part in steps)
            squares = (self.nearest(cut, scales, zeros).sub_(zeros).mul_(scales) - cut).square_()
            return (squares if importance is None else squares * importance).sum(-1)

        least, plain = error(best), best
        for factor in self._factors(search):
            if self.symmetric:
                tried = Steps(self.stored(plain.scales * factor), plain.zeros)
            else:
                tried = self.between(low * factor, high * factor)
            found = error(tried)
            is_less = found < least
            best = Steps(*(torch.where(is_less, *pair) for pair in zip(tried, best, strict=True)))
            least = torch.minimum(least, found)
        return best

    def _factors(self, search: int) -> Sequence[float]:
        ends = (NARROWEST, WIDEST if self.symmetric else 1.0)
        if not (self.symmetric and self.full_range):
            return torch.linspace(*ends, search).tolist()
        half = torch.linspace(*ends, -(-search // 2)).tolist()
        return [*half, *(-factor for factor in half)][:search]

    def nearest(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        """The integers nearest to weights, as floats: clamp(round(w / s + z)); all broadcast."""
        return (weight / scales).add_(zeros).round_().clamp_(self.bottom, self.top)

    def plain(self, weight: Tensor, importance: Tensor | None = None, search: int = 0) -> Quantised:
        """Plain rounding (RTN) of [N, K]; see `steps` for the other arguments."""
        return self.onto(weight, self.steps(weight, importance, search))

    def onto(self, weight: Tensor, steps: Steps) -> Quantised:
        """Round [N, K] to given scales and zeros [N, G], groups in order."""
        groups = self.groups(weight.shape[1], weight.device)
        wide = weight.to(steps.scales.dtype).reshape(*steps.scales.shape, -1)
        values = self.nearest(wide, steps.scales[..., None], steps.zeros[..., None])
        return Quantised(values.to(torch.uint8).flatten(1), *steps, groups)
