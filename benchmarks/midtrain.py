"""Three ways to teach the default model medicine, and what each costs the rest.

python benchmarks/midtrain.py DATA_DIR WORK_DIR

makes the corpus in WORK_DIR once, then the runs of `ARMS` that are not there yet, one after the
other, and writes midtrain.md. A run that was stopped is gone on with.
WORK_DIR/tests holds the suite's data: general text by the split rule's held-out side only.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib import pyplot
from page import HERE, facts

from attending.corpus.split import is_held_out
from attending.evaluate.forgetting import of_documents, read_documents
from attending.evaluate.page import Change
from attending.logs import read_metrics
from attending.mesh import hardware

HIGH = ("peak=1e-3", "final=1e-4")  # the recipe's own rate forgets nothing
ARMS = {
    "plain": ("plain", "plain continued training", HIGH),
    "gentle": ("plain", "plain, a fifth of the rate", ()),
    "replay": ("replay", "replay: cross entropy on all", HIGH),
    "open": ("open", "self-constraint on general and maths", HIGH),
}
TITLES = {arm: title for arm, (_, title, _) in ARMS.items()}
PARTS = ("medical", "general", "maths")
NOTES = HERE / "midtrain" / "notes.md"
LIMIT = 100


def attending(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "attending.cli", *words], check=True)


def make(data: Path, work: Path) -> None:
    """The corpus, the suite's data, and the runs."""
    if not (work / "corpus").exists():
        words = ["--set", f"root={data}", "--out", str(work / "corpus"), "--resume"]
        attending("corpus", "midtrain", *words)
    write_tests(data, work / "tests")
    for arm, (recipe, _, rates) in ARMS.items():
        if (work / arm).exists():
            continue
        settings = [f"corpus={work / 'corpus'}", f"forgetting.data={work / 'tests'}"]
        settings += [f"forgetting.limit={LIMIT}", f"compute.precision={precision()}"]
        settings += [f"optimizer.{rate}" for rate in rates]
        pairs = [word for setting in settings for word in ("--set", setting)]
        attending("midtrain", recipe, *pairs, "--out", str(work / arm), "--resume")


def precision() -> str:
    """Half where this CPU multiplies in it: nearly twice as fast there."""
    simd = cast(list[str], hardware()["simd"])
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & {*simd} else "float32"


def write_tests(data: Path, folder: Path) -> None:
    """The retention suite's data."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("gsm8k_test.jsonl", "ifeval_541.jsonl"):
        (folder / name).write_bytes((data / "eval" / name).read_bytes())
    lines = (data / "train" / "general_openstax.jsonl").read_text("utf-8").splitlines()
    rows = [(json.loads(line), line) for line in lines]
    held = [line for row, line in rows if is_held_out(f"{row['book']}/{row['module']}")]
    (folder / "general_openstax.jsonl").write_text("\n".join(held) + "\n", "utf-8")


def table(work: Path) -> tuple[list[str], dict[str, dict[str, Change]]]:
    """A row an arm: what was read, what it took, what it gained and lost."""
    changes: dict[str, dict[str, Change]] = {}
    for arm in ARMS:
        found = {name: of_documents(name, read_documents(work / arm, name)) for name in PARTS}
        changes[arm] = found
    plain = changes["plain"]
    head = ["", "tokens", "operations, 10^15", "hours", "medical gain, bits a byte", "of plain's"]
    head += ["general loss, bits a byte", "of plain's", "maths loss, bits a byte"]
    rows = []
    for arm, title in TITLES.items():
        run = json.loads((work / arm / "run.json").read_text("utf-8"))
        last = [
            row for row in read_metrics(work / arm / "metrics.jsonl") if "train/loss_nats" in row
        ]
        tokens = int(last[-1]["train/consumed_tokens"])
        medical, general, maths = (changes[arm][name] for name in PARTS)
        rows.append(
            [
                title,
                f"{tokens:,}",
                f"{operations(run, tokens) / 1e15:,.2f}",
                f"{last[-1]['run/elapsed_seconds'] / 3600:.2f}",
                cell(medical, 1),
                f"{medical.gain / plain['medical'].gain:.0%}",
                cell(general, -1),
                f"{general.gain / plain['general'].gain:.0%}" if plain["general"].gain else "",
                cell(maths, -1),
            ]
        )
    return markdown(head, rows), changes


def operations(run: dict[str, Any], tokens: int) -> float:
    """Of the products, the teacher's among them: 6 a weight and token, 2 where it is only asked."""
    parts, weights = run["recipe"]["parts"], 134_515_008
    share = sum(one["share"] for one in parts.values() if one["loss"] == "self_constraint")
    asked = share / sum(one["share"] for one in parts.values())
    return tokens * weights * (6 + 2 * asked)


