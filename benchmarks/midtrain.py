"""Three ways to teach the default model medicine, and what each costs the rest.

python benchmarks/midtrain.py DATA_DIR WORK_DIR [ARM ...]

makes the corpus in WORK_DIR once, then the runs of `ARMS` (or of those named) that have no record
yet, one after the other, and writes midtrain.md. A run that was stopped is gone on with; one that
ended leaves its figures in midtrain/ARM.json, from which the page is made. The arms of `BACK` are
those runs' models, brought back to `SHARE` of the way from the start as `interpolation` of a recipe
does it before it measures; nothing is trained twice for them.
WORK_DIR/tests holds the suite's data: general text by the split rule's held-out side only.

Budget on two cores without AVX512-BF16 (130 tokens/s of 135M trained, 360 measured): plain 13
minutes, the others 33 to 43, and 15 of measures each, as of the arms of `BACK`: 4 hours.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot
from page import HERE
from page import about as facts

from attending.corpus.split import is_held_out
from attending.evaluate import forgetting
from attending.evaluate.forgetting import DocumentBits, of_documents, read_documents
from attending.evaluate.page import Change
from attending.evaluate.store import PLAN
from attending.logs import read_metrics
from attending.mesh import multiplies_bfloat16
from attending.midtrain.recipe import MidtrainConfig
from attending.midtrain.setup import heldout_by_part
from attending.model.weights import save_model
from attending.train.heldout import score_documents
from attending.train.parallel import build, interpolate, process_group, whole_weights
from attending.train.start import open_start

MEDICAL, ALL = 100_000, 250_000  # tokens of an arm: of medical text, and with the others'
# Five times the recipe's rate, as the others have it: arms that forget can be compared.
HIGH = ("optimizer.peak=1e-3", "optimizer.final=1e-4")
WHOLE = ("interpolation=1",)
ARMS = {
    "plain": ("plain", "plain continued training", MEDICAL, HIGH),
    "replay": ("replay", "replay: cross entropy on all", ALL, WHOLE),
    "open": ("open", "self-constraint on general and maths", ALL, WHOLE),
}
SHARE = MidtrainConfig.load("open", "midtrain").interpolation
BACK = {f"{arm}_back": arm for arm in ARMS}
TITLES = {arm: title for arm, (_, title, _, _) in ARMS.items()}
TITLES |= {arm: f"{TITLES[of]}, {SHARE} of the way" for arm, of in BACK.items()}
PARTS = ("medical", "general", "maths")
NOTES = HERE / "midtrain" / "notes.md"
LIMIT = 40


def attending(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "attending.cli", *words], check=True)


def make(data: Path, work: Path, arms: Sequence[str]) -> None:
    """The corpus, the suite's data, the runs, and what they left."""
    if not (work / "corpus").exists():
        words = ["--set", f"root={data}", "--out", str(work / "corpus"), "--resume"]
        attending("corpus", "midtrain", *words)
    write_tests(data, work / "tests")
    for arm in arms:
        if record(arm).exists():
            continue
        recipe, _, tokens, own = ARMS[BACK.get(arm, arm)]
        settings = [f"corpus={work / 'corpus'}", f"forgetting.data={work / 'tests'}"]
        settings += [f"forgetting.limit={LIMIT}", f"compute.precision={precision()}"]
        settings += [f"tokens={tokens}", f"heldout.every_tokens={tokens // 2}"]
        settings += ["optimizer.warmup_tokens=20480", *own]
        if arm in BACK:
            bring_back(work, arm, MidtrainConfig.load(recipe, "midtrain", settings))
            continue
        pairs = [word for setting in settings for word in ("--set", setting)]
        if not (work / arm).exists():
            attending("midtrain", recipe, *pairs, "--out", str(work / arm), "--resume")
        note(work / arm, arm, work / arm)


def bring_back(work: Path, arm: str, config: MidtrainConfig) -> None:
    """An arm of `BACK`: the end of a run with `interpolation`, from the model that has been."""
    trained, out = work / BACK[arm], work / arm
    if not trained.exists():
        raise SystemExit(
            f"{arm} needs the model {trained}: remove {record(BACK[arm])} to train it."
        )
    start = open_start(config.model)
    heldout, kept = heldout_by_part(Path(config.corpus), config)
    if not out.exists():
        draft = out.with_suffix(".tmp")
        draft.mkdir(exist_ok=True)
        with process_group(config.compute.precision) as (place, device):
            decoder = build(
                start.arch, open_start(str(trained)).fill, place, device, config.compute
            )
            interpolate(decoder, start.fill, SHARE)
            for name, documents in heldout.items():
                rows = score_documents(
                    decoder,
                    documents,
                    context=config.context,
                    micro_tokens=config.batch.micro_tokens,
                    max_tokens=config.heldout.final_tokens,
                    place=place,
                    device=device,
                )
                lines = [json.dumps(row._asdict()) + "\n" for row in rows]
                (draft / f"heldout_{name}.jsonl").write_text("".join(lines), "utf-8")
                shutil.copy(trained / f"heldout_{name}_before.jsonl", draft)
            weights = whole_weights(decoder)
        save_model(draft, start.arch, weights, start.tokenizer, start.generation)
        draft.replace(out)
    if not (out / "forgetting").exists():
        take_answers(trained / "forgetting", out / "forgetting")
    forgetting.compare(config.forgetting, config.model, out, kept, lambda *_: None, print)
    note(out, arm, trained)


