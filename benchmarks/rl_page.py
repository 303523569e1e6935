"""rl.md and rl.svg out of what benchmarks/rl.py kept in rl/."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot
from midtrain import markdown
from numpy.typing import NDArray
from page import HERE
from scipy.stats import t

from attending.model.files import read_config
from attending.sources import resolve
from attending.train.plan import flops

NOTES = HERE / "rl" / "notes.md"
DRAWS = 2000
Floats = NDArray[np.float64]
Found = Mapping[str, Mapping[str, Any]]


def write() -> None:
    files = sorted((HERE / "rl").glob("*.json"))
    found: Found = {file.stem: json.loads(file.read_text("utf-8")) for file in files}
    text = ["# Reinforcement learning: what each stage is worth", "", NOTES.read_text("utf-8")]
    for name, part in (("rules-0", first), ("rubrics", second), ("dialogues", third)):
        if name in found:
            text += [*part(found), ""]
    draw(found)
    text += ["![Curves](rl.svg)", "", "`python benchmarks/rl.py DATA_DIR WORK_DIR` with", ""]
    text += [f"- {name}: `{words(one['asked'])}`; {one['about']}" for name, one in found.items()]
    text += [""]
    (HERE / "rl.md").write_text("\n".join(text), "utf-8")


def words(asked: Mapping[str, Any]) -> str:
    """The options of the command that made a record."""
    pairs = {name: one if isinstance(one, list) else [one] for name, one in asked.items()}
    return " ".join(f"--{name} {one}" for name, every in pairs.items() for one in every)


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
    every = (row["scores"] for row in rows)
    return np.array([one[0] if likeliest else np.mean(one[1:]) for one in every])


def first(found: Found) -> list[str]:
    start, lines = found["start"]["answers"], ["## Stage 1: rules", ""]
    runs = {name: one for name, one in found.items() if name.startswith("rules-")}
    spent, tuned = ([one[key] for one in runs.values()] for key in ("spent", "tuned"))
    asked = runs["rules-0"]["asked"]
    arch = read_config(resolve(asked["model"]).path)
    each = flops(arch, [asked["context"]]) / asked["context"]
    mean = {key: float(np.mean([one[key] for one in spent])) for key in spent[0]}
    sampled, trained = each / 3 * mean["sampled_tokens"], each * mean["trained_rows"]
    cases = ", ".join(str(one["cases"]) for one in runs.values())
    lines += [
        f"{cases} cases to learn from, {len(start)} held out. {asked['steps']} steps sample "
        f"{mean['answers']:,.0f} answers ({mean['sampled_tokens']:,.0f} tokens, "
        f"{sampled / 1e12:,.1f} TFLOP) and train on {mean['trained_rows']:,.0f} rows "
        f"({trained / 1e12:,.1f} TFLOP at 6 a weight and row). The baseline samples as many "
        f"answers ({', '.join(str(one['repeats']) for one in tuned)} to each case) and trains on "
        f"as many rows: {', '.join(str(one['kept']) for one in tuned)} right answers, "
        f"{', '.join(format(one['epochs'], '.2f') for one in tuned)} epochs. Prompts are most of "
        "the rows, and a group's is read once where the baseline reads it with every answer: "
        f"{mean['learnt_tokens']:,.0f} tokens of answers are learnt from, by the baseline "
        f"{np.mean([one['learnt_tokens'] for one in tuned]):,.0f}.",
        "",
    ]
    head = ["", "likeliest answer", f"mean of {len(next(iter(start.values()))['scores']) - 1}"]
    kinds = sorted({row["kind"] for row in start.values()})
    rows = []
    arms = {"start": start}
    for title, arm in (("reinforced", "rl"), ("rejection", "rejection")):
        arms |= {f"{title}, seed {name[6:]}": one[arm] for name, one in runs.items()}
    for name, answers in arms.items():
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
                scores(run[one], likeliest=is_first)
                - scores(run[other] if other else start, likeliest=is_first)
                for run in runs.values()
            ]
            cells += [cell(np.mean(apart, axis=0), signed=True)]
            cells += [over_seeds([float(each.mean()) for each in apart])]
        rows.append([title, *cells])
    head = ["difference, paired", "likeliest, over cases", "over seeds", "sampled, over cases"]
    return [*lines, *markdown([*head, "over seeds"], rows)]


def second(every: Found) -> list[str]:
    found = every["rubrics"]
    arms = {
        arm: {
            key: np.array([row[key] for row in found[arm].values()], np.float64)
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


def third(every: Found) -> list[str]:
    found = every["dialogues"]["arms"]
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


def draw(found: Found) -> None:
    stages = {"1": "rules-", "2": "rubrics", "3": "dialogues"}
    shown = {
        f"stage {number}": {name: one for name, one in found.items() if name.startswith(begin)}
        for number, begin in stages.items()
    }
    shown = {stage: runs for stage, runs in shown.items() if runs}
    keys = list(next(iter(next(iter(shown.values())).values()))["curves"])
    size = (3 * len(keys), 2.6 * len(shown))
    figure, axes = pyplot.subplots(len(shown), len(keys), figsize=size, squeeze=False)
    for row, (stage, runs) in zip(axes, shown.items(), strict=True):
        for panel, key in zip(row, keys, strict=True):
            for name, run in runs.items():
                if run["curves"][key]:
                    steps, values = zip(*run["curves"][key], strict=True)
                    window = min(1 if key.startswith("heldout") else 5, len(values))
                    smooth = np.convolve(values, np.ones(window) / window, "valid")
                    panel.plot(steps[window - 1 :], smooth, label=name)
            panel.set_title(f"{stage}: {key}", fontsize=8)
            panel.tick_params(labelsize=7)
            panel.spines[["top", "right"]].set_visible(False)
        row[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(HERE / "rl.svg", metadata={"Date": None})
