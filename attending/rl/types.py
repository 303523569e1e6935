"""What becomes of a prompt: Case -> Rollout -> Verdict -> Sample -> Batch.

Token in, token out: the ids that the engine was given and the ids that it sampled, with their
log-probabilities, are what is trained on; text is made of them for the verifier, never the reverse.

Example: the prompt "2+2=" is the ids (5, 6, 7). Its two rollouts are (8, 2) and (9,), where 2 ends
an answer; the verdicts are 1.0 and 0.0, so are the rewards, and the advantages 0.5 and -0.5. As a
batch they are 3 + 1 + 0 rows, since no row is needed for what nothing follows:

    ids      5 6 7 | 8 |      groups [[3, 1, 0]], positions 0 1 2 | 3 |
    at       2 3 2            the rows that predict the targets
    targets  8 2 9            answers 0 0 1, advantages 0.5 0.5 -0.5
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from attending.errors import ConfigError, ReplyError
from attending.train.reader import Batch as Rows
from attending.verifier.rubric.schema import Criterion, Message, Rubric


@dataclass(frozen=True, slots=True)
class Case:
    """A conversation whose next answer is sampled, and what judges it.

    Raises:
        ConfigError: Not exactly one of a rule, criteria and a patient judges it.
    """

    id: str
    """Names it in errors and reports; one case is one group of rollouts."""
    messages: tuple[Message, ...]
    """The prompt; the last one is the user's. Of stage 3, a slice of a consultation."""
    kind: str
    """Domain or source, told apart in the metrics."""
    rule: Mapping[str, Any] | None = None
    """For `verifier.rules.check`."""
    criteria: tuple[Criterion, ...] = ()
    """For the judge."""
    patient: str = ""
    """For `verifier.patient.find`: slices of its consultations become cases with criteria."""

    def __post_init__(self) -> None:
        """Refuse what nothing, or two things, would judge."""
        judges = {"a rule": self.rule, "criteria": self.criteria, "a patient": self.patient}
        if len(found := [name for name, one in judges.items() if one]) != 1:
            told = " and ".join(found) or "neither a rule nor criteria nor a patient"
            raise ConfigError(f"case {self.id!r} has {told}: give it one of the three.")

    @property
    def rubric(self) -> Rubric:
        """The criteria as the judge is asked."""
        return Rubric(self.id, self.messages, self.criteria)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled answer.

    Raises:
        ReplyError: It is empty, or its log-probabilities are not one finite number a token.
    """

    case: str
    prompt: tuple[int, ...]
    """Ids, as sent to the engine."""
    ids: tuple[int, ...]
    """Ids, as sampled; the one that ended the answer is the last."""
    logprobs: tuple[float, ...]
    """Of each sampled id under the weights that sampled it, at temperature 1, in nats."""
    stop: Literal["stop", "length"]
    seed: int
    version: int
    """Of the weights: the number of updates before them."""

    def __post_init__(self) -> None:
        """Refuse what cannot be trained on."""
        where = f"a rollout of case {self.case!r}"
        if not self.prompt or not self.ids or len(self.ids) != len(self.logprobs):
            raise ReplyError(
                f"{where} has {len(self.prompt)} prompt ids, {len(self.ids)} sampled ids and "
                f"{len(self.logprobs)} log-probabilities: the engine must return one for each id."
            )
        if not all(map(math.isfinite, self.logprobs)):
            raise ReplyError(f"{where} has a log-probability that is no number: check the engine.")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the verifier says of an answer.

    Raises:
        ValueError: The score lies outside [0, 1].
    """

    score: float | None
    """From 0 to 1; None is unscored, which is not 0."""
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Scores by rule or axis, for the metrics."""

    def __post_init__(self) -> None:
        """Refuse NaN, too."""
        if self.score is not None and not 0 <= self.score <= 1:
            raise ValueError(f"a verdict's score is {self.score}; expected 0 to 1, or None.")


@dataclass(frozen=True, slots=True)
class Sample:
    """A rollout and what it was worth."""

    rollout: Rollout
    reward: float | None
    """With the length reward; None is unscored."""
    advantage: float


@dataclass(frozen=True, slots=True)
class Batch(Rows):
    """Samples of one forward pass, G answers behind one copy of their prompt.

    T rows in all: of an answer of n ids, n - 1, as nothing follows the last. K targets: all ids of
    all answers, in order. Of `train.reader.Batch`, `targets`, `weights` (ones) and `kinds` (of the
    case) are [K] here, and `lengths` are those of the segments, some of them 0.
    """

    groups: list[list[int]]
    """Rows of each prompt and of its answers, in order; see `shared.Shared`."""
    cases: list[str]
    """The case of each group."""
    at: Tensor
    """[K] int64, the row whose state predicts the target: for an answer's first, its prompt's last.
    """
    answers: Tensor
    """[K] int64, which answer each target is in, from 0 over the whole batch."""
    group: Tensor
    """[K] int64, which group."""
    advantages: Tensor
    """[K] float64."""
    sampler: Tensor
    """[K] float64, the sampled ids' log-probabilities by the engine."""
    old: Tensor | None = None
    """[K], by the trainer before this batch's first update; None if this is the first."""
