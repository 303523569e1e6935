"""Text to a folder with `tokenizer.json`: one byte-level BPE and Baichuan-M1's control tokens.

All 256 bytes are tokens and nothing is normalised, so every text comes back as it was. Digits are
split one by one before words are, so no token holds a digit and anything else. Letters never merge
with `<` or `>`, so no merge spells a control token.
"""

import gzip
import json
import tomllib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from attending import artifact
from attending.chat import THINK_CLOSE, THINK_OPEN, Tokenizer
from attending.errors import AttendingError, ConfigError
from attending.model.files import read_tokenizer
from attending.sources import Progress, resolve
from attending.tokenizer.fertility import fertility
from attending.tokenizer.recipe import TextConfig, TokenizerConfig

HERE = resources.files("attending.tokenizer")
CONTROL = tomllib.loads((HERE / "control.toml").read_text("utf-8"))
TEMPLATE = HERE / "chat_template.jinja"
BEGIN = CONTROL["settings"]["bos_token"]
NUM_BYTES, MULTIPLE = 256, 128
BYTES_PER_SECOND = 5_000_000  # 28 MB of English to 8,192 tokens took 6 s on two cores
DAMAGE = (ValueError, LookupError, TypeError, EOFError, gzip.BadGzipFile, zlib.error)


class Result(NamedTuple):
    """A tokenizer that was trained."""

    out: Path
    documents: int
    num_bytes: int  # of text
    fertility: list[dict[str, str | float | None]]
    notes: list[str]  # what was not measured, and why


def train(config: TokenizerConfig, out: Path, progress: Progress | None = None) -> Result:
    """Learn the merges, write OUT, measure it beside others.

    Raises:
        ConfigError: The sizes do not fit each other, there is no text, or too little of it.
        UsageError: `out` exists.
    """
    files, tell = _check(config), progress or (lambda *_: None)
    total, counts = sum(path.stat().st_size for path in files), Counter[str]()

    def texts() -> Iterator[str]:
        for text, _ in _read(files, config.text):
            counts.update(documents=1, bytes=len(text.encode()))
            tell(min(counts["bytes"], total), total, "reading")
            yield text
        tell(total, total, "reading")
        tell(0, None, f"learning merges of {counts['bytes']:,} bytes")

    parents = [{"uri": path.name, "sha256": artifact.digest(path)} for path in files]
    record = artifact.Record("tokenizer", config.model_dump(mode="json"), None, parents)
    with artifact.publish(out) as draft:
        artifact.write_json(draft / "tokenizer.json", _learn(config, texts(), counts))
        artifact.write_json(draft / "tokenizer_config.json", CONTROL["settings"])
        (draft / TEMPLATE.name).write_bytes(TEMPLATE.read_bytes())
        tell(0, None, "measuring fertility")
        measured, notes = {"this": Tokenizer.from_folder(draft)}, list[str]()
        for name in config.compare:
            try:
                measured[name] = read_tokenizer(resolve(name).path)
            except AttendingError as error:
                notes.append(f"{name} is not measured: {error}")
        rows = []
        for name, told in ({"training text": config.text} | config.samples).items():
            samples = _beginnings(config, told, name)
            notes += [] if samples else [f"{name}: there is no text in {', '.join(told.paths)}"]
            for (sample, some), (other, one) in product(samples.items(), measured.items()):
                row = fertility(one, some)._asdict()
                rows.append({"sample": sample, "tokenizer": other, **row})
        artifact.write_json(draft / "fertility.json", {"rows": rows, "notes": notes})
        artifact.write_run(draft, record, {f"tokenizer/{k}": float(n) for k, n in counts.items()})
    return Result(out, counts["documents"], counts["bytes"], rows, notes)


def estimate(config: TokenizerConfig) -> dict[str, Any]:
    """What a run takes, at the measured speed."""
    total = sum(path.stat().st_size for path in _check(config))
    return {"input_bytes": total, "seconds": round(total / BYTES_PER_SECOND)}


