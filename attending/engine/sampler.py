"""From a row of logits to one token: penalties, temperature, top-k, top-p, min-p, seed.

Pure numpy, one sequence at a time, so a draw depends on nothing but its own logits, history and
seed. The order is the one transformers uses: repetition penalty, temperature, top-k, top-p, min-p.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from attending.config import Config
from attending.errors import CheckpointError

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
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    """Divides positive and multiplies negative logits of every token seen (arXiv 1909.05858)."""
    seed: int | None = Field(None, ge=0)
    """Of this answer alone; the same seed and prompt give the same answer. None draws one."""
    stop: tuple[str, ...] = Field((), max_length=16)
    """Texts that end the answer; they are not part of it."""
    max_tokens: int | None = Field(None, gt=0)
    """Most tokens to write; None writes until the context is full."""

    def model_post_init(self, context: Any, /) -> None:
        """Refuse an empty stop text, which would end every answer before it begins."""
        if "" in self.stop:
            raise ValueError("stop must not hold an empty text")


def probabilities(logits: Logits, sampling: Sampling, history: Sequence[int]) -> Probabilities:
    """The distribution a token is drawn from: logits [V] -> probabilities [V] that sum to 1.

    Args:
        logits: Finite, of one position.
        sampling: The filters.
        history: Prompt and answer so far, for the repetition penalty.

    Raises:
        CheckpointError: The logits are not numbers.
    """
    scores = logits.astype(np.float64)
    if np.isnan(scores.max()):
        raise CheckpointError(
            "the model computed logits that are not numbers: its weights are damaged, or overflow "
            "in this precision. Get the model again, or load it with dtype float32."
        )
    if sampling.repetition_penalty != 1.0 and history:
        seen = np.unique(np.asarray(history, dtype=np.int64))
        was, penalty = scores[seen], sampling.repetition_penalty
        scores[seen] = np.where(was > 0, was / penalty, was * penalty)
    if sampling.temperature == 0:
        chosen = np.zeros_like(scores)
        chosen[scores.argmax()] = 1.0
        return chosen
    scores = (scores - scores.max()) / sampling.temperature
    if 0 < sampling.top_k < scores.size:
        # By rank and not by value, so that ties do not let more than k through.
        scores[_ranked(scores)[sampling.top_k :]] = -np.inf
    mass: Probabilities = np.exp(scores)
    mass /= mass.sum()
    if sampling.top_p < 1:
        order = _ranked(mass)
        before = np.cumsum(mass[order]) - mass[order]
        mass[order[before >= sampling.top_p]] = 0.0
    if sampling.min_p > 0:
        mass[mass < sampling.min_p * mass.max()] = 0.0
    mass /= mass.sum()
    return mass


def draw(distribution: Probabilities, rng: np.random.Generator) -> int:
    """One token by inverse transform: a single uniform number a token, whatever the filters."""
    edges = np.cumsum(distribution)
    return int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))


def _ranked(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices from the largest value down; equal values in order of index."""
    return np.argsort(-values, kind="stable")
