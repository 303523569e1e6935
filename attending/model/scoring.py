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
"""Logits [C, V], then a slice [C, ...] of each of `rows` -> a value of each token [C]."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target [C], in nats."""
    return F.cross_entropy(logits, targets, reduction="none")


def over_logits(
    hidden: Tensor, head: Tensor, measure: Measure, coefficients: Tensor, *rows: Tensor
) -> tuple[Tensor, Tensor]:
    """The sum of coefficients times values, and the values, of a function of the logits.

    Where gradients are wanted, those of `hidden` and `head` are found in the same pass, chunk by
    chunk, so neither logits nor their gradients are kept, and none are made twice.

    Args:
        hidden: [T, D].
        head: [V, D].
        measure: Of a chunk's logits and rows.
        coefficients: [T], of each value in the sum; the values' gradients, so to speak.
        rows: Each [T, ...], cut like the logits and handed to `measure`.

    Returns:
        The sum, which can be differentiated by `hidden` and `head`; the values [T], which cannot.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        return _OverLogits.apply(hidden, head, measure, coefficients, *rows)  # type: ignore[no-any-return, no-untyped-call]
    values = torch.cat(
        [
            measure(at_least_float32(F.linear(hidden[at], head)), *(row[at] for row in rows))
            for at in _chunks(hidden)
        ]
    )
    return (coefficients.to(values.dtype) * values).sum(), values


class _OverLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        hidden: Tensor,
        head: Tensor,
        measure: Measure,
        coefficients: Tensor,
        *rows: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        coefficients = coefficients.to(wide)
        values = hidden.new_empty(len(hidden), dtype=wide)
        d_hidden, d_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=wide)
        for at in _chunks(hidden):
            logits = at_least_float32(F.linear(hidden[at], head)).requires_grad_()
            with torch.enable_grad():
                found = measure(logits, *(row[at] for row in rows))
            values[at] = found.detach()
            (d_logits,) = torch.autograd.grad(found, logits, coefficients[at])
            d_logits = d_logits.to(head.dtype)
            torch.mm(d_logits, head, out=d_hidden[at])
            if head.dtype == wide:
                d_head.addmm_(d_logits.T, hidden[at])
            else:
                d_head += d_logits.T @ hidden[at]
        context.save_for_backward(d_hidden, d_head.to(head.dtype))
        context.mark_non_differentiable(values)
        return (coefficients * values).sum(), values

    @staticmethod
    def backward(context: Any, d_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = context.saved_tensors
        rows = len(context.needs_input_grad) - 2
        d_hidden, d_head = ((d_total * one).to(one.dtype) for one in (d_hidden, d_head))
        return d_hidden, d_head, *[None] * rows


def _chunks(hidden: Tensor) -> list[slice]:
    size = CHUNK if hidden.is_cuda else CPU_CHUNK
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


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
