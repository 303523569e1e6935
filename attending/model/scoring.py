"""From hidden states to numbers, without all logits at once: losses, bits per byte.

The logits of a batch are its largest tensor (tokens x vocabulary). Everything that touches them
goes through `over_logits`, which makes them for at most `CHUNK` tokens at a time, on a CPU for
fewer, so that they fit its cache.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the field's name for it)

from attending.model.decoder import at_least_float32

CHUNK, CPU_CHUNK = 1024, 256

Measure = Callable[..., Tensor]
"""Logits [C, V], then a slice [C, ...] of each of `rows` -> values of each token, [C] or [C, M]."""
Slopes = Callable[[Tensor, slice], Tensor]
"""Values of the tokens at a slice -> what each counts in the sum, of the same shape."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target [C], in nats."""
    return F.cross_entropy(logits, targets, reduction="none")


def over_logits(
    hidden: Tensor, head: Tensor, measure: Measure, coefficients: Tensor | Slopes, *rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum of coefficients times values, and the values, of a function of the logits.

    Where gradients are wanted, those of `hidden` and `head` are found in the same pass, chunk by
    chunk, so neither logits nor their gradients are kept, and none are made twice.

    Args:
        hidden: [T, D].
        head: [V, D].
        measure: Of a chunk's logits and rows; one value a token, or M.
        coefficients: [T] or [T, M], of each value in the sum; the values' gradients, so to speak.
            Those of a loss that is a sum over tokens may depend on their values: then a function,
            asked chunk by chunk, and the sum has the loss's gradient, but not its value.
        rows: Each [T, ...], cut like the logits and handed to `measure`.

    Returns:
        The sum, which can be differentiated by `hidden` and `head`; the values, which cannot.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        return _OverLogits.apply(hidden, head, measure, coefficients, *rows)  # type: ignore[no-any-return, no-untyped-call]
    values = measured(hidden, head, measure, *rows)
    slopes = coefficients(values, slice(None)) if callable(coefficients) else coefficients
    return (slopes.to(values.dtype) * values).sum(), values


@torch.no_grad()
def measured(hidden: Tensor, head: Tensor, measure: Measure, *rows: Tensor) -> Tensor:
    """The values alone, without gradient; see `over_logits`."""
    return torch.cat(
        [
            measure(at_least_float32(F.linear(hidden[at], head)), *(row[at] for row in rows))
            for at in _chunks(hidden)
        ]
    )


class _OverLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        hidden: Tensor,
        head: Tensor,
        measure: Measure,
        coefficients: Tensor | Slopes,
        *rows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden)
        is_learnt = context.needs_input_grad[1]  # adapters leave the head as it is
        d_head = torch.zeros_like(head, dtype=wide) if is_learnt else None
        total, values = hidden.new_zeros((), dtype=wide), []
        for at in _chunks(hidden):
            logits = at_least_float32(F.linear(hidden[at], head)).requires_grad_()
            with torch.enable_grad():
                found = measure(logits, *(row[at] for row in rows))
            values.append(found.detach())
            slopes = coefficients(values[-1], at) if callable(coefficients) else coefficients[at]
            slopes = slopes.to(wide)
            total += (slopes * values[-1]).sum()
            (d_logits,) = torch.autograd.grad(found, logits, slopes)
            d_logits = d_logits.to(head.dtype)
            torch.mm(d_logits, head, out=d_hidden[at])
            if d_head is None:
                continue
            if head.dtype == wide:
                d_head.addmm_(d_logits.T, hidden[at])
            else:
                d_head += d_logits.T @ hidden[at]
        context.save_for_backward(d_hidden, None if d_head is None else d_head.to(head.dtype))
        found = torch.cat(values)
        context.mark_non_differentiable(found)
        return total, found

    @staticmethod
    def backward(context: Any, d_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = context.saved_tensors
        rows = len(context.needs_input_grad) - 2
        d_hidden = (d_total * d_hidden).to(d_hidden.dtype)
        d_head = None if d_head is None else (d_total * d_head).to(d_head.dtype)
        return d_hidden, d_head, *[None] * rows


def _chunks(hidden: Tensor) -> list[slice]:
    size = CHUNK if hidden.is_cuda else CPU_CHUNK
    return [slice(start, start + size) for start in range(0, max(len(hidden), 1), size)]


def bits_per_byte(nats: Sequence[float], num_bytes: Sequence[int]) -> float:
    """Of documents' negative log-likelihoods and their sizes as UTF-8; compares across tokenizers.

    The end of each text is predicted, too, and counts among the bits, not among the bytes.
    """
    return float(np.sum(nats) / math.log(2) / np.sum(num_bytes))


def bits_interval(
    nats: Sequence[float], num_bytes: Sequence[int], seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of bits per byte: a bootstrap over documents."""
    bits, sizes = np.asarray(nats) / math.log(2), np.asarray(num_bytes, np.float64)
    random, found = np.random.default_rng(seed), []
    for _ in range(1000):
        at = random.integers(len(bits), size=len(bits))
        found.append(bits[at].sum() / sizes[at].sum())
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)
