"""Packed tokens on the disk: what the corpus writes and every trainer memory-maps.

A folder holds `NNNNN.bin` (uint32 little-endian tokens, one document after the other, each ending
with the end-of-text), `NNNNN.idx` (a `DOCUMENT` record for each) and `index.json`. A document is
never split: one longer than a shard has a shard of its own. A token with its highest bit set is
context: it is read and never a target, such as a prompt's or the text around a note.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from attending.artifact import digest, write_json
from attending.errors import CheckpointError

Tokens = NDArray[np.uint32]
# start: the first token's place in its shard; bytes: of the UTF-8 text, for bits per byte; source
# and domain: numbers in the index's lists.
FIELDS = {"start": "<u8", "tokens": "<u4", "bytes": "<u4", "source": "<u2", "domain": "<u2"}
DOCUMENT = np.dtype(list(FIELDS.items()))
CONTEXT = np.uint32(1 << 31)  # the flag; no vocabulary is that large


class ShardInfo(NamedTuple):
    """A finished shard, as `index.json` lists it."""

    name: str
    tokens: int
    documents: int
    sha256: str  # of NNNNN.bin
    idx_sha256: str


class ShardWriter:
    """Writes documents to shards numbered from `first`; a shard appears only when it is whole."""

    def __init__(self, folder: Path, tokens_per_shard: int, first: int = 0) -> None:
        """Writes nothing before the first document."""
        folder.mkdir(parents=True, exist_ok=True)
        self.shards: list[ShardInfo] = []
        self._folder, self._limit, self._number = folder, tokens_per_shard, first
        self._rows: list[tuple[int, int, int, int, int]] = []
        self._tokens = 0

    def add(self, ids: Tokens, num_bytes: int, source: int, domain: int) -> None:
        """Append a document; its ids end with the end-of-text already."""
        if self._rows and self._tokens + len(ids) > self._limit:
            self._finish()
        if not self._rows:
            self._file = self._path("bin.tmp").open("wb")
        self._file.write(np.ascontiguousarray(ids, "<u4").tobytes())
        self._rows.append((self._tokens, len(ids), num_bytes, source, domain))
        self._tokens += len(ids)

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the last shard; after an error, leave it unfinished."""
        if self._rows and kind is None:
            self._finish()
        elif self._rows:
            self._file.close()

    def _path(self, suffix: str) -> Path:
        return self._folder / f"{self._number:05d}.{suffix}"

    def _finish(self) -> None:
        with self._file, self._path("idx.tmp").open("wb") as idx:
            idx.write(np.array(self._rows, DOCUMENT).tobytes())
            for file in (idx, self._file):
                file.flush()
                os.fsync(file.fileno())
        paths = [self._path(f"{s}.tmp").replace(self._path(s)) for s in ("bin", "idx")]
        name, sums = f"{self._number:05d}", map(digest, paths)
        self.shards.append(ShardInfo(name, self._tokens, len(self._rows), *sums))
        self._rows, self._tokens, self._number = [], 0, self._number + 1


def write_index(folder: Path, shards: Sequence[ShardInfo], **facts: Any) -> None:
    """Write `index.json`: the facts, and the shards.

    The facts are `begin_of_text` (the id before every text, or None), `end_of_text`,
    `tokenizer_sha256`, `sources` and `domains`, and `has_context` where tokens are flagged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "index.json", {**facts, "shards": [one._asdict() for one in shards]})


class Shards:
    """The shards of a folder as one stream of tokens, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Map the files; CheckpointError if one is absent or of another size than indexed."""
        try:
            self.index: dict[str, Any] = json.loads((folder / "index.json").read_text("utf-8"))
            self.shards = [ShardInfo(**row) for row in self.index["shards"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder} has no readable index.json ({error}): give a folder of token shards, "
                "such as train/ of what `attending corpus` wrote."
            ) from None
        self._folder = folder
        self._bins = [self._map(f"{one.name}.bin", "<u4", one.tokens) for one in self.shards]
        self._rows = [self._map(f"{one.name}.idx", DOCUMENT, one.documents) for one in self.shards]
        self._tokens = np.cumsum([0, *(one.tokens for one in self.shards)])
        self._documents = np.cumsum([0, *(one.documents for one in self.shards)])
        self.num_tokens, self.num_documents = int(self._tokens[-1]), int(self._documents[-1])

    def record(self, number: int) -> np.void:
        """The `DOCUMENT` record of a document."""
        shard, row = self._find(number)
        found: np.void = self._rows[shard][row]
        return found

    def shard(self, number: int) -> tuple[int, NDArray[np.void]]:
        """The number of a shard's first document, and the records of all of its documents."""
        return int(self._documents[number]), self._rows[number]

    def document(self, number: int) -> Tokens:
        """The ids of a document, without a copy if none is flagged; IndexError if there is none."""
        ids = self._stored(number)
        return ids & ~CONTEXT if self.index.get("has_context") else ids

    def trained(self, number: int) -> NDArray[np.bool_]:
        """Which tokens of a document are targets."""
        if not self.index.get("has_context"):
            return np.ones(int(self.record(number)["tokens"]), np.bool_)
        found: NDArray[np.bool_] = self._stored(number) < CONTEXT
        return found

    def slice(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of the whole stream; a copy only across a border of shards."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        first, last = np.searchsorted(self._tokens, [start, max(stop - 1, start)], side="right") - 1
        bases = self._tokens[first : last + 1].tolist()
        bins = self._bins[first : last + 1]
        parts = [b[max(0, start - at) : stop - at] for b, at in zip(bins, bases, strict=False)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, "<u4"), *parts])

    def verify(self) -> None:
        """Read every byte; CheckpointError if one has changed or a document does not end."""
        end = self.index["end_of_text"]
        for one, ids, rows in zip(self.shards, self._bins, self._rows, strict=True):
            sums = [digest(self._folder / f"{one.name}.{suffix}") for suffix in ("bin", "idx")]
            stops = np.cumsum(rows["tokens"], dtype=np.int64)
            is_joined = np.array_equal(rows["start"], stops - rows["tokens"])
            is_same = sums == [one.sha256, one.idx_sha256]
            ends = (ids[stops - 1] & ~CONTEXT == end).all()
            if not (is_same and is_joined and stops[-1] == len(ids) and ends):
                raise CheckpointError(f"shard {one.name} is damaged: build the corpus again.")

    def _stored(self, number: int) -> Tokens:
        start, length = int(self.record(number)["start"]), int(self.record(number)["tokens"])
        return self._bins[self._find(number)[0]][start : start + length]

    def _find(self, number: int) -> tuple[int, int]:
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of {self.num_documents}")
        shard = int(np.searchsorted(self._documents, number, side="right")) - 1
        return shard, number - int(self._documents[shard])

    def _map(self, name: str, kind: Any, count: int) -> NDArray[Any]:
        path = self._folder / name
        if not path.is_file() or path.stat().st_size != count * np.dtype(kind).itemsize:
            raise CheckpointError(f"{name} is absent or not whole: build the corpus again.")
        return np.memmap(path, kind, mode="r", shape=(count,))
