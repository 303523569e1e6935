"""Who holds which page of the cache, and which whole pages can be found again by their tokens.

A whole page is published under a hash of its tokens and of everything before them, so a later
sequence that begins the same way shares it instead of computing it. A page that nobody holds any
more stays findable until its room is needed; then the one unused for longest goes.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from attending.model.architecture import PAGE_TOKENS

Key = bytes


def page_keys(ids: Sequence[int], known: Sequence[Key] = ()) -> list[Key]:
    """A key for each whole page of a text; `known` are those of its beginning.

    SHA-256 and not a faster hash: a collision would show one user's text to another.
    """
    keys = list(known)
    for start in range(len(keys) * PAGE_TOKENS, len(ids) - PAGE_TOKENS + 1, PAGE_TOKENS):
        page = np.asarray(ids[start : start + PAGE_TOKENS], dtype="<i8").tobytes()
        keys.append(hashlib.sha256((keys[-1] if keys else b"") + page).digest())
    return keys


class Pages:
    """Hands out page numbers and counts who holds them."""

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

    def hold(self, keys: Iterable[Key]) -> list[int]:
        """The pages of keys that `count` found, held by one more."""
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
