"""A case by its name on a command line or in a recipe."""

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from attending.config import suggest
from attending.errors import ConfigError, UsageError
from attending.verifier.patient.case import Case, read_case
from attending.verifier.patient.ddxplus import read_ddxplus
from attending.verifier.patient.vignette import read_vignette

FORMS = (
    "a shipped case, FILE.json, FILE.jsonl:ID of vignettes with atomic facts, or the folder of "
    "DDXPlus' tables, FOLDER or FOLDER:CONDITION"
)


def find_case(name: str, seed: int = 0) -> Case:
    """The case that a name means; `seed` draws what its source leaves open.

    Raises:
        UsageError: It is none of the forms, or names what is not there.
        ConfigError: What is there is no case.
    """
    shipped = resources.files("attending.verifier.patient") / "cases"
    names = [path.name.removesuffix(".json") for path in shipped.iterdir()]
    if name in names:
        with resources.as_file(shipped / f"{name}.json") as path:
            return read_case(path)
    file, _, inner = name.partition(":")
    path = Path(file)
    if path.is_dir():
        return read_ddxplus(path).draw(seed, inner)
    if not path.is_file():
        raise UsageError(f"{name!r} is not {FORMS}.{suggest(name, names)}")
    if path.suffix == ".json" and not inner:
        return read_case(path)
    for _, row in _rows(path):
        if str(row.get("id")) == inner:
            return read_vignette(row, seed)
    raise UsageError(f"{path.name} has no vignette {inner!r}: give FILE.jsonl:ID, with its `id`.")


def find_cases(name: str, seed: int = 0) -> Iterator[Case]:
    """The case that a name means, or all of FILE.jsonl, one a row; raises as `find_case` does."""
    path = Path(name)
    if path.suffix != ".jsonl" or not path.is_file():
        yield find_case(name, seed)
        return
    for where, row in _rows(path):
        yield Case.build(row, where)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row after its file and line. Only a line feed ends one: texts hold U+2028."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            where = f"{path.name}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{where} is no JSON ({error}).") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{where} is no object: expected a case or vignette, {{...}}.")
            yield where, row
