"""Files to records: what each task reads, and what of it cannot be read.

Each record says where it stands; one that cannot be decoded says why instead, and the records
around it survive. A record above `max_bytes` is skipped without being held in memory.
"""

import gzip
import io
import json
import logging
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from attending.corpus.recipe import TEMPLATE, CorpusConfig, SourceConfig
from attending.errors import ConfigError

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 18
PIECES_PER_TASK = 4  # so that tasks can be evened out
FIELD = re.compile(TEMPLATE)
GZIP_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error)


class Piece(NamedTuple):
    """What one task reads at a stretch: whole lines of a file, or a whole file."""

    source: str
    path: str  # below the root
    start: int  # bytes
    stop: int
    line: int  # number of the first record, from 0


class Record(NamedTuple):
    """A record of a file, or why there is none."""

    line: int
    num_bytes: int
    fields: Mapping[str, Any]
    fault: str = ""


def plan(config: CorpusConfig) -> list[list[Piece]]:
    """Cut the sources into pieces and spread them over the tasks, the largest first.

    Uncompressed JSONL is cut between lines; other files are pieces as they are.
    """
    files = source_files(config)
    total = sum(path.stat().st_size for paths in files.values() for path in paths)
    target = max(CHUNK_BYTES, total // (PIECES_PER_TASK * config.executor.tasks))
    pieces: list[Piece] = []
    for name, paths in files.items():
        for path in paths:
            is_cut = config.sources[name].format == "jsonl" and path.suffix != ".gz"
            spans = _cut(path, target) if is_cut else [(0, path.stat().st_size, 0)]
            inner = path.relative_to(config.root).as_posix()
            pieces += [Piece(name, inner, *span) for span in spans]
    tasks: list[list[int]] = [[] for _ in range(config.executor.tasks)]
    loads = [0] * len(tasks)
    for number in sorted(range(len(pieces)), key=lambda n: pieces[n].start - pieces[n].stop):
        lightest = loads.index(min(loads))
        loads[lightest] += pieces[number].stop - pieces[number].start + 1
        tasks[lightest].append(number)
    return [[pieces[number] for number in sorted(task)] for task in tasks]


def source_files(config: CorpusConfig) -> dict[str, list[Path]]:
    """The files of each source, by name; ConfigError if one that must have some has none."""
    files = {
        name: glob(config.root, source.path, may_be_absent=source.may_be_absent)
        for name, source in config.sources.items()
    }
    if not any(files.values()):
        patterns = ", ".join(source.path for source in config.sources.values())
        raise ConfigError(f"no file below {config.root!r} matches any of {patterns}.")
    if any("**" in source.path for source in config.sources.values()):
        read = {path for paths in files.values() for path in paths}
        rest = Counter(
            p.suffix for p in Path(config.root).rglob("*") if p.is_file() and p not in read
        )
        if rest:
            told = ", ".join(
                f"{count} {ending or 'without ending'}" for ending, count in rest.items()
            )
            log.warning("files that no source reads: %s", told)
    return files


def glob(root: str, pattern: str, *, may_be_absent: bool = False) -> list[Path]:
    """Files below the root, by name; ConfigError if there are none, or one cannot be read."""
    try:
        globs = (Path(root).glob(part) for part in pattern.split("|"))
        found = sorted({path for paths in globs for path in paths if path.is_file()})
    except (NotImplementedError, ValueError):
        raise ConfigError(f"{pattern!r} is no glob below the recipe's root.") from None
    if closed := [path.name for path in found if not os.access(path, os.R_OK)]:
        raise ConfigError(f"{closed[0]!r} (of {pattern!r}) may not be read: see its permissions.")
    if not found and not may_be_absent:
        raise ConfigError(
            f"no file matches {pattern!r} below {root!r}: set the recipe's root (--set root=DIR) "
            "or the path."
        )
    return found


def records(root: str, piece: Piece, source: SourceConfig, max_bytes: int) -> Iterator[Record]:
    """The records of a piece, in order."""
    path = Path(root, piece.path)
    if piece.stop == 0:
        found = iter([Record(0, 0, {}, "empty_file")])
    elif source.format == "jsonl":
        found = _jsonl(path, piece, max_bytes)
    elif source.format == "parquet":
        found = _parquet(path, piece, max_bytes)
    else:
        found = _whole(path, piece, max_bytes, WHOLE[source.format])
    for record in found:
        if source.limit and record.line >= source.limit:
            break
        yield record


def render(template: str, fields: Mapping[str, Any]) -> str:
    """Fill a template.

    Raises:
        LookupError: The record lacks one of its fields, or has null there.
        UnicodeError: The text is no Unicode, such as half of a surrogate pair.
    """
    text = FIELD.sub(lambda found: _text(fields, found[1].split(".")), template)
    text.encode()
    return text


def strings(path: Path) -> Iterator[tuple[str, str]]:
    """Every text in every row of a JSONL file, under the name of its file and line.

    Raises:
        ConfigError: A row cannot be read: what is not known cannot be kept out.
    """
    for record in _jsonl(path, Piece("", path.name, 0, path.stat().st_size, 0), 1 << 30):
        name = f"{path.name}:{record.line + 1}"
        if record.fault:
            raise ConfigError(f"{name} is no JSON object ({record.fault}): restore the file.")
        yield from ((name, text) for text in _strings(record.fields))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)


