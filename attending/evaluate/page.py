"""The report of a run as one page: the scores, how far to trust them, and every example.

`report.json` is the truth: the page shows no score that is not there or in the files of answers and
grades beside it. It loads nothing, runs its own script only, and shows as text what a model, a data
set or a judge wrote. Examples lie in it as JSON, in pieces that are read when one is opened.
"""

import base64
import hashlib
import json
import math
import tomllib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from attending.artifact import disk_has_room
from attending.errors import CheckpointError, UsageError
from attending.report import embedded
from attending.verifier.rubric.schema import read_lines

ROOM = resources.files("attending") / "evaluate"
PIECE = 100  # examples
SHOWN = {"clear gain": "#4f8a5b", "clear loss": "#d1495b", "no clear change": "#a9b4bf"}


class Change(NamedTuple):
    """What became of a task from one model to another, in its metric's unit."""

    task: str
    metric: str
    a: str
    b: str
    before: float | None
    after: float | None
    gain: float
    """More is better, of losses too: of those it is how much less there is."""
    interval: tuple[float, float] | None
    """Of the gain."""
    is_loss: bool

    @property
    def is_clear(self) -> bool:
        """The interval excludes 0."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)

    @property
    def says(self) -> str:
        """In words."""
        if not self.is_clear:
            return "no clear change"
        return "clear gain" if self.gain > 0 else "clear loss"


def write_page(folder: Path) -> Path:
    """Write `report.html` beside a run's `report.json` and return its path.

    Raises:
        UsageError: The folder has no `report.json`.
        CheckpointError: It or a file beside it is damaged or of another form, or the disk is full.
    """
    if not (folder / "report.json").is_file():
        raise UsageError(f"{folder} has no report.json; expected the folder of an evaluation.")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "allow_nan": False,  # no JSON, and a browser would refuse the whole piece
        "separators": (",", ":"),
    }
    environment.filters.update(draw=lambda found: embedded(draw_changes(found)), allow=_allow)
    files = {name: (ROOM / f"page.{name}").read_text("utf-8") for name in ("js", "css")}
    template = environment.from_string((ROOM / "report.html.jinja").read_text("utf-8"))
    try:
        report = json.loads((folder / "report.json").read_text("utf-8"))
        tasks = list(dict.fromkeys(row["task"] for row in report["rows"]))
        examples = list(_examples(folder, report["models"], tasks))
        page = template.render(
            **files,
            report=report,
            tasks=tasks,
            changes=changes(report),
            published=_published(tasks),
            count=len(examples),
            pieces=[examples[at : at + PIECE] for at in range(0, len(examples), PIECE)],
            math=math,
        )
    except (ValueError, KeyError, TypeError, jinja2.UndefinedError) as error:
        raise CheckpointError(
            f"{folder.name}/report.json or a file that it names is damaged or of another version "
            f"({type(error).__name__}: {error}). Run the evaluation again: its answers are kept."
        ) from error
    draft = folder / "report.html.tmp"
    with disk_has_room(draft):
        draft.write_bytes(page.encode("utf-8", "replace"))  # half a surrogate pair is no text
        return draft.replace(folder / "report.html")


def changes(report: dict[str, Any]) -> list[Change]:
    """The paired differences, each so that more is better, in the report's order."""
    rows = {(row["task"], row["model"]): row for row in report["rows"]}
    found = []
    for pair in report["pairs"]:
        a, b = (rows[pair["task"], pair[side]] for side in "ab")
        sign = -1 if a["is_loss"] else 1
        low, high = sorted(sign * end for end in pair["interval"] or (0, 0))
        names = pair["task"], a["metric"], pair["a"], pair["b"]
        gain, interval = sign * pair["difference"], (low, high) if pair["interval"] else None
        found.append(Change(*names, a["score"], b["score"], gain, interval, a["is_loss"]))
    return found


def draw_changes(found: Sequence[Change]) -> Any:
    """A matplotlib figure with a bar a task; right is better, and losses have their own scale."""
    from matplotlib.figure import Figure

    groups = [[one for one in found if one.is_loss is kind] for kind in (False, True)]
    groups = [group for group in groups if group]
    heights = [len(group) + 1.5 for group in groups]
    figure = Figure((7, 0.36 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(groups), height_ratios=heights, squeeze=False)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        reach = max(abs(x) for one in group for x in (one.gain, *(one.interval or ()))) or 1
        for place, one in enumerate(group):
            axes.barh(place, one.gain, 0.6, color=SHOWN[one.says])
            axes.plot(one.interval or (one.gain,) * 2, [place] * 2, color="#1c2733", lw=1.2)
            told = f"{one.gain:+.3f}  {one.says}".replace("-", "−")
            axes.text(1.1 * reach, place, told, va="center", fontsize=8)
        axes.axvline(0, color="#1c2733", lw=0.8)
        axes.set(xlim=(-1.1 * reach, 1.1 * reach), ylim=(len(group) - 0.4, -0.6))
        axes.set_yticks(range(len(group)), [f"{one.task}, {one.metric}" for one in group])
        axes.set_xlabel(f"worse  ←   →  better{' (less)' * group[0].is_loss}", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _published(tasks: Sequence[str]) -> list[dict[str, Any]]:
    """The tables of other models' scores for some tasks."""
    names = [task.replace("-", "_") for task in tasks]
    tables = tomllib.loads((ROOM / "published.toml").read_text("utf-8"))["tables"]
    return [one for one in tables if any(name.startswith(tuple(one["tasks"])) for name in names)]


def _examples(
    folder: Path, models: Sequence[dict[str, Any]], tasks: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Each example with every model's answers to it and their grades."""
    for task in tasks:
        kept = [_answers(folder / model["folder"], task) for model in models]
        for row in _rows(folder / "examples" / f"{task}.jsonl"):
            yield {"task": task, **row, "answers": [own.get(row["id"], []) for own in kept]}


def _answers(folder: Path, task: str) -> dict[str, list[dict[str, Any]]]:
    """A model's answers with their grades by example; the last line of a key counts."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for kind in ("answers", "grades"):
        for row in _rows(folder / f"{task}.{kind}.jsonl"):
            key = row["id"], row["repeat"]
            found[key] = found.get(key, {"score": None, "verdicts": []}) | row
    grouped: dict[str, list[dict[str, Any]]] = {}
    for (name, _), row in sorted(found.items()):
        grouped.setdefault(name, []).append(row)
    return grouped


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Of a file that may not be there: a run may have been stopped before it."""
    return (row for _, row in (read_lines(path) if path.exists() else ()))


def _allow(text: str) -> str:
    """What a Content-Security-Policy allows an inline script or style by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
