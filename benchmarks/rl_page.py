"""rl.md and rl.svg out of what benchmarks/rl.py found."""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from midtrain import markdown
from numpy.typing import NDArray
from page import HERE, facts
from scipy.stats import t

from attending.logs import read_metrics
from attending.model.files import read_config
from attending.sources import resolve
from attending.train.plan import flops

NOTES = HERE / "rl" / "notes.md"
DRAWS = 2000
Floats = NDArray[np.float64]
Stages = Mapping[str, Mapping[str, Any]]


def write(told: argparse.Namespace, found: Stages) -> None:
    text = ["# Reinforcement learning: what each stage is worth", "", NOTES.read_text("utf-8")]
    for stage, part in (("1", first), ("2", second), ("3", third)):
        if stage in found:
            text += [*part(told, found[stage]), ""]
    draw(told, found)
    text += ["![Curves](rl.svg)", "", *facts(), ""]
    (HERE / "rl.md").write_text("\n".join(text), "utf-8")


def bootstrap(values: Floats) -> tuple[float, float]:
    """95 % of the mean over drawn cases."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(DRAWS, len(values)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def over_seeds(values: Sequence[float]) -> str:
    """Mean and 95 % by Student's t: of few seeds it is wide."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:+.3f} (one seed)"
    half = float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def cell(values: Floats, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    low, high = bootstrap(values)
    return f"{values.mean():{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def scores(answers: Mapping[str, Any], *, likeliest: bool, kind: str = "") -> Floats:
    """Of each case: the likeliest answer's, or the mean of those that were sampled."""
    rows = (row for row in answers.values() if not kind or row["kind"] == kind)
    every = ([one["score"] for one in row["answers"]] for row in rows)
    return np.array([one[0] if likeliest else np.mean(one[1:]) for one in every])


def first(told: argparse.Namespace, found: Mapping[str, Any]) -> list[str]:
    start, lines = found["start"][0], ["## Stage 1: rules", ""]
    spent = [*found["spent"].values()]
    arch = read_config(resolve(told.model).path)
    each = flops(arch, [told.context]) / told.context
    mean = {key: float(np.mean([one[key] for one in spent])) for key in spent[0]}
    sampled, trained = each / 3 * mean["sampled_tokens"], each * mean["trained_rows"]
    tuned = [json.loads((told.work / f"rejection-{s}/told.json").read_text()) for s in found["rl"]]
    lines += [
        f"{found['cases']} cases to learn from, {len(start)} held out. A run samples "
        f"{mean['answers']:,.0f} answers ({mean['sampled_tokens']:,.0f} tokens, "
        f"{sampled / 1e12:,.1f} TFLOP) and trains on {mean['trained_rows']:,.0f} rows "
        f"({trained / 1e12:,.1f} TFLOP at 6 a weight and row). The baseline samples as many "
        f"answers ({', '.join(str(one['repeats']) for one in tuned)} to each case) and trains on "
        f"as many rows: {', '.join(str(one['kept']) for one in tuned)} right answers, "
        f"{', '.join(format(one['epochs'], '.2f') for one in tuned)} epochs.",
        "",
    ]
    head = ["", "likeliest answer", f"mean of {len(next(iter(start.values()))['answers']) - 1}"]
    kinds = sorted({row["kind"] for row in start.values()})
    rows = []
    arms = {"start": found["start"], "reinforced": found["rl"], "rejection": found["rejection"]}
    for arm, runs in arms.items():
        for seed, answers in runs.items():
            name = arm if arm == "start" else f"{arm}, seed {seed}"
            cells = [cell(scores(answers, likeliest=one)) for one in (True, False)]
            cells += [f"{scores(answers, likeliest=False, kind=k).mean():.3f}" for k in kinds]
            rows.append([name, *cells])
    lines += ["Held-out accuracy; in brackets 95 % over cases.", ""]
    lines += [*markdown([*head, *kinds], rows), ""]
    rows = []
    for title, one, other in (
        ("reinforced - start", "rl", ""),
        ("rejection - start", "rejection", ""),
        ("reinforced - rejection", "rl", "rejection"),
    ):
        cells = []
        for is_first in (True, False):
            apart = [
                scores(found[one][s], likeliest=is_first)
                - scores(found[other][s] if other else start, likeliest=is_first)
                for s in found["rl"]
            ]
            cells += [cell(np.mean(apart, axis=0), signed=True)]
            cells += [over_seeds([float(each.mean()) for each in apart])]
        rows.append([title, *cells])
    head = ["difference, paired", "likeliest, over cases", "over seeds", "sampled, over cases"]
    return [*lines, *markdown([*head, "over seeds"], rows)]


def second(_: argparse.Namespace, found: Mapping[str, Any]) -> list[str]:
    arms = {
        arm: {
            key: np.array([row["answers"][0][key] for row in found[arm].values()], np.float64)
            for key in ("training", "reporting", "tokens")
        }
        for arm in ("before", "after")
    }
    rows = []
    for key, name in (
        ("training", "score by the judge of the training"),
        ("reporting", "score by the other judge"),
        ("tokens", "length, tokens"),
    ):
        before, after = (arms[arm][key] for arm in ("before", "after"))
        rows.append([name, cell(before), cell(after), cell(after - before, signed=True)])
    shorter = arms["after"]["tokens"] <= arms["before"]["tokens"]
    gain = (arms["after"]["reporting"] - arms["before"]["reporting"])[shorter]
    equal = cell(gain, signed=True) if len(gain) else "none"
    worth = ", ".join(
        f"{name} {found[name][0]:.2f} ({found[name][1]:.2f} to {found[name][2]:.2f})"
        for name in ("training", "reporting")
    )
    return [
        "## Stage 2: rubrics",
        "",
        f"{len(found['before'])} held-out questions, the likeliest answer. The judges' macro-F1 "
        f"on constructed labels: {worth}.",
        "",
        *markdown(["", "before", "after", "difference, paired"], rows),
        "",
        f"Of the {int(shorter.sum())} questions whose answer is as long as before or shorter, the "
        f"other judge's score changes by {equal}.",
    ]


def third(_: argparse.Namespace, found: Mapping[str, Any]) -> list[str]:
    rows, start = [], found["start"]
    for arm, patients in found.items():
        facts_of = np.array([one["facts"] / one["turns"] for one in patients.values()])
        base = np.array([one["facts"] / one["turns"] for one in start.values()])
        share = np.array([one["share"] for one in patients.values()])
        apart = "" if arm == "start" else cell(facts_of - base, signed=True)
        turns = np.mean([one["turns"] for one in patients.values()])
        rows.append([arm, cell(facts_of), apart, cell(share), f"{turns:.1f}"])
    head = ["", "new facts a turn", "more than the start", "share of the case", "turns"]
    return [
        "## Stage 3: consultations",
        "",
        f"{len(start)} held-out patients, interviewed for at most six turns.",
        "",
        *markdown(head, rows),
    ]


def curve(run: Path, key: str, window: int) -> tuple[list[float], Floats]:
    """A metric over steps, a running mean."""
    seen = [(row["step"], row[key]) for row in read_metrics(run / "metrics.jsonl") if key in row]
    if not seen:
        return [], np.array([])
    steps, values = zip(*seen, strict=True)
    window = min(window, len(values))
    smooth = np.convolve(values, np.ones(window) / window, "valid")
    return list(steps[window - 1 :]), smooth


def draw(told: argparse.Namespace, found: Stages) -> None:
    runs: dict[str, Sequence[str]] = {
        "1": [f"rules-{seed}" for seed in range(told.seeds)],
        "2": ["rubrics"],
        "3": ["dialogues"],
    }
    keys = ("rl/score", "heldout/score", "rl/length_tokens", "rl/entropy_nats")
    keys += ("rl/zero_advantage_share", "rl/mismatch_kl_nats")
    stages = sorted(found)
    figure, axes = pyplot.subplots(
        len(stages), len(keys), figsize=(3 * len(keys), 2.6 * len(stages)), squeeze=False
    )
    for row, stage in zip(axes, stages, strict=True):
        for panel, key in zip(row, keys, strict=True):
            for name in _there(told.work, runs[stage]):
                window = 1 if key.startswith("heldout") else 5
                panel.plot(*curve(told.work / name, key, window), label=name)
            panel.set_title(f"stage {stage}: {key}", fontsize=8)
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
        row[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(HERE / "rl.svg", metadata={"Date": None})


def _there(work: Path, names: Iterable[str]) -> list[str]:
    return [name for name in names if (work / name / "metrics.jsonl").is_file()]
