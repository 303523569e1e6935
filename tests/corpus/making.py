"""Small sources, a small tokenizer, and what a run of the corpus left behind."""

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from attending.corpus import run
from attending.corpus.recipe import CorpusConfig

TEXT = (
    "the patient has a history of fever and cough since three days ago treated with amoxicillin "
    "blood pressure was normal but heart rate rose during the night so doctors gave fluids and "
    "kept watching until morning when pain in chest went away after rest food water sleep"
)
WORDS = TEXT.split()


def prose(seed: int, count: int = 60) -> str:
    """English-looking text that no other seed gives."""
    return " ".join(Random(seed).choices(WORDS, k=count)) + f" case {seed}."


def write_tokenizer(folder: Path) -> Path:
    """Bytes and a few merges, with an end-of-text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any] | str | bytes]) -> Path:
    """Records as JSON; texts and bytes as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        line = row if isinstance(row, str | bytes) else json.dumps(row, ensure_ascii=False)
        lines.append(line if isinstance(line, bytes) else line.encode())
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def recipe(root: Path, **changes: Any) -> CorpusConfig:
    """One public JSONL source, in this process, without the quality filter."""
    values: dict[str, Any] = {
        "root": str(root),
        "sources": {"notes": {"path": "*.jsonl*", "private": False}},
        "quality": {"min_quality": 0.0, "languages": []},
        "duplicates": {"bands": 6, "rows": 4},
        "pack": {"tokenizer": str(write_tokenizer(root / "tokenizer")), "tokens_per_shard": 4000},
        "executor": {"tasks": 3, "workers": 1},
    }
    return CorpusConfig.build(values | changes)


def build(config: CorpusConfig, out: Path, **options: Any) -> "Found":
    """Run it; what came out."""
    run.build(config, out, **options)
    return Found(out)


class Found:
    """A corpus folder, read."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.funnel: dict[str, Any] = json.loads((out / "funnel.json").read_text("utf-8"))

    def removed(self) -> list[dict[str, Any]]:
        files = sorted((self.out / "removed").rglob("*.jsonl.gz"))
        return [json.loads(line) for f in files for line in gzip.open(f, "rt", encoding="utf-8")]

    def reasons(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for row in self.removed():
            counts[row["reason"]] = counts.get(row["reason"], 0) + 1
        return counts

    def documents(self) -> int:
        return sum(row["documents"] for row in self.funnel["tokens"])

    def bytes(self) -> dict[str, bytes]:
        """Every file whose bytes must not depend on how the run went."""
        folders = [self.out / name for name in ("train", "heldout", "removed")]
        files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
        files += self.out.glob("sample.jsonl")
        found = {str(path.relative_to(self.out)): path.read_bytes() for path in files}
        same = {name: value for name, value in self.funnel.items() if name != "seconds"}
        return found | {"funnel.json": json.dumps(same).encode()}
