"""What every judge returns, and what it is."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from attending.endpoint import Endpoint
from attending.verifier.rubric.schema import Rubric


class Verdict(NamedTuple):
    """Whether an answer meets a criterion: a negative one is met where the bad thing is there."""

    met: bool | None
    """None is unscored: no judge's word was to be had. It is never counted as met or not met."""
    explanation: str
    """The judge's reason; of an unscored one, what failed. Empty where the verdict was cached."""
    cached: bool = False
    """From the endpoint's cache, which keeps no reason."""


class Judge(Protocol):
    """An endpoint's model, or the embedded one."""

    name: str
    """Of the model that judges; scores under different judges are not compared."""
    caution: str
    """What must be printed beside its verdicts; empty where nothing is known about it."""

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        """Where it asks, for tokens and cost; the embedded one nowhere."""

    async def __call__(self, rubric: Rubric, answer: str) -> list[Verdict]:
        """A verdict for each criterion, in the rubric's order."""
