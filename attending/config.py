"""The one configuration idiom: frozen, strict, documented records, read from TOML.

A recipe is `recipes/VERB/NAME.toml` or a file of the user's; it may name a `base`, whose values it
overrides. `--set a.b=value` overrides both. Unknown keys are errors with a suggestion.
"""

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json

from attending.errors import ConfigError

RECIPES = resources.files("attending") / "recipes"


class Config(BaseModel):
    """Base of every recipe and option record: no unknown key, no coercion, no change after."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True
    )

    @classmethod
    def build(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """Validate plain values, as TOML or keyword arguments give them.

        Args:
            values: Nested mappings; sequences may be lists where the field is a tuple.
            where: Named in the error, e.g. the recipe's file name.

        Raises:
            ConfigError: With every wrong field, its value, and a suggestion for an unknown name.
        """
        try:
            # JSON mode is what lets a list become a tuple and a string an enum, while strict
            # still refuses "3" for 3.
            return cls.model_validate_json(to_json(values))
        except ValidationError as error:
            head = f"{where or cls.__name__} is not valid:"
            lines = [_explain(cls, dict(item)) for item in error.errors(include_url=False)]
            raise ConfigError("\n  ".join([head, *lines])) from None

    @classmethod
    def load(cls, name: str, verb: str, overrides: Iterable[str] = ()) -> Self:
        """Read a shipped recipe by name, or a TOML file by path, then apply `--set` pairs."""
        return cls.build(override(read_recipe(name, verb), overrides), where=f"recipe {name}")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again (pydantic's `model_copy` is not)."""
        return self.build({**self.model_dump(mode="json"), **changes})


def read_recipe(name: str, verb: str) -> dict[str, Any]:
    """The merged values of a recipe and the bases it names, nearest last.

    Raises:
        ConfigError: Unknown name (with the list), unreadable TOML, or a circle of bases.
    """
    seen: list[str] = []
    layers: list[dict[str, Any]] = []
    current: str | None = name
    while current is not None:
        if current in seen:
            raise ConfigError(f"recipe {name} is based on itself: {' -> '.join([*seen, current])}")
        seen.append(current)
        values = _read_toml(current, verb)
        current = values.pop("base", None)
        layers.append(values)
    merged: dict[str, Any] = {}
    for values in reversed(layers):
        merged = _merge(merged, values)
    return merged


def recipe_names(verb: str) -> list[str]:
    """The shipped recipes of a verb."""
    folder = RECIPES / verb
    if not folder.is_dir():
        return []
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def override(values: Mapping[str, Any], pairs: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b=value` pairs; a value is TOML where it parses as TOML, else a plain string."""
    result = dict(values)
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {pair!r} is not of the form a.b=value")
        try:
            value: Any = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        for part in reversed(key.split(".")):
            value = {part: value}
        result = _merge(result, value)
    return result


def suggest(name: str, known: Iterable[str]) -> str:
    """The tail of an unknown-name error: the nearest known name and the list of all."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(names) or 'none'}."


def _read_toml(name: str, verb: str) -> dict[str, Any]:
    shipped = RECIPES / verb / f"{name}.toml"
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"recipe file {name} does not exist.")
        text = path.read_text(encoding="utf-8")
    elif shipped.is_file():
        text = shipped.read_text(encoding="utf-8")
    else:
        raise ConfigError(f"no {verb} recipe {name!r}.{suggest(name, recipe_names(verb))}")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {name} is not valid TOML: {error}") from None


def _merge(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        both = isinstance(below, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _explain(cls: type[BaseModel], item: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        return (
            f"{where}: unknown.{suggest(str(item['loc'][-1]), _fields_at(cls, item['loc'][:-1]))}"
        )
    if item["type"].startswith("union_tag"):
        tags = item["ctx"]["expected_tags"].replace("'", "").split(", ")
        told = item["ctx"].get("tag", "")
        return f"{where}: has no known {item['ctx']['discriminator']}.{suggest(told, tags)}"
    return f"{where}: {item['msg']} (got {item['input']!r})"


def _fields_at(cls: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Of the records there; keys of a mapping and the tag of a union are parts without a field."""
    kinds = [cls]
    for part in path:
        fields = [kind.model_fields[part] for kind in kinds if part in kind.model_fields]
        inner = [model for field in fields for model in _models(field.annotation)]
        kinds = inner or [kind for kind in kinds if part in _tags(kind)] or kinds
    return list(dict.fromkeys(name for kind in kinds for name in kind.model_fields))


def _tags(kind: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(kind.model_fields["kind"].annotation) if "kind" in kind.model_fields else ()


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
