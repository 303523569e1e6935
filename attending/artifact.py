"""The unit that every verb reads and writes: a Hugging Face model folder with its `run.json`.

A folder is written as `X.tmp/`, flushed to the disk and renamed, so a reader never sees half of
one. `run.json` says how it came to be: enough to do it again, and to trust a number in it.
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from safetensors import SafetensorError

from attending.errors import CheckpointError, UsageError
from attending.mesh import hardware

DEPENDENCIES = ("attending", "torch", "numpy", "safetensors", "tokenizers", "gguf", "datatrove")


@dataclass(frozen=True, slots=True)
class Record:
    """A run that has begun: all of `run.json` but its end."""

    verb: str
    recipe: Mapping[str, Any]
    seed: int | None
    parents: Sequence[Mapping[str, str]]
    """Each `{"uri": ..., "sha256": ...}`."""
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    began_seconds: float = field(default_factory=time.monotonic)


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Yield a draft folder; on success it becomes `target`, on failure nothing does.

    Raises:
        UsageError: `target` exists; nothing is ever overwritten.
        CheckpointError: The disk is full.
    """
    if target.exists():
        raise UsageError(f"{target.name} exists; choose another name or remove it first.")
    draft = target.with_name(target.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        with disk_has_room(target):
            yield draft
            settle(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def settle(draft: Path, target: Path) -> None:
    """Flush a finished draft to the disk and give it its name."""
    for path in [*draft.rglob("*"), draft]:
        _flush(path)
    draft.rename(target)
    _flush(target.parent)


@contextmanager
def disk_has_room(target: Path) -> Iterator[None]:
    """Around what writes `target`: a full disk is a CheckpointError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter keeps the number in its text alone
        told = f"(os error {errno.ENOSPC})" in str(error)
        if not told and getattr(error, "errno", None) != errno.ENOSPC:
            raise
        free = shutil.disk_usage(target.parent).free
        raise CheckpointError(
            f"the disk is full ({free:,} bytes free): {target.name} was not written. "
            "Make room and run the command again, with --resume where a run stopped."
        ) from None


@contextmanager
def alone(folder: Path, remedy: str) -> Iterator[None]:
    """While one process writes to an existing folder, another one is a UsageError."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another process writes to {folder}: wait for it, or {remedy}."
            ) from None
        yield


def finish(
    draft: Path,
    record: Record,
    *,
    title: str,
    note: str = "",
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write `run.json` and the model card, the last files of a model's draft."""
    run = write_run(draft, record, metrics)
    source = (resources.files("attending") / "card.md.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    config = json.loads((draft / "config.json").read_text(encoding="utf-8"))
    card = template.render(title=title, note=note, run=run, config=config)
    (draft / "README.md").write_text(card, encoding="utf-8")


def write_run(
    draft: Path, record: Record, metrics: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Write `run.json`, which a corpus has too, and return what it says."""
    run = {
        "verb": record.verb,
        "command": command(),
        "commit": commit(),
        "seed": record.seed,
        "recipe": without_folders(record.recipe),
        "parents": [without_folders(parent) for parent in record.parents],
        "versions": versions(),
        "hardware": hardware(),
        "started": record.started.isoformat(timespec="seconds"),
        "wall_seconds": round(time.monotonic() - record.began_seconds, 1),
        "metrics": dict(metrics or {}),
    }
    write_json(draft / "run.json", run)
    return run


def write_json(file: Path, values: object) -> None:
    """Write JSON as people read it; text stays as it is."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def digest(path: Path) -> str:
    """sha256 of a file; of a folder, over the names and sha256 of its model files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for file_path in sorted([*path.glob("*.json"), *path.glob("*.safetensors")]):
        if file_path.name != "run.json":
            total.update(f"{file_path.name} {digest(file_path)}\n".encode())
    return total.hexdigest()


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide a result, where installed."""
    found = {"python": sys.version.split()[0]}
    for name in DEPENDENCIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of this package's checkout, `+changes` if it has any; None when installed."""
    top = Path(__file__).parent.parent
    if not (top / ".git").exists():
        return None
    git = ["git", "-C", str(top)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return None
    status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def command() -> str:
    """This process's command line, absolute paths cut to their last name."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return shlex.join(map(without_folders, words))


def without_folders(value: Any) -> Any:
    """Absolute paths cut to their last name, wherever they stand: they are nobody's business."""
    if isinstance(value, str):
        return re.sub(r"(?<![\w.:/}])/(?:[^\s/,;'\"]+/)*([^\s/,;'\"]+)/?", r"\1", value)
    if isinstance(value, Mapping):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(one) for one in value]
    return value


def _flush(path: Path) -> None:
    """Make a file's bytes, or a folder's names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
