"""Continuous batching: every step runs the next token of all answers and a piece of new prompts.

One thread calls `step` again and again. Sequences join and leave between steps; a prompt is read
in chunks beside the others' tokens; pages that begin alike are computed once. When pages run out,
the youngest sequence gives its own back and is computed again later: its text, seed and place in
the answer stay. An answer depends on its own request alone, never on what else is being served.

With a draft (`speculate.py`), answers advance by as many tokens as it foresaw, and one.
"""

import secrets
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from attending.engine.pages import Cache, Key, Table, page_keys
from attending.engine.runner import Proposal, Runner, Span
from attending.engine.sampler import Sampling, Scored, choose, score
from attending.engine.speculate import Speculation, extended, follower
from attending.errors import AttendingError, ContextError, UsageError
from attending.model.architecture import PAGE_TOKENS

SCORED_ROWS = 128  # logits of a prompt that is scored, at most so many rows of V at a time


class Grammar(Protocol):
    """What a constraint on an answer must be able to say."""

    def allowed(self) -> NDArray[np.bool_] | None:
        """[V] tokens that may come next; None for all."""

    def advance(self, token: int) -> None:
        """A token was chosen."""


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to continue."""

    ids: tuple[int, ...]
    sampling: Sampling
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end the answer."""
    num_top: int | None = None
    """Score the answer's tokens, each beside so many likelier ones; None does not."""
    num_prompt_top: int | None = None
    """The same for the prompt, which is then computed anew rather than found in the cache."""
    grammar: Grammar | None = None
    speculate: bool = True
    """Whether a draft may help, where there is one; the answer is the same."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a step brought for a request."""

    handle: int
    token: int | None = None
    """The next token; None if there was none to write, or an error."""
    scored: Scored | None = None
    finish: Literal["stop", "length"] | None = None
    """Set in a request's last output."""
    cached_tokens: int = 0
    """Of the prompt: found rather than computed."""
    prompt: tuple[Scored | None, ...] | None = None
    """In the first output, if asked for; None for the first token, which nothing precedes."""
    error: AttendingError | None = None
    """The request failed; the others go on."""


