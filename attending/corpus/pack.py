"""Documents to shards: tokenise, put all repeats into one order, cut the order into shards.

The order is by a hash of seed, id and repeat, so it depends on neither tasks nor machines. Every
task works out the whole order from the tasks' indices and writes its share of the shards.
"""

import json
import re
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datatrove.data import Document
from numpy.typing import NDArray

from attending.chat import Tokenizer
from attending.corpus.ledger import write_whole
from attending.corpus.recipe import PackConfig
from attending.corpus.split import draw
from attending.corpus.steps import Part
from attending.errors import TokenizerError
from attending.model.files import read_tokenizer
from attending.shards import CONTEXT, ShardInfo, ShardWriter, Tokens
from attending.sources import resolve

DOMAINS = ("general", "medical")
PARTS = ("train", "heldout/general", "heldout/medical")
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
ROW = np.dtype(  # one a repeat of a document
    [
        ("key", "<u8"),
        ("start", "<u8"),  # tokens before it in its task's file
        ("tokens", "<u4"),
        ("bytes", "<u4"),
        ("source", "<u2"),
        ("domain", "u1"),
        ("part", "u1"),
        ("task", "<u4"),
        ("repeat", "<u4"),
    ]
)
Rows = NDArray[np.void]


class Encoder(NamedTuple):
    """A tokenizer, and what begins and ends a document."""

    tokenizer: Tokenizer
    begin_of_text: int | None  # None: it puts nothing before a text
    end_of_text: int
    sha256: str  # of the definition

    @classmethod
    @cache
    def load(cls, config: PackConfig) -> "Encoder":
        """From a folder, a tokenizer.json or a GGUF file on this machine.

        Raises:
            SourceError: It is not there.
            TokenizerError: It has no control token that ends a text.
        """
        tokenizer = read_tokenizer(resolve(config.tokenizer).path)
        own = tokenizer.config.get("eos_token")
        names = [config.end_of_text] if config.end_of_text else [*ENDS]
        names += [own] if isinstance(own, str) and not config.end_of_text else []
        ends = [i for name in names if (i := tokenizer.control_id(name)) is not None]
        if not ends:
            raise TokenizerError(
                f"the tokenizer has none of {', '.join(names)} as a control token: name one that "
                "ends a document with --set pack.end_of_text=..."
            )
        begin = next(iter(tokenizer.encode("")), None)
        return cls(tokenizer, begin, ends[0], tokenizer.sha256)

    def ids(self, text: str, notes: tuple[str, str] | None) -> Tokens:
        """A document with its end; all but its notes and their closing marks is flagged as context.

        The text's own `<|endoftext|>` is spelled; only ours is the control token.
        """
        encode = self.tokenizer.encode
        if notes is None:
            return np.array([*encode(text), self.end_of_text], "<u4")
        opened, closed = map(re.escape, notes)
        parts = re.split(f"(?<={opened})(.*?{closed})", text, flags=re.DOTALL)
        found = [
            np.array(encode(part, is_first=not place), "<u4") | (CONTEXT if place % 2 == 0 else 0)
            for place, part in enumerate(parts)
        ]
        return np.concatenate([*found, [self.end_of_text | CONTEXT]]).astype("<u4")


class Tokenise(Part):
    """Token ids of a task's documents, a row for every time that one is seen, and the sample."""

    name = "tokenise"

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> None:
        encoder, seed = Encoder.load(self.config.pack), self.config.pack.seed
        sources = {name: number for number, name in enumerate(self.config.sources)}
        rows: list[tuple[int, ...]] = []
        position = 0
        path = self.work / "tokens" / f"{rank:05d}.bin"
        sampled = self.work / "sample" / f"{rank:05d}.jsonl"
        for folder in (path.parent, sampled.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file, sampled.open("wb") as sample:
            for document in data:
                told = document.metadata
                ids = encoder.ids(document.text, self.config.sources[told["source"]].notes)
                file.write(ids.tobytes())
                domain = DOMAINS.index(told["domain"])
                part = 1 + domain if told["is_held_out"] else 0
                size = len(document.text.encode())
                same = (position, len(ids), size, sources[told["source"]], domain, part, rank)
                rows += [
                    (draw(seed, document.id, repeat), *same, repeat)
                    for repeat in range(told["times"])
                ]
                position += len(ids)
                if self._is_sampled(document):
                    row = {"text": document.text, "domain": told["domain"]}
                    sample.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        write_whole(path.with_suffix(".rows"), np.array(rows, ROW).tobytes())

    def _is_sampled(self, document: Document) -> bool:
        told, drawn = self.config.pack, draw("sample text", self.config.pack.seed, document.id)
        return not document.metadata["is_held_out"] and drawn < told.sample_share * 2**64


class Shard(NamedTuple):
    """A shard to write: rows [start, stop) of a part's order."""

    part: int
    number: int
    rows: Rows


def read_rows(draft: Path) -> Rows:
    """All tasks' rows; every task of `Pack` holds all of them, 40 bytes a document."""
    files = sorted((draft / "work" / "tokens").glob("*.rows"))
    return np.concatenate([np.empty(0, ROW), *(np.fromfile(file, ROW) for file in files)])


def layout(rows: Rows, tokens_per_shard: int) -> list[Shard]:
    """The shards of every part: rows by key, as many in each as fit."""
    found = []
    for part in range(len(PARTS)):
        own = rows[rows["part"] == part]
        own = own[np.lexsort((own["start"], own["task"], own["key"]))]
        ends = np.cumsum(own["tokens"], dtype=np.int64)
        start = number = 0
        while start < len(own):
            full = tokens_per_shard + (int(ends[start - 1]) if start else 0)
            stop = max(start + 1, int(np.searchsorted(ends, full, side="right")))
            found.append(Shard(part, number, own[start:stop]))
            start, number = stop, number + 1
    return found


class Pack(Part):
    """Each task writes every n-th shard."""

    name = "pack"

    def run(self, data: None = None, rank: int = 0, world_size: int = 1) -> None:
        limit, written = self.config.pack.tokens_per_shard, []
        for part, number, rows in layout(read_rows(self.draft), limit)[rank::world_size]:
            files = {
                int(task): np.memmap(self.work / "tokens" / f"{task:05d}.bin", "<u4", mode="r")
                for task in np.unique(rows["task"])
            }
            most = max(limit, int(rows["tokens"][0]))
            with ShardWriter(self.draft / PARTS[part], most, number) as writer:
                for row in rows:
                    start, size = int(row["start"]), int(row["tokens"])
                    ids = files[int(row["task"])][start : start + size]
                    writer.add(ids, int(row["bytes"]), int(row["source"]), int(row["domain"]))
            written += [[part, *info] for info in writer.shards]
        write_whole(self.work / "shards" / f"{rank:05d}.json", json.dumps(written).encode())


def join_sample(draft: Path) -> None:
    """What the tasks sampled, as one file."""
    with (draft / "sample.jsonl").open("wb") as whole:
        for file in sorted((draft / "work" / "sample").glob("*.jsonl")):
            with file.open("rb") as part:
                shutil.copyfileobj(part, whole)


def read_shards(draft: Path) -> list[tuple[str, list[ShardInfo]]]:
    """What `Pack` has written, by part."""
    files = sorted((draft / "work" / "shards").glob("*.json"))
    found: list[list[Any]] = [one for file in files for one in json.loads(file.read_text("utf-8"))]
    return [
        (name, sorted(ShardInfo(*one[1:]) for one in found if one[0] == part))
        for part, name in enumerate(PARTS)
    ]
