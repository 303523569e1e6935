"""The default model's table of tests, and fifty conversations of HealthBench.

    python benchmarks/evaluate.py DATA ROWS [OUT]

DATA is the folder with the test sets, ROWS HealthBench's rows (evaluation only), OUT where the runs
are kept: one that was stopped goes on. Budget: some 2,900 prompts of 220 tokens at 400 tokens a
second and 1,000 answers of 200 tokens at 100 a second: about 90 minutes of two cores.
"""

import json
import random
import sys
from pathlib import Path
from subprocess import run
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib import pyplot
from page import HERE, facts

from attending.errors import AttendingError
from attending.evaluate import scores
from attending.evaluate.healthbench.task import HealthBench, recorded
from attending.evaluate.page import write_page
from attending.evaluate.recipe import EvalConfig

sys.path.insert(0, str(HERE.parent))
from tests.evaluate import healthbench_oracle as oracle

TABLE = (
    "SmolLM2-135M-Instruct, the demonstration model, on the recipe `table`, greedily. It was not "
    "made for medicine and is at chance where the last column says so; of PubMedQA's answers 55 % "
    "are yes, so always saying yes would be better than it. *Cut* answers had not ended at their "
    "most tokens (the model repeats itself) and were graded as they stood. 95 % intervals."
)
HEALTHBENCH = (
    "The same model on {n} conversations drawn from 500 packaged rows, judged by the embedded "
    "judge. **What that is worth:** {worth}. Most of HealthBench's criteria are instructions, "
    "which that judge was not trained on, and no agreement with physicians was measured: the "
    "figure shows that the path works, and is no HealthBench score of the model."
)
CHECK = (
    "Verdicts drawn at random for all {n} packaged rows, scored by `attending eval healthbench "
    "--rows --graded` and by a second, independent computation of the reference's formulas: the "
    "largest difference of {figures} figures (overall, unclipped, each theme, axis and tag, their "
    "counts) is {difference:.1e}."
)


def evaluate(suite: str, out: Path, *more: str) -> dict[str, Any]:
    """The verb itself, going on where it was stopped."""
    resume = ["--resume"] if (out / "plan.json").exists() else []
    command = [sys.executable, "-m", "attending.cli", "eval", suite, "default", "--out", str(out)]
    done = run([*command, "--judge", "embedded", *more, *resume])
    if done.returncode not in (0, 3):
        raise AttendingError(f"{suite} ended with exit code {done.returncode}.")
    found: dict[str, Any] = json.loads((out / "report.json").read_text("utf-8"))
    write_page(out)
    return found


def check(rows: Path) -> str:
    """Recorded verdicts on the packaged rows, scored twice."""
    told = [json.loads(line) for line in rows.read_text("utf-8").split("\n") if line.strip()]
    drawing = random.Random(0)
    graded = [
        {
            "prompt_id": row["prompt_id"],
            "response": "",
            "verdicts": [{"criteria_met": drawing.random() < 0.5} for _ in row["rubrics"]],
        }
        for row in told
    ]
    with TemporaryDirectory() as folder:
        file = Path(folder) / "graded.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in graded), encoding="utf-8")
        config = EvalConfig.build({"tasks": {"hb": {"kind": "healthbench", "data": str(rows)}}})
        task = HealthBench(config.tasks["hb"], None)  # type: ignore[arg-type]
        found = scores.row(task, recorded(task, file), seed=0, resamples=1000)
    wanted = oracle.results(told, graded)
    pairs = [(found["score"], wanted.overall), (found["unclipped"], wanted.unclipped)]
    for tag, part in found["parts"].items():
        pairs += [(part["score"], wanted.metrics[tag])]
        pairs += [(part["n_answers"], wanted.metrics[f"{tag}:n_samples"])]
    assert len(found["parts"]) * 2 + 2 == len(wanted.metrics)
    most = max(abs(a - b) for a, b in pairs if b is not None)
    return CHECK.format(n=len(told), figures=len(pairs), difference=most)


