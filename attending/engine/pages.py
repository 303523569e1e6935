"""Who holds which page of the cache, and which whole pages can be found again by their tokens.

A whole page is published under a hash of its tokens and of everything before them, so a later
sequence that begins the same way shares it instead of computing it. A page that nobody holds any
more stays findable until its room is needed; then the one unused for longest goes.

Layers of one window form a group with pages of its own (`Architecture.windows`). A sequence gives
back a windowed group's pages as its window leaves them behind, and of a beginning that is found
again only those in the window need be there still.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from attending.model.architecture import PAGE_TOKENS, Architecture

Key = bytes
Table = list[list[int]]
"""A sequence's pages in each group, in order; -1 for one that was given back or never needed."""
GONE = -1


def page_keys(ids: Sequence[int], known: Sequence[Key] = ()) -> list[Key]:
    """A key for each whole page of a text; `known` are those of its beginning.

    SHA-256 and not a faster hash: a collision would show one user's text to another.
    """
    keys = list(known)
    for start in range(len(keys) * PAGE_TOKENS, len(ids) - PAGE_TOKENS + 1, PAGE_TOKENS):
        page = np.asarray(ids[start : start + PAGE_TOKENS], dtype="<i8").tobytes()
        keys.append(hashlib.sha256((keys[-1] if keys else b"") + page).digest())
    return keys


def pages_for(
    arch: Architecture, cache_tokens: int, max_running: int, step_tokens: int = 256
) -> tuple[int, ...]:
    """Pages of each group for so many tokens in the cache.

    A windowed group gets no more than its sequences can hold at once, and never less than one
    needs: where no layer sees everything, memory does not bound the length of an answer.
    """
    full = _up(cache_tokens)
    longest = full if None in arch.windows else _up(arch.context)
    return tuple(
        full
        if window is None
        else max(
            min(full, max_running * _most_held(window, step_tokens)),
            min(longest, _most_held(window, 1)),
        )
        for window in arch.windows
    )


def _first_seen(window: int | None, cached: int) -> int:
    """The first page that is read after so many tokens.

    The last token's page stays even where the window is 1: Baichuan-M1 goes on from its raw row.
    """
    return 0 if window is None else max(0, cached + 1 - max(window, 2)) // PAGE_TOKENS


def _most_held(window: int, new: int) -> int:
    """Pages that `new` tokens of a sequence and the window before them can touch."""
    return _up(max(window, 2) + new - 2) + 1


def _up(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


class Cache:
    """The pages of all groups; a `Table` says which of them a sequence holds."""

    def __init__(
        self, windows: Sequence[int | None], num_pages: Sequence[int], step_tokens: int
    ) -> None:
        """All pages are free; a step runs at most `step_tokens` tokens."""
        self.groups = [Pages(count) for count in num_pages]
        self._windows = windows
        self._most = [
            count if window is None else min(count, _most_held(window, step_tokens))
            for window, count in zip(windows, num_pages, strict=True)
        ]
        bounded = [
            count * PAGE_TOKENS
            for window, count in zip(windows, num_pages, strict=True)
            if window is None or count < _most_held(window, 1)
        ]
        self.context = min(bounded, default=None)
        """Most tokens of a sequence; None if no window ever fills its group's pages."""

    @property
    def num_pages(self) -> int:
        """Of all groups together."""
        return sum(group.num_pages for group in self.groups)

    @property
    def num_available(self) -> int:
        """Pages of all groups that nobody holds."""
        return sum(group.num_available for group in self.groups)

    def room(self, cached: int) -> int:
        """Most tokens that a sequence can run at once after `cached`, the cache being its own."""
        return min(
            (_first_seen(window, cached) + group.num_pages) * PAGE_TOKENS - cached
            for window, group in zip(self._windows, self.groups, strict=True)
        )

    def find(self, keys: Sequence[Key]) -> int:
        """The longest beginning, in pages, after which every group has all that is read."""
        found = len(keys)
        runs = []  # of each windowed group, how many pages in a row end with each
        for window, group in zip(self._windows, self.groups, strict=True):
            if window is None:
                found = group.count(keys[:found])
            else:
                runs.append((window, group.runs(keys[:found])))
        while found and any(
            run[found - 1] < found - _first_seen(window, found * PAGE_TOKENS)
            for window, run in runs
        ):
            found -= 1
        return found

    def hold(self, keys: Sequence[Key]) -> Table:
        """The pages of a beginning that `find` found, held by one more."""
        firsts = [_first_seen(window, len(keys) * PAGE_TOKENS) for window in self._windows]
        return [
            [GONE] * first + group.hold(keys[first:])
            for first, group in zip(firsts, self.groups, strict=True)
        ]

    def grow(self, table: Table, tokens: int) -> bool:
        """Take pages up to so many tokens; False if a group has none left."""
        for held, group in zip(table, self.groups, strict=True):
            while len(held) < _up(tokens):
                page = group.take()
                if page is None:
                    return False
                held.append(page)
        return True

    def fits(self, sequences: Iterable[tuple[Table, int]]) -> bool:
        """Whether all tables can grow, each to so many tokens, as windows leave pages behind."""
        lacking = [0] * len(self.groups)
        for table, tokens in sequences:
            for index, held in enumerate(table):
                gone = held.count(GONE)
                most = min(_up(tokens) - gone, self._most[index])
                lacking[index] += max(0, most - (len(held) - gone))
        return all(
            more <= group.num_available for more, group in zip(lacking, self.groups, strict=True)
        )

    def publish(self, table: Table, index: int, key: Key) -> None:
        """Make a page that is whole now findable, in every group."""
        for held, group in zip(table, self.groups, strict=True):
            group.publish(held[index], key)

    def retire(self, table: Table, cached: int) -> None:
        """Give back the pages that nothing after `cached` tokens reads; they stay findable."""
        for window, held, group in zip(self._windows, table, self.groups, strict=True):
            first = seen = _first_seen(window, cached)
            while first and held[first - 1] != GONE:
                first -= 1
            group.release(held[first:seen])
            held[first:seen] = [GONE] * (seen - first)

    def release(self, table: Table) -> None:
        """Give back all pages; the table is empty then."""
        for held, group in zip(table, self.groups, strict=True):
            group.release(held[held.count(GONE) :])
            held.clear()


class Pages:
    """Hands out page numbers of one group and counts who holds them."""

    def __init__(self, num_pages: int) -> None:
        """All pages are free."""
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._key_of: dict[int, Key] = {}
        self._page_of: dict[Key, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # findable, held by nobody; oldest first

    @property
    def num_available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._idle)

    def count(self, keys: Iterable[Key]) -> int:
        """How many of the keys, from the first on, can be found."""
        found = 0
        for key in keys:
            if key not in self._page_of:
                break
            found += 1
        return found

    def runs(self, keys: Iterable[Key]) -> list[int]:
        """For each key, how many in a row up to and with it can be found."""
        found, runs = 0, []
        for key in keys:
            found = found + 1 if key in self._page_of else 0
            runs.append(found)
        return runs

    def hold(self, keys: Iterable[Key]) -> list[int]:
        """The pages of keys that are found, held by one more."""
        pages = [self._page_of[key] for key in keys]
        for page in pages:
            self._idle.pop(page, None)
            self._holders[page] += 1
        return pages

    def take(self) -> int | None:
        """A page to write to; None if every page is held."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        else:
            return None
        self._holders[page] = 1
        return page

    def publish(self, page: int, key: Key) -> None:
        """Make a page that is whole now findable; of two with the same tokens, the first stays."""
        if key not in self._page_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """One holder less of each; the last pages of a text go first, since they need the rest."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)
