"""Criteria with signed points: the rows of HealthBench's files, read strictly and written back.

A row is `{"prompt_id", "prompt", "rubrics": [{"criterion", "points", "tags"}], ...}`: the prompt is
a conversation that ends with the user, and its other keys (`example_tags`, `canary`,
`ideal_completions_data`) travel along untouched.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attending.errors import ConfigError

LARGEST = 10
Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Criterion:
    """What an answer is judged on: met, a positive one earns its points, a negative one costs them.

    Raises ConfigError for an empty text or for points that are no integer from -10 to 10, or 0.
    """

    text: str
    points: int
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no score could use."""
        if not self.text.strip():
            raise ConfigError("a criterion without text: say what the answer must (not) do.")
        if type(self.points) is not int or not 0 < abs(self.points) <= LARGEST:
            raise ConfigError(
                f"criterion {self.text[:60]!r} has {self.points!r} points: expected an integer "
                f"from -{LARGEST} to {LARGEST} that is not 0."
            )


@dataclass(frozen=True, slots=True)
class Rubric:
    """The criteria of one conversation's next answer.

    A criterion that is there twice is read (a row of HealthBench has one); `check` refuses it.
    """

    name: str  # HealthBench's prompt_id
    conversation: tuple[Message, ...]  # role and content; the last one is the user's
    criteria: tuple[Criterion, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)  # the row's other keys

    def __post_init__(self) -> None:
        """Refuse a conversation that no answer could follow."""
        if not self.conversation:
            raise ConfigError(f"rubric {self.name!r} has no conversation: nothing can be judged.")
        if self.conversation[-1].get("role") != "user":
            raise ConfigError(
                f"rubric {self.name!r}: its conversation ends with "
                f"{self.conversation[-1].get('role')!r}; the answer to be judged follows a user."
            )

    def row(self) -> dict[str, Any]:
        """As HealthBench's files have it."""
        criteria = [
            {"criterion": one.text, "points": one.points, "tags": list(one.tags)}
            for one in self.criteria
        ]
        prompt = [dict(message) for message in self.conversation]
        return {"prompt_id": self.name, "prompt": prompt, "rubrics": criteria, **self.extra}


def parse_rubric(row: Mapping[str, Any], where: str = "a rubric") -> Rubric:
    """Of one row; ConfigError, with `where`, for what is missing or of a wrong kind."""
    try:
        known = {"prompt_id", "prompt", "rubrics"}
        criteria = tuple(
            Criterion(item["criterion"], item["points"], tuple(item.get("tags") or ()))
            for item in row["rubrics"]
        )
        turns = tuple({"role": str(m["role"]), "content": str(m["content"])} for m in row["prompt"])
        extra = {key: value for key, value in row.items() if key not in known}
        return Rubric(str(row["prompt_id"]), turns, criteria, extra)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{where} is no row of prompt_id, prompt (role, content) and rubrics (criterion, "
            f"points, tags): {error!r}."
        ) from None


def read_rubrics(path: Path) -> Iterator[Rubric]:
    """The rows of a JSONL file, checked one by one; texts may hold U+2028.

    Raises:
        ConfigError: With file and line.
    """
    return (parse_rubric(row, where) for where, row in read_lines(path))


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each after FILE:LINE. Only a line feed ends one.

    Raises:
        ConfigError: With file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.name} is no text in UTF-8 ({type(error).__name__}).") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path.name}:{number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{where} is no JSON ({error}).") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{where} is no JSON object: expected a row in braces.")
            yield where, row


def write_rubrics(path: Path, rubrics: Sequence[Rubric]) -> None:
    """One row a line; a reader never sees half a file."""
    draft = path.with_name(path.name + ".tmp")
    lines = (json.dumps(rubric.row(), ensure_ascii=False) + "\n" for rubric in rubrics)
    draft.write_text("".join(lines), encoding="utf-8")
    draft.replace(path)
