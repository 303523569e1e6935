"""One self-contained page about a run, drawn from its `metrics.jsonl` and `run.json`.

`metrics.jsonl` is the truth: the page shows no number that is not in one of its files, loads
nothing from a network, and shows every text as text. A run that has not ended has no `run.json`
yet; the page says so. Where a `funnel.json` lies, the page says what each step removed.
"""

import base64
import io
import json
import math
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from attending.errors import CheckpointError, UsageError
from attending.logs import read_metrics


class Stage(NamedTuple):
    """A step of a funnel for one domain, all sources together."""

    name: str
    domain: str
    entered: dict[str, int]  # documents, bytes
    left: dict[str, int]
    removed: dict[str, int]  # documents by reason


class Series(NamedTuple):
    """One metric over the steps that wrote it."""

    name: str
    steps: list[int]
    values: list[float]

    @property
    def is_curve(self) -> bool:
        """One point is no curve: the table of final values says it all."""
        return len(self.steps) > 1


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
    run = _read_object(folder / "run.json")
    funnel = _read_object(folder / "funnel.json")
    try:
        stages = _stages(funnel["rows"]) if funnel else []
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder / "funnel.json", str(error)) from None
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(plot=_plot, show=_show, funnel=_draw_funnel)
    source = (resources.files("attending") / "report.html").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        name=folder.resolve().name.removesuffix(".tmp"),
        areas=areas,
        run=run,
        funnel=funnel,
        stages=stages,
        written=_read_samples(folder / "samples.jsonl"),
    )
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


def _read_samples(path: Path) -> list[dict[str, Any]]:
    """What a model wrote while it trained: rows of `step`, `prompt` and `text`."""
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in ("step", "prompt", "text")})
        except (json.JSONDecodeError, KeyError, TypeError):
            raise _damaged(path, line) from None
    return rows


def _read_object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text)
    except json.JSONDecodeError:
        raise _damaged(path, text) from None
    if not isinstance(values, dict):
        raise _damaged(path, text)
    return values


def _stages(rows: list[dict[str, Any]]) -> list[Stage]:
    """The rows of all sources added up, in the order of the steps."""
    found: dict[tuple[str, str], Stage] = {}
    for row in rows:
        key = row["step"], row["domain"]
        stage = found.setdefault(key, Stage(*key, Counter(), Counter(), Counter()))
        for total, part in zip(stage[2:], (row["in"], row["out"], row["removed"]), strict=True):
            total.update(part)
    return list(found.values())


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
    return embedded(figure)


def _draw_funnel(stages: list[Stage]) -> str:
    """A panel a domain: what each step let through, and what it removed, in documents."""
    from matplotlib.figure import Figure

    domains = list(dict.fromkeys(stage.domain for stage in stages))
    steps = list(dict.fromkeys(stage.name for stage in stages))
    figure = Figure((5.2 * len(domains), 0.8 + 0.36 * len(steps)), layout="constrained")
    panels = figure.subplots(1, len(domains), sharey=True, squeeze=False)[0]
    for axes, domain in zip(panels, domains, strict=True):
        own = [stage for stage in stages if stage.domain == domain]
        places = [steps.index(stage.name) for stage in own]
        kept = [stage.left.get("documents", 0) for stage in own]
        gone = [sum(stage.removed.values()) for stage in own]
        axes.barh(places, kept, 0.7, color="#3b6ea5", label="kept")
        axes.barh(places, gone, 0.7, left=kept, color="#d1495b", label="removed")
        for place, stays, goes in zip(places, kept, gone, strict=True):
            label = f" {stays:,}" + (f"  (-{goes:,})" if goes else "")
            axes.text(stays + goes, place, label, va="center", fontsize=8)
        axes.set_xlim(0, 1.35 * max(map(sum, zip(kept, gone, strict=True)), default=1) or 1)
        axes.set_yticks(range(len(steps)), steps)
        axes.set_title(f"{domain}, documents", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    return embedded(figure)


def embedded(figure: Any) -> str:
    """A figure as a data URI."""
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
