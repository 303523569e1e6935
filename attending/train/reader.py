"""Token shards to packed rows: which documents a step sees, the same for any number of ranks.

Documents are drawn in groups: domains, or sources that a recipe names. A row holds exactly
`context` targets of one group, the one that is furthest behind its share. Each group's documents
come in a shuffled order and pass through a pool, from which rows are packed so that few are cut: a
row begins with the oldest, then takes the longest that fits, and what room is left is filled by the
beginning of the longest, which would be cut soonest anyway. Its rest goes to the pool's end, so
that a long document is spread over many steps. Dialogues are never cut: their rows end where none
fits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attending.config import suggest
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
    """[T] int64, what each target counts as in the metrics; here its group's number."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same on a device."""
        ids, targets = self.ids.to(device), self.targets.to(device)
        weights, kinds = self.weights.to(device), self.kinds.to(device)
        return Batch(ids, targets, weights, self.lengths, kinds)


class Groups(NamedTuple):
    """Which documents are drawn together."""

    names: list[str]
    table: NDArray[np.int64]
    """[sources, domains]: a group's number, or -1."""

    def of(self, rows: NDArray[np.void] | np.void) -> NDArray[np.int64]:
        """The groups of some documents' records, or of one's."""
        found: NDArray[np.int64] = self.table[rows["source"], rows["domain"]]
        return found


class Part(Protocol):
    """How a recipe names a group."""

    @property
    def domain(self) -> str | None:
        """All documents of this domain, those aside whose source a part names."""

    @property
    def sources(self) -> Sequence[str]:
        """All documents of these sources."""


def by_domain(index: Mapping[str, Any]) -> Groups:
    """A group a domain."""
    count = len(index["domains"])
    return Groups(list(index["domains"]), np.tile(np.arange(count), (len(index["sources"]), 1)))


def by_part(index: Mapping[str, Any], parts: Mapping[str, Part]) -> Groups:
    """A group a part, of what an index lists.

    Raises:
        ConfigError: A domain or source that it does not list, or a source that two parts name.
    """
    known = {kind: list(index[kind]) for kind in ("sources", "domains")}
    table = np.full((len(known["sources"]), len(known["domains"])), -1)
    numbered = list(enumerate(parts.items()))
    wanted = [(n, name, "sources", one) for n, (name, part) in numbered for one in part.sources]
    wanted += [(n, name, "domains", part.domain) for n, (name, part) in numbered if part.domain]
    for number, name, kind, one in wanted:
        if one not in known[kind]:
            raise ConfigError(
                f"part {name}: the corpus has no {kind[:-1]} {one!r}.{suggest(one, known[kind])}"
            )
        at = known[kind].index(one)
        cells = table[at] if kind == "sources" else table[:, at]
        if kind == "sources" and (cells >= 0).any():
            raise ConfigError(f"part {name}: another part has the source {one!r} already.")
        cells[cells < 0] = number
    return Groups(list(parts), table)


