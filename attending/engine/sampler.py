"""From a row of logits to one token: penalties, temperature, top-k, top-p, min-p, seed.

Pure numpy, one sequence at a time, so a draw depends on nothing but its own logits, history and
seed. The order is the one vLLM and transformers share: bias, repetition, presence and frequency
penalties, temperature, top-k, top-p, min-p.

A vocabulary is passed over in float32 and never sorted: what may be drawn is found by a threshold,
and only that is ranked. What grows long is summed in float64.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from attending.config import Config
from attending.errors import CheckpointError, UsageError

Logits = NDArray[np.float32]
Masses = NDArray[np.float32]
Indices = NDArray[np.intp]

BLOCK = 256  # values in a partial sum: float32 is exact enough for so few
HUGE = 1e38  # a bias within float32 that no logit outdoes
LAST = 1 - 2.0**-53  # the largest number below 1


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


def choose(
    logits: Logits,
    sampling: Sampling,
    history: Sequence[int] | NDArray[np.int64],
    uniform: float,
    num_prompt: int = 0,
    allowed: NDArray[np.bool_] | None = None,
) -> int:
    """The next token, by inverse transform of one number in [0, 1), whatever the filters.

    Args:
        logits: [V] finite, of one position.
        sampling: The filters.
        history: Prompt and answer so far, for the penalties.
        uniform: The random number.
        num_prompt: How many of the history are the prompt.
        allowed: [V] the tokens that a grammar lets through; None lets all.

    Raises:
        CheckpointError: The logits are not numbers.
        UsageError: `allowed` or the filters leave nothing.
    """
    ids, mass = candidates(logits, sampling, history, num_prompt, allowed)
    return int(ids[draw(mass, uniform) if len(ids) > 1 else 0])


def candidates(
    logits: Logits,
    sampling: Sampling,
    history: Sequence[int] | NDArray[np.int64],
    num_prompt: int = 0,
    allowed: NDArray[np.bool_] | None = None,
) -> tuple[Sequence[int] | Indices, Masses]:
    """What `choose` draws from: ids in ascending order, and their probabilities up to a factor."""
    scores = logits
    likeliest = _likeliest(logits)
    if _has_edits(sampling) or allowed is not None:
        scores = _edited(logits, sampling, history, num_prompt, allowed)
        likeliest = int(scores.argmax())
    peak = float(scores[likeliest])
    if allowed is not None and peak == -np.inf:
        raise UsageError("no token may follow here: the grammar and the model have none alike.")
    if sampling.temperature == 0:
        return (likeliest,), np.ones(1, np.float32)
    if not np.isfinite(peak):
        raise UsageError("these sampling options leave no token that can be chosen.")
    # Below the floor nothing but ties is left either, and above it the quotients stay finite.
    temperature = max(sampling.temperature, 1e-30)
    ids: Indices | None = None
    if 0 < sampling.top_k < scores.size:
        ids = np.sort(_ranked(scores, sampling.top_k))
    elif sampling.top_p == 1 and sampling.min_p > 0:
        # Spares the exponentials of the rest; a few too many, which the masses decide.
        ids = np.flatnonzero(scores >= peak + temperature * (math.log(sampling.min_p) - 1e-3))
    # A second copy of a vocabulary costs more than all else where its memory comes from the system.
    spare = None if scores is logits else scores
    if ids is not None:
        scores = spare = scores[ids]
    mass = _exponentials(scores, peak, temperature, spare)
    if sampling.top_p < 1:
        kept = _nucleus(mass, sampling.top_p)
        ids, mass = kept if ids is None else ids[kept], mass[kept]
    if sampling.min_p > 0 and ids is not None:
        kept = np.flatnonzero(mass >= sampling.min_p)  # the likeliest has 1
        ids, mass = ids[kept], mass[kept]
    return range(logits.size) if ids is None else ids, mass


def draw(mass: Masses, uniform: float) -> int:
    """The index where the cumulative sum of `mass` passes a share in [0, 1) of the whole.

    First the block, then the place in it: a running sum over a vocabulary costs more than all else.
    """
    block, uniform = _pick(_sums(mass), uniform)
    return block * BLOCK + _pick(mass[block * BLOCK : (block + 1) * BLOCK], uniform)[0]


def score(logits: Logits, token: int, num_top: int) -> Scored:
    """The log-probability of a token at a place (to 1e-6), and of the likeliest ones.

    Raises:
        CheckpointError: The logits are not numbers.
    """
    peak = float(logits[_likeliest(logits)])
    norm = peak + float(np.log(_total(_exponentials(logits, peak))))
    best = _ranked(logits, num_top).tolist() if num_top else []
    top = tuple((i, float(logits[i]) - norm) for i in best)
    rank = int(np.count_nonzero(logits > logits[token])) + 1
    return Scored(token, float(logits[token]) - norm, rank, top)


def _likeliest(logits: Logits) -> int:
    index = int(logits.argmax())  # of a NaN, if there is one
    if not np.isfinite(logits[index]):
        raise CheckpointError(
            "the model computed logits that are not numbers: its weights are damaged, or overflow "
            "in this precision. Get the model again and delete packed/ in the cache, or take dtype "
            "float32."
        )
    return index


def _has_edits(of: Sampling) -> bool:
    return bool(
        of.logit_bias or of.repetition_penalty != 1.0 or of.presence_penalty or of.frequency_penalty
    )


def _edited(
    logits: Logits,
    sampling: Sampling,
    history: Sequence[int] | NDArray[np.int64],
    num_prompt: int,
    allowed: NDArray[np.bool_] | None,
) -> Logits:
    scores = logits.copy()
    with np.errstate(over="ignore"):  # to minus infinity
        for token, bias in sampling.logit_bias:
            scores[token] += min(bias, HUGE)
    # A token seen twice is read before any is written: each writing is the same.
    if sampling.repetition_penalty != 1.0:
        seen, penalty = np.asarray(history, dtype=np.int64), sampling.repetition_penalty
        was = scores[seen]
        scores[seen] = np.where(was > 0, was / penalty, was * penalty)
    if sampling.presence_penalty or sampling.frequency_penalty:
        answer = np.asarray(history[num_prompt:], dtype=np.int64)
        often = sampling.frequency_penalty * np.bincount(answer)[answer]
        scores[answer] = scores[answer] - (sampling.presence_penalty + often)
    if allowed is not None:
        scores[~allowed[: scores.size]] = -np.inf
    return scores


def _exponentials(
    scores: Logits, peak: float, temperature: float = 1.0, out: Masses | None = None
) -> Masses:
    """exp((score - peak) / temperature), the largest 1."""
    with np.errstate(over="ignore"):  # far below the peak is minus infinity
        below: Masses = np.subtract(scores, np.float32(peak), out=out)
        below *= np.float32(1 / temperature)
    np.exp(below, out=below)
    return below


def _sums(mass: Masses) -> Masses:
    """Of each block."""
    return np.add.reduceat(mass, np.arange(0, mass.size, BLOCK))


def _total(mass: Masses) -> float:
    return float(_sums(mass).sum(dtype=np.float64))


def _pick(mass: Masses, uniform: float) -> tuple[int, float]:
    """The index where a share of the whole falls, and how far it lies in that one's mass."""
    edges = np.cumsum(mass, dtype=np.float64)
    at = uniform * edges[-1]
    index = int(np.searchsorted(edges, at, side="right"))  # never one without mass
    rest = 1 - (edges[index] - at) / float(mass[index])
    return index, min(max(rest, 0.0), LAST)


