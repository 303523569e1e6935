"""A benchmark's result: a dated Markdown table and a figure, with what it takes to repeat it."""

import datetime
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from attending import artifact
from attending.mesh import hardware

HERE = Path(__file__).parent
matplotlib.rcParams["svg.hashsalt"] = "attending"  # the same figures give the same file


class Measure(NamedTuple):
    """Repeats of one quantity of one subject."""

    quantity: str
    subject: str
    values: Sequence[float]

    @property
    def text(self) -> str:
        """Median, and the whole spread."""
        low, high = min(self.values), max(self.values)
        if len(self.values) == 1:
            return f"{low:,.2f}" if abs(low) >= 1 else f"{low:.3f}"
        return f"{statistics.median(self.values):,.2f} ({low:,.2f} to {high:,.2f})"


def write(
    name: str,
    title: str,
    notes: str,
    measures: Sequence[Measure],
    *,
    rows_are_subjects: bool = False,
    ratios: bool = True,
) -> Path:
    """Write `NAME.md` and `NAME.svg` beside this file; the first subject is the one compared.

    Where many are compared they are the rows, each cell with its ratio, if `ratios` are wanted.
    """
    quantities = list(dict.fromkeys(m.quantity for m in measures))
    subjects = list(dict.fromkeys(m.subject for m in measures))
    found = {(m.quantity, m.subject): m for m in measures}
    rows = []
    if rows_are_subjects:
        head = ["", *quantities]
        for subject in subjects:
            cells = []
            for quantity in quantities:
                first, mine = found.get((quantity, subjects[0])), found.get((quantity, subject))
                ratio = _ratio(first, mine) if ratios and subject != subjects[0] else ""
                cells.append("; ".join(filter(None, (mine.text, ratio))) if mine else "")
            rows.append([subject, *cells])
    else:
        head = ["", *subjects, *(f"{subjects[0]} / {other}" for other in subjects[1:])]
        for quantity in quantities:
            row = [found.get((quantity, subject)) for subject in subjects]
            cells = [measure.text if measure else "" for measure in row]
            rows.append([quantity, *cells, *(_ratio(row[0], other) for other in row[1:])])
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    repeats = len(measures[0].values)
    how = f"Medians of {repeats} repeats, with the spread." if repeats > 1 else "One run."
    text = [f"# {title}", "", notes.strip(), "", how, ""]
    text += [*lines, "", f"![{title}]({name}.svg)", "", *facts(), ""]
    page = HERE / f"{name}.md"
    page.write_text("\n".join(text), encoding="utf-8")
    _draw(HERE / f"{name}.svg", title, quantities, subjects, found)
    return page


def facts() -> list[str]:
    """What it takes to repeat a figure: date, command, commit, hardware, versions."""
    machine = hardware()
    return [
        f"- date: {datetime.datetime.now(datetime.UTC).date()}",
        f"- command: `python benchmarks/{artifact.command()}`",
        f"- commit: {artifact.commit()}",
        f"- hardware: {machine['cpu']}, {machine['available_cores']} cores, "
        f"{int(str(machine['memory_bytes'])) / 2**30:.1f} GiB, {', '.join(machine['simd'])}",  # type: ignore[arg-type]
        "- versions: " + ", ".join(f"{k} {v}" for k, v in artifact.versions().items()),
    ]


def about() -> str:
    """The same without the command, in a line."""
    date, _, commit, *rest = facts()
    return "; ".join(one[2:] for one in (date, commit, *rest))


def kept(file: Path, asked: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, now or before, with what was asked and, unless it has one, `about`.

    Raises:
        SystemExit: The record is of other settings.
    """
    if not file.is_file():
        told = json.dumps({"about": about()} | make() | {"asked": asked})
        file.parent.mkdir(exist_ok=True)
        draft = file.with_suffix(".tmp")
        draft.write_text(f"{told}\n", "utf-8")
        draft.replace(file)
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    if found["asked"] != json.loads(json.dumps(asked)):
        raise SystemExit(
            f"{file} was measured with {found['asked']}, not {asked}: remove it to measure again."
        )
    return found


def _ratio(ours: Measure | None, theirs: Measure | None) -> str:
    """Of the repeats that ran side by side, so that a slow minute of the machine cancels out."""
    if ours is None or theirs is None:
        return ""
    ratios = [a / b for a, b in zip(ours.values, theirs.values, strict=True)]
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}{spread}"


def _draw(
    file: Path,
    title: str,
    quantities: Sequence[str],
    subjects: Sequence[str],
    found: dict[tuple[str, str], Measure],
) -> None:
    width = max(3.2, 0.45 * len(subjects))
    columns = min(5 if width == 3.2 else 3, len(quantities))
    rows = -(-len(quantities) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(width * columns, 3 * rows), layout="constrained", squeeze=False
    )
    panels = list(axes.flat)
    for panel in panels[len(quantities) :]:
        panel.set_visible(False)
    for panel, quantity in zip(panels, quantities, strict=False):
        shown = [s for s in subjects if (quantity, s) in found]
        for place, subject in enumerate(shown):
            values = found[quantity, subject].values
            middle = statistics.median(values)
            spread = [[middle - min(values)], [max(values) - middle]]
            color = f"C{subjects.index(subject)}"
            panel.bar(place, middle, 0.7, yerr=spread, capsize=4, color=color)
        panel.set_xlim(-0.8, max(len(shown), 2) - 0.2)
        slope = {"rotation": 35, "ha": "right"} if len(shown) > 3 else {}
        panel.set_xticks(range(len(shown)), shown, fontsize=8, **slope)
        panel.set_title(quantity, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, metadata={"Date": None})
