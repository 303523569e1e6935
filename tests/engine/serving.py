"""What scheduler tests share: runners that watch or fail, and an answer computed plainly."""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from attending.engine.runner import Runner, Span
from attending.engine.sampler import Sampling, Scored, choose, score
from attending.engine.scheduler import Output, Request, Scheduler
from attending.engine.torch_runner import TorchRunner
from attending.errors import AttendingError
from attending.model.architecture import PAGE_TOKENS, Architecture, parse_config
from attending.model.attend import Packed
from attending.model.decoder import Decoder
from tests.model.tiny import build

CONFIG: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.4,
    "sliding_window": 20,
    "sliding_window_layers": [1],
    "use_sliding_window": True,
    "max_window_layers": 1,
    "head_dim": 8,
}
GREEDY = Sampling(temperature=0.0, max_tokens=20)
BORDERS = (63, 64, 65, 127, 128, 129)


def decoder(family: str, **config: Any) -> Decoder:
    return build({**CONFIG, "model_type": family, **config}, dtype=torch.float64)


def text(length: int, seed: int = 0, vocab: int = 50) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(vocab, size=length).tolist())


def paged(model: Decoder, num_pages: int) -> TorchRunner:
    """A runner with so many pages for each group of layers."""
    return TorchRunner(model, [num_pages] * len(model.arch.windows))