def cell(change: Change, sign: int) -> str:
    low, high = sorted(sign * end for end in change.interval or (math.nan, math.nan))
    return f"{sign * change.gain:+.4f} ({low:+.4f} to {high:+.4f})"


def tasks(work: Path) -> list[str]:
    """The suite before and after, by arm."""
    head, rows = ["", "before", *TITLES.values()], {}
    for at, arm in enumerate(ARMS):
        told = json.loads((work / arm / "forgetting.json").read_text("utf-8"))["changes"]
        for one in told:
            if one["task"] not in PARTS or one["metric"] != "bits per byte":
                key = f"{one['task']}, {one['metric']}"
                row = rows.setdefault(key, [f"{one['before']:.3f}", *["not measured"] * len(ARMS)])
                low, high = one["interval"] or (math.nan, math.nan)
                row[at + 1] = f"{one['after']:.3f} ({low:+.3f} to {high:+.3f})"
    return markdown(head, [[name, *row] for name, row in rows.items()])


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def draw(work: Path, changes: dict[str, dict[str, Change]]) -> None:
    figure, panels = pyplot.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    for panel, name in zip(panels, PARTS, strict=False):
        for place, arm in enumerate(ARMS):
            one = changes[arm][name]
            low, high = one.interval or (one.gain, one.gain)
            panel.bar(place, one.gain, 0.7, yerr=[[one.gain - low], [high - one.gain]], capsize=4)
        panel.axhline(0, color="#1c2733", lw=0.8)
        panel.set_xticks(range(len(ARMS)), ARMS, fontsize=8)
        panel.set_title(f"{name}: bits a byte gained", fontsize=9)
    for arm in ARMS:
        rows = [row for row in read_metrics(work / arm / "metrics.jsonl")]
        key = "train/medical_loss_nats"
        seen = [(row["train/consumed_tokens"], row[key]) for row in rows if key in row]
        x, y = np.array(seen).T
        smooth = np.convolve(y, np.ones(10) / 10, "valid")
        panels[3].plot(x[len(x) - len(smooth) :] / 1e3, smooth, label=arm)
    panels[3].set_title("medical loss while training, nats", fontsize=9)
    panels[3].set_xlabel("thousand tokens", fontsize=8)
    panels[3].legend(fontsize=8)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    figure.savefig(HERE / "midtrain.svg", metadata={"Date": None})


def main(data: Path, work: Path) -> None:
    make(data, work)
    rows, changes = table(work)
    draw(work, changes)
    counts = {name: len(read_documents(work / "plain", name)) for name in PARTS}
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    text = [
        "# Mid-training: what is gained, and what it costs",
        "",
        NOTES.read_text("utf-8").strip(),
    ]
    text += [
        "",
        f"Held-out documents: {told}.",
        "",
        *rows,
        "",
        "![The three ways](midtrain.svg)",
        "",
    ]
    text += [f"Tasks, {LIMIT} examples each; the interval is the gain's, paired.", "", *tasks(work)]
    (HERE / "midtrain.md").write_text("\n".join([*text, "", *facts(), ""]), "utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
