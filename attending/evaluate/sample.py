"""What every task shares: examples, answers, grades; and the files that keep them.

The path of a result: `Example` (what is asked) -> `Answer` (what the model said) -> `Grade` (what it
is worth) -> a row of the report. Answers and grades are lines of two files, so that a run goes on
where it stopped, and answers can be graded anew without asking the model again.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from attending import logs
from attending.artifact import disk_has_room
from attending.endpoint import Endpoint
from attending.errors import CheckpointError
from attending.verifier.judge.verdict import Verdict
from attending.verifier.rubric.schema import Rubric

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to ask, under an id of its own in the task."""

    id: str
    messages: tuple[Message, ...]
    """What a chat model is asked, and what the report shows."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """What the task needs more, to ask or to grade."""
    tags: tuple[str, ...] = ()
    """Groups that it counts in."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered."""

    id: str  # the example's
    repeat: int  # 0, 1, ... of several answers to one example
    text: str  # thinking included, where the endpoint did not take it out
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    logprobs: Mapping[str, float] | None = None  # of options, in nats; of a text, its sum

    @property
    def key(self) -> tuple[str, int]:
        """What tells it from the other answers of a task."""
        return self.id, self.repeat


@dataclass(frozen=True, slots=True)
class Grade:
    """What an answer is worth."""

    score: float | None
    """None is unscored: nothing is known, and it is never counted as a wrong answer."""
    reason: str = ""
    """For people."""
    bounds: tuple[float, float] | None = None
    """Between these an unscored one lies, where that is known."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Scores of parts of it, such as HealthBench's axes."""
    verdicts: tuple[Mapping[str, Any], ...] = ()
    """Of a judge, a criterion each: `criterion`, `points`, `met`, `explanation`."""
    weight: float = 1.0
    """In the mean; bytes, where the score is one per byte."""


class Sample(NamedTuple):
    """An example with one answer to it and its grade."""

    example: Example
    answer: Answer
    grade: Grade


class Task(Protocol):
    """A test: its examples, how a model is asked and how its answers are graded."""

    name: str
    metric: str
    """What the score is, in two or three words."""
    chance: float | None
    """The expected score of guessing."""
    is_loss: bool
    """Less is better."""
    is_clipped: bool
    """Means are clipped to [0, 1], as HealthBench's are."""
    repeats: int
    """Answers to each example."""
    examples: Sequence[Example]
    sha256: str
    """Of the data."""

    async def ask(self, endpoint: Endpoint, example: Example, repeat: int) -> Answer:
        """One answer; EndpointError or ReplyError where there is none."""

    def rubric(self, example: Example) -> Rubric | None:
        """What a judge must be asked; None where `grade` needs no verdicts."""

    def grade(self, example: Example, answer: Answer, verdicts: Sequence[Verdict] = ()) -> Grade:
        """What the answer is worth; pure."""

    def more(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Further figures of all samples, for the report."""


class Lines:
    """A JSONL file that grows by whole lines, flushed at once; a half-written last one is cut."""

    def __init__(self, path: Path) -> None:
        """Open for appending; CheckpointError for a damaged line."""
        path.parent.mkdir(parents=True, exist_ok=True)
        logs.cut(path)
        self.rows = list(read_lines(path))
        """What was there already."""
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def write(self, record: Answer | Mapping[str, Any]) -> None:
        """Append one; CheckpointError where the disk is full: what stands there stays whole."""
        row = record if isinstance(record, Mapping) else asdict(record)
        with disk_has_room(self._path):
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file. Only a line feed ends one: texts hold U+2028.

    Raises:
        CheckpointError: With file and line.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CheckpointError(f"{path.name}:{number} is no JSON ({error}).") from None
            if not isinstance(row, dict):
                raise CheckpointError(f"{path.name}:{number} is no JSON object.")
            yield row