def take_answers(asked: Path, place: Path) -> None:
    """The start's, which are the same for all arms."""
    draft = place.with_suffix(".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    for side in (forgetting.BEFORE, "examples"):
        shutil.copytree(asked / side, draft / side)
    plan = json.loads((asked / PLAN).read_text("utf-8")).items()
    kept = {key: value for key, value in plan if not key.endswith(forgetting.AFTER)}
    (draft / PLAN).write_text(json.dumps(kept), "utf-8")
    draft.replace(place)


def record(arm: str) -> Path:
    """Where an arm's figures are kept."""
    return HERE / "midtrain" / f"{arm}.json"


def note(folder: Path, arm: str, trained: Path) -> None:
    """Keep what the page needs of a model and of the run that trained it."""
    run = json.loads((trained / "run.json").read_text("utf-8"))
    rows = [row for row in read_metrics(trained / "metrics.jsonl") if "train/loss_nats" in row]
    tokens, key = int(rows[-1]["train/consumed_tokens"]), "train/medical_loss_nats"
    told = json.loads((folder / "forgetting.json").read_text("utf-8"))["changes"]
    documents = {name: [*map(list, read_documents(folder, name))] for name in PARTS}
    found = {
        "tokens": tokens,
        "operations": operations(run, tokens),
        "seconds": rows[-1]["run/elapsed_seconds"],
        "documents": {k: [[round(x, 3) for x in one] for one in v] for k, v in documents.items()},
        "tasks": [one for one in told if one["task"] not in PARTS or not one["is_loss"]],
        "curve": [[row["train/consumed_tokens"], row[key]] for row in rows if key in row],
        "about": about(run) if folder == trained else f"{facts()}; trained as {trained.name}",
    }
    record(arm).write_text(json.dumps(found) + "\n", "utf-8")


def about(run: dict[str, Any]) -> str:
    """Date, commit, hardware and versions of a run."""
    machine, versions = run["hardware"], run["versions"].items()
    memory = f"{machine['memory_bytes'] / 2**30:.1f} GiB, {', '.join(machine['simd'])}"
    return (
        f"{run['started'][:10]}, commit {run['commit'][:10]}, {machine['cpu']}, "
        f"{machine['available_cores']} cores, {memory}; {', '.join(map(' '.join, versions))}"
    )


def noted() -> dict[str, dict[str, Any]]:
    """The figures of all arms that have some."""
    found = {arm: record(arm) for arm in TITLES}
    return {arm: json.loads(f.read_text("utf-8")) for arm, f in found.items() if f.exists()}


def precision() -> str:
    """Half where this CPU multiplies in it: nearly twice as fast there."""
    return "bfloat16" if multiplies_bfloat16() else "float32"


def write_tests(data: Path, folder: Path) -> None:
    """The retention suite's data."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("gsm8k_test.jsonl", "ifeval_541.jsonl"):
        (folder / name).write_bytes((data / "eval" / name).read_bytes())
    lines = (data / "train" / "general_openstax.jsonl").read_text("utf-8").splitlines()
    rows = [(json.loads(line), line) for line in lines]
    held = [line for row, line in rows if is_held_out(f"{row['book']}/{row['module']}")]
    (folder / "general_openstax.jsonl").write_text("\n".join(held) + "\n", "utf-8")


def table(runs: dict[str, dict[str, Any]]) -> tuple[list[str], dict[str, dict[str, Change]]]:
    """A row an arm: what was read, what it took, what it gained and lost."""
    changes: dict[str, dict[str, Change]] = {}
    for arm, run in runs.items():
        own = {
            name: [DocumentBits(*one) for one in rows] for name, rows in run["documents"].items()
        }
        changes[arm] = {name: of_documents(name, rows) for name, rows in own.items()}
    plain = changes["plain"]
    head = ["", "tokens", "operations, 10^15", "hours", "medical gain, bits a byte", "of plain's"]
    head += ["general loss, bits a byte", "of plain's", "maths loss, bits a byte", "of plain's"]
    rows = []
    for arm, run in runs.items():
        told = [TITLES[arm], f"{run['tokens']:,}", f"{run['operations'] / 1e15:,.2f}"]
        told.append(f"{run['seconds'] / 3600:.2f}")
        for name, sign in zip(PARTS, (1, -1, -1), strict=True):
            told += [cell(changes[arm][name], sign), share(changes[arm][name], plain[name])]
        rows.append(told)
    return markdown(head, rows), changes


def beside_plain(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What an arm ends better than plain by, paired over documents."""
    rows = []
    for arm, run in runs.items():
        if arm == "plain":
            continue
        told = [TITLES[arm]]
        for name in PARTS:
            ends = zip(runs["plain"]["documents"][name], run["documents"][name], strict=True)
            pairs = [DocumentBits(plain[1], own[1], own[2]) for plain, own in ends]
            told.append(cell(of_documents(name, pairs), 1))
        rows.append(told)
    return markdown(["bits a byte below plain's", *PARTS], rows)


def share(one: Change, plain: Change) -> str:
    """Of the plain arm's change; nothing where that is not clear of none."""
    low, high = plain.interval or (-1.0, 1.0)
    return "" if low <= 0 <= high else f"{one.gain / plain.gain:.0%}"


def operations(run: dict[str, Any], tokens: int) -> float:
    """Of the products, the teacher's among them: 6 a weight and token, 2 where it is only asked."""
    parts, weights = run["recipe"]["parts"], 134_515_008
    share = sum(one["share"] for one in parts.values() if one["loss"] == "self_constraint")
    asked = share / sum(one["share"] for one in parts.values())
    return tokens * weights * (6 + 2 * asked)


def cell(change: Change, sign: int) -> str:
    low, high = sorted(sign * end for end in change.interval or (math.nan, math.nan))
    return f"{sign * change.gain:+.4f} ({low:+.4f} to {high:+.4f})"


def tasks(runs: dict[str, dict[str, Any]]) -> list[str]:
    """The suite before and after, by arm."""
    head, rows = ["", "before", *(TITLES[arm] for arm in runs)], {}
    for at, run in enumerate(runs.values()):
        for one in run["tasks"]:
            key = f"{one['task']}, {one['metric']}"
            row = rows.setdefault(key, [f"{one['before']:.3f}", *["not measured"] * len(runs)])
            ends = one["interval"]  # of the same answers to all there is none
            told = f" ({ends[0]:+.3f} to {ends[1]:+.3f})" if ends else ""
            row[at + 1] = f"{one['after']:.3f}{told}"
    return markdown(head, [[name, *row] for name, row in rows.items()])


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def draw(runs: dict[str, dict[str, Any]], changes: dict[str, dict[str, Change]]) -> None:
    figure, panels = pyplot.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    for panel, name in zip(panels, PARTS, strict=False):
        for place, arm in enumerate(runs):
            one = changes[arm][name]
            low, high = one.interval or (one.gain, one.gain)
            panel.bar(place, one.gain, 0.7, yerr=[[one.gain - low], [high - one.gain]], capsize=4)
        panel.axhline(0, color="#1c2733", lw=0.8)
        panel.set_xticks(range(len(runs)), [arm.replace("_", "\n") for arm in runs], fontsize=8)
        panel.set_title(f"{name}: bits a byte gained", fontsize=9)
    for arm, run in runs.items():
        if arm in BACK:
            continue
        x, y = np.array(run["curve"]).T
        smooth = np.convolve(y, np.ones(10) / 10, "valid")
        panels[3].plot(x[len(x) - len(smooth) :] / 1e3, smooth, label=arm)
    panels[3].set_title("medical loss while training, nats", fontsize=9)
    panels[3].set_xlabel("thousand tokens", fontsize=8)
    panels[3].legend(fontsize=8)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    figure.savefig(HERE / "midtrain.svg", metadata={"Date": None})


def main(data: Path, work: Path, *arms: str) -> None:
    make(data, work, arms or tuple(TITLES))
    runs = noted()
    rows, changes = table(runs)
    draw(runs, changes)
    told = ", ".join(f"{len(own)} {name}" for name, own in runs["plain"]["documents"].items())
    missing = [title for arm, title in TITLES.items() if arm not in runs]
    text = ["# Mid-training: what is gained, and what it costs", ""]
    text += [NOTES.read_text("utf-8").strip(), "", f"Held-out documents: {told}.", ""]
    text += [f"Not run yet: {'; '.join(missing)}.", ""] if missing else []
    text += [*rows, "", *beside_plain(runs), "", "![The ways](midtrain.svg)", ""]
    text += [f"Tasks, {LIMIT} examples each; the interval is the gain's, paired.", ""]
    text += [*tasks(runs), "", "`python benchmarks/midtrain.py DATA_DIR WORK_DIR`", ""]
    text += [*(f"- {arm}: {run['about']}" for arm, run in runs.items()), ""]
    (HERE / "midtrain.md").write_text("\n".join(text), "utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]), *sys.argv[3:])
