"""The corpus on open data: its funnel, its speed, and what it finds of what was planted.

    python benchmarks/corpus.py DATA_DIR [--limit N]

Runs recipe `open` on DATA_DIR (see its LICENSES.md), then a set with planted copies and test
questions. `--limit N` takes the first N records of every file, for a trial that writes no page.
Budget: 20 minutes of two cores for 15 million tokens.
"""

import argparse
import datetime
import gzip
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from attending import artifact
from attending.config import override, read_recipe
from attending.corpus import run
from attending.corpus.pack import Encoder
from attending.corpus.recipe import CorpusConfig, DuplicateConfig, PackConfig
from attending.corpus.steps import NearSign
from attending.mesh import hardware

HERE = Path(__file__).parent
WORDS = 200  # of a planted document
COPIES = 60  # planted of each kind
CHANGED_PERCENT = (0, 1, 2, 5, 10, 15, 20, 30)
QUESTION_SHARES = (1.0, 0.5, 0.25)


class Planted(NamedTuple):
    """A document, what it is, and which document it was made from."""

    id: str
    text: str
    kind: str
    origin: str


class Found(NamedTuple):
    """What the pipeline did to one kind of planted documents."""

    kind: str
    planted: int
    found: int


def plant(data: Path, seed: int = 0) -> list[Planted]:
    """Passages of textbooks, copies of some with words changed, and some with test questions."""
    generator = random.Random(seed)
    passages = list(_passages(data / "train" / "openstax_textbooks.jsonl"))
    generator.shuffle(passages)
    needed = COPIES * (len(CHANGED_PERCENT) + len(QUESTION_SHARES) + 10)
    assert len(passages) >= needed, f"{len(passages)} passages, {needed} are needed"
    vocabulary = sorted({word for passage in passages for word in passage})
    taken = iter(passages)
    made = []
    for percent in CHANGED_PERCENT:
        for number in range(COPIES):
            words = next(taken)
            name = f"{percent}-{number}"
            copy = list(words)
            for place in generator.sample(range(len(copy)), len(copy) * percent // 100):
                copy[place] = generator.choice(vocabulary)
            made.append(Planted(name, " ".join(words), "original", name))
            made.append(Planted(f"{name}-copy", " ".join(copy), f"copy, {percent} % changed", name))
    questions = [json.loads(line)["question"] for line in _lines(data, "medqa_us_4opt_test")]
    for share in QUESTION_SHARES:
        for number, question in enumerate(generator.sample(questions, COPIES)):
            words, asked = next(taken), question.split()
            kept = asked[: max(13, round(share * len(asked)))]
            middle = len(words) // 2
            text = " ".join([*words[:middle], *kept, *words[middle:]])
            kind = f"test question, {share:.0%} of it"
            made.append(Planted(f"q{share}-{number}", text, kind, ""))
    made += [
        Planted(f"plain-{n}", " ".join(next(taken)), "untouched", "") for n in range(10 * COPIES)
    ]
    generator.shuffle(made)
    return made


def find(data: Path, planted: list[Planted], work: Path, tokenizer: str) -> list[Found]:
    """Run the pipeline on the planted set; a pair is found if one of it was removed as a copy."""
    with (work / "planted.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": one.id, "text": one.text}) + "\n" for one in planted)
    (work / "test.jsonl").write_bytes((data / "eval" / "medqa_us_4opt_test.jsonl").read_bytes())
    source = {"path": "planted.jsonl", "id": "{id}", "private": False, "domain": "medical"}
    values = {
        "root": str(work),
        "sources": {"planted": source},
        "quality": {"min_quality": 0.0},
        "decontamination": {"paths": ["test.jsonl"]},
        "pack": {"tokenizer": tokenizer},
    }
    run.build(CorpusConfig.build(values), work / "out")
    reasons = {row["id"]: row["reason"] for row in removed(work / "out")}
    copies = {"exact_duplicate", "near_duplicate"}
    kinds = sorted({one.kind for one in planted}, key=lambda kind: [*map(_number, kind.split())])
    table = []
    for kind in kinds:
        own = [one for one in planted if one.kind == kind]
        if kind.startswith("copy"):
            hit = [o for o in own if {reasons.get(o.id), reasons.get(o.origin)} & copies]
        elif kind.startswith("test"):
            hit = [one for one in own if reasons.get(one.id) == "test_question"]
        else:  # must stay; an original may go for its copy
            pairs = {one.id for one in own if kind == "original"}
            hit = [o for o in own if o.id in reasons and o.id not in pairs]
            hit += [o for o in own if o.id in pairs and reasons.get(o.id) == "test_question"]
        table.append(Found(kind, len(own), len(hit)))
    return table


