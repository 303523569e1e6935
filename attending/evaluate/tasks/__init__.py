"""The kinds of task, by the name that a recipe gives them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from attending.evaluate.healthbench.meta import Meta
from attending.evaluate.healthbench.task import HealthBench
from attending.evaluate.recipe import AnyTask
from attending.evaluate.sample import Task
from attending.evaluate.tasks.by_rule import Instructions, Maths, Refusal
from attending.evaluate.tasks.choice import Choice
from attending.evaluate.tasks.likelihood import Text
from attending.evaluate.tasks.statements import Statements

KINDS: dict[str, Callable[[Any, Path | None], Task]] = {
    **{"choice": Choice, "maths": Maths, "instructions": Instructions},
    **{"healthbench": HealthBench, "meta": Meta},
    **{"statements": Statements, "refusal": Refusal, "text": Text},
}


def build(config: AnyTask, folder: Path | None) -> Task:
    """The task of a record; its data lies in the folder, or where its source was pulled to."""
    return KINDS[config.kind](config, folder)
