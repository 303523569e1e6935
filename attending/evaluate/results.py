"""What a run leaves behind: `report.json`, the page and `run.json`."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from attending import artifact
from attending.errors import CheckFailed, UsageError
from attending.evaluate import contamination, scores
from attending.evaluate.healthbench.grader import read_template
from attending.evaluate.healthbench.task import HealthBench
from attending.evaluate.healthbench.task import recorded as read_recorded
from attending.evaluate.judging import JudgeSetup
from attending.evaluate.page import write_page
from attending.evaluate.recipe import EvalConfig
from attending.evaluate.run import (
    JUDGE_IDENTITY,
    ModelSetup,
    Run,
    Samples,
    begin,
    carry_out,
    is_judged,
)
from attending.evaluate.sample import Task
from attending.evaluate.store import Store

DEMONSTRATION = "The default model is a small demonstration: its scores describe nothing clinical."
UNMEASURED = (
    "The embedded judge was trained on statements of fact, and HealthBench's criteria are mostly "
    "instructions ('Advises ...'): its agreement on these was not measured, and this score is "
    "worth very little."
)
FEW = 10  # conversations
Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TrainingText:
    """What a model was trained on."""

    paths: tuple[Path, ...]
    """Folders of token shards, or JSONL files."""
    tokenizer: str | None = None
    """Of the shards: a source."""


def evaluate(run: Run, suite: str, text: TrainingText | None = None) -> Report:
    """Carry a run out and write what it leaves behind.

    Args:
        run: What is asked of whom.
        suite: Its name.
        text: What the examples are looked for in.

    Raises:
        AttendingError: As `carry_out`; what was done is kept.
    """
    config = run.config.model_dump(mode="json")
    parents: list[dict[str, str]] = []
    record = artifact.Record("eval", {"suite": suite, **config}, run.config.seed, parents)
    texts = contamination.against(text.paths, text.tokenizer) if text else None
    samples = asyncio.run(carry_out(run))
    parents += run.parents
    values = report(run, suite, samples)
    if texts:
        values |= _look_for(run, values, samples, texts)
    write(run, values, record)
    return values


def recorded(
    config: EvalConfig,
    tasks: Sequence[Task],
    suite: str,
    graded: Path,
    judge: str | None,
    template: str | None,
    folder: Path | None,
) -> Report:
    """Score verdicts that were given elsewhere; nobody is asked.

    Args:
        config: Seed and resamples are used.
        tasks: HealthBench, alone.
        suite: Its name.
        graded: The file with the verdicts.
        judge: Who gave them, as far as is known.
        template: Source of the text that it was asked with, as far as is known.
        folder: Where results are written; None writes nothing.
    """
    if len(tasks) != 1 or not isinstance(task := tasks[0], HealthBench):
        raise UsageError("--graded is for one HealthBench task: take a suite such as healthbench.")
    samples = read_recorded(task, graded)
    text = read_template(template) if template else None
    facts = {
        "name": judge or "recorded",
        "version": judge or f"unknown, verdicts {artifact.digest(graded)[:12]}",
        "template": text and text.name,
        "template_sha256": text and text.sha256,
        "caution": "Verdicts given elsewhere: nothing is known of who gave them.",
        "agreement": None,
    }
    model = ModelSetup(graded.stem, None)
    with ExitStack() as stack:
        place = folder or Path(stack.enter_context(TemporaryDirectory()))
        setup, silent = JudgeSetup("recorded"), lambda *_: None
        run = Run(config, tasks, [model], setup, Store(place, resume=False), silent, silent)
        run.facts, run.paths = facts, {model.name: {"source": graded.name}}
        values = report(run, suite, {(model.name, task.name): samples})
        if folder:
            begin(run)
            run.store.hold("judge", {key: facts[key] for key in JUDGE_IDENTITY})
            with run.store.adding_answers(model.folder, task) as add:
                for sample in samples:
                    add(sample.answer)
            run.store.write_grades(model.folder, task, samples)
            recipe = {"suite": suite, **config.model_dump(mode="json")}
            write(run, values, artifact.Record("eval", recipe, config.seed, run.parents))
    return values


def report(run: Run, suite: str, samples: Samples) -> Report:
    """What `report.json` says."""
    how = {"seed": run.config.seed, "resamples": run.config.resamples}
    rows, groups = [], {}
    for task in run.tasks:
        for model in run.models:
            own = samples[model.name, task.name]
            judge = run.facts["name"] if run.facts and is_judged(task) else None
            row = {"model": model.name, **scores.row(task, own, **how)}
            rows.append(row | {"judge": judge, "path": run.paths[model.name]})
            groups[model.name, task.name] = scores.grouped((s.example.id, s.grade) for s in own)
    first = [one for one in rows if one["model"] == run.models[0].name]
    canaries = dict.fromkeys(canary for task in run.tasks for canary in task.canary)
    models = [(one.name, one.folder) for one in run.models]
    return {
        "suite": suite,
        "overall": scores.overall(first),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": artifact.command(),
        "commit": artifact.commit(),
        **how,
        "canary": ", ".join(canaries) or None,
        "warnings": [*_warnings(run, rows)],
        "judge": run.facts,
        "models": [{"name": n, "folder": f, "path": run.paths[n]} for n, f in models],
        "rows": rows,
        "pairs": pairs(rows, groups, how),
        "spent": run.meter.sums,
    }


def write(run: Run, values: Report, record: artifact.Record) -> Path:
    """`report.json`, `report.html`, `run.json`; the page's path."""
    folder = run.store.folder
    with artifact.disk_has_room(folder / "report.html"):
        artifact.write_json(folder / "report.json", values)
        page = write_page(folder)
        artifact.write_run(folder, record, _figures(values))
    return page


