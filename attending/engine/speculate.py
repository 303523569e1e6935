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

import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from attending.engine.runner import Drafter, Proposal, Span
from attending.model.architecture import PAGE_TOKENS

LATEST = 9  # measurements of a time, whose lower quartile counts: what disturbs makes it longer
FADE = 0.99  # what a round counts, at the next
LOOK_ROUNDS = 16  # from one look at another depth to the next, at least
LOOK_SHARE = 0.02  # of the time that looks may lose
FIRST = 3  # rounds with the least that can be proposed, before it is judged
PRIOR, PRIOR_TRIES = 1.0, 1.25  # acceptance before anything was measured


class Seconds:
    """What steps took by their rows; between and beyond those measured, a line.

    More rows never take less: where a time says so it is older, or something else computed.
    """

    def __init__(self) -> None:
        self._latest: dict[int, deque[float]] = {}
        self._usual: dict[int, float] = {}
        self._line: tuple[list[int], list[float]] = [], []  # others read it while it is replaced

    def add(self, rows: int, seconds: float) -> None:
        """Another measurement."""
        latest = self._latest.setdefault(rows, deque(maxlen=LATEST))
        latest.append(seconds)
        self._usual[rows] = sorted(latest)[(len(latest) - 1) // 4]
        known, times, least = sorted(self._usual), list[float](), math.inf
        for each in reversed(known):
            least = min(least, self._usual[each])
            times.append(least)
        self._line = known, times[::-1]

    @property
    def measured(self) -> tuple[int, int]:
        """The fewest and the most rows that were; zeros before any."""
        known, _ = self._line
        return (known[0], known[-1]) if known else (0, 0)

    def at(self, rows: int) -> float:
        """Of a step of so many; 0 before any was measured."""
        known, times = self._line
        if not known:
            return 0.0
        place = bisect_left(known, rows)  # by hand: it is asked for every depth of every step
        if place == len(known):
            slope = (times[-1] - times[0]) / max(known[-1] - known[0], 1)
            return times[-1] + slope * (rows - known[-1])
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
        """Tokens proposed at once in the last step; 0 left the draft alone."""
        self.drafting = 0.0
        """Seconds that went into proposals."""
        self._recent = np.zeros((2, self.shape.depth))  # of both, fading
        self._runner, self._adapts, self._clock = runner, adapts, clock
        self._unused = dict.fromkeys(self._depths, 0.0)  # seconds since each was
        # Whatever is measured first: one step may have waited for something else.
        self._untried = [self._depths[0], *[self._depths[1]] * FIRST]
        self._until_look, self._proposing = LOOK_ROUNDS, 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens of a round, the target's own included; 0 before the first."""
        return 1 + float(self.accepted.sum()) / self.rounds if self.rounds else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Of the proposal at each depth, where all before it were accepted."""
        return [a / t if t else 0.0 for a, t in zip(self.accepted, self.tried, strict=True)]

    def depth(self, batch: int, drafting: int, most: int) -> int:
        """How deep to draft for `drafting` of so many sequences, at most; 0 leaves it.

        The best by what is known, or one that was left for so long that a look at it is paid.
        """
        if not self._adapts:
            return min(self.shape.depth, most)
        depths = [depth for depth in self._depths if depth <= most]
        if self._untried and self._untried[0] in depths:
            return self._untried[0]
        costs = {depth: self._cost(batch, drafting, depth) for depth in depths}
        rates = self._rates(batch, drafting, costs)
        best = max(rates, key=lambda depth: rates[depth])
        if self._until_look > 0:
            return best
        lost = {d: costs[d] * (1 - rate / rates[best]) for d, rate in rates.items() if d != best}
        # The nearer to the best, the larger its part of what looks may lose.
        parts = {depth: 1 / max(seconds, 1e-9) for depth, seconds in lost.items()}
        budget = LOOK_SHARE / max(sum(parts.values()), 1e-9)
        paid = [d for d in lost if lost[d] <= budget * parts[d] * self._unused[d]]
        if not paid:
            return best
        self._until_look = LOOK_ROUNDS
        return max(paid, key=lambda depth: self._unused[depth])

    def break_even(self, most: int) -> int:
        """The largest batch up to which drafting pays, by what was measured, as far as it was."""
        fewest, _ = self.seconds.measured
        _, drafted = self.draft_seconds.measured
        found = 0
        for batch in range(fewest, min(most, drafted) + 1) if self.rounds else ():
            costs = {depth: self._cost(batch, batch, depth) for depth in self._used}
            rates = self._rates(batch, batch, costs)
            if max(rates, key=lambda depth: rates[depth]) == 0:
                break
            found = batch
        return found

    def step(self, spans: Sequence[Span], depth: int) -> NDArray[np.float32]:
        """The runner's, of a token of each span with so many proposed after it; timed."""
        start = self._clock()
        logits = self._runner.step(spans)
        spent = self._clock() - start
        self.seconds.add(sum(len(span.ids) for span in spans), spent)
        self._unused = {d: was + spent + self._proposing for d, was in self._unused.items()}
        self._unused[depth], self._proposing, self.latest = 0.0, 0.0, depth
        self._until_look -= 1
        if self._untried and self._untried[0] == depth:
            del self._untried[0]
        return logits

    def propose(self, spans: Sequence[Span], depth: int) -> list[Proposal]:
        """The runner's."""
        start = self._clock()
        found = self._runner.propose(spans, depth)
        spent = self._clock() - start
        self.drafting += spent
        self._proposing += spent
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

    @property
    def _used(self) -> Sequence[int]:
        return self._depths if self._adapts else (0, self.shape.depth)

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
