"""EAGLE-3's training-time test: the head is trained on its own states, several steps deep.

Of a segment, row t has read token t, and its target is token t + 1. Slot t of step i puts target
t + i (the text's, not the head's own) beside what precedes it: the target model's features of row
t in step 0, then the head's own state of step i - 1. It is compared with the target model's
distribution of row t + 1 + i, over the tokens that the draft has, where the likeliest of all
tokens is one of them. So a slot lives as long as the text goes on; the losses of step i count
0.8^i (arXiv 2503.01840 names no weights, its code does).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attending.draft.target import Target
from attending.model.architecture import LayerSpec
from attending.model.attend import Packed
from attending.model.eagle import Eagle
from attending.model.scoring import over_logits
from attending.train.reader import Batch


class Unrolled:
    """An `attend` for several steps over the same slots, of which later ones may be fewer.

    In step i a slot sees what one that drafts alone would: the keys of step 0 up to its own slot,
    and its own of the steps 1 to i.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """`lengths`: slots of each segment in step 0."""
        self._lengths = list(lengths)
        self._base = Packed(lengths, device=device)
        self._slots = torch.arange(sum(lengths), device=device)
        self._step, self._keys = 0, list[tuple[Tensor, Tensor]]()
        self.positions = self._base.positions

    def follow(self, slots: Tensor) -> None:
        """Begin the next step, with these of the whole row's slots, ascending."""
        kept = torch.searchsorted(self._slots, slots)
        self._keys[1:] = [(k[kept], v[kept]) for k, v in self._keys[1:]]
        self._slots, self._step = slots, self._step + 1
        self.positions = self._base.positions[slots] + self._step

    def previous(self, spec: LayerSpec, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """A draft's layer has no convolution."""
        raise NotImplementedError

    def __call__(self, spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [S, N, H], k and v [S, K, H] -> [S, N, H]."""
        self._keys.append((k, v))
        if self._step == 0:
            return self._base(spec, q, k, v)
        first_k, first_v = self._keys[0]
        q = (
            q.reshape(len(q), spec.num_kv_heads, -1, spec.head_dim) * spec.head_dim**-0.5
        )  # [S, K, G, H]
        own_k, own_v = (torch.stack(one, 2) for one in zip(*self._keys[1:], strict=True))
        own = torch.einsum("skgh,skjh->skgj", q, own_k)
        ends = torch.tensor(self._lengths, device=q.device).cumsum(0)
        cuts = torch.searchsorted(self._slots, ends[:-1]).tolist()
        out, start = [], 0
        parts = (torch.tensor_split(one, cuts) for one in (self._slots, q, own, own_v))
        for length, (slots, asked, mine, values) in zip(
            self._lengths, zip(*parts, strict=True), strict=True
        ):
            before = slice(start, start + length)
            scores = torch.einsum("skgh,tkh->skgt", asked, first_k[before])
            late = self._slots.new_tensor(range(start, start + length)) > slots[:, None]
            scores = scores.masked_fill(late[:, None, None], -torch.inf)
            shares = torch.cat((scores, mine), dim=-1).softmax(-1)
            there, here = shares[..., :length], shares[..., length:]
            mixed = torch.einsum("skgt,tkh->skgh", there, first_v[before])
            out.append(mixed + torch.einsum("skgj,skjh->skgh", here, values))
            start += length
        return torch.cat(out).flatten(1, 2)


class Read(NamedTuple):
    """What the target model made of a batch of T rows."""

    features: Tensor  # [T, 3 D]
    embedded: Tensor  # [T, D], of the batch's targets
    shares: Tensor  # [A, draft vocabulary], see `read`
    is_inside: Tensor  # [T] bool: rows that count whose likeliest token the draft has
    place: Tensor  # [T]: each such row's in `shares`


@torch.no_grad()
def read(target: Target, eagle: Eagle, batch: Batch) -> Read:
    """A look of the frozen target at a batch.

    Of the shares of its likeliest tokens those of draft words are taken, and sum to one; they are
    zeros where none of these tokens is a draft word.
    """
    wanted, look = batch.weights > 0, target.look(batch)
    words = eagle.t2d.cumsum(0) - 1  # of each token that the draft has
    is_there = eagle.t2d[look.ids]
    shares = look.shares.new_zeros(len(look.ids), len(eagle.d2t))
    shares.scatter_add_(1, words[look.ids].clamp_min(0), look.shares * is_there)
    shares /= shares.sum(-1, keepdim=True).clamp_min(1e-12)
    is_inside = wanted.clone()
    is_inside[wanted] = is_there[:, 0]
    place = wanted.cumsum(0) - 1
    own = eagle.embed_tokens if hasattr(eagle, "embed_tokens") else target.ends.model.embed_tokens
    return Read(look.features, own(batch.targets), shares, is_inside, place)


def alive(batch: Batch, steps: int) -> list[Tensor]:
    """For each step the slots that it computes: those with a weight there or later.

    Step 0 computes all, since later slots see them.
    """
    total = len(batch.ids)
    lengths = torch.tensor(batch.lengths, device=batch.ids.device)
    slots = torch.arange(total, device=batch.ids.device)
    ends = lengths.cumsum(0).repeat_interleave(lengths)
    weights, found = batch.weights, [slots]
    counts = torch.zeros(total, dtype=torch.bool, device=batch.ids.device)
    for step in reversed(range(1, steps)):
        row = slots + 1 + step
        counts = counts | ((row < ends) & (weights[row.clamp(max=total - 1)] > 0))
        found.insert(1, slots[counts])
    return found


def cross_entropy_to(logits: Tensor, shares: Tensor) -> Tensor:
    """- sum p log q in nats, [C]: of logits [C, V] from a distribution [C, V]."""
    return -(shares * logits.log_softmax(-1)).sum(-1)


@dataclass(frozen=True, slots=True)
class UnrolledLoss:
    """`train.step.Loss` of a draft."""

    target: Target
    steps: int = 7
    decay: float = 0.8

    def __call__(self, eagle: Eagle, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
        """All steps' losses, weighed and scaled; the values are summed at the row they are of."""
        seen = read(self.target, eagle, batch)
        total = 0.0 * eagle.norm.weight.sum()  # a batch of which no token counts has a gradient
        values = torch.zeros(len(batch.ids), dtype=total.dtype, device=batch.ids.device)
        for step, slots, states in unroll(eagle, batch, seen, self.steps):
            rows, at = counted(batch, slots, step, seen.is_inside)
            if not len(rows):
                continue
            factor = self.decay**step
            coefficients = batch.weights[rows].double() * (scale * factor)
            shares = seen.shares[seen.place[rows]]
            normed, head = eagle.norm(states[at]), eagle.lm_head.weight
            part, own = over_logits(normed, head, cross_entropy_to, coefficients, shares)
            total = total + part
            values.index_add_(0, rows, own * factor)
        return total, values


def unroll(eagle: Eagle, batch: Batch, seen: Read, steps: int) -> Any:
    """Of each step its number, the slots computed, and the head's states at them [S, D]."""
    attend = Unrolled(batch.lengths, batch.ids.device)
    hidden = eagle.fc(seen.features)
    before: Tensor | None = None
    for step, slots in enumerate(alive(batch, steps)):
        if before is not None:
            if not len(slots):
                return
            attend.follow(slots)
            hidden = hidden[torch.searchsorted(before, slots)]
        hidden = eagle(seen.embedded[slots + step], hidden, attend)
        yield step, slots, hidden
        before = slots


def counted(batch: Batch, slots: Tensor, step: int, is_counted: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that a step's slots are compared with and that count; the places of these slots."""
    lengths = torch.tensor(batch.lengths, device=slots.device)
    ends = lengths.cumsum(0).repeat_interleave(lengths)[slots]
    rows = slots + 1 + step
    at = torch.nonzero((rows < ends) & is_counted[rows.clamp(max=len(batch.ids) - 1)])[:, 0]
    return rows[at], at