@dataclass(slots=True)
class Counters:
    """What happened so far."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preempted: int = 0
    cancelled: int = 0


@dataclass(slots=True, eq=False)
class _Sequence:
    handle: int
    request: Request
    ids: list[int]
    limit: int  # tokens of prompt and answer
    rng: np.random.Generator
    keys: list[Key]  # of the whole pages so far
    pages: Table
    cached: int = 0  # tokens whose K and V are in the pages
    found: int = 0  # of the prompt, at first admission
    scores: list[Scored | None] = field(default_factory=lambda: [None])
    was_admitted: bool = False

    @property
    def num_prompt(self) -> int:
        return len(self.request.ids)

    @property
    def is_scoring(self) -> bool:
        return self.request.num_prompt_top is not None and len(self.scores) < self.num_prompt


class Scheduler:
    """All sequences of one runner."""

    def __init__(
        self,
        runner: Runner,
        *,
        context: int | None = None,
        max_running: int = 32,
        step_tokens: int = 256,
        speculation: Speculation | None = None,
    ) -> None:
        """The runner's pages are all this scheduler's.

        Args:
            runner: Weights and pages.
            context: Most tokens of prompt and answer together; by default all that the model and
                the pages allow.
            max_running: Most sequences in a step.
            step_tokens: Most tokens in a step; long prompts are cut there, so that the answers
                beside them keep coming.
            speculation: Of the same runner.

        Raises:
            UsageError: The draft proposes more than a step or the pages have room for.
        """
        self.counters = Counters()
        self.pages = Cache(runner.arch.windows, runner.num_pages, step_tokens)
        room = min(runner.arch.context, self.pages.context or runner.arch.context)
        self.context = min(context or room, room)
        """Most tokens of prompt and answer together."""
        self.speculation = speculation
        if speculation and speculation.shape.rows > min(step_tokens, self.context - 1):
            raise UsageError(
                f"a draft of {speculation.shape.rows - 1} tokens at once: a step has {step_tokens} "
                f"and the context {self.context:,}; take fewer, or make room for more tokens."
            )
        self._runner = runner
        self._max_running, self._step_tokens = max_running, step_tokens
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []  # oldest first
        self._handles = 0

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a place."""
        return len(self._waiting)

    def check(self, request: Request) -> None:
        """Whether a request can be run at all; safe to call from any thread.

        Raises:
            ContextError: The prompt is empty or leaves no room for an answer.
            UsageError: Ids that the vocabulary does not have.
        """
        if not 0 < len(request.ids) < self.context:
            raise ContextError(
                f"the prompt is {len(request.ids):,} tokens; 1 to {self.context - 1:,} fit here. "
                "Shorten it, or give the server more context if the model allows it."
            )
        most = self._runner.arch.vocab_size - 1
        named = [*request.ids, *(token for token, _ in request.sampling.logit_bias)]
        if min(named) < 0 or max(named) > most:
            raise UsageError(f"token ids must be 0 to {most}; the request has others.")

    def submit(self, request: Request) -> int:
        """Queue a request; the handle names it in `Output` and `cancel`."""
        self.check(request)
        self._handles += 1
        room = self.context - len(request.ids)
        wanted = request.sampling.max_tokens
        limit = len(request.ids) + (room if wanted is None else min(wanted, room))
        seed = request.sampling.seed
        rng = np.random.default_rng(secrets.randbits(64) if seed is None else seed)
        keys, pages = page_keys(request.ids), self.pages.hold([])
        sequence = _Sequence(self._handles, request, list(request.ids), limit, rng, keys, pages)
        self._waiting.append(sequence)
        return self._handles

    def cancel(self, handle: int) -> bool:
        """Forget a request and give back its pages; False if it had already ended."""
        for queue in (self._running, self._waiting):
            for sequence in queue:
                if sequence.handle == handle:
                    queue.remove(sequence)
                    self._give_back(sequence)
                    self.counters.cancelled += 1
                    return True
        return False

    def step(self) -> list[Output]:
        """Advance every running sequence; nothing if there are none."""
        self._admit()
        work = self._plan()
        if not work:
            return []
        depth = 0
        if self.speculation and all(_is_next(*each) for each in work):
            depth, work = self._foresee(self.speculation, work)
            rows = self.speculation.step([span for _, span in work], depth)
        else:
            rows = self._runner.step([span for _, span in work])
        self.counters.steps += 1
        outputs: list[Output] = []
        at = 0
        for sequence, span in work:
            mine = rows[at : at + span.num_logits]
            at += span.num_logits
            if depth and len(span.ids) > 1:
                found = self._check(sequence, span, mine)
            else:
                self._keep(sequence, len(span.ids))
                found = self._read(sequence, span.cached, mine)
            outputs += found
            if found and (found[-1].finish or found[-1].error):
                self._running.remove(sequence)
                self._give_back(sequence)
        return outputs

    def _foresee(
        self, speculation: Speculation, work: list[tuple[_Sequence, Span]]
    ) -> tuple[int, list[tuple[_Sequence, Span]]]:
        """The depth of what is proposed, and the work with it; no sequence gives way for it."""
        # Nothing is proposed for places that the answer cannot have.
        left = {s.handle: s.limit - len(s.ids) - 1 for s, _ in work if s.request.speculate}
        able = [s for s, _ in work if s.cached and left.get(s.handle, 0) > 0]
        shape = speculation.shape
        if shape.nodes:
            able = [s for s in able if left[s.handle] >= shape.depth]
        most = max((left[s.handle] for s in able), default=0)
        if able and not shape.nodes:
            most = min(most, (self._step_tokens - len(work)) // len(able))
        depth = speculation.depth(len(work), len(able), most)
        rows = shape.rows if shape.nodes else 1 + depth
        if not shape.nodes:
            able = [s for s in able if s.cached + rows <= self.context]
        if depth < 1 or not able or len(able) * rows > self._step_tokens:
            return 0, work
        wanted = [(s.pages, s.cached + rows) for s in able]
        if not self.pages.fits(wanted):
            return 0, work
        if any(rows > self.pages.room(s.cached) for s in able):
            return 0, work
        if not all([self.pages.grow(*each) for each in wanted]):
            return 0, work
        asked = [self._span(sequence, 1, rows) for sequence in able]
        proposed = speculation.propose(asked, depth)
        if not shape.nodes:
            proposed = [
                Proposal(p.ids[: left[s.handle]]) for s, p in zip(able, proposed, strict=True)
            ]
        longer = map(extended, asked, proposed)
        spans = {s.handle: span for s, span in zip(able, longer, strict=True)}
        return depth, [(s, spans.get(s.handle, span)) for s, span in work]

    def _check(self, sequence: _Sequence, span: Span, logits: NDArray[np.float32]) -> list[Output]:
        """Choose token after token, as long as the one that was chosen had been proposed."""
        outputs: list[Output] = []
        row: int | None = 0
        is_over = False
        path: list[int] = []
        while row is not None:
            path.append(row)
            self._keep(sequence, 1)
            outputs += self._read(sequence, span.cached, logits[row : row + 1])
            is_over = bool(outputs[-1].finish or outputs[-1].error)
            row = None if is_over else follower(span, row, sequence.ids[-1])
        assert self.speculation
        self.speculation.keep(span, path, is_over=is_over)
        return outputs

    def _admit(self) -> None:
        """Let waiting sequences in, first come first served, while there is room for them."""
        if not self._waiting:
            return
        computing = {key for s in self._running for key in s.keys[s.cached // PAGE_TOKENS :]}
        for sequence in list(self._waiting):
            if len(self._running) >= self._max_running:
                return
            usable = [] if sequence.is_scoring else sequence.keys[: _whole(len(sequence.ids) - 1)]
            found = self.pages.find(usable)
            if found < len(usable) and usable[found] in computing:
                continue  # another is just computing the same page: wait, then share it
            sequence.pages, sequence.cached = self.pages.hold(usable[:found]), found * PAGE_TOKENS
            together = [(s.pages, _soon(s)) for s in (*self._running, sequence)]
            if self._running and not self.pages.fits(together):
                self._give_back(sequence)
                return
            self._waiting.remove(sequence)
            self._running.append(sequence)
            if not sequence.was_admitted:
                sequence.was_admitted, sequence.found = True, sequence.cached
                self.counters.prompt_tokens += sequence.num_prompt
                self.counters.cached_tokens += sequence.cached
            computing.update(sequence.keys[found:])

    def _plan(self) -> list[tuple[_Sequence, Span]]:
        """Whose tokens to run: answers first, then prompts while the step has room."""
        room = self._step_tokens
        work: list[tuple[_Sequence, Span]] = []
        by_need = sorted(self._running, key=lambda s: len(s.ids) - s.cached > 1)
        for sequence in by_need:
            if sequence not in self._running:  # it gave way to one before it
                continue
            most = min(max(room, 0), self.pages.room(sequence.cached))
            count = min(len(sequence.ids) - sequence.cached, most)
            if sequence.is_scoring:
                count = min(count, SCORED_ROWS)
            if count == 0 or not self._has_pages(sequence, sequence.cached + count):
                continue
            room -= count
            work.append((sequence, self._span(sequence, count)))
        return [(sequence, span) for sequence, span in work if sequence in self._running]

    def _span(self, sequence: _Sequence, count: int, room: int = 0) -> Span:
        """The next tokens; the pages of them, or of `room` slots."""
        end = sequence.cached + count
        num_logits = count if sequence.is_scoring else int(end == len(sequence.ids))
        ids = np.asarray(sequence.ids[sequence.cached : end], dtype=np.int64)
        used = -(-(sequence.cached + max(count, room)) // PAGE_TOKENS)
        pages = tuple(np.asarray(held[:used], dtype=np.int64) for held in sequence.pages)
        return Span(ids, sequence.cached, pages, num_logits)

    def _has_pages(self, sequence: _Sequence, tokens: int) -> bool:
        """Take pages up to so many tokens; younger sequences give theirs back if none is free."""
        while not self.pages.grow(sequence.pages, tokens):
            youngest = self._running[-1]
            self._running.remove(youngest)
            self._give_back(youngest)
            self._waiting.appendleft(youngest)
            self.counters.preempted += 1
            if youngest is sequence:
                return False
        return True

    def _give_back(self, sequence: _Sequence) -> None:
        self.pages.release(sequence.pages)
        sequence.cached = 0
        if sequence.is_scoring:
            sequence.scores = [None]

    def _keep(self, sequence: _Sequence, count: int) -> None:
        """Pages that became whole can be found from now on; those out of the window are freed."""
        before = _whole(sequence.cached)
        sequence.cached += count
        after = _whole(sequence.cached)
        if after > len(sequence.keys):
            sequence.keys = page_keys(sequence.ids, sequence.keys)
        for index in range(before, after):
            self.pages.publish(sequence.pages, index, sequence.keys[index])
        self.pages.retire(sequence.pages, sequence.cached)

    def _read(self, sequence: _Sequence, cached: int, logits: NDArray[np.float32]) -> list[Output]:
        """What the rows after `cached` tokens bring: an output, an error, or nothing yet."""
        try:
            output = self._chosen(sequence, cached, logits)
        except AttendingError as error:
            output = Output(sequence.handle, error=error)
        return [] if output is None else [output]

    def _chosen(
        self, sequence: _Sequence, cached: int, logits: NDArray[np.float32]
    ) -> Output | None:
        """Score a prompt's rows; choose the next token where all tokens have been run."""
        request = sequence.request
        if sequence.is_scoring:
            nexts = sequence.ids[cached + 1 : cached + 1 + len(logits)]
            top = request.num_prompt_top or 0
            # The prompt's last row is about the answer: it has no next token in the prompt.
            pairs = zip(logits, nexts, strict=False)
            sequence.scores += [score(row, token, top) for row, token in pairs]
        if sequence.cached < len(sequence.ids):
            return None
        is_first = len(sequence.ids) == sequence.num_prompt
        prompt = tuple(sequence.scores) if is_first and request.num_prompt_top is not None else None
        if len(sequence.ids) >= sequence.limit:
            return Output(
                sequence.handle, finish="length", cached_tokens=sequence.found, prompt=prompt
            )
        allowed = request.grammar.allowed() if request.grammar else None
        uniform = sequence.rng.random()
        token = choose(
            logits[-1], request.sampling, sequence.ids, uniform, sequence.num_prompt, allowed
        )
        if request.grammar:
            request.grammar.advance(token)
        sequence.ids.append(token)
        self.counters.output_tokens += 1
        finish: Literal["stop", "length"] | None = None
        if token in request.stop_ids:
            finish = "stop"
        elif len(sequence.ids) >= sequence.limit:
            finish = "length"
        scored = None if request.num_top is None else score(logits[-1], token, request.num_top)
        return Output(sequence.handle, token, scored, finish, sequence.found, prompt)


def _is_next(sequence: _Sequence, span: Span) -> bool:
    """Whether it is the one token that an answer goes on from."""
    return len(span.ids) == 1 and span.num_logits == 1 and not sequence.is_scoring


def _soon(sequence: _Sequence) -> int:
    """Tokens that a sequence has by now, and a little more of its answer."""
    return min(len(sequence.ids) + PAGE_TOKENS, sequence.limit)


def _whole(tokens: int) -> int:
    """Whole pages in so many tokens."""
    return tokens // PAGE_TOKENS