def check(values: Report, most: float) -> None:
    """CheckFailed where a share above `most` has no score, or a canary stood in training text."""
    if (found := values.get("training_text")) and found["canary"]:
        raise CheckFailed(
            f"the canary {values['canary']} stands in {len(found['canary'])} training texts, as "
            f"{found['canary'][0]}: what was trained on them is not tested by this."
        )
    lacking = [one for one in values["rows"] if one["unscored"] > most]
    if lacking:
        worst = max(lacking, key=lambda one: one["unscored"])
        raise CheckFailed(
            f"{worst['unscored']:.1%} of {worst['task']} of {worst['model']} have no score "
            f"({worst['why_unscored']}): the report says what they could change. Run again with "
            "--resume to ask once more."
        )


def _look_for(
    run: Run, values: Report, samples: Samples, read: Iterable[tuple[str, str]]
) -> dict[str, Any]:
    """Which examples stand in training text, with each score without them."""
    texts = {
        f"{task.name}/{one.id}": "\n".join(turn["content"] for turn in one.messages)
        for task in run.tasks
        for one in task.examples
    }
    canaries = [canary for task in run.tasks for canary in task.canary]
    found = contamination.contaminated(texts, read, canaries, progress=run.progress)
    for row, task in ((r, t) for r in values["rows"] for t in run.tasks if t.name == r["task"]):
        known = {one.id for one in task.examples if f"{task.name}/{one.id}" in found.hits}
        own = [one for one in samples[row["model"], task.name] if one.example.id not in known]
        without = scores.row(task, own, seed=0, resamples=1)["score"] if own else None
        share = len(known) / len(task.examples)
        row["contamination"] = {"n": len(known), "share": share, "score_without": without}
    hits = {name: hit._asdict() for name, hit in found.hits.items()}
    told = {"documents": found.documents, "tokens": found.tokens, "canary": found.canary}
    values["warnings"][:0] = _seen(values, found)
    return {"training_text": {**told, "hits": hits}}


def _seen(values: Report, found: contamination.Contamination) -> list[str]:
    """What a reader must know of it first."""
    told = [f"The data's canary stands in training text, as {one}." for one in found.canary[:1]]
    for row in values["rows"]:
        if row["contamination"]["n"]:
            own = [name for name in found.hits if name.startswith(f"{row['task']}/")]
            some = ", ".join(f"{name} in {found.hits[name].document}" for name in own[:3])
            seen = f"{row['contamination']['n']} examples of {row['task']} ({some}"
            told.append(f"{seen}{', ...' if own[3:] else ''}) stand in the training text.")
    return list(dict.fromkeys(told))


def pairs(
    rows: Sequence[Mapping[str, Any]],
    groups: Mapping[tuple[str, str], scores.Groups],
    how: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The differences of every two models, task by task."""
    found = []
    for a, b in combinations(rows, 2):
        if a["task"] == b["task"]:
            both = groups[a["model"], a["task"]], groups[b["model"], b["task"]]
            if one := scores.pair(a, *both, **how):
                found.append({"a": a["model"], "b": b["model"], **one})
    return found


def _warnings(run: Run, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know before the numbers."""
    found = [DEMONSTRATION] if any(one.source == "default" for one in run.models) else []
    if run.judge and run.judge.is_embedded:
        kinds = {told.kind for told in run.config.tasks.values()}
        found += [UNMEASURED] if kinds & {"healthbench", "meta"} else []
    for task, told in zip(run.tasks, run.config.tasks.values(), strict=True):
        if told.limit and len(task.examples) == told.limit:
            found.append(f"{task.name}: {len(task.examples)} examples drawn, not all of them.")
    for row in rows:
        if row["says"] == "at chance":
            where = f"{row['model']} is at chance on {row['task']}"
            found.append(f"{where} ({row['score']:.1%}, guessing gives {row['chance']:.1%}).")
        if row["cut"]:
            where = f"{row['cut']} answers of {row['model']} to {row['task']}"
            found.append(f"{where} were cut at their longest; they were graded as they stand.")
        if row["unscored"]:
            where = f"{row['unscored']:.1%} of {row['task']} of {row['model']} are unscored"
            found.append(f"{where} ({row['why_unscored']}).")
        if row["n"] < FEW:
            found.append(f"{row['task']}: {row['n']} conversations are too few for a figure.")
    return found


def _figures(values: Report) -> dict[str, float]:
    """For `run.json`."""
    rows = [one for one in values["rows"] if one["score"] is not None]
    return {f"eval/{one['model']}/{one['task']}": one["score"] for one in rows}