def table(report: dict[str, Any]) -> list[str]:
    lines = ["| task | score is | score | interval | n | unscored | cut | against chance |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in report["rows"]:
        span = " to ".join(f"{end:.3f}" for end in row["interval"] or ())
        chance = f"{row['says']} ({row['chance']:.3f})" if row["chance"] else ""
        score = "none" if row["score"] is None else f"{row['score']:.3f}"
        cells = [row["task"], row["metric"], score, span, f"{row['n']:,}"]
        lines.append(
            f"| {' | '.join([*cells, format(row['unscored'], '.1%'), str(row['cut']), chance])} |"
        )
    return lines


def parts(report: dict[str, Any], *tasks: str) -> list[str]:
    lines = ["| task | part | score | interval | n |", "|---|---|---|---|---|"]
    for row in (row for row in report["rows"] if row["task"] in tasks):
        for name, part in row["parts"].items():
            if not name.startswith(("cluster:", "physician_agreed", "file:")):
                span = " to ".join(f"{end:.3f}" for end in part["interval"] or ())
                cells = [row["task"], name, f"{part['score']:.3f}", span, str(part["n"])]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(*reports: dict[str, Any]) -> None:
    """A bar a task with its interval, and where guessing would be."""
    rows = [row for report in reports for row in report["rows"]]
    figure, axes = pyplot.subplots(figsize=(7, 0.5 * len(rows) + 1), layout="constrained")
    for place, row in enumerate(rows):
        low, high = row["interval"]
        spread = [[row["score"] - low], [high - row["score"]]]
        axes.barh(place, row["score"], 0.6, xerr=spread, capsize=4, color="#3b6ea5")
        if row["chance"]:
            axes.plot([row["chance"]] * 2, [place - 0.4, place + 0.4], "--", color="#d1495b")
    axes.set_yticks(range(len(rows)), [f"{row['task']}, {row['metric']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("score with 95 % interval; dashed: guessing")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "evaluate.svg", metadata={"Date": None})


def main(data: Path, rows: Path, out: Path) -> Path:
    known = facts()  # before a file is written that the commit has not
    told = evaluate("table", out / "table", "--data", str(data))
    sampling = "tasks.healthbench.sampling."
    settings = ["--set", f"{sampling}max_tokens=512", "--set", f"{sampling}temperature=0.0"]
    more = ["--rows", str(rows), "--limit", "50", *settings]
    health = evaluate("healthbench", out / "healthbench", *more)
    worth = health["judge"]["agreement"]
    low, high = worth["interval"]
    value = (
        f"{worth['metric']} {worth['value']:.2f} ({low:.2f} to {high:.2f}) with "
        f"{worth['against']}, n = {worth['n']:,}"
    )
    paths = [f"{name} {value}" for name, value in told["models"][0]["path"].items()]
    text = ["# What the default model scores", "", TABLE, "", *table(told), ""]
    text += [*parts(told, "mmlu-med", "kqa", "ifeval"), ""]
    text += ["## Fifty conversations of HealthBench", ""]
    text += [HEALTHBENCH.format(n=health["rows"][0]["n"], worth=value), ""]
    text += [*table(health), "", *parts(health, "healthbench"), ""]
    text += ["## The formulas", "", check(rows), ""]
    draw(told, health)
    text += ["![What the default model scores](evaluate.svg)", ""]
    text += [f"- path: {', '.join(paths)}", *known, ""]
    page = HERE / "evaluate.md"
    page.write_text("\n".join(text), encoding="utf-8")
    return page


if __name__ == "__main__":
    try:
        folder = Path(sys.argv[3]) if len(sys.argv) > 3 else Path("out/evaluate")
        main(Path(sys.argv[1]), Path(sys.argv[2]), folder)
    except (IndexError, OSError, AttendingError) as error:
        sys.exit(f"{error}\n{__doc__}")