def _text(value: Any, names: list[str]) -> str:
    if not names:
        if value is None:
            raise KeyError("null")
        if isinstance(value, bytes):  # as some writers of parquet store text
            return value.decode()
        return (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        )
    name, is_list, _ = names[0].partition("[*]")
    below = value[name] if isinstance(value, Mapping) else None
    if not is_list:
        return _text(below, names[1:])
    if not isinstance(below, list):
        raise KeyError(name)
    return "\n".join(_text(item, names[1:]) for item in below)


def _cut(path: Path, target: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first line) of pieces of about `target` bytes that end with a line."""
    start = line = lines = position = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            end = position + chunk.rfind(b"\n") + 1
            lines += chunk.count(b"\n")
            position += len(chunk)
            if end - start >= target and b"\n" in chunk:
                yield start, end, line
                start, line = end, lines
    if position > start or position == 0:
        yield start, position, line


def _jsonl(path: Path, piece: Piece, max_bytes: int) -> Iterator[Record]:
    """One record a line; what a damaged gzip file gives before the damage is kept."""
    is_packed = path.suffix == ".gz"
    number, position = piece.line, piece.start
    with gzip.open(path) if is_packed else path.open("rb") as file:
        file.seek(piece.start)
        while is_packed or position < piece.stop:
            try:
                line, size = _line(file, max_bytes)
            except GZIP_DAMAGE as error:
                fault = "gzip_cut_short" if isinstance(error, EOFError) else "gzip_damaged"
                yield Record(number, 0, {}, fault)
                return
            if not size:
                return
            if size > max_bytes:
                yield Record(number, size, {}, "too_long")
            elif line.strip():
                yield _decode(number, line)
            number, position = number + 1, position + size


def _line(file: IO[bytes] | gzip.GzipFile, max_bytes: int) -> tuple[bytes, int]:
    """The next line and its size; of one that is too long, not all."""
    line, size = b"", 0
    while part := file.readline(min(max_bytes, CHUNK_BYTES) + 1):
        line = line + part if size <= max_bytes else b""
        size += len(part)
        if part.endswith(b"\n"):
            break
    return line, size


def _decode(number: int, line: bytes) -> Record:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return Record(number, len(line), {}, "broken_utf8")
    except (ValueError, RecursionError):
        return Record(number, len(line), {}, "broken_json")
    is_object = isinstance(fields, dict)
    return Record(number, len(line), fields if is_object else {}, "" if is_object else "no_object")


def _parquet(path: Path, piece: Piece, max_bytes: int) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for row in (batch.slice(n, 1) for n in range(len(batch))):
                    fields: dict[str, Any] = {}
                    fault = "too_long" if row.nbytes > max_bytes else ""
                    try:
                        fields = {} if fault else row.to_pylist()[0]
                    except (OverflowError, ValueError) as error:
                        is_text = isinstance(error, UnicodeDecodeError)
                        fault = "broken_utf8" if is_text else "broken_row"
                    yield Record(number, row.nbytes, fields, fault)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        yield Record(number, piece.stop, {}, "broken_parquet")


def _whole(
    path: Path, piece: Piece, max_bytes: int, parts: Callable[[bytes], Iterator[tuple[str, str]]]
) -> Iterator[Record]:
    """What needs all bytes of a file at once, unpacked if it is gzip; `parts` gives text, fault."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except GZIP_DAMAGE:
        yield Record(0, piece.stop, {}, "gzip_damaged")
        return
    if len(data) > max_bytes:
        yield Record(0, piece.stop, {}, "too_long")
        return
    for number, (text, fault) in enumerate(parts(data)):
        yield Record(number, len(text.encode(errors="replace")) or len(data), {"text": text}, fault)


def _text_parts(data: bytes) -> Iterator[tuple[str, str]]:
    """A document, or several with form feeds between."""
    for part in data.split(b"\f"):
        try:
            yield part.decode("utf-8-sig"), ""
        except UnicodeDecodeError:
            yield "", "broken_utf8"


def _html(data: bytes) -> Iterator[tuple[str, str]]:
    import trafilatura

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it is our part to say why
    text = trafilatura.extract(data, include_comments=False) or ""
    is_broken = "\ufffd" in text and "\ufffd".encode() not in data
    yield text, "broken_utf8" if is_broken else "" if text else "no_text"


def _pdf(data: bytes) -> Iterator[tuple[str, str]]:
    import pypdf
    from pypdf.errors import DependencyError, PyPdfError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        is_closed = reader.is_encrypted
        text = "" if is_closed else "\n\n".join(page.extract_text() for page in reader.pages)
        yield text, "encrypted_pdf" if is_closed else "" if text.strip() else "no_text_layer"
    except DependencyError:
        yield "", "encrypted_pdf"
    # All that a malformed file is known to make pypdf stumble over.
    except (PyPdfError, ArithmeticError, AssertionError, AttributeError, LookupError, OSError):
        yield "", "broken_pdf"
    except (RuntimeError, TypeError, ValueError, struct.error, zlib.error):
        yield "", "broken_pdf"


WHOLE = {"text": _text_parts, "html": _html, "pdf": _pdf}
