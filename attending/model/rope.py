"""RoPE's frequencies (Su et al. 2021) and how longer contexts stretch them; for every runner.

Float32 throughout, since that is what models were trained with.
"""

import math

import numpy as np
from numpy.typing import NDArray

from attending.model.architecture import Rope

Frequencies = NDArray[np.float32]


def inverse_frequencies(rope: Rope, head_dim: int) -> Frequencies:
    """Radians a token [H/2]."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # The power in float64: numpy's own in float32 may be off by more than the rounding.
    power = (float(np.float32(rope.theta)) ** exponents.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / power
    if rope.kind == "linear":
        return plain / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope, head_dim)
    return plain


def _llama3(plain: Frequencies, rope: Rope) -> Frequencies:
    """Llama 3.1: long waves slowed by `factor`, short ones kept, the middle blended."""
    turns = plain * np.float32(rope.original_context) / np.float32(2 * math.pi)
    width = np.float32(rope.high_freq_factor - rope.low_freq_factor)
    keep: Frequencies = np.clip(
        (turns - np.float32(rope.low_freq_factor)) / width, 0, 1, dtype=np.float32
    )
    return (1 - keep) * plain / np.float32(rope.factor) + keep * plain


def _yarn(plain: Frequencies, rope: Rope, head_dim: int) -> Frequencies:
    """YaRN (Peng et al. 2023, section 3.2): interpolate by a ramp over the dimensions."""

    def dimension(turns: float) -> float:
        ratio = rope.original_context / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.arange(head_dim // 2, dtype=np.float32)
    slow: Frequencies = np.clip(
        (ramp - np.float32(low)) / np.float32(high - low), 0, 1, dtype=np.float32
    )
    return plain / np.float32(rope.factor) * slow + plain * (1 - slow)