def speeds(data: Path, tokenizer: str) -> dict[str, tuple[float, float]]:
    """Documents/s and MB/s of the two steps that keep no account, on passages, on one core."""
    texts = [" ".join(w) for w in _passages(data / "train" / "openstax_textbooks.jsonl")][:2000]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    encoder = Encoder.load(PackConfig(tokenizer=tokenizer)).tokenizer
    with tempfile.TemporaryDirectory() as folder:
        signer = NearSign(folder, DuplicateConfig())
        steps = {
            "MinHash signing": lambda text: signer.get_signature(signer.get_shingles(text)),
            "tokenising": encoder.encode,
        }
        found = {}
        for name, step in steps.items():
            start = time.perf_counter()
            for text in texts:
                step(text)
            seconds = time.perf_counter() - start
            found[name] = len(texts) / seconds, megabytes / seconds
    return found


def removed(out: Path) -> Iterator[dict[str, Any]]:
    """Every removed document of a corpus."""
    for path in sorted((out / "removed").rglob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            yield from map(json.loads, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--tokenizer", default="default")
    told = parser.parse_args()
    pairs = [f"root={told.data}", f"pack.tokenizer={told.tokenizer}"]
    values = override(read_recipe("open", "corpus"), pairs)
    if told.limit:
        values = override(values, [f"sources.{n}.limit={told.limit}" for n in values["sources"]])
    config = CorpusConfig.build(values)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        start = time.perf_counter()
        run.build(config, out)
        seconds = time.perf_counter() - start
        account = json.loads((out / "funnel.json").read_text("utf-8"))
        rates = json.loads((out / "metrics.jsonl").read_text("utf-8").splitlines()[0])
        work = Path(folder) / "planted"
        work.mkdir()
        planted = find(told.data, plant(told.data), work, told.tokenizer)
    alone = speeds(told.data, told.tokenizer)
    text = page(account, rates, planted, seconds, alone)
    if told.limit:
        print(text)
        return
    (HERE / "corpus.md").write_text(text, encoding="utf-8")
    draw(account, planted, HERE / "corpus.svg")
    print(text)


def page(
    account: dict[str, Any],
    rates: dict[str, float],
    planted: list[Found],
    seconds: float,
    alone: dict[str, tuple[float, float]],
) -> str:
    """The report, as Markdown."""
    tokens = sum(row["tokens"] for row in account["tokens"])
    seen = sum(row["seen_tokens"] for row in account["tokens"])
    lines = [
        "# The corpus on open data",
        "",
        "Recipe `open`: MedQuAD, textbooks, PubMedQA, guideline summaries, dialogues (identifiers "
        "replaced) and general textbooks, decontaminated against seven evaluation sets.",
        "",
        f"The whole pass took **{seconds:,.0f} s** for {tokens:,} tokens ({seen:,} with repeats), "
        "from raw files to packed shards.",
        "",
        "## Funnel",
        "",
        "| step | domain | documents in | out | MB in | MB out | removed |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for (step, domain), sums in totals(account).items():
        reasons = ", ".join(f"{k} {v:,}" for k, v in sums["removed"].items()) or "0"
        sizes = f"{sums['in']['bytes'] / 1e6:,.2f} | {sums['out']['bytes'] / 1e6:,.2f}"
        counts = f"{sums['in']['documents']:,} | {sums['out']['documents']:,}"
        lines.append(f"| {step} | {domain} | {counts} | {sizes} | {reasons} |")
    lines += ["", "## Speed of each step, on one core", ""]
    lines += ["| step | documents/s | MB/s | seconds |", "|---|--:|--:|--:|"]
    for step, spent in account["seconds"].items():
        speed = [rates.get(f"corpus/{step}_{unit}_per_second") for unit in ("documents", "bytes")]
        if None not in speed:
            lines.append(f"| {step} | {speed[0]:,.0f} | {speed[1] / 1e6:,.2f} | {spent:,.1f} |")
    lines += [f"| {k} (measured alone) | {a:,.0f} | {b:,.2f} | |" for k, (a, b) in alone.items()]
    stages = {k[7:-14]: v for k, v in rates.items() if k.endswith("_stage_seconds")}
    lines += ["", "| stage | seconds, with its barrier |", "|---|--:|"]
    lines += [f"| {stage} | {spent:,.1f} |" for stage, spent in stages.items()]
    lines += ["", "## What is found of what was planted", ""]
    lines += [
        f"Passages of {WORDS} words of textbooks; a copy's changed words are drawn from all of "
        "theirs. *Untouched* and *original* must stay: what is found of them is a false alarm.",
        "",
        "| planted | number | found | share |",
        "|---|--:|--:|--:|",
    ]
    lines += [
        f"| {p.kind} | {p.planted} | {p.found} | {p.found / p.planted:.3f} |" for p in planted
    ]
    machine = hardware()
    lines += [
        "",
        f"Precision: {precision(planted):.3f} of what was removed was planted.",
        "",
        "![Funnel and planted copies](corpus.svg)",
        "",
        f"- date: {datetime.datetime.now(datetime.UTC).date()}",
        f"- command: `python benchmarks/{artifact.command()}`",
        f"- commit: {artifact.commit()}",
        f"- hardware: {machine['cpu']}, {machine['available_cores']} cores",
        "- versions: " + ", ".join(f"{k} {v}" for k, v in artifact.versions().items()),
        "",
    ]
    return "\n".join(lines)


def precision(planted: list[Found]) -> float:
    """Of the documents that were removed, the share that was planted."""
    right = sum(one.found for one in planted if one.kind.startswith(("copy", "test")))
    wrong = sum(one.found for one in planted if not one.kind.startswith(("copy", "test")))
    return right / max(1, right + wrong)


def totals(account: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The funnel's rows, all sources of a domain together."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in account["rows"]:
        empty: dict[str, Any] = {"in": {}, "out": {}, "removed": {}}
        sums = found.setdefault((row["step"], row["domain"]), empty)
        for side in ("in", "out", "removed"):
            for name, count in row[side].items():
                sums[side][name] = sums[side].get(name, 0) + count
    return found


def draw(account: dict[str, Any], planted: list[Found], file: Path) -> None:
    """Documents after each step, and planted copies found by how much was changed."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    sums = totals(account)
    for domain in ("medical", "general"):
        rows = [(step, s["out"]["documents"]) for (step, d), s in sums.items() if d == domain]
        left.plot([step for step, _ in rows], [n for _, n in rows], marker="o", label=domain)
    left.set_ylim(bottom=0)
    left.tick_params(axis="x", rotation=40, labelsize=7)
    left.set_title("documents after each step", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    shares = {p.kind: p.found / p.planted for p in planted}
    copies = [shares[f"copy, {percent} % changed"] for percent in CHANGED_PERCENT]
    right.plot(CHANGED_PERCENT, copies, marker="o")
    right.set_xlabel("words changed, %")
    right.set_title("planted copies found", fontsize=9)
    right.set_ylim(-0.03, 1.03)
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, metadata={"Date": None})


def _number(word: str) -> tuple[int, str]:
    """Words before numbers, and these by size."""
    digits = word.rstrip("%")
    return (int(digits), "") if digits.isdigit() else (-1, word)


def _passages(path: Path) -> Iterator[list[str]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            words = json.loads(line)["text"].split()
            for start in range(0, len(words) - WORDS, WORDS):
                yield words[start : start + WORDS]


def _lines(data: Path, name: str) -> list[str]:
    return (data / "eval" / f"{name}.jsonl").read_text("utf-8").splitlines()


if __name__ == "__main__":
    main()
