"""From a row of logits to one token: penalties, temperature, top-k, top-p, min-p, seed.

Pure numpy, one sequence at a time, so a draw depends on nothing but its own logits, history and
seed. The order is the one vLLM and transformers share: bias, repetition, presence and frequency
penalties, temperature, top-k, top-p, min-p.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from attending.config import Config
from attending.errors import CheckpointError, UsageError

Logits = NDArray[np.float32]
Probabilities = NDArray[np.float64]


class Sampling(Config):
    """How the next token is chosen, and when to stop."""

    temperature: float = Field(0.6, ge=0, le=10)
    """0 always takes the likeliest token; Baichuan-M2 was evaluated at 0.6."""
    top_k: int = Field(0, ge=0)
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the smallest set of likeliest tokens with at least this probability."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Drop tokens less likely than this share of the likeliest one's probability."""
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    """Divides positive and multiplies negative logits of every token seen (arXiv 1909.05858)."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Subtracted from the logits of every token of the answer so far."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """Subtracted once for each time that the answer holds the token."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, each with what is added to its logit."""
    seed: int | None = Field(None, ge=0)
    """Of this answer alone; the same seed and prompt give the same answer. None draws one."""
    stop: tuple[str, ...] = Field((), max_length=16)
    """Texts that end the answer; they are not part of it."""
    max_tokens: int | None = Field(None, ge=0)
    """Most tokens to write; None writes until the context is full."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse an empty stop text, which would end every answer before it begins."""
        if "" in self.stop:
            raise ValueError("stop must not hold an empty text")


class Scored(NamedTuple):
    """A token with its log-probability under the model itself, before any filter."""

    id: int
    logprob: float
    rank: int
    """1 for the likeliest."""
    top: tuple[tuple[int, float], ...]
    """The likeliest ids with theirs."""


def probabilities(
    logits: Logits,
    sampling: Sampling,
    history: Sequence[int],
    num_prompt: int = 0,
    allowed: NDArray[np.bool_] | None = None,
) -> Probabilities:
    """The distribution a token is drawn from: logits [V] -> probabilities [V] that sum to 1.

    Args:
        logits: Finite, of one position.
        sampling: The filters.
        history: Prompt and answer so far, for the penalties.
        num_prompt: How many of these are the prompt.
        allowed: [V] the tokens that a grammar lets through; None lets all.

    Raises:
        CheckpointError: The logits are not numbers.
        UsageError: `allowed` leaves nothing.
    """
    scores = _finite(logits)
    for token, bias in sampling.logit_bias:
        scores[token] += bias
    _penalise(scores, sampling, history, num_prompt)
    if allowed is not None:
        scores[~allowed[: scores.size]] = -np.inf
        if scores.max() == -np.inf:
            raise UsageError("no token may follow here: the grammar and the model have none alike.")
    if sampling.temperature == 0:
        chosen = np.zeros_like(scores)
        chosen[scores.argmax()] = 1.0
        return chosen
    scores = (scores - scores.max()) / sampling.temperature
    if 0 < sampling.top_k < scores.size:
        # By rank and not by value, so that ties do not let more than k through.
        kept = _ranked(scores, sampling.top_k)[: sampling.top_k]
        scores = _only(scores, kept, -np.inf)
    mass: Probabilities = np.exp(scores)
    mass /= mass.sum()
    if not np.isfinite(mass[0]):
        raise UsageError("these sampling options leave no token that can be chosen.")
    if sampling.top_p < 1:
        mass = _only(mass, _nucleus(mass, sampling.top_p), 0.0)
    if sampling.min_p > 0:
        mass[mass < sampling.min_p * mass.max()] = 0.0
    mass /= mass.sum()
    return mass


def draw(distribution: Probabilities, rng: np.random.Generator) -> int:
    """One token by inverse transform: a single uniform number a token, whatever the filters."""
    edges = np.cumsum(distribution)
    return int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))


def score(logits: Logits, token: int, num_top: int) -> Scored:
    """The log-probability of a token at a place, and of the likeliest ones.

    Raises:
        CheckpointError: The logits are not numbers.
    """
    scores = _finite(logits)
    peak = scores.max()
    scores -= peak + np.log(np.exp(scores - peak).sum())
    best = _ranked(scores, max(num_top, 1))[:num_top]
    top = tuple((int(i), float(scores[i])) for i in best)
    return Scored(token, float(scores[token]), int((scores > scores[token]).sum()) + 1, top)


def _finite(logits: Logits) -> Probabilities:
    scores: Probabilities = logits.astype(np.float64)
    if not np.isfinite(scores.max()):
        raise CheckpointError(
            "the model computed logits that are not numbers: its weights are damaged, or overflow "
            "in this precision. Get the model again, or load it with dtype float32."
        )
    return scores


def _penalise(
    scores: Probabilities, sampling: Sampling, history: Sequence[int], num_prompt: int
) -> None:
    if sampling.repetition_penalty != 1.0 and history:
        seen = np.unique(np.asarray(history, dtype=np.int64))
        was, penalty = scores[seen], sampling.repetition_penalty
        scores[seen] = np.where(was > 0, was / penalty, was * penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        answer = np.asarray(history[num_prompt:], dtype=np.int64)
        seen, times = np.unique(answer, return_counts=True)
        scores[seen] -= sampling.presence_penalty + sampling.frequency_penalty * times


def _ranked(values: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """At least the `count` largest values' indices, largest first; equal ones in order of index.

    All that tie with the last are there, so the order is that of a full sort, without its cost.
    """
    if count < values.size:
        border = np.partition(values, values.size - count)[values.size - count]
        among = np.flatnonzero(values >= border)
    else:
        among = np.arange(values.size)
    return among[np.argsort(-values[among], kind="stable")]


def _nucleus(mass: Probabilities, top_p: float) -> NDArray[np.intp]:
    """The fewest likeliest tokens with at least `top_p` in sum."""
    count = 64
    while True:
        ranked = _ranked(mass, count)
        before = np.cumsum(mass[ranked]) - mass[ranked]
        if before[-1] >= top_p or ranked.size == mass.size:
            return ranked[before < top_p]
        count *= 8


def _only(values: Probabilities, kept: NDArray[np.intp], rest: float) -> Probabilities:
    filtered = np.full_like(values, rest)
    filtered[kept] = values[kept]
    return filtered
