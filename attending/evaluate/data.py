"""Rows of a test set, wherever it lies, and which of them are taken."""

import csv
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from attending import sources
from attending.errors import ConfigError, SourceError, UsageError
from attending.verifier.rubric.schema import read_lines

T = TypeVar("T")


def find(data: str, folder: Path | None) -> Path:
    """Where a task's data lies: in the folder or one below it, or where its source was pulled to.

    Raises:
        UsageError: Nowhere, or in several places; it says what to pull or to give.
    """
    is_name = folder and not data.startswith(("/", "."))
    inside = sorted(filter(Path.is_file, folder.rglob(data))) if folder and is_name else []
    if len(inside) > 1:
        raise UsageError(f"--data has {len(inside)} files {data}: give the folder of one of them.")
    if inside:
        return inside[0]
    try:
        found = sources.resolve(data).path
    except SourceError as error:
        where = "give the folder that holds it with --data" if folder is None else "not in --data"
        raise UsageError(f"no data {data!r}: {where}, or name a source. ({error})") from None
    if not found.is_file():
        raise UsageError(f"{found.name} is a folder: name a file of it with the rows.")
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl, .json (a list), .csv, .tsv or .parquet file; ConfigError for none."""
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ModuleNotFoundError:
            raise UsageError(
                f"{path.name} needs pyarrow: pip install -e '.[corpus]' in the clone"
            ) from None
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    elif path.suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            told = csv.DictReader(file, delimiter="," if path.suffix == ".csv" else "\t")
            rows = [dict(row) for row in told]
    elif path.suffix == ".json":
        rows = json.loads(path.read_text("utf-8"))
    else:
        rows = [row for _, row in read_lines(path)]
    if not rows or not isinstance(rows, list):
        raise ConfigError(f"{path.name} has no rows: expected one a line, or a list of them.")
    return rows


def refuse_repeats(names: Iterable[str], where: str) -> None:
    """ConfigError where two examples have one id: their answers could not be told apart."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(
            f"{where} has {len(twice)} ids more than once, as {twice[0]!r}: remove the repeated "
            "rows (several answers to one example are asked for with repeats=N)."
        )


def take(examples: Sequence[T], limit: int | None) -> Sequence[T]:
    """All, or a sample of `limit`, drawn as HealthBench's reference does, in its order."""
    if limit is None or limit >= len(examples):
        return examples
    return random.Random(0).sample(list(examples), limit)
