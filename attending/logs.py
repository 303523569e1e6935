"""Two streams that never mix: log lines for people, `metrics.jsonl` for measurements.

Log lines never hold patient text, secrets or absolute paths: callers log ids, counts and names.
`metrics.jsonl` is the truth; plots and reports are drawn from it. Names are `area/noun_unit`.
"""

import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

METRIC_NAME = re.compile(r"[a-z0-9]+(/[a-z0-9_@.]+)+")


def setup(*, debug: bool = False, as_json: bool = False) -> None:
    """Send this package's log lines to standard error; under torchrun, rank 0's only.

    Args:
        debug: Show DEBUG lines of this package. Third-party loggers stay at WARNING.
        as_json: One JSON object a line, for machines.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        _JsonFormatter() if as_json else logging.Formatter("%(levelname)s %(name)s: %(message)s")
    )
    package = logging.getLogger("attending")
    package.handlers[:] = [handler]
    package.propagate = False
    quiet = os.environ.get("RANK", "0") != "0"
    package.setLevel(logging.ERROR if quiet else logging.DEBUG if debug else logging.INFO)


class MetricLog:
    """Appends one JSON object a step to `metrics.jsonl`; whole lines only, flushed at once.

    After a crash a half-written last line is cut off, and with `keep_bytes` all that was written
    after the state that is resumed from, so a resumed run's file equals an uninterrupted one's.
    """

    def __init__(self, path: Path, keep_bytes: int | None = None) -> None:
        """Open for appending, after the repair described above; the clock goes on."""
        cut(path, keep_bytes)
        last = _whole_lines(path)[-1:] if path.exists() else []
        before = json.loads(last[0])["run/elapsed_seconds"] if last else 0.0
        self._start = time.monotonic() - before
        self._file = path.open("a", encoding="utf-8")

    @property
    def seconds(self) -> float:
        """Since the run began, the time between a stop and its resumption left out."""
        return time.monotonic() - self._start

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Record the values of one step.

        Raises:
            ValueError: A name is not `area/noun_unit`, or a value is not a finite number.
        """
        for name, value in values.items():
            if not METRIC_NAME.fullmatch(name):
                raise ValueError(f"metric {name!r} is not of the form area/noun_unit")
            if not math.isfinite(value):
                raise ValueError(f"metric {name} is {value} at step {step}")
        row = {"step": step, "run/elapsed_seconds": round(self.seconds, 3), **values}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a half-written last line is left out."""
    return (json.loads(line) for line in _whole_lines(path))


def cut(path: Path, keep_bytes: int | None = None) -> None:
    """Shorten a file of lines to what it held at some time, or to its last whole line."""
    if path.exists():
        whole = path.read_bytes().rfind(b"\n") + 1 if keep_bytes is None else keep_bytes
        os.truncate(path, min(whole, path.stat().st_size))


def _whole_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(
            {
                "time": round(record.created, 3),
                "level": record.levelname,
                "logger": record.name,
                "message": record.getMessage(),
            }
        )
