"""Several runs side by side: their models in one report, where their scores are a comparison."""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attending import artifact
from attending.errors import ConfigError, UsageError
from attending.evaluate import scores
from attending.evaluate.page import write_page
from attending.evaluate.results import Report, pairs
from attending.evaluate.run import JUDGE_IDENTITY
from attending.evaluate.store import read_grade
from attending.verifier.rubric.schema import read_lines


def combine(folders: Sequence[Path], to: Path) -> Report:
    """Several runs' models in one report, with paired differences on the tasks that all have.

    Raises:
        UsageError: They were judged by different judges or under different templates, or asked
            otherwise: such scores are no comparison. Or `to` is there.
    """
    reports = [_read(folder / "report.json") for folder in folders]
    plans = [_read(folder / "plan.json")["recipe"] for folder in folders]
    shared = _shared(reports)
    if not shared:
        raise UsageError(f"no task is in all of {[folder.name for folder in folders]}.")
    for folder, values, plan in zip(folders[1:], reports[1:], plans[1:], strict=True):
        for task in shared:
            if reason := _unlike(reports[0], plans[0], values, plan, task):
                raise UsageError(
                    f"{folders[0].name} and {folder.name} are no comparison on {task}: {reason}."
                )
    rows: list[dict[str, Any]] = []
    models: list[dict[str, Any]] = []
    groups: dict[tuple[str, str], scores.Groups] = {}
    names = [model["name"] for values in reports for model in values["models"]]
    with artifact.publish(to) as draft:
        for number, (folder, values) in enumerate(zip(folders, reports, strict=True), 1):
            for model in values["models"]:
                name, place = str(model["name"]), f"{number}-{model['folder']}"
                name = f"{name} ({folder.name})" if names.count(name) > 1 else name
                name = f"{name} {number}" if name in [one["name"] for one in models] else name
                shutil.copytree(folder / model["folder"], draft / place)
                models.append({**model, "name": name, "folder": place})
                for row in values["rows"]:
                    if row["model"] == model["name"] and row["task"] in shared:
                        rows.append({**row, "model": name})
                        lines = read_lines(draft / place / f"{row['task']}.grades.jsonl")
                        groups[name, row["task"]] = _groups(lines)
        shutil.copytree(folders[0] / "examples", draft / "examples")
        how = {"seed": reports[0]["seed"], "resamples": reports[0]["resamples"]}
        merged = reports[0] | {"rows": rows, "models": models, "pairs": pairs(rows, groups, how)}
        merged["overall"] = scores.overall(r for r in rows if r["model"] == models[0]["name"])
        merged["command"] = artifact.command()
        merged["warnings"] = list(dict.fromkeys(w for one in reports for w in one["warnings"]))
        merged = {key: v for key, v in merged.items() if key not in ("spent", "training_text")}
        artifact.write_json(draft / "report.json", merged)
        write_page(draft)
    return merged


def _shared(reports: Sequence[Report]) -> list[str]:
    """Tasks that all have."""
    tasks = [dict.fromkeys(row["task"] for row in values["rows"]) for values in reports]
    return [task for task in tasks[0] if all(task in other for other in tasks)]


def _groups(lines: Iterable[tuple[str, dict[str, Any]]]) -> scores.Groups:
    """Of a file of grades; the last one of an answer counts."""
    last = {key: grade for key, _, grade in (read_grade(row, where) for where, row in lines)}
    return scores.grouped((name, grade) for (name, _), grade in last.items())


def _unlike(a: Report, plan_a: Report, b: Report, plan_b: Report, task: str) -> str:
    """Why two runs' scores of a task are no comparison; empty where they are."""
    if any(row["judge"] for row in a["rows"] if row["task"] == task):
        for key in JUDGE_IDENTITY:
            both = [(one["judge"] or {}).get(key) for one in (a, b)]
            if both[0] != both[1]:
                return f"another judge or template ({key} {both[0]} and {both[1]})"
        if plan_a["judge"] != plan_b["judge"]:
            return "the judge was asked otherwise, see recipe.judge of their plan.json"
    if plan_a["data"][task] != plan_b["data"][task]:
        return "other data"
    asked = [
        {key: value for key, value in plan["tasks"][task].items() if key != "data"}
        for plan in (plan_a, plan_b)
    ]
    return "" if asked[0] == asked[1] else "it was asked otherwise, see recipe.tasks of plan.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        what = f"{path.parent.name} holds no whole evaluation ({type(error).__name__}: {path.name})"
        raise ConfigError(f"{what}: give the folder that `attending eval` wrote.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path.name} of {path.parent.name} is damaged: evaluate again.")
    return found
