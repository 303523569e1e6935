"""The tables and prompts that stand beside the code of this room, by their path in it."""

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import jinja2

ROOM = resources.files("attending.verifier")


@cache
def table(path: str) -> Mapping[str, Any]:
    """A TOML file, such as `patient/cues`."""
    return tomllib.loads((ROOM / f"{path}.toml").read_text("utf-8"))


@cache
def template(path: str) -> jinja2.Template:
    """A Jinja file, such as `patient/prompts/gate.en`; in HTML every value is escaped."""
    environment = jinja2.Environment(
        autoescape=path.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string((ROOM / f"{path}.jinja").read_text("utf-8"))
