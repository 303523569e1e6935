"""Speculation: a draft proposes what comes next, and one step of the target checks all of it.

It loses nothing. The target's token is chosen as ever, from its own logits by filters, grammar and
random number, and a proposal is accepted if it is that very token. Where a draft proposes for
certain, that is rejection sampling (arXiv 2211.17192): x is accepted with p(x), and what is chosen
instead has p without x; of siblings in a tree as well. So an answer is the same with a draft and
without, token for token, and depends on nothing else that is served.

How deep a chain goes follows from what was measured: tau(k) tokens come of a round, which takes
the time of k + 1 rows of each user and k steps of the draft. Where one row of each is faster, the
draft is left alone. Other depths are looked at every now and then, as often as what that is thought
to cost allows.
"""

import statistics
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from attending.engine.runner import Drafter, Proposal, Span
from attending.model.architecture import PAGE_TOKENS

LATEST = 9  # measurements of a time, whose median counts
FADE = 0.99  # what a round counts, at the next
LOOK_ROUNDS = 16  # from one look at another depth to the next, at least
LOOK_SHARE = 0.02  # of the time that looks may lose
PRIOR, PRIOR_TRIES = 1.0, 1.25  # acceptance before anything was measured


class Seconds:
    """What steps took by their rows; between and beyond those measured, a line."""

    def __init__(self) -> None:
        self._of: dict[int, deque[float]] = {}
        self._known: list[int] = []  # in order, and their medians: they are asked for every step
        self._medians: list[float] = []

    def add(self, rows: int, seconds: float) -> None:
        """Another measurement."""
        at = bisect_left(self._known, rows)
        if rows not in self._of:
            self._of[rows] = deque(maxlen=LATEST)
            self._known.insert(at, rows)
            self._medians.insert(at, seconds)
        self._of[rows].append(seconds)
        self._medians[at] = statistics.median(self._of[rows])

    @property
    def most(self) -> int:
        """The most rows that were measured."""
        return self._known[-1] if self._known else 0

    def at(self, rows: int) -> float:
        """Of a step of so many; 0 before any was measured."""
        known, times = self._known, self._medians
        if not known:
            return 0.0
        place = bisect_left(known, rows)  # by hand: it is asked for every depth of every step
        if place == len(known):
            slope = (times[-1] - times[0]) / max(known[-1] - known[0], 1)
            return times[-1] + max(slope, 0.0) * (rows - known[-1])
        if place == 0 or known[place] == rows:
            return times[place]
        share = (rows - known[place - 1]) / (known[place] - known[place - 1])
        return times[place - 1] + share * (times[place] - times[place - 1])


