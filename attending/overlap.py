"""How much texts share: a 13-gram index for decontamination, MinHash for near-duplicates.

A token is a Han character (simplified and traditional differ) or a word of a script that writes
spaces, so one n serves both. Hashes depend on the text alone, not on the process.
"""

import re
import unicodedata
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from attending.errors import UsageError

Hashes = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
Signature = np.ndarray[tuple[int, ...], np.dtype[np.uint32]]
HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
TOKEN = re.compile(rf"[{HAN}]|[^\W_{HAN}]+")


class Overlap(NamedTuple):
    """What a text has in common with the texts of an index."""

    share: float  # of the text's n-grams: small if a long document holds one whole question
    longest_run: int  # tokens in the text's longest stretch made of known n-grams
    ids: tuple[str, ...]  # the indexed texts concerned, in the order they were added


class NgramIndex:
    """The n-grams of many texts; one shorter than n matches only a text that equals all of it."""

    def __init__(self, n: int = 13) -> None:
        """n counts tokens."""
        self._n = n
        self._ids: list[str] = []
        self._parts = [(np.empty(0, np.uint64), np.empty(0, np.int64))]  # n-grams, whose they are

    def add(self, name: str, text: str) -> None:
        """Index a text. Add all before asking: the first question after this sorts everything."""
        grams = np.unique(ngrams(normalise(text), self._n))
        self._parts.append((grams, np.full(len(grams), len(self._ids))))
        self._ids.append(name)

    def overlap(self, text: str) -> Overlap:
        """Compare a text with all that is indexed."""
        if len(self._parts) > 1:
            known, owners = (np.concatenate(arrays) for arrays in zip(*self._parts, strict=True))
            order = np.argsort(known, kind="stable")
            self._parts = [(known[order], owners[order])]
        known, owners = self._parts[0]
        tokens = normalise(text)
        grams = ngrams(tokens, self._n)
        start, stop = np.searchsorted(known, grams), np.searchsorted(known, grams, side="right")
        edges = np.flatnonzero(np.diff(stop > start, prepend=False, append=False))
        if not len(edges):
            return Overlap(0.0, 0, ())
        run = int((edges[1::2] - edges[::2]).max()) + min(self._n, len(tokens)) - 1
        found = np.unique(np.concatenate([owners[a:b] for a, b in zip(start, stop, strict=True)]))
        return Overlap(float((stop > start).mean()), run, tuple(self._ids[i] for i in found))


def normalise(text: str) -> list[str]:
    """The tokens of a text, without case, width, punctuation and spacing."""
    return TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())


def ngrams(tokens: Sequence[str], n: int) -> Hashes:
    """A hash of each n tokens in a row, [tokens - n + 1]; of a shorter text, one of it all, [1]."""
    if n < 1:
        raise UsageError(f"n-grams of {n} tokens: n must be at least 1.")
    words = b"".join(blake2b(token.encode(), digest_size=8).digest() for token in tokens)
    hashes = np.frombuffer(words or bytes(8), "<u8")
    width = min(n, len(hashes))  # its weights are its own, so no short text looks like an n-gram
    sums = np.lib.stride_tricks.sliding_window_view(hashes, width) @ _odd(0, width, width)
    return sums ^ (sums >> np.uint64(32))


def minhash(grams: Hashes, num_permutations: int = 128, seed: int = 0) -> Signature:
    """The least n-gram under each permutation x -> a x + b mod 2^64, a odd; its upper half."""
    factor, term = _odd(1, seed, 2 * num_permutations).reshape(2, -1, 1)
    blocks = np.split(grams, range(4096, len(grams), 4096))  # 4 MB of products at a time
    least: Hashes = np.min([(factor * block + term).min(axis=1) for block in blocks], axis=0)
    return (least >> np.uint64(32)).astype(np.uint32)


def similarity(a: Signature, b: Signature) -> float:
    """Two n-gram sets' Jaccard similarity J, with a standard error of sqrt(J (1 - J) / len)."""
    return float(np.equal(a, b).mean())


def band_keys(signature: Signature, rows: int) -> Hashes:
    """A key a band, [len / rows]; two texts share one with probability 1 - (1 - J^rows)^bands."""
    weighted = signature.astype(np.uint64) * _odd(2, rows, len(signature))
    return weighted.reshape(-1, rows) @ np.ones(rows, np.uint64)


def _odd(purpose: int, key: int, count: int) -> Hashes:
    return np.random.PCG64([purpose, key]).random_raw(count) | np.uint64(1)
