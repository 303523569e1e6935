"""What a run will take, said before it starts; and where it stops by itself."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from attending.endpoint import Endpoint
from attending.errors import CheckFailed, EndpointError, ReplyError
from attending.evaluate.recipe import LimitsConfig
from attending.evaluate.sample import Example
from attending.verifier.ask import together

CHARACTERS = 4.0  # of a token, roughly, in English
GRADE_TOKENS, TEMPLATE_TOKENS = 150, 700  # of a verdict with its reason; of the grader's text
PROBE_TOKENS = 16


class Work(NamedTuple):
    """Requests, and the tokens that they read and write at most."""

    requests: int
    input_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        """As people read it."""
        return (
            f"{self.requests:,} requests, about {self.input_tokens:,} tokens read and at most "
            f"{self.output_tokens:,} written"
        )


class Speed(NamedTuple):
    """In tokens a second, as many requests at once as will be."""

    reading: float
    writing: float

    def hours(self, work: Work) -> float:
        """If every answer were as long as it may be."""
        seconds = work.input_tokens / self.reading + work.output_tokens / self.writing
        return seconds / 3600


def answering(examples: Sequence[Example], max_tokens: int) -> Work:
    """Of asking a model once for each."""
    characters = sum(len(turn["content"]) for one in examples for turn in one.messages)
    return Work(len(examples), round(characters / CHARACTERS), max_tokens * len(examples))


def grading(num_criteria: Sequence[int], characters: Sequence[int]) -> Work:
    """Of asking a judge about each criterion of each answer.

    Args:
        num_criteria: Of each answer.
        characters: Of each answer with its conversation.
    """
    read = sum(n * c for n, c in zip(num_criteria, characters, strict=True)) / CHARACTERS
    total = sum(num_criteria)
    return Work(total, round(read) + TEMPLATE_TOKENS * total, GRADE_TOKENS * total)


async def probe(endpoint: Endpoint, at_once: int) -> Speed | None:
    """One short request alone, then several at once; None where there is no chat."""
    asked = [{"role": "user", "content": "Name what a physician asks first. " * 16}]
    try:
        began = time.monotonic()
        first = await endpoint.chat(asked, max_tokens=1, temperature=0.0)
        middle = time.monotonic()
        how = {"max_tokens": PROBE_TOKENS, "temperature": 0.0}
        several = await together([endpoint.chat(asked, **how) for _ in range(at_once)])
        ended = time.monotonic()
    except (EndpointError, ReplyError):
        return None  # a base model, which completions reach; or gone, which is seen at once
    read = first.input_tokens or len(asked[0]["content"]) / CHARACTERS
    written = sum(one.output_tokens or PROBE_TOKENS for one in several)
    return Speed(read / (middle - began), written / (ended - middle))


class Meter:
    """Counts what a run spends and stops it at its limits."""

    def __init__(self, limits: LimitsConfig) -> None:
        """Starts the clock."""
        self._limits, self._began = limits, time.monotonic()
        self.endpoints: list[Endpoint] = []
        """All that were asked in this run."""

    @property
    def tokens(self) -> int:
        """Read and written so far."""
        return sum(one.totals.input_tokens + one.totals.output_tokens for one in self.endpoints)

    @property
    def cost(self) -> float | None:
        """So far; None where a price is unknown."""
        spent = [one.totals.cost for one in self.endpoints]
        return None if None in spent else sum(cost or 0.0 for cost in spent)

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self._began

    def check(self) -> None:
        """CheckFailed where a limit is reached: what is done is kept."""
        spent = {"max_cost": self.cost, "max_tokens": self.tokens, "max_seconds": self.seconds}
        for name, value in spent.items():
            most = getattr(self._limits, name)
            if most is not None and value is not None and value >= most:
                raise CheckFailed(
                    f"limits.{name} of {most:g} is reached: what is done is kept. To go on, run "
                    "again with --resume and a higher limit."
                )
