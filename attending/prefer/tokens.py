"""Between a decoder and a loss of sequences: token values out of hidden states, slopes back in.

A pair's loss hangs on sums over two answers, so what a token's gradient is multiplied with is known
only when all tokens have been seen; and all logits at once are too large. So the logits are made
twice, in chunks: first for their values, of which the loss is made and differentiated, then for a
straight line through them with these slopes. Its gradient is the loss's own: the chain rule.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the field's name for it)

from attending.model.decoder import at_least_float32
from attending.model.scoring import measured, over_logits
from attending.train.reader import Batch

Told = TypeVar("Told")


class Values(NamedTuple):
    """Of K targets, in nats; each [K]."""

    logprobs: Tensor
    """log pi(y_t | ...)."""
    reference: Tensor
    """The reference model's; nought without one."""
    divergences: Tensor
    """KL(pi_ref || pi) over the whole vocabulary; nought without a reference."""


class Beside(NamedTuple):
    """The reference model's hidden states [K, D] of the same tokens, and its head [V, D]."""

    hidden: Tensor
    head: Tensor


def compared(hidden: Tensor, head: Tensor, targets: Tensor, beside: Beside | None) -> Values:
    """The values of targets [K] behind hidden states [K, D], without gradient."""
    measure, rows = _measured(targets, beside)
    return Values(*measured(hidden, head, measure, *rows).unbind(-1))


def chained(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    loss: Callable[[Values], tuple[Tensor, Told]],
    beside: Beside | None = None,
) -> tuple[Tensor, Values, Told]:
    """A loss of all targets' values, differentiated through the logits chunk by chunk.

    From hidden states [K, D], the head [V, D] and targets [K]; `loss` gives what to differentiate
    and whatever else is to be known.

    Returns:
        A number with the loss's gradient by `hidden` and `head`, but not its value; the values;
        what else `loss` told.
    """
    values = compared(hidden, head, targets, beside)
    leaves = Values(*(value.detach().requires_grad_() for value in values))
    total, told = loss(leaves)
    slopes = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    # DPO and ELO have no part in the divergence: it is not made again.
    measure, rows = _measured(targets, beside if slopes[2].any() else None)
    straight, _ = over_logits(hidden, head, measure, torch.stack(slopes, -1), *rows)
    return straight, values, told


def _measured(
    targets: Tensor, beside: Beside | None
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A measure for `over_logits`, and its rows."""
    if beside is None:
        return partial(_measure, None), (targets,)
    return partial(_measure, beside.head), (targets, beside.hidden)


def _measure(their_head: Tensor | None, logits: Tensor, targets: Tensor, *theirs: Tensor) -> Tensor:
    """[C, V] and rows -> [C, 3], see `Values`."""
    logs, at = logits.log_softmax(-1), targets[:, None]
    own = logs.gather(-1, at)[:, 0]
    if their_head is None:
        return torch.stack((own, torch.zeros_like(own), torch.zeros_like(own)), -1)
    reference = at_least_float32(F.linear(theirs[0], their_head)).log_softmax(-1)
    divergences = (reference.exp() * (reference - logs)).sum(-1)
    return torch.stack((own, reference.gather(-1, at)[:, 0], divergences), -1)


def trained(batch: Batch) -> tuple[Tensor, Tensor]:
    """The places [K] of a batch's targets that count, and the segments [K] that they are in."""
    at = batch.weights.nonzero()[:, 0]
    lengths = torch.tensor(batch.lengths, device=at.device)
    return at, torch.arange(len(lengths), device=at.device).repeat_interleave(lengths)[at]


def summed(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """Sums [count] of values [K] by segment."""
    return values.new_zeros(count).index_add(0, segments, values)
