"""Token shards to packed rows: which documents a step sees, the same for any number of ranks.

A row holds exactly `context` targets of one domain, the one that is furthest behind its share. Each
domain's documents come in a shuffled order and pass through a pool, from which rows are packed so
that few are cut: a row begins with the oldest, then takes the longest that fits, and what room is
left is filled by the beginning of the longest, which would be cut soonest anyway. Its rest goes to
the pool's end, so that a long document is spread over many steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attending.errors import ConfigError
from attending.shards import Shards

POOL = 64


class Piece(NamedTuple):
    """Targets [start, stop) of a document; the token before `start` is its first input."""

    document: int
    start: int
    stop: int


Row = list[Piece]


@dataclass(frozen=True, slots=True)
class Batch:
    """Segments side by side, none of which sees another; T tokens in all."""

    ids: Tensor
    """[T] int64, inputs."""
    targets: Tensor
    """[T] int64, what follows each."""
    weights: Tensor
    """[T] float32, of each target's loss; 0 is not trained on."""
    lengths: list[int]
    """Tokens of each segment; they sum to T."""
    kinds: Tensor
    """[T] int64, what each target counts as in the metrics; here its domain's number."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same on a device."""
        ids, targets = self.ids.to(device), self.targets.to(device)
        weights, kinds = self.weights.to(device), self.kinds.to(device)
        return Batch(ids, targets, weights, self.lengths, kinds)


class PackedReader:
    """An endless stream of rows, resumable at any of them."""

    def __init__(self, shards: Shards, mixture: Mapping[str, float], seed: int) -> None:
        """`mixture`: share of the tokens by domain; they need not sum to one.

        Raises:
            ConfigError: A domain that these shards have no document of.
        """
        self.shards = shards
        self._seed = seed
        domains = shards.column("domain")
        self._documents = {
            name: np.flatnonzero(domains == number)
            for number, name in enumerate(shards.index["domains"])
        }
        self._orders: dict[str, tuple[int, NDArray[np.int64]]] = {}
        self._next: dict[str, list[int]] = {name: [0, 0] for name in self._documents}
        self._pools: dict[str, list[Piece]] = {name: [] for name in self._documents}
        self._mixture: dict[str, float] = {}
        self._read: dict[str, int] = {}
        self.num_cut = 0
        self.remix(mixture)

    def remix(self, mixture: Mapping[str, float]) -> None:
        """Draw by these weights from here on."""
        mixture = {name: weight for name, weight in mixture.items() if weight}
        if mixture == self._mixture:
            return
        for name in mixture:
            if not len(self._documents.get(name, ())):
                has = ", ".join(name for name, found in self._documents.items() if len(found))
                raise ConfigError(
                    f"the mixture wants {name!r} documents and the corpus has none (it has: {has})."
                )
        self._mixture = mixture
        self._read = dict.fromkeys(mixture, 0)

    def row(self, context: int) -> Row:
        """The next row: pieces that sum to `context` targets."""
        name = min(self._mixture, key=lambda name: self._read[name] / self._mixture[name])
        self._read[name] += context
        row, room = [self._take(name, 0, context)], context
        while room := room - (row[-1].stop - row[-1].start):
            lengths = [piece.stop - piece.start for piece in self._refilled(name)]
            fitting = [(length, -i) for i, length in enumerate(lengths) if length <= room]
            index = -max(fitting)[1] if fitting else lengths.index(max(lengths))
            row.append(self._take(name, index, room))
        return row

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""
        return {
            "mixture": self._mixture,
            "read": self._read,
            "next": self._next,
            "pools": {name: [list(piece) for piece in pool] for name, pool in self._pools.items()},
            "num_cut": self.num_cut,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._mixture, self._read = dict(state["mixture"]), dict(state["read"])
        self._next = {name: list(place) for name, place in state["next"].items()}
        pools = state["pools"].items()
        self._pools = {name: [Piece(*piece) for piece in pool] for name, pool in pools}
        self.num_cut = int(state["num_cut"])

    @property
    def epochs(self) -> dict[str, float]:
        """Times that each domain has been read."""
        return {
            name: epoch + at / len(self._documents[name])
            for name, (epoch, at) in self._next.items()
            if len(self._documents[name])
        }

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Read some rows' tokens."""
        return gather(self.shards, [piece for row in rows for piece in row])

    def _take(self, name: str, index: int, room: int) -> Piece:
        """Remove a piece from a pool, or as much of it as there is room for."""
        pool = self._refilled(name)
        document, start, stop = pool.pop(index)
        if stop - start > room:
            self.num_cut += 1
            pool.append(Piece(document, start + room, stop))
            stop = start + room
        return Piece(document, start, stop)

    def _refilled(self, name: str) -> list[Piece]:
        pool = self._pools[name]
        while len(pool) < POOL:
            pool.append(self._draw(name))
        return pool

    def _draw(self, name: str) -> Piece:
        """The next document of a domain."""
        epoch, at = self._next[name]
        if self._orders.get(name, (-1,))[0] != epoch:
            number = list(self._documents).index(name)
            random = np.random.default_rng((self._seed, number, epoch))
            self._orders[name] = epoch, random.permutation(self._documents[name])
        document = int(self._orders[name][1][at])
        is_last = at + 1 == len(self._documents[name])
        self._next[name] = [epoch + 1, 0] if is_last else [epoch, at + 1]
        return whole(self.shards, document)


def whole(shards: Shards, document: int) -> Piece:
    """All targets of a document.

    Where the tokenizer puts a token before every text, that one is only an input. Elsewhere the
    end of the text before stands in its place, as GPT-2 was trained.
    """
    has_begin = shards.index.get("begin_of_text") is not None
    return Piece(document, int(has_begin), int(shards.record(document)["tokens"]))


def gather(shards: Shards, pieces: Sequence[Piece]) -> Batch:
    """The tokens of some pieces, one segment each."""
    inputs: list[NDArray[Any]] = []
    targets, kinds = [], []
    for piece in pieces:
        ids = shards.document(piece.document)
        first = [shards.index["end_of_text"]] if piece.start == 0 else ids[piece.start - 1 :][:1]
        inputs += [np.asarray(first, np.int64), ids[piece.start : piece.stop - 1]]
        targets.append(ids[piece.start : piece.stop])
        kinds.append(int(shards.record(piece.document)["domain"]))
    lengths = [piece.stop - piece.start for piece in pieces]
    return Batch(
        ids=torch.from_numpy(np.concatenate(inputs).astype(np.int64)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        weights=torch.ones(sum(lengths)),
        lengths=lengths,
        kinds=torch.repeat_interleave(torch.tensor(kinds), torch.tensor(lengths)),
    )
