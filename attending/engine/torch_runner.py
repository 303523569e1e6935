"""The decoder itself as a Runner: unfused, on any device torch knows; the reference."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attending.engine.runner import Proposal, Shape, Span
from attending.model.architecture import PAGE_TOKENS
from attending.model.attend import Paged, PagePool, Rows
from attending.model.decoder import Decoder, Features
from attending.model.eagle import Eagle


class TorchRunner:
    """A decoder and its pools of pages; a `Drafter` where it has a draft."""

    def __init__(
        self,
        decoder: Decoder,
        num_pages: Sequence[int],
        draft: Eagle | None = None,
        shape: Shape | None = None,
    ) -> None:
        """Allocate so many pages for each group of layers beside a loaded decoder.

        Args:
            decoder: On its device.
            num_pages: Of each group.
            draft: Of this decoder, in its dtype and on its device.
            shape: What the draft may propose; needed with one.
        """
        self.arch = decoder.arch
        self.num_pages = tuple(num_pages)
        self.shape = shape or Shape(0)
        self._decoder, self._draft = decoder, draft
        weight = decoder.model.embed_tokens.weight
        self._device = weight.device
        place = weight.dtype, str(weight.device), self.shape.rows
        self._pools = [PagePool(decoder.arch, num_pages, *place)]
        if draft:
            # The draft sees everything, as far as there are pages for it.
            self._group = 0 if None in self.arch.windows else len(num_pages) - 1
            draft.set_window(self.arch.windows[self._group])
            pages = self.num_pages[self._group]
            self._pools.append(PagePool(draft.arch, [pages], *place))
            states = (pages, self.shape.rows, self.arch.hidden_size)
            self._states = torch.zeros(states, dtype=weight.dtype, device=weight.device)

    @torch.inference_mode()
    def step(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        """See `Runner.step`."""
        features = Features(self._draft.config.layers if self._draft else ())
        rows = [_rows(span, span.pages) for span in spans]
        ids = torch.from_numpy(np.concatenate([span.ids for span in spans])).to(self._device)
        hidden = self._decoder(ids, Paged(self._pools[0], rows), features)
        if self._draft:
            attend = self._beside([_rows(span, [span.pages[self._group]]) for span in spans])
            states, [window] = self._draft.fc(features.whole()), self._draft.arch.windows
            before = attend.parents(self._states, states, window)
            self._draft.remember(self._embedded(ids), before, attend)
        ends = np.cumsum([len(span.ids) for span in spans])
        wanted = [
            row
            for end, span in zip(ends, spans, strict=True)
            for row in range(end - span.num_logits, end)
        ]
        logits = self._decoder.logits(hidden[wanted])
        result: NDArray[np.float32] = logits.to("cpu", torch.float32).numpy()
        return result

    @torch.inference_mode()
    def propose(self, spans: Sequence[Span], depth: int) -> list[Proposal]:
        """See `Drafter.propose`; every level runs the whole tree so far."""
        assert self._draft
        trees = [_Tree(int(span.ids[0]), self._state_before(span)) for span in spans]
        for level in range(depth):
            if level:
                for tree in trees:
                    tree.widen(self.shape.width)
            rows = [
                Rows(
                    span.cached,
                    [torch.from_numpy(span.pages[self._group])],
                    len(tree.ids),
                    tuple(tree.depths),
                    tuple(tree.parents),
                )
                for tree, span in zip(trees, spans, strict=True)
            ]
            ids = torch.tensor([one for tree in trees for one in tree.ids], device=self._device)
            hidden = torch.stack([one for tree in trees for one in tree.before])
            states = self._draft(self._embedded(ids), hidden, self._beside(rows))
            shares = self._draft.logits(states).log_softmax(-1)
            scores, found = shares.topk(self.shape.width)
            found = self._draft.target_ids(found)
            counts = [len(tree.ids) for tree in trees]
            parts = (one.split(counts) for one in (states, scores.cpu(), found.cpu()))
            for tree, *own in zip(trees, *parts, strict=True):
                tree.grow(*own)
        return [tree.best(self.shape.nodes or depth) for tree in trees]

    @torch.inference_mode()
    def keep(self, span: Span, rows: Sequence[int]) -> None:
        """See `Drafter.keep`."""
        taken, given = torch.tensor(rows) + span.cached, torch.arange(len(rows)) + span.cached
        assert self._draft
        archs, every = (self.arch, self._draft.arch), (range(len(span.pages)), [self._group])
        for pool, arch, groups in zip(self._pools, archs, every, strict=True):
            pages = {
                window: torch.from_numpy(span.pages[group])
                for window, group in zip(pool.windows, groups, strict=True)
            }
            for spec in arch.layers:
                table = pages[spec.window]
                for kept in (pool.keys, pool.values):
                    values = kept[spec.index].transpose(1, 2)
                    _move(values, table, taken, given, PAGE_TOKENS)
                for kept in (pool.raw_keys, pool.raw_values) if pool.raw_keys else ():
                    _move(kept[spec.index], table, taken, given, self.shape.rows)
        _move(self._states, table, taken, given, self.shape.rows)

    def _beside(self, rows: Sequence[Rows]) -> Paged:
        return Paged(self._pools[1], rows, first=1)

    def _embedded(self, ids: Tensor) -> Tensor:
        own = getattr(self._draft, "embed_tokens", self._decoder.model.embed_tokens)
        found: Tensor = own(ids)
        return found

    def _state_before(self, span: Span) -> Tensor:
        slot = span.cached - 1
        return self._states[span.pages[self._group][slot // PAGE_TOKENS], slot % self.shape.rows]


def _rows(span: Span, pages: Sequence[NDArray[np.int64]]) -> Rows:
    tables, count = [*map(torch.from_numpy, pages)], len(span.ids)
    if span.parents is None:
        return Rows(span.cached, tables, count)
    depths = [0] * count
    for row, parent in enumerate(span.parents):
        depths[row] = depths[parent] + 1 if parent >= 0 else 0
    return Rows(span.cached, tables, count, tuple(depths), span.parents)


def _move(kept: Tensor, table: Tensor, taken: Tensor, given: Tensor, size: int) -> None:
    """Of slots [pages, size, ...] some to others' places; a slot lies at itself modulo `size`."""
    moved = kept[table[taken // PAGE_TOKENS], taken % size]
    kept[table[given // PAGE_TOKENS], given % size] = moved


class _Candidate(NamedTuple):
    score: float  # log-probability of all since the root
    token: int
    parent: int  # row


class _Tree:
    """What a draft has run and what it found, for one sequence (EAGLE-2, arXiv 2406.16858)."""

    def __init__(self, root: int, before: Tensor) -> None:
        self.ids, self.parents, self.depths, self.before = [root], [-1], [0], [before]
        self._scores, self._frontier = [0.0], [0]
        self._found: list[_Candidate] = []
        self._origin = [-1]  # of each row, its candidate
        self._states: Tensor | None = None
        self._begin = 0

    def grow(self, states: Tensor, scores: Tensor, tokens: Tensor) -> None:
        """Note the continuations of the last level's rows: [rows, width]."""
        self._states, self._begin = states, len(self._found)
        for row in self._frontier:
            for score, token in zip(scores[row].tolist(), tokens[row].tolist(), strict=True):
                self._found.append(_Candidate(self._scores[row] + score, token, row))

    def widen(self, width: int) -> None:
        """Make the likeliest of them rows of the next level."""
        assert self._states is not None
        newest = range(self._begin, len(self._found))
        self._frontier = []
        for index in sorted(newest, key=lambda i: -self._found[i].score)[:width]:
            one = self._found[index]
            self._frontier.append(len(self.ids))
            self.ids.append(one.token)
            self.parents.append(one.parent)
            self.depths.append(self.depths[one.parent] + 1)
            self.before.append(self._states[one.parent])
            self._scores.append(one.score)
            self._origin.append(index)

    def best(self, count: int) -> Proposal:
        """The likeliest candidates; whose parent is always one of them."""
        order = sorted(range(len(self._found)), key=lambda i: (-self._found[i].score, i))
        chosen = sorted(order[:count])
        row = {index: place for place, index in enumerate(chosen, start=1)} | {-1: 0}
        parents = tuple(row[self._origin[self._found[index].parent]] for index in chosen)
        ids = np.array([self._found[index].token for index in chosen], dtype=np.int64)
        is_chain = parents == tuple(range(len(parents)))
        return Proposal(ids, None if is_chain else parents)
