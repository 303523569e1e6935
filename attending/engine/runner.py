"""A Runner computes one step of a batch; the scheduler talks to nothing else.

`TorchRunner` (`torch_runner.py`) is the reference, for any architecture on any device;
`NativeRunner` (`native/`) is the fast one on a CPU, and needs no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
    parents: tuple[int, ...] | None = None
    """Of a draft's tree: the row that each row follows, -1 for the last cached token. Row i still
    goes to slot `cached + i`; its position is its depth after `cached`."""


class Shape(NamedTuple):
    """What a draft may propose at once."""

    depth: int
    """Tokens one after the other."""
    width: int = 1
    """Continuations tried of each; 1 is a chain."""
    nodes: int = 0
    """Likeliest tokens of a tree that are proposed; a chain proposes all."""

    @property
    def rows(self) -> int:
        """Most rows of a sequence, in the draft's own steps or the target's."""
        return 1 + max(self.nodes, self.width * (self.depth - 1), self.depth)


class Proposal(NamedTuple):
    """What a draft believes to come after a span's token."""

    ids: Ids
    parents: tuple[int, ...] | None = None
    """Of a tree: what each follows, 0 the span's token and i the i-th of `ids`."""


class Runner(Protocol):
    """What a step needs; implementations own the weights and the pages."""

    arch: Architecture
    num_pages: tuple[int, ...]
    """Of each group's pool."""

    def step(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        """Run a step: [all spans' num_logits, V], in their order."""


class Observed(NamedTuple):
    """A step, and what a draft reads of it."""

    logits: NDArray[np.float32]
    """As `Runner.step` gives them."""
    features: NDArray[np.float32]
    """[all rows, layers * D]: the residual stream at the input of the layers asked for."""


class Observer(Runner, Protocol):
    """A runner that was asked to show its model's features."""

    path: dict[str, str]
    """What it computes with."""

    def observe(self, spans: Sequence[Span]) -> Observed:
        """Run a step, and look on."""


class Drafter(Runner, Protocol):
    """A runner with a draft beside its model: it keeps the draft's keys and values in step.

    Those lie at the target's own pages and slots. Slot s holds token s beside the target's
    feature of s - 1, so that a page depends on nothing that comes after it; slot 0 is never read.
    """

    shape: Shape
    """The largest that it has room for."""

    def propose(self, spans: Sequence[Span], depth: int) -> list[Proposal]:
        """What may follow the one token of each span, in as many steps of the draft.

        The spans' pages have room for `shape.rows` more slots, or `depth` of a chain.
        """

    def keep(self, span: Span, rows: Sequence[int]) -> None:
        """Of a tree that was just run only these rows stay, side by side from `cached` on."""
