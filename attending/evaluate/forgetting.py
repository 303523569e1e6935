"""What training cost: a model before and after, on what it should have kept.

Every run that goes on from a model ends with this: held-out bits per byte of its own corpus, and
the scores of a suite, side by side, as `forgetting.json` and a figure. A limit makes it a check.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import PositiveFloat, PositiveInt

from attending.artifact import write_json
from attending.config import Config
from attending.endpoint import EndpointOptions
from attending.errors import CheckFailed, ConfigError
from attending.evaluate import results
from attending.evaluate.page import Change, changes, draw_changes
from attending.evaluate.recipe import EvalConfig
from attending.evaluate.run import ModelSetup, Run
from attending.evaluate.sample import Task
from attending.evaluate.store import PLAN, Store
from attending.evaluate.tasks import build
from attending.sources import Progress

REPORT, FIGURE = "forgetting.json", "forgetting.svg"
RESAMPLES = 1000
SIDES = BEFORE, AFTER = "before", "after"


class ForgettingConfig(Config):
    """What is compared before and after training."""

    suite: str = "retention"
    """A recipe of `attending eval`; of it only what needs no judge."""
    data: str | None = None
    """Folder of the suite's data; None: only held-out bits per byte are compared."""
    limit: PositiveInt | None = None
    """Draw so many examples of each task."""
    concurrency: PositiveInt = 8
    """Questions under way at once."""
    max_forgetting: PositiveFloat | None = None
    """The run fails (exit code 3) where something kept is clearly worse than before by more than
    this share of what it was: 0.02 is 2 %."""


class DocumentBits(NamedTuple):
    """A document's bits before and after, and its bytes as UTF-8."""

    before: float
    after: float
    num_bytes: int


class Forgetting(NamedTuple):
    """Of a run."""

    changes: list[Change]
    kept: frozenset[str]
    """The tasks that training must not cost."""

    def worst(self) -> tuple[str, float] | None:
        """The kept task that clearly lost the most, and the share of it that is gone."""
        lost = [
            (one.task, -one.gain / abs(one.before))
            for one in self.changes
            if one.task in self.kept and one.says == "clear loss" and one.before
        ]
        return max(lost, key=lambda one: one[1], default=None)

    def figures(self) -> dict[str, float]:
        """For `run.json`: the gain of each task; more is better, of losses too."""
        return {f"forgetting/{one.task}_gain": one.gain for one in self.changes}

    def lines(self) -> list[str]:
        """To print."""
        found = []
        for one in self.changes:
            ends = f" ({one.interval[0]:+.3f} to {one.interval[1]:+.3f})" if one.interval else ""
            told = f"{one.before or 0:.3f} -> {one.after or 0:.3f}; gain {one.gain:+.3f}{ends}"
            found.append(f"{one.task}, {one.metric}: {told}, {one.says}")
        return found


def require_measured(config: ForgettingConfig, kept: frozenset[str]) -> None:
    """Before training, what would else be known only after it.

    Raises:
        ConfigError: A limit is set, and nothing that counts is measured.
        UsageError: The suite's data is not in the folder, or what grades it is not installed.
    """
    if config.max_forgetting is not None and config.data is None and not kept:
        raise ConfigError(
            f"max_forgetting={config.max_forgetting} would compare nothing: name the folder with "
            f"the data of the suite {config.suite} (--set forgetting.data=DIR), or mark held-out "
            "parts as is_kept."
        )
    if config.data is not None:
        _asked(config, config.data)


def compare(
    config: ForgettingConfig,
    start: str,
    draft: Path,
    kept: frozenset[str],
    progress: Progress,
    note: Callable[[str], object],
) -> Forgetting:
    """Compare, and write the report into a run's folder.

    Args:
        config: What is compared.
        start: The model that was gone on from: a source.
        draft: The run's folder: a model, and what it kept of held-out documents.
        kept: The sets of held-out documents that training must not cost; a suite's tasks are all.
        progress: Told of every answer.
        note: Told what people should know, and the report's lines.
    """
    names = [path.name[8:-13] for path in sorted(draft.glob("heldout_*_before.jsonl"))]
    found = [of_documents(name, read_documents(draft, name)) for name in names]
    if config.data is None:
        note("forgetting: tasks are not compared, since forgetting.data names no folder.")
    else:
        tasks = of_suite(config, start, draft, progress, note)
        found, kept = found + tasks, kept | {one.task for one in tasks}
    report = Forgetting(found, kept)
    write(draft, report)
    for line in report.lines():
        note(line)
    return report


