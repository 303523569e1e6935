"""One optimizer step: gradients of all micro-batches, clip, skip or update."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from attending.model.decoder import Decoder
from attending.model.scoring import cross_entropy, over_logits
from attending.train.parallel import attend_to, is_compiled, total
from attending.train.reader import Batch

Trained = TypeVar("Trained", bound=nn.Module)
Loss = Callable[[Trained, Batch, float], tuple[Tensor, Tensor]]
"""A batch and the scale of its weights -> a loss to differentiate, and each token's value [T]."""


@dataclass(frozen=True, slots=True)
class Gradients:
    """What a step's backward passes found, before any update."""

    loss: float
    """Mean over the tokens of all ranks and micro-batches, by weight."""
    by_kind: dict[str, float]
    """The same by kind."""
    norm: float
    """Of the whole gradient, before clipping."""
    tokens: int


def next_token_loss(decoder: Decoder, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
    """Cross entropy of every target, weighed and scaled."""
    attend = attend_to(batch.lengths, batch.ids.device, is_compiled(decoder))
    coefficients = batch.weights.double() * scale

    def of(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
        return over_logits(hidden, head, cross_entropy, coefficients, batch.targets)

    return decoder.measure(batch.ids, attend, of)


def accumulate(
    decoder: Trained,
    batches: Sequence[Batch],
    loss: Loss[Trained],
    num_ranks: int,
    names: Sequence[str],
) -> Gradients:
    """Leave the gradients of the weighted mean loss over all batches and ranks in `.grad`.

    Each token counts by its weight and nothing else: not by its micro-batch, segment or rank, as
    when means of means are taken. Every rank must bring as many batches as the others, since each
    is a forward pass that all take part in.

    Args:
        decoder: Its gradients must be empty.
        batches: This rank's.
        loss: What is minimised.
        num_ranks: FSDP divides gradients by it, so the loss is multiplied.
        names: Of the kinds that batches tell apart.
    """
    kinds = len(names)
    device = batches[0].ids.device
    weight = torch.stack([batch.weights.sum(dtype=torch.float64) for batch in batches]).sum()
    whole = float(total(weight))
    sums = torch.zeros(kinds + 1, 2, dtype=torch.float64, device=device)
    for batch in batches:
        value, values = loss(decoder, batch, num_ranks / whole if whole else 0.0)
        value.backward()  # type: ignore[no-untyped-call]
        weighed = torch.stack((values * batch.weights, batch.weights), dim=1).double()
        sums[:kinds].index_add_(0, batch.kinds, weighed)
        sums[kinds] += torch.tensor([0.0, len(values)], dtype=torch.float64, device=device)
    found = total(sums).tolist()
    parameters = [p.grad for p in decoder.parameters() if p.grad is not None]
    norm = get_total_norm(parameters)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return Gradients(
        loss=sum(nats for nats, _ in found[:kinds]) / (whole or 1.0),
        by_kind={
            name: nats / count for name, (nats, count) in zip(names, found, strict=False) if count
        },
        norm=float(norm),
        tokens=int(found[kinds][1]),
    )


def clip(parameters: Iterable[torch.nn.Parameter], limit: float, norm: float) -> None:
    """Scale the gradients down so that their whole norm is at most `limit`."""
    if norm > limit:
        clip_grads_with_norm_(parameters, limit, torch.tensor(norm, dtype=torch.float64))
