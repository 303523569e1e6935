"""A Runner computes one step of a batch; the scheduler talks to nothing else.

`TorchRunner` (`torch_runner.py`) is the reference, for any architecture on any device;
`NativeRunner` (`native/`) is the fast one on a CPU, and needs no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from attending.model.architecture import Architecture

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """The new tokens of one sequence in a step; they go to slots `cached`, `cached + 1`, ..."""

    ids: Ids
    """[n] tokens to run."""
    cached: int
    """Tokens of this sequence that are in the cache already."""
    pages: tuple[Ids, ...]
    """For each group of layers (`Architecture.windows`) [P] pages that hold slots 0 ..
    cached + n - 1, in order; -1 where one lies outside the group's window of every token of the
    span, and was given back."""
    num_logits: int = 1
    """How many of the last tokens need logits: 0 before a prompt's end, n to score a prompt."""


class Runner(Protocol):
    """What a step needs; implementations own the weights and the pages."""

    arch: Architecture
    num_pages: tuple[int, ...]
    """Of each group's pool."""

    def step(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        """Run a step: [all spans' num_logits, V], in their order."""