class Speculation:
    """What a scheduler asks how much to draft, and tells what came of it."""

    def __init__(
        self,
        runner: Drafter,
        *,
        adapts: bool = True,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Nothing is known yet.

        Args:
            runner: Proposes and checks.
            adapts: Whether the depth follows the measurements; it is the shape's otherwise.
            clock: Seconds.
        """
        self.shape = runner.shape
        self.rounds = 0
        """Of a sequence with something proposed."""
        self.accepted = np.zeros(self.shape.depth, np.int64)
        """Rounds in which the proposal at each depth was."""
        self.tried = np.zeros(self.shape.depth, np.int64)
        """Rounds in which there was one and all before it were accepted."""
        self.seconds, self.draft_seconds = Seconds(), Seconds()
        self.latest = 0
        """The last depth that was chosen; 0 leaves the draft alone."""
        self.drafting = 0.0
        """Seconds that went into proposals."""
        self._recent = np.zeros((2, self.shape.depth))  # of both, fading
        self._runner, self._adapts, self._clock = runner, adapts, clock
        self._unused = dict.fromkeys(self._depths, 0.0)  # seconds since each was, as foreseen
        self._untried, self._until_look = list(self._depths[:2]), LOOK_ROUNDS

    @property
    def acceptance_length(self) -> float:
        """Tokens of a round, the target's own included; 0 before the first."""
        return 1 + float(self.accepted.sum()) / self.rounds if self.rounds else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Of the proposal at each depth, where all before it were accepted."""
        return [a / t if t else 0.0 for a, t in zip(self.accepted, self.tried, strict=True)]

    def depth(self, batch: int, drafting: int) -> int:
        """How deep to draft for `drafting` of so many sequences; 0 leaves it."""
        self.latest = self._chosen(batch, drafting) if self._adapts else self.shape.depth
        return self.latest

    def _chosen(self, batch: int, drafting: int) -> int:
        """The best by what is known; or one that was not used for so long that a look is paid."""
        costs = {depth: self._cost(batch, drafting, depth) for depth in self._depths}
        rates = self._rates(batch, drafting, costs)
        best = max(rates, key=lambda depth: rates[depth])
        chosen = self._untried.pop(0) if self._untried else best
        self._until_look -= 1
        if self._until_look < 1:
            looks = {
                depth: costs[depth] * (1 - rate / rates[best])
                for depth, rate in rates.items()
                if depth != best
            }
            budget = LOOK_SHARE / len(looks)
            paid = [depth for depth, lost in looks.items() if lost <= budget * self._unused[depth]]
            if paid:
                chosen = max(paid, key=lambda depth: self._unused[depth])
                self._until_look = LOOK_ROUNDS
        self._unused = {d: seconds + costs[chosen] for d, seconds in self._unused.items()}
        self._unused[chosen] = 0.0
        return chosen

    def break_even(self, most: int) -> int:
        """The largest batch for which drafting pays, among those up to the largest that drafted."""
        pays = [
            batch
            for batch in range(1, min(most, self.draft_seconds.most) + 1)
            if self.rounds and self._pays(batch)
        ]
        return max(pays, default=0)

    def step(self, spans: Sequence[Span], *, is_timed: bool) -> NDArray[np.float32]:
        """The runner's; timed where it reads no prompt."""
        start = self._clock()
        logits = self._runner.step(spans)
        if is_timed:
            self.seconds.add(sum(len(span.ids) for span in spans), self._clock() - start)
        return logits

    def propose(self, spans: Sequence[Span], depth: int) -> list[Proposal]:
        """The runner's."""
        start = self._clock()
        found = self._runner.propose(spans, depth)
        spent = self._clock() - start
        self.drafting += spent
        self.draft_seconds.add(len(spans), spent / depth)
        return found

    def keep(self, span: Span, rows: Sequence[int], *, is_over: bool) -> None:
        """What came of a span's proposals: rows that are its answer now, from its token on.

        Args:
            span: As it was run.
            rows: In order.
            is_over: The answer ends here, whatever was proposed behind it.
        """
        accepted = len(rows) - 1
        self.rounds += 1
        parents = span.parents or range(-1, len(span.ids) - 1)
        tried = accepted + (rows[-1] in parents and not is_over)
        self.accepted[:accepted] += 1
        self.tried[:tried] += 1
        self._recent[:, :tried] *= FADE  # what was not tried is no less known
        self._recent[0, :accepted] += 1
        self._recent[1, :tried] += 1
        if [*rows] != [*range(len(rows))]:
            self._runner.keep(span, rows)

    @property
    def _depths(self) -> Sequence[int]:
        """A tree is grown whole or not at all."""
        return (0, self.shape.depth) if self.shape.nodes else range(self.shape.depth + 1)

    def _pays(self, batch: int) -> bool:
        rates = self._rates(batch, batch, {d: self._cost(batch, batch, d) for d in self._depths})
        return max(rates, key=lambda depth: rates[depth]) > 0

    def _rates(self, batch: int, drafting: int, costs: Mapping[int, float]) -> dict[int, float]:
        """Tokens a second to be expected of depths; 0 before anything was measured."""
        more = [0.0, *np.cumsum(np.cumprod(self._expected())).tolist()]
        return {
            depth: (batch + drafting * more[depth]) / seconds if seconds else 0.0
            for depth, seconds in costs.items()
        }

    def _cost(self, batch: int, drafting: int, depth: int) -> float:
        """Seconds of a round, as foreseen."""
        rows = batch + drafting * self._proposed(depth)
        return self.seconds.at(rows) + depth * self.draft_seconds.at(drafting)

    def _proposed(self, depth: int) -> int:
        return self.shape.nodes if depth and self.shape.nodes else depth

    def _expected(self) -> NDArray[np.float64]:
        accepted, tried = self._recent
        return (accepted + PRIOR) / (tried + PRIOR_TRIES)


def extended(span: Span, found: Proposal) -> Span:
    """A span with what was proposed after its token, all rows' logits asked for."""
    ids = np.concatenate((span.ids, found.ids))
    parents = None if found.parents is None else (-1, *found.parents)
    used = -(-(span.cached + len(ids)) // PAGE_TOKENS)
    pages = tuple(held[:used] for held in span.pages)
    return Span(ids, span.cached, pages, len(ids), parents)


def follower(span: Span, row: int, token: int) -> int | None:
    """The row that proposes a token after another row's, if one does."""
    parents = span.parents or range(-1, len(span.ids) - 1)
    for index in range(row + 1, len(span.ids)):
        if parents[index] == row and span.ids[index] == token:
            return index
    return None
