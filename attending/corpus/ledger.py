"""Nothing is lost silently: what every step of every task let in, let out, and removed.

A ledger keeps removed documents, with the reason, in `removed/STEP/TASK.jsonl.gz`, and counts by
source and domain. The funnel is the sum of all ledgers, and it must add up.
"""

import gzip
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from datatrove.data import Document

from attending.corpus.split import draw
from attending.errors import CheckFailed

STEPS = (
    *("read", "clean", "language", "score", "phi", "ids", "exact", "near"),
    *("rewrite", "decontaminate", "mix"),
)
SAMPLES, SAMPLE_CHARACTERS = 5, 300
UNTOLD = "untold"  # the domain of a document that no one has scored yet

Sums = dict[tuple[str, str, str], Counter[str]]  # by source, domain, reason ("": kept)
Json = dict[str, Any]
T = TypeVar("T")


class Ledger:
    """The account of one step in one task, written when the step ends."""

    def __init__(self, draft: Path, step: str, rank: int) -> None:
        """Opens nothing until something is removed."""
        self._draft, self._step, self._task = draft, step, f"{rank:05d}"
        self._sums: Sums = defaultdict(Counter)
        self._samples: defaultdict[str, list[Json]] = defaultdict(list)
        self._notes: Counter[str] = Counter()
        self._lines: Lines | None = None
        self._seconds = 0.0

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write the sums, unless the step failed."""
        if self._lines:
            self._lines.close(is_whole=kind is None)
        if kind is None:
            values = {
                "rows": [
                    [*key, sums["documents"], sums["bytes"]] for key, sums in self._sums.items()
                ],
                "samples": self._samples,
                "notes": self._notes,
                "seconds": self._seconds,
            }
            file = self._draft / "work" / "counts" / self._step / f"{self._task}.json"
            write_whole(file, json.dumps(values).encode())

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Count the time of the block as this step's."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def keep(self, document: Document) -> None:
        """Count a document that goes on."""
        self._count(document.metadata, "", len(document.text.encode()))

    def remove(self, document: Document, reason: str) -> None:
        """Store a document that does not; from a private source never before it is redacted."""
        if document.metadata.get("raw"):
            from attending.phi import redact

            document.text = redact(document.text, second_pass=True)
        told = {k: v for k, v in document.metadata.items() if k not in ("key", "raw")}
        self.lose(told, reason, len(document.text.encode()), id=document.id, text=document.text)

    def lose(self, told: Mapping[str, Any], reason: str, num_bytes: int, **found: Any) -> None:
        """Store the account of what is removed, a record that cannot be read included."""
        self._count(told, reason, num_bytes)
        file = self._draft / "removed" / self._step / f"{self._task}.jsonl.gz"
        self._lines = self._lines or Lines(file, level=6)
        row = {"step": self._step, "reason": reason, "bytes": num_bytes, **found, **told}
        self._lines.write(row)
        sample = {**row, "text": found.get("text", "")[:SAMPLE_CHARACTERS]}
        self._samples[reason] = first_samples([*self._samples[reason], sample])

    def note(self, name: str, count: int = 1) -> None:
        """Count something that removes nothing."""
        if count:
            self._notes[name] += count

    def _count(self, told: Mapping[str, Any], reason: str, num_bytes: int) -> None:
        key = told["source"], told["domain"] or UNTOLD, reason
        self._sums[key].update(documents=1, bytes=num_bytes)


class Lines:
    """Writes JSON lines to a gzip file that holds neither its name nor the time."""

    def __init__(self, path: Path, level: int) -> None:
        """The file appears when it is closed; a draft of a killed task is overwritten."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._draft = path, path.with_name(path.name + ".tmp")
        self._raw = self._draft.open("wb")
        self._file = gzip.GzipFile("", "wb", level, self._raw, mtime=0)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line."""
        self._file.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")

    def close(self, *, is_whole: bool) -> None:
        """Publish the file, unless what wrote it failed."""
        with self._raw:
            if is_whole:
                self._file.close()
        if is_whole:
            self._draft.replace(self._path)


def read_lines(path: Path) -> Iterator[tuple[Json, float]]:
    """What `Lines` wrote, each with the share of the file's bytes that are read."""
    size = path.stat().st_size
    with path.open("rb") as raw, gzip.open(raw) as file:
        for line in file:
            yield json.loads(line), raw.tell() / size


def ticking(file: Path, items: Iterable[tuple[T, float]]) -> Iterator[T]:
    """Pass a task's items on; tell a bar twice a second their number and the share of bytes."""
    due, number = 0.0, 0
    for number, (item, share) in enumerate(items, 1):
        if time.monotonic() > due:
            due = time.monotonic() + 0.5
            write_whole(file, json.dumps([share, number]).encode())
        yield item
    write_whole(file, json.dumps([1.0, number]).encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_bytes(data)
    draft.replace(path)


def first_samples(samples: Iterable[Json]) -> list[Json]:
    """A few, the same however the work was divided."""
    found = {draw("sample", one.get("id"), one["file"], one["line"]): one for one in samples}
    return [found[key] for key in sorted(found)[:SAMPLES]]


def funnel(draft: Path) -> Json:
    """The sum of all ledgers: a row a step, domain and source, with what went in and came out.

    Raises:
        CheckFailed: Documents are unaccounted for.
    """
    rows: list[Json] = []
    samples: list[Json] = []
    seconds: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    before: Sums | None = None
    for step in STEPS:
        sums: Sums = defaultdict(Counter)
        reasons: defaultdict[str, list[Json]] = defaultdict(list)
        for file in sorted((draft / "work" / "counts" / step).glob("*.json")):
            told = json.loads(file.read_text("utf-8"))
            notes.update(told["notes"])
            seconds[step] += told["seconds"]
            for source, domain, reason, documents, size in told["rows"]:
                sums[source, domain, reason].update(documents=documents, bytes=size)
            for reason, some in told["samples"].items():
                reasons[reason] += some
        if step not in seconds:
            continue  # a step that this recipe does not have
        samples += [one for _, some in sorted(reasons.items()) for one in first_samples(some)]
        rows += _rows(step, before, sums)
        before = {key: count for key, count in sums.items() if not key[2]}
    return {"rows": rows, "seconds": dict(seconds), "samples": samples, "notes": dict(notes)}


def _rows(step: str, before: Sums | None, sums: Sums) -> list[Json]:
    """A step's rows; what goes in is what the step before let out, and the two must agree."""
    entered = defaultdict(Counter, before or {})
    if before is None or step == "score":  # where domains are told
        entered.clear()
        for (source, domain, _), count in sums.items():
            entered[source, domain, ""].update(count)
    balance: Counter[str] = Counter()
    for table, sign in ((entered if before is None else before, 1), (sums, -1)):
        for (source, domain, _), count in table.items():
            key = source if step == "score" else f"{source} ({domain})"
            balance[key] += sign * count["documents"]
    if wrong := {key: count for key, count in balance.items() if count}:
        raise CheckFailed(
            f"step {step} lost or invented documents: {wrong}. This is a fault of the program or "
            "of the disk; the work folder is kept."
        )
    nothing = Counter(documents=0, bytes=0)
    return [
        {
            "step": step,
            "domain": domain,
            "source": source,
            "in": entered.get((source, domain, ""), nothing),
            "out": sums.get((source, domain, ""), nothing),
            "removed": {
                key[2]: sums[key]["documents"]
                for key in sorted(sums)
                if key[:2] == (source, domain) and key[2]
            },
        }
        for source, domain in sorted({key[:2] for key in (*entered, *sums)})
    ]