class Watched:
    """A runner that notes its steps; no sequence writes to a page another one reads, none is held
    that its window has left behind, and none is given back that it still sees."""

    def __init__(self, runner: Runner) -> None:
        self.arch, self.num_pages, self._runner = runner.arch, runner.num_pages, runner
        self.steps: list[list[Span]] = []

    @property
    def num_tokens(self) -> int:
        return sum(len(span.ids) for spans in self.steps for span in spans)

    def step(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        self.steps.append(list(spans))
        for span in spans:
            assert len(span.ids) >= 1 and span.num_logits <= len(span.ids)
            assert len(span.pages) == len(self.arch.windows)
            for group, window in enumerate(self.arch.windows):
                pages = span.pages[group]
                assert len(pages) == -(-(span.cached + len(span.ids)) // PAGE_TOKENS)
                seen = 0 if window is None else max(0, span.cached + 1 - window) // PAGE_TOKENS
                if span.cached and window == 1:  # the last token's page is kept
                    seen = (span.cached - 1) // PAGE_TOKENS
                assert (pages[:seen] == -1).all() and (pages[seen:] >= 0).all()
                assert len(set(pages[seen:].tolist())) == len(pages) - seen
                written = set(pages[span.cached // PAGE_TOKENS :].tolist())
                for other in spans:
                    assert other is span or written.isdisjoint(other.pages[group].tolist())
        return self._runner.step(spans)


class Notebook:
    """A runner without weights: pages hold ids, and logits are a hash of the text that they hold.

    A page that is shared too early, given away while held or written twice changes the answer.
    """

    def __init__(
        self,
        num_pages: int | tuple[int, ...],
        vocab: int = 50,
        windows: tuple[int | None, ...] = (None,),
    ) -> None:
        """`num_pages`: of each group, or all alike; `windows`: of the groups, None first."""
        config = {**CONFIG, "model_type": "llama", "vocab_size": vocab, "num_hidden_layers": 1}
        arch = parse_config(config)
        layers = tuple(replace(arch.layers[0], window=window) for window in windows)
        self.arch: Architecture = replace(arch, layers=layers)
        counts = (num_pages,) * len(windows) if isinstance(num_pages, int) else num_pages
        self.num_pages = counts
        self._ids = [np.full((count, PAGE_TOKENS), -1) for count in counts]

    def step(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        for span in spans:
            slots = np.arange(span.cached, span.cached + len(span.ids))
            for kept, pages in zip(self._ids, span.pages, strict=True):
                kept[pages[slots // PAGE_TOKENS], slots % PAGE_TOKENS] = span.ids
        rows = []
        for span in spans:
            end = span.cached + len(span.ids)
            held = [k[p].ravel() for k, p in zip(self._ids, span.pages, strict=True)]
            rows += [
                self._row([ids[: at + 1] for ids in held])
                for at in range(end - span.num_logits, end)
            ]
        return np.stack(rows) if rows else np.zeros((0, self.arch.vocab_size), np.float32)

    def row(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        return self._row([np.asarray(ids, dtype=np.int64)] * len(self.arch.windows))

    def _row(self, held: Sequence[NDArray[np.int64]]) -> NDArray[np.float32]:
        """What each group sees decides; the window of a text's last token."""
        seen = [i[-(w or len(i)) :] for i, w in zip(held, self.arch.windows, strict=True)]
        rng = np.random.default_rng(zlib.crc32(np.concatenate([*seen, [len(held[0])]]).tobytes()))
        return rng.standard_normal(self.arch.vocab_size, dtype=np.float32) * 2


@dataclass
class Told:
    """All that came for one request."""

    tokens: list[int] = field(default_factory=list)
    scores: list[Scored] = field(default_factory=list)
    prompt: tuple[Scored | None, ...] | None = None
    finish: str | None = None
    cached_tokens: int = 0
    error: AttendingError | None = None

    def add(self, output: Output) -> None:
        assert self.finish is None and self.error is None, "nothing comes after the end"
        self.tokens += [] if output.token is None else [output.token]
        self.scores += [] if output.scored is None else [output.scored]
        assert output.prompt is None or self.prompt is None, "a prompt's scores come once"
        self.prompt = self.prompt or output.prompt
        self.finish, self.error = output.finish, output.error
        self.cached_tokens = output.cached_tokens


def serve(scheduler: Scheduler, *requests: Request) -> list[Told]:
    """All at once, to their ends."""
    told = {scheduler.submit(request): Told() for request in requests}
    for _ in range(5_000):
        if not scheduler.num_running and not scheduler.num_waiting:
            break
        for output in scheduler.step():
            told[output.handle].add(output)
    assert not scheduler.num_running and not scheduler.num_waiting, "nothing moves any more"
    assert scheduler.pages.num_available == scheduler.pages.num_pages
    return list(told.values())


Rows = Callable[[Sequence[int]], NDArray[np.float32]]


def rows_of(model: Decoder) -> Rows:
    """[T, V] of a text, computed whole and without a cache."""

    @torch.no_grad()
    def rows(ids: Sequence[int]) -> NDArray[np.float32]:
        hidden = model(torch.tensor(ids), Packed([len(ids)]))
        found: NDArray[np.float32] = model.logits(hidden).float().numpy()
        return found

    return rows


def plainly(rows: Rows, request: Request, context: int) -> Told:
    """What must come: token by token, each from the whole text, nothing kept between them."""
    ids, told = list(request.ids), Told()
    rng = np.random.default_rng(request.sampling.seed)
    if request.num_prompt_top is not None:
        pairs = zip(rows(ids)[:-1], ids[1:], strict=True)
        told.prompt = (None, *(score(row, i, request.num_prompt_top) for row, i in pairs))
    wanted = request.sampling.max_tokens
    limit = context if wanted is None else min(context, len(ids) + wanted)
    while len(ids) < limit:
        row = rows(ids)[-1]
        ids.append(choose(row, request.sampling, ids, rng.random(), len(request.ids)))
        told.tokens.append(ids[-1])
        if request.num_top is not None:
            told.scores.append(score(row, ids[-1], request.num_top))
        if ids[-1] in request.stop_ids:
            told.finish = "stop"
            return told
    told.finish = "length"
    return told


def assert_same(told: Told, wanted: Told) -> None:
    assert told.error is None
    assert (told.tokens, told.finish) == (wanted.tokens, wanted.finish)
    assert_scores(told.scores, wanted.scores)
    assert (told.prompt is None) == (wanted.prompt is None)
    assert_scores(told.prompt or (), wanted.prompt or ())


def assert_scores(found: Sequence[Scored | None], wanted: Sequence[Scored | None]) -> None:
    assert len(found) == len(wanted)
    for one, two in zip(found, wanted, strict=True):
        if one is None or two is None:
            assert one is two
            continue
        assert (one.id, one.rank, [i for i, _ in one.top]) == (
            two.id,
            two.rank,
            [i for i, _ in two.top],
        )
        assert one.logprob == pytest.approx(two.logprob, abs=1e-5)
        assert [v for _, v in one.top] == pytest.approx([v for _, v in two.top], abs=1e-5)


class Failing:
    """Gives rows that are not numbers after one token."""

    def __init__(self, runner: Runner, token: int) -> None:
        self.arch, self.num_pages = runner.arch, runner.num_pages
        self._runner, self._token = runner, token

    def step(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        rows = self._runner.step(spans).copy()
        at = 0
        for span in spans:
            if span.num_logits and span.ids[-1] == self._token:
                rows[at : at + span.num_logits] = np.nan
            at += span.num_logits
        return rows


class Odd:
    """Only odd tokens, then one even one; counts what it was told."""

    def __init__(self) -> None:
        self.chosen: list[int] = []

    def allowed(self) -> NDArray[np.bool_] | None:
        mask: NDArray[np.bool_] = np.arange(64) % 2 == (len(self.chosen) < 6)
        return mask  # longer than the vocabulary

    def advance(self, token: int) -> None:
        self.chosen.append(token)
