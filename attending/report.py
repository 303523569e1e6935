"""One self-contained page about a run, drawn from its `metrics.jsonl` and `run.json`.

`metrics.jsonl` is the truth: the page shows no number that is not in one of the two files, loads
nothing from a network, and shows every text as text. A run that has not ended has no `run.json`
yet; the page says so.
"""

import base64
import io
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from attending.errors import CheckpointError, UsageError
from attending.logs import read_metrics


class Series(NamedTuple):
    """One metric over the steps that wrote it."""

    name: str
    steps: list[int]
    values: list[float]


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run's folder and return its path.

    Raises:
        UsageError: There is no such folder.
        CheckpointError: Its `metrics.jsonl` is absent, empty or damaged, or its `run.json` damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; expected a run's, with a metrics.jsonl in it.")
    areas: dict[str, list[Series]] = {}
    found = _read_series(folder / "metrics.jsonl")
    for series in sorted(found, key=lambda one: one.name.startswith("run/")):  # the clock last
        areas.setdefault(series.name.partition("/")[0], []).append(series)
    run = _read_run(folder / "run.json")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(plot=_plot, show=_show)
    source = (resources.files("attending") / "report.html").read_text(encoding="utf-8")
    page = environment.from_string(source).render(name=folder.resolve().name, areas=areas, run=run)
    draft = folder / "report.html.tmp"
    draft.write_text(page, encoding="utf-8")
    return draft.replace(folder / "report.html")


def _read_series(path: Path) -> list[Series]:
    """Every metric of the file, in the order of first appearance."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: give the folder of a run that has begun.")
    found: dict[str, Series] = {}
    try:
        for row in read_metrics(path):
            if not _is_whole(row):
                raise _damaged(path, json.dumps(row))
            step = row.pop("step")
            for name, value in row.items():
                series = found.setdefault(name, Series(name, [], []))
                series.steps.append(step)
                series.values.append(value)
    except json.JSONDecodeError as error:
        raise _damaged(path, error.doc) from None
    if not found:
        raise CheckpointError(f"{path} is empty: the run has not finished its first step. Wait.")
    return list(found.values())


def _read_run(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    try:
        run = json.loads(text)
    except json.JSONDecodeError:
        raise _damaged(path, text) from None
    if not isinstance(run, dict):
        raise _damaged(path, text)
    return run


def _is_whole(row: object) -> bool:
    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(type(value) in (int, float) and math.isfinite(value) for value in row.values())
    )


def _damaged(path: Path, text: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged at {text.strip()[:80]!r}: expected what `attending` wrote. "
        "Restore it, or resume the run, which repairs it."
    )


def _plot(series: Series) -> str:
    """The curve as an image inside the page: its size does not grow with the number of steps."""
    from matplotlib.figure import Figure  # half a second that only this verb should pay

    figure = Figure(figsize=(4.4, 2.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(series.steps, series.values, lw=1, marker="." if len(series.steps) < 50 else "")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=180, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(image.getvalue()).decode()


def _show(value: object) -> str:
    """Numbers as people read them, records as JSON, the rest as it is."""
    if type(value) is int:
        return f"{value:,}"
    if type(value) is float:
        return f"{value:.6g}"
    if isinstance(value, dict):
        return json.dumps(value, indent=2, ensure_ascii=False)
    if isinstance(value, list):
        return ", ".join(_show(item) for item in value) or "none"
    return "not recorded" if value is None else str(value)
