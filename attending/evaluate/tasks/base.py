"""What the kinds of task share: rows become examples, a chat model is asked, rules check."""

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any, Generic, NamedTuple, TypeVar

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from attending.artifact import digest
from attending.config import suggest
from attending.endpoint import Endpoint
from attending.errors import ConfigError
from attending.evaluate import data
from attending.evaluate.asking import chat
from attending.evaluate.recipe import Columns, TaskConfig
from attending.evaluate.sample import Answer, Example, Grade, Sample
from attending.verifier.judge.verdict import Verdict
from attending.verifier.rubric.schema import Rubric
from attending.verifier.rules import check

Own = TypeVar("Own", bound=TaskConfig)
JINJA = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
compiled = cache(JINJA.from_string)
WORDS = tomllib.loads((resources.files(__package__) / "words.toml").read_text("utf-8"))


class Row(NamedTuple):
    """A row of the data; what it lacks is a ConfigError that says where."""

    cells: Mapping[str, Any]
    where: str
    place: int
    columns: Columns

    def cell(self, key: str, kind: type | tuple[type, ...] = object) -> Any:
        """The value under a key."""
        if key not in self.cells:
            raise ConfigError(f"{self.where} has no {key!r}.{suggest(key, self.cells)}")
        if not isinstance(value := self.cells[key], kind):
            raise ConfigError(f"{self.where}: {key!r} holds {value!r:.80}, of the wrong kind.")
        return value

    def example(self, prompt: str, **told: Any) -> Example:
        """What is asked, under the row's id, or its place without one, and with its group."""
        own, group = self.columns.id, self.columns.group
        tags = (f"{group}:{self.cell(group)}",) if group else ()
        name = str(self.cell(own) if own else self.place)
        return Example(name, ({"role": "user", "content": prompt},), told, tags)

    def render(self, source: str, **values: Any) -> str:
        """A Jinja template with the question and these values."""
        question = self.cell(self.columns.question, str)
        try:
            return compiled(source).render(question=question, **values)
        except jinja2.TemplateError as error:
            raise ConfigError(f"{self.where}: the prompt cannot be made ({error}).") from None


class Base(Generic[Own]):
    """A task whose answers a chat model writes, checked by the rule in `example.data["rule"]`."""

    metric = "accuracy"
    chance: float | None = None
    is_loss = is_clipped = False
    canary: tuple[str, ...] = ()
    requests = 1

    def __init__(self, config: Own, folder: Path | None) -> None:
        """Read the data. Raises ConfigError for what a row lacks, with its number from 1."""
        self.config, self.name, self.repeats = config, config.name, config.repeats
        path = data.find(config.data, folder)
        self.sha256, columns = digest(path), getattr(config, "columns", Columns())
        rows = enumerate(data.read_rows(path))
        read = [self.read(Row(row, f"{path.name}, row {i + 1}", i, columns)) for i, row in rows]
        kept = [example for example in read if example]
        data.refuse_repeats((example.id for example in kept), path.name)
        self.num_left_out = len(read) - len(kept)
        self.examples: Sequence[Example] = data.take(kept, config.limit)
        if not self.examples:
            raise ConfigError(f"{path.name} has no row that {config.name} can ask about.")

    def read(self, row: Row) -> Example | None:
        raise NotImplementedError

    async def ask(self, endpoint: Endpoint, example: Example, repeat: int) -> Answer:
        """One answer, by chat; the endpoint's errors are the caller's."""
        return await chat(endpoint, self.config.sampling, example, repeat)

    def given(self, example: Example, repeat: int) -> Answer | None:
        return None

    def rubric(self, example: Example) -> Rubric | None:
        return None

    def grade(self, example: Example, answer: Answer, verdicts: Sequence[Verdict] = ()) -> Grade:
        """What the answer is worth; a kind without a judge says it in `worth`."""
        return self.worth(example, answer)

    def worth(self, example: Example, answer: Answer) -> Grade:
        """By the rule: thinking does not count, and one that never ends is no answer, so wrong."""
        checked = check(example.data["rule"], answer.text)
        return Grade(checked.score, checked.reason)

    def headline(self, samples: Sequence[Sample], seed: int, resamples: int) -> dict[str, Any]:
        return {}

    def more(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The share of answers in which nothing could be graded."""
        graded = [one.grade for one in samples if one.grade.score is not None]
        told = [grade.reason.startswith(("no answer", "no number")) for grade in graded]
        return {"no_answer": fmean(told)} if any(told) else {}
