"""Watching a model while it trains: bits per byte of held-out documents, and samples."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attending.chat import Tokenizer
from attending.mesh import World
from attending.model.attend import Packed
from attending.model.decoder import Decoder
from attending.model.scoring import cross_entropy, over_logits
from attending.shards import Shards
from attending.train.parallel import total, uncompiled
from attending.train.reader import Piece, by_domain, gather, whole


class DocumentScore(NamedTuple):
    """A held-out document's negative log-likelihood, over its targets, and its sizes."""

    nats: float
    num_bytes: int
    """Of all of its text as UTF-8."""
    num_targets: int


class Heldout(NamedTuple):
    """Documents that are not trained on."""

    shards: Shards
    documents: Sequence[int]


@torch.no_grad()
def score_documents(
    decoder: Decoder,
    heldout: Heldout,
    *,
    context: int,
    micro_tokens: int,
    max_tokens: int,
    place: World,
    device: torch.device,
) -> list[DocumentScore]:
    """Score documents from the first on, until there are `max_tokens`; the ranks share the work.

    A document longer than the context is cut into windows that do not overlap.
    """
    shards, groups = heldout.shards, by_domain(heldout.shards.index)
    pieces: list[Piece] = []
    places: dict[int, int] = {}
    tokens = 0
    for number in heldout.documents:
        if tokens >= max_tokens:
            break
        _, start, stop = whole(shards, number)
        pieces += [Piece(number, i, min(i + context, stop)) for i in range(start, stop, context)]
        places[number], tokens = len(places), tokens + stop - start
    if not pieces:
        return []
    batches = _batches(pieces, micro_tokens)
    found = torch.zeros(len(places), 2, dtype=torch.float64, device=device)
    for first in range(0, len(batches), place.size):
        mine = first + place.rank
        chosen = batches[min(mine, len(batches) - 1)]  # all ranks must make each forward pass
        batch = gather(shards, chosen, groups).to(device)

        def of(hidden: Tensor, head: Tensor, targets: Tensor = batch.targets) -> Tensor:
            return over_logits(hidden, head, cross_entropy, torch.ones_like(targets), targets)[1]

        with uncompiled(decoder):
            values = decoder.measure(batch.ids, Packed(batch.lengths, device=device), of)
        if mine < len(batches):
            owner = torch.tensor([places[piece.document] for piece in chosen], device=device)
            owner = owner.repeat_interleave(torch.tensor(batch.lengths, device=device))
            weighed = torch.stack((values * batch.weights, batch.weights), dim=1)
            found.index_add_(0, owner, weighed.double())
    sizes = [int(shards.record(number)["bytes"]) for number in places]
    rows = zip(total(found).tolist(), sizes, strict=True)
    return [DocumentScore(nats, size, int(targets)) for (nats, targets), size in rows]


@torch.no_grad()
def sample(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    num_tokens: int,
    device: torch.device,
) -> list[str]:
    """Go on with each prompt, greedily; without a cache, since a sharded model has none."""
    if not prompts:
        return []
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    starts = [len(row) for row in rows]
    for _ in range(num_tokens):
        lengths = [len(row) for row in rows]
        ids = torch.tensor([token for row in rows for token in row], device=device)
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1

        def of(hidden: Tensor, head: Tensor, ends: Tensor = ends) -> Tensor:
            return (hidden[ends] @ head.T).argmax(-1)

        with uncompiled(decoder):
            best = decoder.measure(ids, Packed(lengths, device=device), of).tolist()
        for row, token in zip(rows, best, strict=True):
            row.append(token)
    return [tokenizer.decode(row[start:]) for row, start in zip(rows, starts, strict=True)]


def _batches(pieces: Sequence[Piece], micro_tokens: int) -> list[list[Piece]]:
    """Pieces in order, as many in a batch as fit."""
    found: list[list[Piece]] = [[]]
    room = micro_tokens
    for piece in pieces:
        length = piece.stop - piece.start
        if found[-1] and length > room:
            found.append([])
            room = micro_tokens
        found[-1].append(piece)
        room -= length
    return found
