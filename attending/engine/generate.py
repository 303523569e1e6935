"""The simple generate loop: one sequence on one runner, with its cache kept between calls.

A next prompt that begins as the last text did (a conversation going on) reuses the whole pages of
what they share; only whole pages, since Baichuan-M1 keeps one raw K/V row a page.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from attending.engine.runner import Runner, Span
from attending.engine.sampler import Sampling, draw, probabilities
from attending.errors import ContextError
from attending.model.architecture import PAGE_TOKENS

CHUNK_TOKENS = 512


class Generator:
    """Continues token ids, one at a time."""

    def __init__(self, runner: Runner) -> None:
        """The runner's pages are all this generator's."""
        self._runner = runner
        self._cached: list[int] = []
        self._turn = object()
        self._pages = np.arange(runner.num_pages, dtype=np.int64)
        self.context = min(runner.arch.context, runner.num_pages * PAGE_TOKENS)
        """Most tokens of prompt and answer together."""

    def tokens(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Token after token, until the limit or the context ends; the caller stops earlier.

        Raises:
            ContextError: The prompt is empty or leaves no room for an answer.
        """
        if not 0 < len(prompt) < self.context:
            raise ContextError(
                f"the prompt is {len(prompt):,} tokens; 1 to {self.context - 1:,} fit here. "
                "Shorten it, or raise --context if the model allows it."
            )
        rng = np.random.default_rng(sampling.seed)
        text = list(prompt)
        limit = min(self.context, len(text) + (sampling.max_tokens or self.context))
        self._turn = turn = object()
        logits = self._prefill(text)
        while True:
            token = draw(probabilities(logits, sampling, text), rng)
            text.append(token)
            yield token
            if len(text) >= limit:
                return
            # Another answer may have used the cache since; then what it overwrote comes again.
            is_mine = self._turn is turn
            self._turn = turn
            logits = self._step(text[-1:], wants_logits=True) if is_mine else self._prefill(text)

    def _prefill(self, prompt: list[int]) -> np.ndarray:
        shared = 0
        # At least the last token is computed again: its logits are wanted.
        for ours, theirs in zip(self._cached, prompt[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        del self._cached[shared - shared % PAGE_TOKENS :]
        for start in range(len(self._cached), len(prompt), CHUNK_TOKENS):
            end = min(start + CHUNK_TOKENS, len(prompt))
            logits = self._step(prompt[start:end], wants_logits=end == len(prompt))
        return logits

    def _step(self, ids: Sequence[int], *, wants_logits: bool) -> np.ndarray:
        cached = len(self._cached)
        pages = self._pages[: -(-(cached + len(ids)) // PAGE_TOKENS)]
        span = Span(np.asarray(ids, dtype=np.int64), cached, pages, wants_logits)
        logits = self._runner.step([span])
        self._cached.extend(ids)
        return logits[0] if wants_logits else logits


@dataclass(frozen=True, slots=True)
class Cut:
    """What `StopTexts` lets through, and whether the answer ends here."""

    text: str
    ended: bool


class StopTexts:
    """Ends an answer at the stop text that is complete first, wherever the token borders fall."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: none of them empty."""
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> Cut:
        """Text that can no longer become part of a stop text."""
        self._held += text
        found = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            return Cut(self._held[: min(found)[1]], ended=True)
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return Cut(out, ended=False)

    def finish(self) -> str:
        """What was held back: the answer ended otherwise."""
        return self._held


FinishReason = Literal["stop", "length", "cancelled"]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
