"""What a run will take, said before it starts; and where it stops by itself."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from attending.endpoint import Endpoint
from attending.errors import CheckFailed, EndpointError, ReplyError
from attending.evaluate.recipe import AnyTask, LimitsConfig
from attending.evaluate.sample import Example, Task
from attending.verifier.ask import together

CHARACTERS = 4.0  # of a token, roughly, in English
TEMPLATE_TOKENS = 800  # of the published grader's text with a criterion; ours has some 300
PROBE_TOKENS = 16


class Work(NamedTuple):
    """Requests, the tokens that they read, by their characters, and write at most."""

    requests: int
    input_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        """As people read it."""
        return (
            f"{self.requests:,} requests, some {self.input_tokens:,} tokens read and at most "
            f"{self.output_tokens:,} written"
        )


class Speed(NamedTuple):
    """In tokens a second, as many requests at once as will be."""

    reading: float
    writing: float

    def minutes(self, work: Work) -> float:
        """If every answer were as long as it may be."""
        seconds = work.input_tokens / self.reading + work.output_tokens / self.writing
        return seconds / 60


def answering(task: Task, asked: Sequence[tuple[Example, int]], told: AnyTask) -> Work:
    """Of asking a model for these answers."""
    turns = [turn["content"] for one, _ in asked for turn in one.messages]
    characters = sum(map(len, turns)) + len(told.sampling.system or "") * len(asked)
    requests = task.requests * len(asked)
    read = round(task.requests * characters / CHARACTERS)
    return Work(requests, read, told.most_tokens * requests)


def grading(task: Task, asked: Sequence[tuple[Example, int]], told: AnyTask, most: int) -> Work:
    """Of asking a judge about every criterion of these answers, each as long as it may be.

    Args:
        task: What was asked.
        asked: Examples, and which answer to each.
        told: The task's record.
        most: Tokens of a verdict.
    """
    criteria = read = 0
    for example, _ in asked:
        rubric = task.rubric(example)
        assert rubric is not None
        characters = sum(len(turn["content"]) for turn in rubric.conversation)
        tokens = characters / CHARACTERS + told.most_tokens + TEMPLATE_TOKENS
        criteria += len(rubric.criteria)
        read += round(len(rubric.criteria) * tokens)
    return Work(criteria, read, most * criteria)


def total(parts: Iterable[Work]) -> Work:
    """Of all of it."""
    return Work(*map(sum, zip(Work(0, 0, 0), *parts, strict=True)))


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
    """Counts what a run spends, earlier parts of it too, and stops it at its limits."""

    def __init__(self, limits: LimitsConfig, before: Mapping[str, float | None]) -> None:
        """Starts the clock; `before` is what earlier parts spent."""
        self._limits, self._before, self._began = limits, before, time.monotonic()
        self.endpoints: list[Endpoint] = []
        """All that were asked in this part."""

    @property
    def sums(self) -> dict[str, float | None]:
        """Of the whole run: tokens read and written, seconds, cost (None where a price lacks)."""
        tokens = sum(one.totals.input_tokens + one.totals.output_tokens for one in self.endpoints)
        costs = [self._before.get("cost", 0.0), *(one.totals.cost for one in self.endpoints)]
        return {
            "tokens": (self._before.get("tokens") or 0) + tokens,
            "seconds": (self._before.get("seconds") or 0) + time.monotonic() - self._began,
            "cost": None if None in costs else sum(cost or 0.0 for cost in costs),
        }

    def check(self) -> None:
        """CheckFailed where a limit is reached: what is done is kept."""
        for name, value in self.sums.items():
            most = getattr(self._limits, f"max_{name}")
            if most is not None and value is not None and value >= most:
                raise CheckFailed(
                    f"limits.max_{name} of {most:g} is reached: what is done is kept. To go on, "
                    "run again with --resume and a higher limit."
                )
