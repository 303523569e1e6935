"""Who sees whom: `Packed` for whole sequences, `Paged` for a cache that grows.

Both answer the decoder's two questions (which raw K and V came before; what does attention give)
and own all that differs between training, chunked prefill and decode. Layers of one window share
page numbers (a group, `Architecture.windows`); a page that left its group's window is never read.
Baichuan-M1's raw K and V are part of the cache: of each layer and page the last row written, so
that a continuation from any whole page (a shared prefix) or from the end is right; a few of the
last, where rows of a draft may be taken back.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the field's name for it)

from attending.model.architecture import PAGE_TOKENS, Architecture, LayerSpec


class Packed:
    """Whole sequences side by side in one row; none sees another. Nothing is kept."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        """`lengths`: tokens of each sequence; they sum to the row's T."""
        self.lengths = list(lengths)
        self.positions = torch.cat([torch.arange(n, device=device) for n in self.lengths])
        self._is_first = (self.positions == 0)[:, None, None]
        ends = list(accumulate(self.lengths, initial=0))
        self._ends = torch.tensor(ends, dtype=torch.int32, device=device)
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def previous(self, spec: LayerSpec, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The rows one earlier; zero at every sequence's start."""
        return (
            k.roll(1, dims=0).masked_fill(self._is_first, 0),
            v.roll(1, dims=0).masked_fill(self._is_first, 0),
        )

    def __call__(self, spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention by segment; segments of one length go as one batch.

        In half precision, on CUDA all segments are one call of FlashAttention; on a CPU attention
        is done in float32, which is exact and, beside torch's half-precision kernel, faster.
        """
        if q.dtype in (torch.bfloat16, torch.float16):
            if q.is_cuda and (varlen := _varlen_attention()):
                return self._varlen(varlen, spec, q, k, v)
            if not q.is_cuda:
                return self(spec, q.float(), k.float(), v.float()).to(q.dtype)
        if len(set(self.lengths)) == 1:
            parts = (x.reshape(-1, self.lengths[0], *x.shape[1:]) for x in (q, k, v))
            return self._segments(spec, *parts).flatten(0, 1)
        rows = zip(*(torch.split(x, self.lengths) for x in (q, k, v)), strict=True)
        return torch.cat([self._segments(spec, *(x[None] for x in row))[0] for row in rows])

    def _varlen(
        self, attention: Callable[..., Tensor], spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        longest = max(self.lengths)
        return attention(
            q,
            k,
            v,
            self._ends,
            self._ends,
            longest,
            longest,
            window_size=(-1 if spec.window is None else spec.window - 1, 0),
            enable_gqa=spec.num_heads != spec.num_kv_heads,
        )

    def _segments(self, spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[1]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = spec.num_heads != spec.num_kv_heads
        if spec.window is None or spec.window >= length:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        else:
            mask = self._mask(length, spec.window, q.dtype)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
        return out.transpose(1, 2)

    def _mask(self, length: int, window: int, dtype: torch.dtype) -> Tensor:
        """[length, length] to add to the scores; made once for all layers."""
        if (length, window, dtype) not in self._masks:
            at = torch.arange(length, device=self.positions.device)
            hidden = ~visible(at, at, window)
            mask = torch.zeros(length, length, dtype=dtype, device=at.device)
            self._masks[length, window, dtype] = mask.masked_fill(hidden, -torch.inf)
        return self._masks[length, window, dtype]


@functools.cache
def _varlen_attention() -> Callable[..., Tensor] | None:
    """FlashAttention over segments with windows and grouped heads, if this torch has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn  # torch 2.10
    except ImportError:
        return None
    needed = {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)
    return varlen_attn if needed else None  # type: ignore[return-value]


class PagePool:
    """Keys and values of every layer, in pages of 64 tokens: [its group's pages, K, 64, H] each.

    M1 adds the raw K and V of a page's last rows, [pages, rows kept, K, H] per layer.
    """

    def __init__(
        self,
        arch: Architecture,
        num_pages: Sequence[int],
        dtype: torch.dtype,
        device: str = "cpu",
        kept_rows: int = 1,
    ) -> None:
        """Allocate so many pages for the layers of each group.

        Slot s of a page has its raw row at s modulo `kept_rows`: with as many as a step may write
        and take back again, the one before them is still there.
        """
        self.windows, self.kept_rows = arch.windows, kept_rows
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.raw_keys: list[Tensor] = []
        self.raw_values: list[Tensor] = []
        for spec in arch.layers:
            count = num_pages[self.windows.index(spec.window)]
            shape = (count, spec.num_kv_heads, PAGE_TOKENS, spec.head_dim)
            self.keys.append(torch.zeros(shape, dtype=dtype, device=device))
            self.values.append(torch.zeros(shape, dtype=dtype, device=device))
            if arch.is_m1:
                raw = (count, kept_rows, spec.num_kv_heads, spec.head_dim)
                self.raw_keys.append(torch.zeros(raw, dtype=dtype, device=device))
                self.raw_values.append(torch.zeros(raw, dtype=dtype, device=device))


@dataclass(frozen=True, slots=True)
class Rows:
    """The new tokens of one sequence in a step, appended to what is cached.

    Row i goes to cache slot `cached + i`. In a plain step its position is its slot and its parent
    the row before; in a draft tree, siblings share a position and `parents` says whom they follow.
    """

    cached: int
    """Tokens already in the cache."""
    pages: Sequence[Tensor]
    """[P] int64 for each group, pages that hold slots 0 .. cached + count - 1, in order; anything
    where a page lies wholly outside the group's window of every row."""
    count: int
    depths: tuple[int, ...] | None = None
    """Draft tree: position of each row minus `cached`."""
    parents: tuple[int, ...] | None = None
    """Draft tree: row that each row follows; -1 for the last cached token."""


class Lineage(NamedTuple):
    """Where each row's parent is, and which rows stay for those that come after."""

    rows: Tensor  # [T]: the parent in this step
    is_cached: Tensor  # [T]: it is in the cache instead
    is_none: Tensor  # [T]: there is none
    slots: Tensor  # [T]: of the parent in the cache
    kept: Tensor  # rows of this step
    kept_slots: Tensor


class Paged:
    """A step over several sequences whose past lies in a `PagePool`; writes the new K and V."""

    def __init__(self, pool: PagePool, rows: Sequence[Rows], first: int = 0) -> None:
        """The rows of each sequence lie side by side in the flat row, in the order given.

        Args:
            pool: Of all sequences.
            rows: What is new of each.
            first: Slots before it are never seen.

        Raises:
            ValueError: A page list is too short for its sequence.
        """
        self._pool, self._first = pool, first
        self._rows = list(rows)
        self._ends = list(accumulate(row.count for row in rows))
        self._singles = [i for i, row in enumerate(rows) if row.count == 1 and not row.parents]
        self._pasts: dict[tuple[int | None, int], tuple[Tensor, Tensor]] = {}
        self._writes: dict[tuple[int | None, int], Tensor] = {}
        device = pool.keys[0].device
        self._row_positions = [_positions(row).to(device) for row in rows]
        self.positions = torch.cat(self._row_positions)
        slots = [torch.arange(row.cached, row.cached + row.count) for row in rows]
        self._offsets = (torch.cat(slots) % PAGE_TOKENS).to(device)
        self._tables: dict[int | None, list[Tensor]] = {}
        self._pages: dict[int | None, Tensor] = {}
        for group, window in enumerate(pool.windows):
            tables = self._tables[window] = [row.pages[group] for row in rows]
            for table, slot in zip(tables, slots, strict=True):
                if int(slot[-1]) >= len(table) * PAGE_TOKENS:
                    raise ValueError(f"{len(table)} pages cannot hold slot {int(slot[-1])}")
            pages = [t[slot // PAGE_TOKENS] for t, slot in zip(tables, slots, strict=True)]
            self._pages[window] = torch.cat(pages).to(device)
        starts = self._offsets == 0
        self._fresh = {window: pages[starts] for window, pages in self._pages.items()}

    def previous(self, spec: LayerSpec, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's parent's."""
        raw_k, raw_v = self._pool.raw_keys[spec.index], self._pool.raw_values[spec.index]
        return self.parents(raw_k, k, spec.window), self.parents(raw_v, v, spec.window)

    def parents(self, kept: Tensor, new: Tensor, window: int | None) -> Tensor:
        """Each row's parent's of `new` [T, ...]: from this step, from the cache, or zero.

        `kept` [pages of the window's group, rows kept, ...] is the cache; the new last rows go
        there afterwards.
        """
        at, count = self._lineage, kept.shape[1]
        tables, shape = self._tables[window], (-1, *[1] * (new.dim() - 1))
        slots = torch.split(at.slots, [row.count for row in self._rows])
        pages = [t[one // PAGE_TOKENS] for t, one in zip(tables, slots, strict=True)]
        cached = kept[torch.cat(pages).to(new.device), at.slots.to(new.device) % count]
        cached = cached.masked_fill(at.is_none.view(shape), 0)
        before = torch.where(at.is_cached.view(shape), cached, new[at.rows])
        kept[self._pages[window][at.kept], at.kept_slots % count] = new[at.kept]
        return before

    def write(self, spec: LayerSpec, k: Tensor, v: Tensor) -> None:
        """Rotated keys and values [T, K, H] to their pages."""
        slots, fresh = self._slots(spec.window, spec.num_kv_heads), self._fresh[spec.window]
        for pool, new in ((self._pool.keys, k), (self._pool.values, v)):
            if len(fresh):  # unseen slots are multiplied by 0, which only numbers survive
                pool[spec.index][fresh] = 0
            pool[spec.index].flatten(0, 2).index_copy_(0, slots, new.flatten(0, 1))

    def __call__(self, spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v to their pages, then attend: single rows as one batch, others alone."""
        self.write(spec, k, v)
        out = torch.empty_like(q)
        if self._singles:
            at = [self._ends[index] - 1 for index in self._singles]
            out[at] = self._batch(spec, q[at])
        for index, row in enumerate(self._rows):
            if index not in self._singles:
                mine = slice(self._ends[index] - row.count, self._ends[index])
                out[mine] = self._one(spec, index, q[mine])
        return out

    def _batch(self, spec: LayerSpec, q: Tensor) -> Tensor:
        """[B, N, H]: one new row of each of B sequences, their pasts padded to the longest.

        The query heads that share a K/V head go as rows of one small product.
        """
        blocks, mask = self._past(spec.window, spec.num_kv_heads)
        batch, kv_heads, size = q.shape[0], spec.num_kv_heads, q.shape[-1]
        keys, values = (  # whole rows of the pool seen as [pages * K, 64 * H]: the fastest gather
            pool[spec.index].flatten(0, 1).flatten(1).index_select(0, blocks)
            for pool in (self._pool.keys, self._pool.values)
        )
        grouped = q.view(batch, kv_heads, -1, size)
        shape = (batch, kv_heads, -1, size)
        out = F.scaled_dot_product_attention(
            grouped, keys.view(shape), values.view(shape), attn_mask=mask
        )
        return out.view(q.shape)

    def _slots(self, window: int | None, kv_heads: int) -> Tensor:
        """[T * K]: where each new row's heads go in a layer's pool seen as [pages * K * 64]."""
        if (window, kv_heads) not in self._writes:
            blocks = self._pages[window][:, None] * kv_heads
            blocks = blocks + torch.arange(kv_heads, device=blocks.device)
            slots = (blocks * PAGE_TOKENS + self._offsets[:, None]).flatten()
            self._writes[window, kv_heads] = slots
        return self._writes[window, kv_heads]

    def _past(self, window: int | None, kv_heads: int) -> tuple[Tensor, Tensor]:
        """Of the single rows: the pool's blocks [B * K * P], and which slots are seen."""
        if (window, kv_heads) not in self._pasts:
            rows = [self._rows[index] for index in self._singles]
            tables = [self._tables[window][index] for index in self._singles]
            firsts = [
                self._first if window is None else max(self._first, r.cached + 1 - window)
                for r in rows
            ]
            starts = [first // PAGE_TOKENS for first in firsts]
            used = [
                table[start : row.cached // PAGE_TOKENS + 1]
                for table, row, start in zip(tables, rows, starts, strict=True)
            ]
            longest = max(map(len, used))  # a short one is padded with its own: never another's
            pages = torch.stack([p[torch.arange(longest).clamp(max=len(p) - 1)] for p in used])
            slots = torch.arange(longest * PAGE_TOKENS)
            offset = torch.tensor(starts)[:, None] * PAGE_TOKENS
            low, high = torch.tensor(firsts)[:, None], torch.tensor([[r.cached] for r in rows])
            seen = (slots >= low - offset) & (slots <= high - offset)
            blocks = pages[:, None] * kv_heads + torch.arange(kv_heads)[:, None]
            device = self.positions.device
            mask = seen[:, None, None].to(device)
            self._pasts[window, kv_heads] = blocks.flatten().to(device), mask
        return self._pasts[window, kv_heads]

    def _one(self, spec: LayerSpec, index: int, q: Tensor) -> Tensor:
        row, positions = self._rows[index], self._row_positions[index]
        total = row.cached + row.count
        # Pages wholly before every row's window are not read; a row's depth is at least 0.
        first = 0 if spec.window is None else max(0, row.cached + 1 - spec.window) // PAGE_TOKENS
        pages = self._tables[spec.window][index][first : -(-total // PAGE_TOKENS)]
        start = first * PAGE_TOKENS
        keys = _contiguous(self._pool.keys[spec.index], pages)[:, : total - start]
        values = _contiguous(self._pool.values[spec.index], pages)[:, : total - start]
        mask = None
        if row.count > 1 or spec.window is not None or self._first:
            past = torch.arange(start, row.cached, device=q.device)
            mask = visible(positions, torch.cat((past, positions)), spec.window)
            mask[:, : max(self._first - start, 0)] = False
            if row.parents is not None:
                mask[:, row.cached - start :] &= _ancestors(row.parents).to(q.device)
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=mask,
            enable_gqa=spec.num_heads != spec.num_kv_heads,
        )
        return out[0].transpose(0, 1)

    @functools.cached_property
    def _lineage(self) -> Lineage:
        """Kept are, of each page, the last rows that fit the pool's place for them."""
        parent_rows, in_cache, is_none, last, kept, kept_slots = [], [], [], [], [], []
        for row, end in zip(self._rows, self._ends, strict=True):
            base, stop = end - row.count, row.cached + row.count - 1
            for index, parent in enumerate(row.parents or range(-1, row.count - 1)):
                slot = row.cached + index
                parent_rows.append(base + max(parent, 0))
                in_cache.append(parent < 0)
                is_none.append(parent < 0 and row.cached == 0)
                last.append(max(row.cached - 1, 0))
                page_end = slot // PAGE_TOKENS * PAGE_TOKENS + PAGE_TOKENS - 1
                if slot > min(page_end, stop) - self._pool.kept_rows:
                    kept.append(base + index)
                    kept_slots.append(slot)
        device = self.positions.device
        found = (parent_rows, in_cache, is_none, last, kept, kept_slots)
        rows, cached, none, slots, stay, places = map(torch.tensor, found)
        return Lineage(rows.to(device), cached.to(device), none.to(device), slots, stay, places)


def _positions(row: Rows) -> Tensor:
    depths = range(row.count) if row.depths is None else row.depths
    return torch.tensor([row.cached + depth for depth in depths])


def visible(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """[queries, keys] bool by position: not the future, and not past the window."""
    gap = queries[:, None] - keys[None, :]
    seen = gap >= 0
    return seen if window is None else seen & (gap < window)


def _ancestors(parents: Sequence[int]) -> Tensor:
    """[rows, rows] bool: a row sees itself and the rows it descends from."""
    seen = torch.eye(len(parents), dtype=torch.bool)
    for index, parent in enumerate(parents):
        if parent >= 0:
            seen[index] |= seen[parent]
    return seen


def _contiguous(pool: Tensor, pages: Tensor) -> Tensor:
    """[pages, K, 64, H] of some pages -> [K, tokens, H]."""
    return pool[pages.to(pool.device)].transpose(0, 1).flatten(1, 2)
