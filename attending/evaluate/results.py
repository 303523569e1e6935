"""What a run leaves behind: `report.json`, the page, `run.json`; and several runs side by side."""

import asyncio
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from attending import artifact
from attending.errors import CheckFailed, ConfigError, UsageError
from attending.evaluate import scores
from attending.evaluate.healthbench.grader import read_template
from attending.evaluate.healthbench.task import HealthBench
from attending.evaluate.healthbench.task import recorded as read_recorded
from attending.evaluate.judging import JudgeSetup
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
from attending.evaluate.sample import Grade, Task, read_lines
from attending.evaluate.store import Store

DEMONSTRATION = "The default model is a small demonstration: its scores describe nothing clinical."
Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Against:
    """Training text that examples are looked for in."""

    paths: tuple[Path, ...]
    """Folders of token shards, or JSONL files."""
    tokenizer: str | None = None
    """Of the shards: a source."""


def evaluate(run: Run, suite: str, against: Against | None = None) -> Report:
    """Carry a run out and write what it leaves behind.

    Args:
        run: What is asked of whom.
        suite: Its name.
        against: Training text that the examples are looked for in.

    Raises:
        AttendingError: As `carry_out`; what was done is kept.
    """
    config = run.config.model_dump(mode="json")
    parents: list[dict[str, str]] = []
    record = artifact.Record("eval", {"suite": suite, **config}, run.config.seed, parents)
    samples = asyncio.run(carry_out(run))
    parents += run.parents
    values = report(run, suite, samples)
    if against:
        values |= _look_for(run, values, samples, against)
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
    canaries = [task.canary for task in run.tasks if task.canary]
    models = [(one.name, one.folder) for one in run.models]
    return {
        "suite": suite,
        "overall": scores.overall(first),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": artifact.command(),
        "commit": artifact.commit(),
        **how,
        "canary": canaries[0] if canaries else None,
        "warnings": [*_warnings(run, rows)],
        "judge": run.facts,
        "models": [{"name": n, "folder": f, "path": run.paths[n]} for n, f in models],
        "rows": rows,
        "pairs": _pairs(rows, groups, how),
        "cost": run.meter.cost,
        "tokens": run.meter.tokens,
        "seconds": round(run.meter.seconds, 1),
    }


def write(run: Run, values: Report, record: artifact.Record) -> Path:
    """`report.json`, `report.html`, `run.json`; the page's path."""
    from attending.evaluate.page import write_page

    folder = run.store.folder
    with artifact.disk_has_room(folder / "report.html"):
        artifact.write_json(folder / "report.json", values)
        page: Path = write_page(folder)
        artifact.write_run(folder, record, _figures(values))
    return page


def check(values: Report, most: float) -> None:
    """CheckFailed where a share above `most` has no score, or a canary stood in training text."""
    if (found := values.get("contamination")) and found["canary"]:
        raise CheckFailed(
            f"the canary {values['canary']} stands in the training text {found['canary'][0]} and "
            f"{len(found['canary']) - 1} more: what was trained on it is not tested by this."
        )
    lacking = [one for one in values["rows"] if one["unscored"] > most]
    if lacking:
        worst = max(lacking, key=lambda one: one["unscored"])
        raise CheckFailed(
            f"{worst['unscored']:.1%} of {worst['task']} of {worst['model']} have no score: the "
            "report says what they could change. Run again with --resume to ask once more."
        )