def _read(paths: Iterable[Path], told: TextConfig) -> Iterator[tuple[str, str]]:
    """Texts with their domains, empty ones left out; ConfigError if a file cannot be read."""
    for path in paths:
        line, is_text = 0, ".txt" in path.suffixes[-2:]
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                for data in [file.read()] if is_text else file:
                    line += 1
                    row = {} if is_text else json.loads(data)
                    values = [data.decode()] if is_text else [row[name] for name in told.fields]
                    parts = (part for v in values for part in (v if isinstance(v, list) else [v]))
                    text = "\n\n".join(parts)
                    text.encode()  # half a surrogate pair is an error here, not later
                    if text:
                        yield text, str(row.get("domain") or "")
        except DAMAGE as error:
            raise ConfigError(
                f"{path.name}, line {line}: {type(error).__name__}: {error}. Expected UTF-8: JSON "
                f"lines with the fields {', '.join(told.fields)}, or a .txt file."
            ) from None


def _beginnings(config: TokenizerConfig, told: TextConfig, name: str) -> dict[str, list[str]]:
    """The first texts of each domain."""
    found, seen = dict[str, list[str]](), Counter[str]()
    for text, domain in _read(_files(config.root, told), told):
        key = f"{name}, {domain}" if domain else name
        if seen[key] < config.sample_bytes:
            found.setdefault(key, []).append(text)
            seen[key] += len(text.encode())
    return found


def _files(root: str, told: TextConfig) -> list[Path]:
    try:
        return sorted({p for one in told.paths for p in Path(root).glob(one) if p.is_file()})
    except (NotImplementedError, ValueError):
        raise ConfigError(f"{told.paths} are no globs below the recipe's root.") from None


def _check(config: TokenizerConfig) -> list[Path]:
    """The files of the training text, if the recipe can be run."""
    size, least = config.vocab_size, -(-(config.num_special + NUM_BYTES) // MULTIPLE) * MULTIPLE
    if size < least or size % MULTIPLE:
        near = max(least, size // MULTIPLE * MULTIPLE)
        raise ConfigError(
            f"vocab_size {size:,} is no multiple of {MULTIPLE}, which fast kernels want, from "
            f"{least:,} on ({config.num_special} control tokens and {NUM_BYTES} bytes): take "
            f"{near:,} or {near + MULTIPLE:,}."
        )
    if files := _files(config.root, config.text):
        return files
    missing = f"no file matches {', '.join(config.text.paths)} below {config.root!r}"
    raise ConfigError(f"{missing}: set the recipe's root (--set root=DIR) or text.paths.")


def _learn(config: TokenizerConfig, texts: Iterator[str], counts: Counter[str]) -> dict[str, Any]:
    """The contents of `tokenizer.json`; counts are those of the texts, once they are read."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # What GGUF files call `smollm`, so that other programs can read a vocabulary of ours.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    frame = {"single": f"{BEGIN} $A", "pair": f"{BEGIN} $A $B:1"}
    tokenizer.post_processor = processors.TemplateProcessing(**frame, special_tokens=[(BEGIN, 1)])
    named, wanted = CONTROL["named"], config.vocab_size
    trainer = trainers.BpeTrainer(
        vocab_size=wanted,
        min_frequency=config.min_frequency,
        special_tokens=[named.get(str(n), f"<reserved_{n}>") for n in range(config.num_special)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < wanted:
        merges = found - config.num_special - NUM_BYTES
        raise ConfigError(
            f"{counts['bytes']:,} bytes of text gave {merges:,} merges, and vocab_size {wanted:,} "
            f"wants {merges + wanted - found:,}: give more text, or take a smaller vocab_size, "
            f"{found // MULTIPLE * MULTIPLE:,} at most."
        )
    definition: dict[str, Any] = json.loads(tokenizer.to_str())
    for token in definition["added_tokens"]:  # special ones have no text when ids are decoded
        token["special"] = token["content"] not in (THINK_OPEN, THINK_CLOSE)
    return definition