def _nucleus(mass: Masses, top_p: float) -> Indices:
    """The fewest likeliest tokens with at least `top_p` in sum; equal ones in order of index."""
    total = _total(mass)
    # All that are less likely than (1 - top_p) / V have less than 1 - top_p together; sums round.
    for least in (2.0**-11, 2.0**-14, (1 - top_p) / mass.size, 0.0):
        among = np.flatnonzero(mass >= least * total)
        likely = mass[among]
        if likely.sum(dtype=np.float64) >= top_p * total:
            break
    ranked = np.sort(likely)[::-1]
    count = int(np.searchsorted(np.cumsum(ranked[:-1], dtype=np.float64), top_p * total)) + 1
    kept = among[likely >= ranked[count - 1]]
    ties = np.flatnonzero(mass[kept] == ranked[count - 1])
    return np.delete(kept, ties[ties.size - (kept.size - count) :])


def _ranked(values: Logits, count: int) -> Indices:
    """The `count` largest values' indices, largest first; equal ones in order of index."""
    # The count-th largest of the maxima of so many columns is not above that of all values.
    width = max(4 * count, 1024)
    if 2 * width <= values.size:
        depth = values.size // width
        maxima = values[: depth * width].reshape(depth, width).max(axis=0)
        border = np.partition(maxima, width - count)[width - count]
        among = np.flatnonzero(values >= border)
    else:
        among = np.arange(values.size)
    return among[np.argsort(-values[among], kind="stable")[:count]]
