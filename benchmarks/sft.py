"""Fine-tuning on open medical dialogues: what it gives and costs, beside where it began.

    python benchmarks/sft.py DATA_DIR WORK_DIR [MODEL] [--no-suite]

tunes MODEL (default: the run `open` of benchmarks/midtrain.py in WORK_DIR) by the recipe `open`,
then asks it, the model it began from and the default model MMLU-medical, PubMedQA and the 60
questions of K-QA that the embedded judge was not fitted on (`attending pull judge`). Either leaves
its figures in sft/NAME.json, of which sft.md is made; what was stopped is gone on with.

Budget on two cores without AVX512-BF16: an hour of one for the training, half an hour for its
measures; the suite 12 to 25 minutes a model.
"""

import argparse
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from midtrain import LIMIT, about, cell, markdown, precision, write_tests
from page import HERE, kept

from attending.evaluate.forgetting import DocumentBits, of_documents
from attending.logs import read_metrics
from attending.verifier.judge.pairs import PARTS, read_kqa

SOURCES = {"questions": "MedQuAD questions", "sections": "MTS-Dialog", "notes": "ACI-Bench"}
LOSS = "train/loss_nats"
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


def tuned(data: Path, work: Path, model: str) -> dict[str, Any]:
    """The training, and what it left."""
    tests, out = work / "tests", work / "tuned"
    if not out.exists():
        write_tests(data, tests)
        settings = [f"root={data}", f"model={model}", f"forgetting.data={tests}"]
        settings += [f"forgetting.limit={LIMIT}", f"compute.precision={precision()}"]
        pairs = [word for setting in settings for word in ("--set", setting)]
        attending("sft", "open", *pairs, "--out", str(out), "--resume")
    run = json.loads((out / "run.json").read_text("utf-8"))
    found: dict[str, Any] = {key: run[key] for key in ("recipe", "metrics", "wall_seconds")}
    found["about"] = about(run)
    for key in ("model", "root", "forgetting"):
        found["recipe"].pop(key)
    found["documents"] = {name: documents(out, name) for name in SOURCES}
    found["changes"] = json.loads((out / "forgetting.json").read_text("utf-8"))["changes"]
    rows = list(read_metrics(out / "metrics.jsonl"))
    found["loss"] = [[one["step"], one[LOSS]] for one in rows if LOSS in one]
    return found


def documents(out: Path, name: str) -> list[list[float]]:
    """Of each held-out answer: nats before and after, and its tokens."""
    files = [out / f"heldout_{name}{end}.jsonl" for end in ("_before", "")]
    told = [[json.loads(line) for line in f.read_text("utf-8").splitlines()] for f in files]
    pairs = zip(*told, strict=True)
    return [[round(a["nats"], 3), round(b["nats"], 3), b["num_targets"]] for a, b in pairs]


def asked(data: Path, work: Path, model: str) -> dict[str, Any]:
    """The suite's report of the three."""
    tests = work / "tests"
    for name in ("mmlu_med_test.jsonl", "pubmedqa_pqal_test500.jsonl"):
        (tests / name).write_bytes((data / "eval" / name).read_bytes())
    rows = read_kqa(data / "eval" / "kqa_201_physician_rubric.jsonl")[PARTS["report"]]
    (tests / "kqa_report.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), "utf-8"
    )
    (work / "asked.toml").write_text(SUITE, "utf-8")
    out = work / "asked"
    resume = ["--resume"] if (out / "plan.json").exists() else []
    models = ["default", *([model] if model != "default" else []), str(work / "tuned")]
    words = ["--data", str(tests), "--judge", "embedded", "--out", str(out), *resume]
    attending("eval", str(work / "asked.toml"), *models, *words)
    found: dict[str, Any] = json.loads((out / "report.json").read_text("utf-8"))
    return {key: found[key] for key in ("rows", "pairs")}


def read(run: dict[str, Any]) -> list[str]:
    """What was trained on, and what that took."""
    keys = ("dialogues", "train", "train_tokens", "train_learnt_tokens", "held_out")
    rows = [
        [title, *(f"{run['metrics'].get(f'data/{name}_{key}', 0):,.0f}" for key in keys)]
        for name, title in SOURCES.items()
    ]
    head = ["", "dialogues", "trained on", "their tokens", "of them answers", "held out"]
    recipe = run["recipe"]
    return [
        *markdown(head, rows),
        "",
        f"One epoch, {recipe['batch']['tokens']:,} tokens a step. It began from: {run['asked']}. "
        f"{run['wall_seconds'] / 3600:.1f} hours of one core, all measures among them.",
    ]


def answers(run: dict[str, Any]) -> list[str]:
    """Held-out answers, in bits a token."""
    rows = []
    for name, title in SOURCES.items():
        own = run["documents"][name]
        bits = [DocumentBits(a / np.log(2), b / np.log(2), tokens) for a, b, tokens in own]
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


def forgotten(run: dict[str, Any]) -> list[str]:
    """What it cost: the retention suite."""
    rows = [
        [
            f"{one['task']}, {one['metric']}",
            f"{one['before']:.3f}",
            f"{one['after']:.3f}",
            f"{one['gain']:+.3f} ({one['interval'][0]:+.3f} to {one['interval'][1]:+.3f})",
            one["says"],
        ]
        for one in run["changes"]
        if one["task"] not in SOURCES and one["interval"]
    ]
    return markdown(["kept?", "before", "after", "gain (95 %, paired)", ""], rows)


def draw(run: dict[str, Any]) -> None:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    bits = {one["task"]: (one["before"], one["after"]) for one in run["changes"]}
    for place, name in enumerate(SOURCES):
        left.bar([place - 0.2, place + 0.2], bits[name], 0.36, color=["#b9c4cf", "C0"])
    left.set_xticks(range(len(SOURCES)), SOURCES.values(), fontsize=8)
    left.set_title("held-out answers, bits a byte: before, after", fontsize=9)
    right.plot(*zip(*run["loss"], strict=True))
    right.set_xlabel("step", fontsize=8)
    right.set_title("loss while training, nats", fontsize=9)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    figure.savefig(HERE / "sft.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--no-suite", dest="suite", action="store_false")
    told = parser.parse_args()
    model = told.model or str(told.work / "open")
    began = told.model or "midtrain.md's self-constraint"
    folder = HERE / "sft"
    run = kept(folder / "tuned.json", began, partial(tuned, told.data, told.work, model))
    draw(run)
    text = ["# Fine-tuning: what it gives, and what it costs", "", NOTES.read_text("utf-8").strip()]
    text += ["", *read(run), "", *answers(run), "", "![Held-out answers](sft.svg)", ""]
    abouts = [f"- training: {run['about']}"]
    file = folder / "asked.json"
    if told.suite or file.is_file():
        report = kept(file, began, partial(asked, told.data, told.work, model))
        text += [*scores(report), ""]
        abouts.append(f"- suite: {report['about']}")
    else:
        text += ["MMLU-medical, PubMedQA and K-QA have not been asked yet.", ""]
    text += [*forgotten(run), "", "`python benchmarks/sft.py DATA_DIR WORK_DIR`", "", *abouts, ""]
    (HERE / "sft.md").write_text("\n".join(text), "utf-8")


if __name__ == "__main__":
    main()
