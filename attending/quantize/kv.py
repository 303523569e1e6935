"""Keys, values and activations in eight bits.

Baichuan-M2 keeps its cache in FP8 E4M3 with a static scale of 1.0; it reports that calibrated
scales changed nothing of note. Shapes: K key-value heads, H head size.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from attending.model.architecture import LayerSpec
from attending.model.attend import Packed

Cache = Literal["float16", "fp8", "int8"]

E4M3_MAX = 448.0
"""The largest finite value of FP8 E4M3 (Micikevicius 2022, arXiv 2209.05433); there is no
infinity, and what a cast makes of larger values is torch's affair: they are clamped before it."""


class Eight(NamedTuple):
    """Values in eight bits; times their scales, they are the numbers."""

    values: Tensor
    """float8_e4m3fn or int8."""
    scales: Tensor
    """float32, broadcasts with the values."""

    def dequantise(self) -> Tensor:
        """In float32."""
        return self.values.float() * self.scales


def head_scales(x: Tensor, largest: float) -> Tensor:
    """Static scales [K, 1] of calibration keys or values [..., K, H]: each head's peak / largest.

    For `fp8`, `largest` is E4M3_MAX; for `int8`, 127.
    """
    peaks = x.float().abs().amax(dim=(*range(x.dim() - 2), -1))
    return peaks.clamp_min(torch.finfo(torch.float32).tiny)[:, None] / largest


def fp8(x: Tensor, scales: Tensor | float = 1.0) -> Eight:
    """E4M3 of x / scales, saturated.

    |x - dequantised| <= max(2^-4 |x|, 2^-10 scales) where |x| <= 448 scales: half a step of three
    mantissa bits, of the subnormal steps below 2^-6.
    """
    scales = torch.as_tensor(scales, dtype=torch.float32, device=x.device)
    values = (x.float() / scales).clamp(-E4M3_MAX, E4M3_MAX)
    return Eight(values.to(torch.float8_e4m3fn), scales)


def int8(x: Tensor, scales: Tensor | None = None) -> Eight:
    """Symmetric: clamp(round(x / scales), -127, 127); |x - dequantised| <= scales / 2 in range.

    Without scales, each row's (a token's head's, or a token's activations) own: its peak / 127.
    """
    if scales is None:
        peaks = x.float().abs().amax(-1, keepdim=True)
        scales = peaks.clamp_min(torch.finfo(torch.float32).tiny * 127) / 127
    return Eight((x.float() / scales).round().clamp(-127, 127).to(torch.int8), scales)


class Rounded(Packed):
    """Whole sequences whose keys and values are what a cache of eight bits gives back.

    `fp8` with the static scale 1.0; `int8` with a scale for each head of a token, as the native
    engine has it. Baichuan-M1's raw last K and V are left as they are.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        cache: Cache,
        device: torch.device | str = "cpu",
        seen: Callable[[LayerSpec, Tensor, Tensor], object] = lambda *_: None,
    ) -> None:
        """`lengths` as for `Packed`; `float16` rounds nothing; `seen` is shown keys and values."""
        super().__init__(lengths, device)
        self._seen = seen
        rounds: dict[Cache, Callable[[Tensor], Eight]] = {"fp8": fp8, "int8": int8}
        self._round = rounds.get(cache)

    def __call__(self, spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention over the rounded keys (rotated already) and values."""
        self._seen(spec, k, v)
        if self._round:
            k, v = (self._round(x).dequantise().to(x.dtype) for x in (k, v))
        return super().__call__(spec, q, k, v)


def cache_scheme(cache: Cache) -> dict[str, Any] | None:
    """As compressed-tensors writes FP8's; None for others, which vLLM refuses to read there."""
    if cache != "fp8":
        return None
    kind = {"num_bits": 8, "type": "float", "symmetric": True}
    return kind | {"strategy": "tensor", "dynamic": False}


def cache_scales(cache: Cache, layers: int) -> dict[str, Tensor]:
    """FP8's static scales of 1.0 as compressed-tensors stores them: it makes up absent ones."""
    names = [f"model.layers.{i}.self_attn.{side}_scale" for i in range(layers) for side in "kv"]
    return {name: torch.ones(1) for name in names} if cache == "fp8" else {}
