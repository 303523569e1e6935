"""The kinds of task, by the name that a recipe gives them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from attending.config import suggest
from attending.errors import ConfigError
from attending.evaluate.recipe import AnyTask
from attending.evaluate.sample import Task
from attending.evaluate.tasks.by_rule import Instructions, Maths, Refusal
from attending.evaluate.tasks.choice import Choice
from attending.evaluate.tasks.likelihood import Text
from attending.evaluate.tasks.statements import Statements

KINDS: dict[str, Callable[[Any, Path | None], Task]] = {
    **{"choice": Choice, "maths": Maths, "instructions": Instructions},
    **{"statements": Statements, "refusal": Refusal, "text": Text},
}


def build(config: AnyTask, folder: Path | None) -> Task:
    """The task of a record; its data lies in the folder, or where its source was pulled to."""
    if config.kind not in KINDS:
        raise ConfigError(f"no kind of task {config.kind!r}.{suggest(config.kind, KINDS)}")
    return KINDS[config.kind](config, folder)
