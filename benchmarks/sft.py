"""Fine-tuning on open medical dialogues: what it gives and costs, beside where it began.

python benchmarks/sft.py DATA_DIR WORK_DIR [MODEL]

tunes MODEL (default: the run `open` of benchmarks/midtrain.py in WORK_DIR) by the recipe `open`,
then asks it, the model it began from and the default model MMLU-medical, PubMedQA and the 60
questions of K-QA that the embedded judge was not fitted on. Writes sft.md. What was stopped is gone
on with.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from midtrain import LIMIT, cell, markdown, precision, write_tests
from page import HERE, facts

from attending.evaluate.forgetting import DocumentBits, of_documents
from attending.logs import read_metrics
from attending.verifier.judge.pairs import PARTS, read_kqa

SOURCES = {"questions": "MedQuAD questions", "sections": "MTS-Dialog", "notes": "ACI-Bench"}
NOTES = HERE / "sft" / "notes.md"
SUITE = """
[tasks.mmlu-med]
kind = "choice"
data = "mmlu_med_test.jsonl"
columns = { id = "id", group = "subject" }
prompt = "mmlu"

[tasks.pubmedqa]
kind = "choice"
data = "pubmedqa_pqal_test500.jsonl"
limit = 150
columns = { id = "id", context = "contexts", answer = "answer" }
fixed = ["yes", "no", "maybe"]

[tasks.kqa]
kind = "statements"
data = "kqa_report.jsonl"
sampling = { max_tokens = 320 }
"""


def attending(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "attending.cli", *words])
    if done.returncode not in (0, 3):
        raise SystemExit(done.returncode)


def make(data: Path, work: Path, model: str) -> dict[str, Any]:
    """The tuned model, and the suite's report of the three."""
    tests = work / "tests"
    write_tests(data, tests)
    for name in ("mmlu_med_test.jsonl", "pubmedqa_pqal_test500.jsonl"):
        (tests / name).write_bytes((data / "eval" / name).read_bytes())
    rows = read_kqa(data / "eval" / "kqa_201_physician_rubric.jsonl")[PARTS["report"]]
    (tests / "kqa_report.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), "utf-8"
    )
    (work / "asked.toml").write_text(SUITE, "utf-8")
    if not (work / "tuned").exists():
        settings = [f"root={data}", f"model={model}", f"forgetting.data={tests}"]
        settings += [f"forgetting.limit={LIMIT}", f"compute.precision={precision()}"]
        pairs = [word for setting in settings for word in ("--set", setting)]
        attending("sft", "open", *pairs, "--out", str(work / "tuned"), "--resume")
    out = work / "asked"
    resume = ["--resume"] if (out / "plan.json").exists() else []
    models = ["default", *([model] if model != "default" else []), str(work / "tuned")]
    words = ["--data", str(tests), "--judge", "embedded", "--out", str(out), *resume]
    attending("eval", str(work / "asked.toml"), *models, *words)
    found: dict[str, Any] = json.loads((out / "report.json").read_text("utf-8"))
    return found


def read(run: dict[str, Any]) -> list[str]:
    """What was trained on, and what that took."""
    keys = ("dialogues", "train", "train_tokens", "train_learnt_tokens", "held_out")
    rows = [
        [title, *(f"{run['metrics'].get(f'data/{name}_{key}', 0):,.0f}" for key in keys)]
        for name, title in SOURCES.items()
    ]
    head = ["", "dialogues", "trained on", "their tokens", "of them answers", "held out"]
    recipe = run["recipe"]
    began = "midtrain.md's self-constraint" if Path(recipe["model"]).name == "open" else "default"
    return [
        *markdown(head, rows),
        "",
        f"One epoch, {recipe['batch']['tokens']:,} tokens a step. It began from: {began}. "
        f"{run['wall_seconds'] / 3600:.1f} hours of one core, all measures among them.",
    ]


