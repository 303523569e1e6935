"""What every rule shares: its result, its fields, its patterns, and where an answer begins."""

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from pydantic import create_model

from attending.config import Config
from attending.errors import UsageError
from attending.verifier.data import table

DATA = table("rules/rules")


class Checked(NamedTuple):
    """A rule's verdict on one response."""

    passed: bool
    reason: str  # what was found
    score: float  # 0 to 1; between them only where a rule counts parts


def verdict(passed: bool, reason: str) -> Checked:
    """Of a rule that counts no parts."""
    return Checked(passed, reason, float(passed))


def bind(rule: Callable[..., Any], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Plain data as a rule's arguments; ConfigError for what is unknown, absent or wrong."""
    built = _fields(rule).build(values, where)
    return {name: getattr(built, name) for name in type(built).model_fields}


def answer_of(response: str) -> str | None:
    """What follows the last `</think>`, as M2's card reads it; None if the thinking never ends."""
    _, tag, text = response.rpartition("</think>")
    return None if "<think>" in text else text.strip() if tag else text


def extra(module: str) -> Any:
    """A module of the extra `verify`; UsageError, naming the extra, where it is absent."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        what = f"this rule needs {error.name}, which is not installed"
        raise UsageError(f"{what}: pip install -e '.[verify]' in the clone") from None


@cache
def _fields(rule: Callable[..., Any]) -> type[Config]:
    own = [*inspect.signature(rule).parameters.values()][1:]
    fields: Any = {p.name: (p.annotation, ... if p.default is p.empty else p.default) for p in own}
    model: type[Config] = create_model(rule.__name__, __base__=Config, **fields)
    return model
