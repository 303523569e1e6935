"""Drafts for scheduler tests: a random head, and one that knows the answers, more or less."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attending.engine.native import pack
from attending.engine.native.draft import pack_draft
from attending.engine.native.runner import NativeOptions, NativeRunner
from attending.engine.runner import Proposal, Shape, Span
from attending.engine.scheduler import Scheduler
from attending.engine.speculate import Speculation
from attending.engine.torch_runner import TorchRunner
from attending.model.decoder import Decoder
from attending.model.eagle import Eagle
from attending.model.eagle_files import choose_vocabulary, eagle_config
from tests.engine.native_models import Trained, kernel
from tests.engine.serving import Notebook, Watched

CHAIN, TREE = Shape(3), Shape(3, 2, 5)


def head(decoder: Decoder, words: int = 0, seed: int = 1, **how: Any) -> Eagle:
    """A draft for a decoder, in its dtype, of some of its words; not trained."""
    arch = decoder.arch
    size = words or arch.vocab_size * 2 // 3
    eagle = Eagle(eagle_config(arch, size, **how)).to(decoder.model.norm.weight.dtype)
    counts = np.random.default_rng(seed).integers(1000, size=arch.vocab_size)
    d2t, t2d = choose_vocabulary(counts, size, [])
    eagle.d2t.copy_(torch.from_numpy(d2t))
    eagle.t2d.copy_(torch.from_numpy(t2d))
    eagle.init_weights(decoder.head_weight(), decoder.model.norm.weight, seed)
    return eagle.requires_grad_(False)


def drafted(decoder: Decoder, pages: int | Sequence[int], shape: Shape = CHAIN) -> TorchRunner:
    """Torch's runner with a head that was not trained."""
    counts = [pages] * len(decoder.arch.windows) if isinstance(pages, int) else pages
    return TorchRunner(decoder, counts, head(decoder), shape)


def natively(
    decoder: Decoder,
    eagle: Eagle | None,
    shape: Shape = CHAIN,
    pages: int = 12,
    features: Sequence[int] = (),
    **options: Any,
) -> NativeRunner:
    """The native runner with the weights of both, or of the decoder alone."""
    with tempfile.TemporaryDirectory() as folder:
        packed = pack.open_packed(Trained(decoder), Path(folder), "w8")
    chosen = NativeOptions(**{"threads": 2, **options})
    counts = [pages] * len(decoder.arch.windows)
    if eagle is None:
        return NativeRunner(packed, counts, chosen, kernel=kernel(), features=features)
    stored = {
        n: w.float().numpy() if w.is_floating_point() else w.numpy()
        for n, w in eagle.state_dict().items()
    }
    draft = pack_draft(eagle.config, stored)
    return NativeRunner(packed, counts, chosen, kernel=kernel(), draft=draft, shape=shape)


class Foreteller(Watched):
    """Proposes what the texts say, with errors: rounds of every length, whatever the weights."""

    def __init__(
        self,
        runner: TorchRunner | NativeRunner | Notebook,
        shape: Shape,
        texts: Sequence[Sequence[int]],
        errors: float = 0.3,
    ) -> None:
        super().__init__(runner)
        self.shape, self._texts, self._errors = shape, texts, errors
        self._random = np.random.default_rng(0)
        self.proposed = 0

    def propose(self, spans: Sequence[Span], depth: int) -> list[Proposal]:
        self.proposed += len(spans)
        return [self._one(span, depth) for span in spans]

    def keep(self, span: Span, rows: Sequence[int]) -> None:
        assert isinstance(self._runner, TorchRunner)
        self._runner.keep(span, rows)

    def _one(self, span: Span, depth: int) -> Proposal:
        at, token = span.cached, int(span.ids[0])
        known = [t for t in self._texts if len(t) > at and t[at] == token]
        told = list(known[self._random.integers(len(known))][at + 1 :]) if known else []
        told += self._random.integers(self.arch.vocab_size, size=depth).tolist()
        if not self.shape.nodes:
            wrong = self._random.random(depth) < self._errors
            other = self._random.integers(self.arch.vocab_size, size=depth)
            return Proposal(np.where(wrong, other, told[:depth]))
        # Each node follows one before it; some of them go on as the text does.
        depths, right, ids, parents = [0], [True], list[int](), list[int]()
        for place in range(self.shape.nodes):
            parent = int(self._random.integers(place + 1))
            if depths[parent] == depth:
                parent = 0
            is_right = right[parent] and self._random.random() > self._errors
            other = int(self._random.integers(self.arch.vocab_size))
            ids.append(told[depths[parent]] if is_right else other)
            parents.append(parent)
            depths.append(depths[parent] + 1)
            right.append(is_right)
        return Proposal(np.array(ids), tuple(parents))


class Recorded(Watched):
    """What a drafter does, watched."""

    def __init__(self, runner: TorchRunner | NativeRunner) -> None:
        super().__init__(runner)
        self.shape, self.propose, self.keep = runner.shape, runner.propose, runner.keep


def speculating(runner: Any, *, adapts: bool = False, **how: Any) -> Scheduler:
    """A scheduler that always drafts, unless it may adapt."""
    return Scheduler(runner, speculation=Speculation(runner, adapts=adapts), **how)
