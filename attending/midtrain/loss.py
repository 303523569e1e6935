"""Baichuan-M2's loss of mid-training, equation 1: its kind is the document's.

Knowledge: cross entropy of every token. Reasoning: cross entropy of the notes between the text.
General and maths: the divergence from the model as it began, and no cross entropy, so that these
texts show where to stay and not what to say. The paper prints KL(model || teacher); it gives no
weights, no temperature, and does not say what its mask covers ("notes" is our reading).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the field's name for it)

from attending.midtrain.recipe import PartConfig
from attending.model.attend import Packed
from attending.model.decoder import Decoder, at_least_float32
from attending.model.scoring import cross_entropy, over_logits
from attending.train.parallel import attend_to, is_compiled, total
from attending.train.reader import Batch

Divergence = Callable[[Tensor, Tensor], Tensor]


def reverse_kl(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(model || teacher) in nats, [C]: of logits [C, V] from the teacher's."""
    log_p, log_q = logits.log_softmax(-1), teacher.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def forward_kl(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || model) in nats, [C]: of logits [C, V] from the teacher's."""
    return reverse_kl(teacher, logits)


DIVERGENCES: dict[Literal["reverse", "forward"], Divergence] = {
    "reverse": reverse_kl,
    "forward": forward_kl,
}


def weigh(batch: Batch, parts: Sequence[PartConfig]) -> Batch:
    """With each token's weight by its part: all of a text count, or only its notes."""
    masked = torch.tensor([part.loss == "masked_cross_entropy" for part in parts])
    weights = torch.tensor([part.weight for part in parts])
    kinds = batch.kinds.cpu()
    kept = torch.where(masked[kinds].to(batch.weights.device), batch.weights, 1.0)
    return replace(batch, weights=kept * weights[kinds].to(batch.weights.device))


@dataclass(frozen=True, slots=True)
class MixedLoss:
    """`train.step.Loss` by part; numbers of kinds are places in the recipe's parts."""

    constrained: Tensor
    """[parts] bool: which are compared with the teacher."""
    teacher: Decoder | None
    divergence: Divergence

    def __call__(self, decoder: Decoder, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
        """Cross entropy or divergence of every target, weighed and scaled."""
        device = batch.ids.device
        attend = attend_to(batch.lengths, device, is_compiled(decoder))
        owned = self.constrained.to(device)[batch.kinds]
        loss = partial(_by_kind, batch, batch.weights.double() * scale, owned, self.divergence)
        # All ranks or none ask the teacher: its weights may be cut among them.
        if self.teacher is None or not bool(total(owned.any().double())):
            return decoder.measure(batch.ids, attend, partial(loss, None, None))
        ids, lengths = _segments(batch, owned)

        def of(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
            # Inside the teacher's own pass, since its head is whole only there.
            with torch.enable_grad():
                reference = hidden[: int(owned.sum())]
                return decoder.measure(batch.ids, attend, partial(loss, reference, head))

        with torch.no_grad():
            return self.teacher.measure(ids, Packed(lengths, device=device), of)


def _segments(batch: Batch, owned: Tensor) -> tuple[Tensor, list[int]]:
    """The constrained segments; without any, one token, for ranks that must take part."""
    first = torch.tensor(batch.lengths).cumsum(0) - torch.tensor(batch.lengths)
    starts = owned[first.to(owned.device)].tolist()
    lengths = [n for n, is_owned in zip(batch.lengths, starts, strict=True) if is_owned]
    return (batch.ids[owned], lengths) if lengths else (batch.ids[:1], [1])


def _by_kind(
    batch: Batch,
    coefficients: Tensor,
    owned: Tensor,
    divergence: Divergence,
    reference: Tensor | None,
    teacher_head: Tensor | None,
    hidden: Tensor,
    head: Tensor,
) -> tuple[Tensor, Tensor]:
    """The two kinds' losses of hidden states [T, D], each over its own tokens, and all values."""
    if reference is None or teacher_head is None:
        return over_logits(hidden, head, cross_entropy, coefficients, batch.targets)

    def apart(logits: Tensor, states: Tensor) -> Tensor:
        return divergence(logits, at_least_float32(F.linear(states, teacher_head)))

    rest = ~owned
    near, near_values = over_logits(hidden[owned], head, apart, coefficients[owned], reference)
    told, told_values = over_logits(
        hidden[rest], head, cross_entropy, coefficients[rest], batch.targets[rest]
    )
    values = near_values.new_empty(len(hidden))
    values[owned], values[rest] = near_values, told_values
    return near + told, values
