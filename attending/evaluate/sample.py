"""What every task shares: examples, answers, grades.

The path of a result: `Example` (what is asked) -> `Answer` (what the model said) -> `Grade` (what
it is worth) -> a row of the report.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from attending.endpoint import Endpoint
from attending.verifier.judge.verdict import Verdict
from attending.verifier.rubric.schema import Rubric

Message = Mapping[str, str]
Key = tuple[str, int]  # an example's id and which answer to it


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
    text: str  # thinking included
    finish_reason: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    logprobs: Mapping[str, float] | None = None  # of options, in nats; of a text, its sum

    @property
    def key(self) -> Key:
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
    canary: tuple[str, ...]
    """Of the data, for every file that holds its texts."""
    requests: int
    """Of one answer, at most."""

    def given(self, example: Example, repeat: int) -> Answer | None:
        """The answer that stands in the data; None where a model is asked."""

    async def ask(self, endpoint: Endpoint, example: Example, repeat: int) -> Answer:
        """One answer; EndpointError or ReplyError where there is none."""

    def rubric(self, example: Example) -> Rubric | None:
        """What a judge must be asked; None where `grade` needs no verdicts."""

    def grade(self, example: Example, answer: Answer, verdicts: Sequence[Verdict] = ()) -> Grade:
        """What the answer is worth; pure."""

    def more(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Further figures of all samples, for the report."""

    def headline(self, samples: Sequence[Sample], seed: int, resamples: int) -> dict[str, Any]:
        """The report's figures where the score is no mean of the samples' scores; else nothing."""