class PackedReader:
    """An endless stream of rows, resumable at any of them."""

    def __init__(
        self,
        shards: Shards,
        mixture: Mapping[str, float],
        seed: int,
        groups: Groups | None = None,
        *,
        cuts: bool = True,
    ) -> None:
        """Draws from shards.

        Args:
            shards: Where the documents are.
            mixture: Share of the tokens by group; they need not sum to one.
            seed: Of the order.
            groups: None: domains.
            cuts: Documents may be cut. Else no document may be longer than a row.

        Raises:
            ConfigError: A group that these shards have no document of.
        """
        self.shards = shards
        self.groups = groups or by_domain(shards.index)
        self._seed, self._cuts = seed, cuts
        self._numbers = {name: number for number, name in enumerate(self.groups.names)}
        self._orders: dict[str, tuple[tuple[int, int], NDArray[np.int64]]] = {}
        self._next: dict[str, list[int]] = {name: [0, 0, 0] for name in self._numbers}
        self._pools: dict[str, list[Piece]] = {name: [] for name in self._numbers}
        self._mixture: dict[str, float] = {}
        self._read: dict[str, int] = {}
        self.num_cuts = 0
        self.remix(mixture)

    def remix(self, mixture: Mapping[str, float]) -> None:
        """Draw by these weights from here on."""
        mixture = {name: weight for name, weight in mixture.items() if weight}
        if mixture == self._mixture:
            return
        self.require(mixture)
        self._mixture = mixture
        self._read = dict.fromkeys(mixture, 0)

    def require(self, mixture: Mapping[str, float]) -> None:
        """ConfigError if these shards lack a group that a mixture wants."""
        for name, weight in mixture.items():
            if weight and not self._has(name):
                has = ", ".join(name for name in self._numbers if self._has(name))
                raise ConfigError(
                    f"the mixture wants {name!r} documents and the corpus has none (it has: {has})."
                )

    def row(self, context: int) -> Row:
        """The next row: pieces that sum to `context` targets, or to less where none is cut."""
        name = min(self._mixture, key=lambda name: self._read[name] / self._mixture[name])
        row, room = [self._take(name, 0, context)], context
        while room := room - (row[-1].stop - row[-1].start):
            lengths = [piece.stop - piece.start for piece in self._refilled(name)]
            fitting = [(length, -i) for i, length in enumerate(lengths) if length <= room]
            if not fitting and not self._cuts:
                break
            index = -max(fitting)[1] if fitting else lengths.index(max(lengths))
            row.append(self._take(name, index, room))
        self._read[name] += context - room
        return row

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""
        return {
            "mixture": self._mixture,
            "read": self._read,
            "next": self._next,
            "pools": {name: [list(piece) for piece in pool] for name, pool in self._pools.items()},
            "num_cuts": self.num_cuts,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._mixture, self._read = dict(state["mixture"]), dict(state["read"])
        self._next = {name: list(place) for name, place in state["next"].items()}
        pools = state["pools"].items()
        self._pools = {name: [Piece(*piece) for piece in pool] for name, pool in pools}
        self.num_cuts = int(state["num_cuts"])

    def figures(self) -> dict[str, float]:
        """For the metrics."""
        epochs = {f"data/{name}_epochs": epoch for name, epoch in self.epochs.items()}
        return epochs | ({"data/cuts": float(self.num_cuts)} if self._cuts else {})

    @property
    def epochs(self) -> dict[str, float]:
        """Times that each group of the mixture has been read, by shards."""
        count = len(self.shards.shards)
        found = {}
        for name in self._mixture:
            epoch, shard, at = self._next[name]
            share = at / max(1, len(self._order(name, epoch, shard)))
            found[name] = epoch + (shard + share) / count
        return found

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Read some rows' tokens."""
        return gather(self.shards, [piece for row in rows for piece in row], self.groups)

    def _take(self, name: str, index: int, room: int) -> Piece:
        """Remove a piece from a pool, or as much of it as there is room for."""
        pool = self._refilled(name)
        document, start, stop = pool.pop(index)
        if stop - start > room:
            self.num_cuts += 1
            pool.append(Piece(document, start + room, stop))
            stop = start + room
        return Piece(document, start, stop)

    def _refilled(self, name: str) -> list[Piece]:
        pool = self._pools[name]
        while len(pool) < POOL:
            if pool and not self._cuts and self._ends_epoch(name):
                break  # all dialogues of an epoch before any of the next
            pool.append(self._draw(name))
        return pool

    def _ends_epoch(self, name: str) -> bool:
        epoch, shard, at = self._next[name]
        is_last = shard == len(self.shards.shards) - 1
        return is_last and at >= len(self._order(name, epoch, shard))

    def _draw(self, name: str) -> Piece:
        """The next document of a group."""
        epoch, shard, at = self._next[name]
        while at >= len(self._order(name, epoch, shard)):
            shard, at = shard + 1, 0
            if shard == len(self.shards.shards):
                epoch, shard = epoch + 1, 0
        self._next[name] = [epoch, shard, at + 1]
        return whole(self.shards, int(self._order(name, epoch, shard)[at]))

    def _order(self, name: str, epoch: int, shard: int) -> NDArray[np.int64]:
        """A group's documents in the shard that comes at some place of an epoch, shuffled.

        The corpus put all documents into one random order, so shuffling the shards and within each
        is enough, and no rank holds a list of all documents.
        """
        if self._orders.get(name, ((-1, -1),))[0] != (epoch, shard):
            number = self._numbers[name]
            shards = np.random.default_rng((self._seed, number, epoch))
            which = int(shards.permutation(len(self.shards.shards))[shard])
            first, rows = self.shards.shard(which)
            own = first + np.flatnonzero(self.groups.of(rows) == number)
            within = np.random.default_rng((self._seed, number, epoch, which))
            self._orders[name] = (epoch, shard), within.permutation(own)
        return self._orders[name][1]

    def _has(self, name: str) -> bool:
        number, count = self._numbers.get(name, -2), len(self.shards.shards)
        return any((self.groups.of(self.shards.shard(i)[1]) == number).any() for i in range(count))


def whole(shards: Shards, document: int) -> Piece:
    """All targets of a document.

    Where the tokenizer puts a token before every text, that one is only an input. Elsewhere the
    end of the text before stands in its place, as GPT-2 was trained.
    """
    has_begin = shards.index.get("begin_of_text") is not None
    return Piece(document, int(has_begin), int(shards.record(document)["tokens"]))


def gather(shards: Shards, pieces: Sequence[Piece], groups: Groups) -> Batch:
    """The tokens of some pieces, one segment each; what is context only has no weight."""
    inputs: list[NDArray[Any]] = []
    targets, weights, kinds = [], [], []
    for piece in pieces:
        ids = shards.document(piece.document)
        first = [shards.index["end_of_text"]] if piece.start == 0 else ids[piece.start - 1 :][:1]
        inputs += [np.asarray(first, np.int64), ids[piece.start : piece.stop - 1]]
        targets.append(ids[piece.start : piece.stop])
        weights.append(shards.trained(piece.document)[piece.start : piece.stop])
        kinds.append(int(groups.of(shards.record(piece.document))))
    lengths = [piece.stop - piece.start for piece in pieces]
    return Batch(
        ids=torch.from_numpy(np.concatenate(inputs).astype(np.int64)),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        weights=torch.from_numpy(np.concatenate(weights)).float(),
        lengths=lengths,
        kinds=torch.repeat_interleave(torch.tensor(kinds), torch.tensor(lengths)),
    )