def of_documents(name: str, documents: Sequence[DocumentBits], seed: int = 0) -> Change:
    """The change of held-out bits per byte; the interval is a paired bootstrap over documents."""
    table = np.array(documents, np.float64)
    rng, count = np.random.default_rng(seed), len(table)
    drawn = [table[rng.integers(count, size=count)].sum(0) for _ in range(RESAMPLES)]
    gains = [(before - after) / size for before, after, size in drawn]
    before, after, size = table.sum(0)
    low, high = np.percentile(gains, (2.5, 97.5))
    return Change(
        task=name,
        metric="bits per byte",
        a=BEFORE,
        b=AFTER,
        before=before / size,
        after=after / size,
        gain=(before - after) / size,
        interval=(float(low), float(high)),
        is_loss=True,
    )


def read_documents(folder: Path, name: str) -> list[DocumentBits]:
    """What a run kept of a part's held-out documents before and after."""
    rows = [
        [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        for file in (folder / f"heldout_{name}_before.jsonl", folder / f"heldout_{name}.jsonl")
    ]
    bit = math.log(2)
    return [
        DocumentBits(before["nats"] / bit, after["nats"] / bit, after["num_bytes"])
        for before, after in zip(*rows, strict=True)
    ]


def of_suite(
    config: ForgettingConfig,
    start: str,
    folder: Path,
    progress: Progress,
    note: Callable[[str], object],
) -> list[Change]:
    """The suite's scores of the model that was gone on from and of a run's, task by task.

    What was asked and answered lies in the folder's `forgetting/`, by `BEFORE` and `AFTER`.

    Args:
        config: Names suite and data.
        start: A source.
        folder: Of the run: a model folder; what was asked and answered is kept in it.
        progress: Told of every answer.
        note: Told what people should know.
    """
    assert config.data is not None
    suite, built = _asked(config, config.data)
    options = EndpointOptions(max_concurrency=suite.concurrency, price_per_million=(0.0, 0.0))
    how = {"engine": suite.engine, "model_id": "", "options": options}
    models = [ModelSetup(BEFORE, start, how), ModelSetup(AFTER, str(folder), how)]
    place = folder / "forgetting"
    store = Store(place, resume=(place / PLAN).exists())
    run = Run(suite, built, models, None, store, progress, note)
    return changes(results.evaluate(run, config.suite))


def _asked(config: ForgettingConfig, data: str) -> tuple[EvalConfig, list[Task]]:
    """The suite as it is asked, and its tasks with their examples."""
    suite = EvalConfig.load(config.suite, "eval")
    tasks = suite.model_dump(mode="json")["tasks"]
    for task in tasks.values():
        task["limit"] = config.limit or task["limit"]
    suite = suite.replace(tasks=tasks, concurrency=config.concurrency)
    return suite, [build(one, Path(data)) for one in suite.tasks.values()]


def write(folder: Path, found: Forgetting) -> None:
    """`forgetting.json` and its figure, in a run's folder."""
    rows = [
        one._asdict() | {"says": one.says, "is_kept": one.task in found.kept}
        for one in found.changes
    ]
    write_json(folder / REPORT, {"changes": rows})
    if found.changes:
        draw_changes(found.changes).savefig(folder / FIGURE)


def check(found: Forgetting, most: float | None) -> None:
    """CheckFailed where something kept is clearly worse by more than `most` of what it was."""
    worst = found.worst()
    if most is not None and worst and worst[1] > most:
        raise CheckFailed(
            f"{worst[0]} lost {worst[1]:.1%} of what it was, and at most {most:.1%} may be "
            "forgotten; the model is written all the same. Lower optimizer.peak, or give general "
            "text a larger share or the loss self_constraint."
        )