def combine(folders: Sequence[Path], to: Path) -> Report:
    """Several runs' models in one report, with paired differences on the tasks that all have.

    Raises:
        UsageError: They were judged by different judges or under different templates, or asked
            otherwise: such scores are no comparison. Or `to` is there.
    """
    reports = [_read(folder / "report.json") for folder in folders]
    plans = [_read(folder / "plan.json") for folder in folders]
    shared = [
        task
        for task in dict.fromkeys(one["task"] for one in reports[0]["rows"])
        if all(any(row["task"] == task for row in other["rows"]) for other in reports)
    ]
    if not shared:
        raise UsageError(f"no task is in all of {[folder.name for folder in folders]}.")
    judges = [one["judge"] for one in reports]
    judged = any(row["judge"] for row in reports[0]["rows"] if row["task"] in shared)
    for folder, judge, plan in zip(folders[1:], judges[1:], plans[1:], strict=True):
        for key in JUDGE_IDENTITY if judged else ():
            if judges[0][key] != (judge or {}).get(key):
                raise UsageError(
                    f"{folders[0].name} and {folder.name} have another judge or template ({key} "
                    f"{judges[0][key]} and {(judge or {}).get(key)}): their scores are no "
                    "comparison. Judge both by one."
                )
        for task in shared:
            if _asked(plans[0], task) != _asked(plan, task):
                raise UsageError(
                    f"{folders[0].name} and {folder.name} asked {task} otherwise, or of other "
                    "data: see their plan.json. Run both alike."
                )
    first, rows, models = reports[0], [], []
    groups: dict[tuple[str, str], scores.Groups] = {}
    with artifact.publish(to) as draft:
        for folder, values in zip(folders, reports, strict=True):
            for model in values["models"]:
                is_twice = sum(m["name"] == model["name"] for v in reports for m in v["models"]) > 1
                name = f"{model['name']} ({folder.name})" if is_twice else model["name"]
                place = f"{folder.name}-{model['folder']}" if is_twice else model["folder"]
                shutil.copytree(folder / model["folder"], draft / place)
                models.append({**model, "name": name, "folder": place})
                own = [row for row in values["rows"] if row["model"] == model["name"]]
                for row in (row for row in own if row["task"] in shared):
                    rows.append({**row, "model": name})
                    lines = read_lines(draft / place / f"{row['task']}.grades.jsonl")
                    grades = [(one.pop("id"), one.pop("repeat"), Grade(**one)) for one in lines]
                    last = {(name, repeat): grade for name, repeat, grade in grades}
                    groups[name, row["task"]] = scores.grouped((k[0], g) for k, g in last.items())
        shutil.copytree(folders[0] / "examples", draft / "examples")
        how = {"seed": first["seed"], "resamples": first["resamples"]}
        told = [one for values in reports for one in values["warnings"]]
        merged = first | {"rows": rows, "models": models, "pairs": _pairs(rows, groups, how)}
        merged |= {"warnings": list(dict.fromkeys(told)), "command": artifact.command()}
        artifact.write_json(draft / "report.json", merged)
        from attending.evaluate.page import write_page

        write_page(draft)
    return merged


def _look_for(run: Run, values: Report, samples: Samples, against: Against) -> dict[str, Any]:
    """Which examples stand in training text, with each score without them."""
    from attending.evaluate import contamination

    texts = {
        f"{task.name}/{one.id}": "\n".join(turn["content"] for turn in one.messages)
        for task in run.tasks
        for one in task.examples
    }
    read = contamination.against(against.paths, against.tokenizer)
    found = contamination.contaminated(texts, read, values["canary"], progress=run.progress)
    how = {"seed": values["seed"], "resamples": 1}
    for row, task in ((r, t) for r in values["rows"] for t in run.tasks if t.name == r["task"]):
        known = {one.id for one in task.examples if f"{task.name}/{one.id}" in found.hits}
        own = [one for one in samples[row["model"], task.name] if one.example.id not in known]
        without = scores.row(task, own, **how)["score"] if own else None
        share = len(known) / len(task.examples)
        row["contamination"] = {"n": len(known), "share": share, "score_without": without}
    told = {"documents": found.documents, "tokens": found.tokens, "canary": found.canary}
    hits = {name: hit._asdict() for name, hit in found.hits.items()}
    return {"contamination": {**told, "hits": hits}}


def _pairs(
    rows: Sequence[Mapping[str, Any]],
    groups: Mapping[tuple[str, str], scores.Groups],
    how: Mapping[str, Any],
) -> list[dict[str, Any]]:
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
    for task, told in zip(run.tasks, run.config.tasks.values(), strict=True):
        if told.limit:
            found.append(f"{task.name}: {len(task.examples)} examples drawn, not all of them.")
    for row in rows:
        if row["says"] == "at chance":
            where = f"{row['model']} is at chance on {row['task']}"
            found.append(f"{where} ({row['score']:.1%}, guessing gives {row['chance']:.1%}).")
        if row["unscored"]:
            found.append(f"{row['unscored']:.1%} of {row['task']} of {row['model']} are unscored.")
    return found


def _figures(values: Report) -> dict[str, float]:
    """For `run.json`."""
    rows = [one for one in values["rows"] if one["score"] is not None]
    return {f"eval/{one['model']}/{one['task']}": one["score"] for one in rows}


def _asked(plan: Mapping[str, Any], task: str) -> Any:
    recipe = plan["recipe"]
    return recipe["data"][task], {k: v for k, v in recipe["tasks"][task].items() if k != "data"}


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        what = f"{path.parent.name} holds no whole evaluation ({type(error).__name__}: {path.name})"
        raise ConfigError(f"{what}: give the folder that `attending eval` wrote.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path.name} of {path.parent.name} is damaged: evaluate again.")
    return found