def answers(work: Path) -> list[str]:
    """Held-out answers, in bits a token."""
    rows = []
    for name, title in SOURCES.items():
        files = [work / "tuned" / f"heldout_{name}{end}.jsonl" for end in ("_before", "")]
        if not all(file.is_file() for file in files):
            continue
        told = [[json.loads(line) for line in f.read_text("utf-8").splitlines()] for f in files]
        bits = [
            DocumentBits(a["nats"] / np.log(2), b["nats"] / np.log(2), b["num_targets"])
            for a, b in zip(*told, strict=True)
        ]
        change = of_documents(name, bits)
        ends = [f"{value:.3f}" for value in (change.before, change.after) if value is not None]
        tokens = sum(one.num_bytes for one in bits)
        rows.append([title, str(len(bits)), f"{tokens:,}", *ends, cell(change, 1)])
    head = ["held-out answers", "n", "tokens", "bits a token before", "after", "gain (95 %)"]
    return markdown(head, rows)


def scores(report: dict[str, Any]) -> list[str]:
    """The suite, a row a score; then the paired differences."""
    head = ["task", "score is", "model", "score", "95 % interval", "n", ""]
    rows = [
        [
            one["task"],
            one["metric"],
            one["model"],
            f"{one['score']:.3f}",
            " to ".join(f"{end:.3f}" for end in one["interval"] or ()),
            f"{one['n']:,}",
            one["says"],
        ]
        for one in report["rows"]
    ]
    told = [
        f"- {one['task']}: {one['b']} - {one['a']} = {one['difference']:+.3f} "
        f"({one['interval'][0]:+.3f} to {one['interval'][1]:+.3f})"
        for one in report["pairs"]
        if one["interval"]
    ]
    return [*markdown(head, rows), "", "Paired differences:", "", *told]


def kept(work: Path) -> list[str]:
    """What it cost: the retention suite."""
    told = json.loads((work / "tuned" / "forgetting.json").read_text("utf-8"))["changes"]
    rows = [
        [
            f"{one['task']}, {one['metric']}",
            f"{one['before']:.3f}",
            f"{one['after']:.3f}",
            f"{one['gain']:+.3f} ({one['interval'][0]:+.3f} to {one['interval'][1]:+.3f})",
            one["says"],
        ]
        for one in told
        if one["task"] not in SOURCES and one["interval"]
    ]
    return markdown(["kept?", "before", "after", "gain (95 %, paired)", ""], rows)


def draw(work: Path) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    rows = list(read_metrics(work / "tuned" / "metrics.jsonl"))
    for place, name in enumerate(SOURCES):
        key = f"heldout/{name}_bits_per_byte"
        seen = [row[key] for row in rows if key in row]
        left.bar([place - 0.2, place + 0.2], [seen[0], seen[-1]], 0.36, color=["#b9c4cf", "C0"])
    left.set_xticks(range(len(SOURCES)), SOURCES.values(), fontsize=8)
    left.set_title("held-out answers, bits a byte: before, after", fontsize=9)
    loss = [(row["step"], row["train/loss_nats"]) for row in rows if "train/loss_nats" in row]
    right.plot(*zip(*loss, strict=True))
    right.set_xlabel("step", fontsize=8)
    right.set_title("loss while training, nats", fontsize=9)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    figure.savefig(HERE / "sft.svg", metadata={"Date": None})


def main(data: Path, work: Path, model: str) -> None:
    report = make(data, work, model)
    run = json.loads((work / "tuned" / "run.json").read_text("utf-8"))
    draw(work)
    text = ["# Fine-tuning: what it gives, and what it costs", "", NOTES.read_text("utf-8").strip()]
    text += [
        "",
        *read(run),
        "",
        *answers(work),
        "",
        "![Held-out answers](sft.svg)",
        "",
        *scores(report),
        "",
    ]
    text += [*kept(work), "", *facts(), ""]
    (HERE / "sft.md").write_text("\n".join(text), "utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]), (*sys.argv[3:], str(Path(sys.argv[2]) / "open"))[0])
