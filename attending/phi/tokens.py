"""Texts as tokens: words, numbers, single Han characters, marks; and the labels between them.

A label is a phrase that announces an identifier ("MRN", "住院号"). A token knows the label before
it in its line, or alone in the line above, and the one at the head of its column; each is within
`LABEL_REACH` or `TABLE_REACH` characters, so what a token knows is bounded.
"""

import re
import tomllib
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attending.overlap import HAN

WORD_MAX, NUMBER_MAX, GAP = 24, 24, 8
LATIN = re.compile(rf"[^\W\d_{HAN}]")
LONG = "…"  # stands for each piece of a word that is longer than a token may be
LABEL_REACH, TABLE_REACH, CELL_REACH = 60, 1200, 80
TOKEN = re.compile(
    rf"[^\W\d_{HAN}]{{1,{WORD_MAX}}}|\d{{1,{NUMBER_MAX}}}|[{HAN}]|\n|[^\S\n]{{{GAP}}}|[^\s]"
)
CELL = re.compile(r"[|\t]|,(?! )| {2,}(?=\S)")
"""What stands between two cells of a line that is a table's row."""

DIGIT = re.compile(r"\d")

FOLD = {0xFF00 + code: 0x20 + code for code in range(1, 0x5F)} | {
    ord(sign): plain
    for plain, signs in {
        " ": "\u00a0\u3000\u2002\u2003\u2009\u202f",
        "-": "‐‑‒–—―−",
        "'": "‘’ʼ`´",
        '"': "“”",
    }.items()
    for sign in signs
}
"""Full-width forms, spaces, dashes and quotes as ASCII has them, each one character long."""

TABLES: dict[str, Any] = tomllib.loads(
    (resources.files("attending.phi") / "labels.toml").read_text("utf-8")
)


class Tokens(NamedTuple):
    """The tokens of a text, and for each the kind of label that speaks of it (0: none)."""

    words: list[str]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    label: NDArray[np.int64]  # before it in its line, or alone in the line above
    distance: NDArray[np.int64]  # tokens since that label, at most 7
    column: NDArray[np.int64]  # at the head of its column


def fold(text: str) -> str:
    """A text of the same length whose digits, letters and marks are ASCII's where they look so."""
    return text.translate(FOLD)


def tokenise(text: str) -> Tokens:
    """Cut a folded text into tokens and look for the label that speaks of each."""
    found = [(match.group(), match.start()) for match in TOKEN.finditer(text)]
    words = [word for word, _ in found]
    starts = np.fromiter((start for _, start in found), np.int64, len(found))
    ends = starts + np.fromiter(map(len, words), np.int64, len(found))
    _hide_long(words, starts, ends)
    labels = _labels(words)
    label, distance = _before(words, starts, ends, labels)
    column = _columns(text, starts, ends, labels)
    return Tokens(words, starts, ends, label, distance, column)


def _hide_long(words: list[str], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
    """Replace all pieces of too long a word or number: where they begin is known far away only."""
    if max(map(len, words), default=0) < min(WORD_MAX, NUMBER_MAX):
        return
    kind = ""  # of the long run that the token before was a piece of
    for index, word in enumerate(words):
        own = "number" if word[0].isdigit() else "word" if LATIN.match(word) else ""
        follows = own and own == kind and starts[index] == ends[index - 1]
        kind = own if follows or len(word) == (NUMBER_MAX if own == "number" else WORD_MAX) else ""
        if kind:
            words[index] = LONG


KINDS = ("", *TABLES["kinds"])
Phrases = dict[str, list[tuple[list[str], int]]]


def _phrases() -> Phrases:
    """The labels by their first word: the other words, longest first, and the kind."""
    found: Phrases = {}
    for kind, texts in TABLES["kinds"].items():
        for text in texts:
            first, *rest = TOKEN.findall(fold(text))
            found.setdefault(first, []).append((rest, KINDS.index(kind)))
    return {first: sorted(ways, key=lambda way: -len(way[0])) for first, ways in found.items()}


PHRASES = _phrases()


class Labels(NamedTuple):
    """The labels in a text, in the order of their first tokens; [first, stop) are tokens."""

    firsts: NDArray[np.int64]
    stops: NDArray[np.int64]
    kinds: NDArray[np.int64]


def _labels(words: list[str]) -> Labels:
    """The longest label at each token; they may overlap, so that none depends on one far away."""
    found: list[tuple[int, int, int]] = []
    for first, word in enumerate(words):
        for rest, kind in PHRASES.get(word) or PHRASES.get(word.lower(), []):
            stop = first + 1
            for want in rest:
                if stop < len(words) and words[stop] in "./'’-":
                    stop += 1
                if stop == len(words) or words[stop].lower() != want:
                    break
                stop += 1
            else:
                found.append((first, stop, kind))
                break
    table = np.array(found, np.int64).reshape(-1, 3)
    return Labels(table[:, 0], table[:, 1], table[:, 2])


def _before(
    words: list[str], starts: NDArray[np.int64], ends: NDArray[np.int64], labels: Labels
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each token the kind of the last label that ended before it, and the tokens between."""
    kinds, distances = np.zeros((2, len(words)), np.int64)
    if not len(labels.firsts):
        return kinds, distances
    order = np.lexsort((labels.stops - labels.firsts, labels.stops))  # of equal ends, the longest
    stops, kind = labels.stops[order], labels.kinds[order]
    index = np.arange(len(words))
    last = np.searchsorted(stops, index, side="right") - 1
    stop = stops[last]
    breaks = np.fromiter((word == "\n" for word in words), np.int64, len(words)).cumsum()
    told = np.fromiter((word.isalnum() for word in words), np.int64, len(words)).cumsum()
    crossed = breaks[index] - breaks[stop - 1]
    line_end = np.searchsorted(breaks, breaks[stop - 1], side="right")  # the label's line break
    alone = told[np.minimum(line_end, len(words) - 1)] == told[stop - 1]
    near = starts - ends[stop - 1] <= LABEL_REACH
    good = (last >= 0) & near & ((crossed == 0) | ((crossed == 1) & alone))
    kinds[good] = kind[last[good]]
    distances[good] = np.minimum(index - stop, 7)[good]
    return kinds, distances


def _columns(
    text: str, starts: NDArray[np.int64], ends: NDArray[np.int64], labels: Labels
) -> NDArray[np.int64]:
    """For each token in a table's row the kind of label at the head of its column."""
    columns = np.zeros(len(starts), np.int64)
    head: list[int] = []
    head_start, at = 0, 0
    for line in text.splitlines(keepends=True) if len(labels.firsts) else ():
        begin, at = at, at + len(line)
        cells = [begin + match.end() for match in CELL.finditer(line)]
        low, high = np.searchsorted(starts, (begin, at))
        if any(head):
            cell = np.searchsorted(cells, starts[low:high], side="right")
            apart = np.append(cells, at + CELL_REACH)[cell] - starts[low:high]
            good = (starts[low:high] - head_start <= TABLE_REACH) & (
                (cell > 0) | (apart < CELL_REACH)
            )
            columns[low:high] = np.array([*head, 0])[np.minimum(cell, len(head))] * good
        if not CELL.search(line.strip()[-CELL_REACH:]):
            head = []
        elif told := _heads(cells, low, high, starts, labels, line):
            head, head_start = told, begin
    return columns


def _heads(
    cells: list[int], low: int, high: int, starts: NDArray[np.int64], labels: Labels, line: str
) -> list[int]:
    """The kinds of label at the heads of columns, if a line is a table's head: two at least."""
    if DIGIT.search(line):
        return []
    told = [0] * (len(cells) + 1)
    for label in np.flatnonzero((labels.firsts >= low) & (labels.firsts < high)).tolist():
        cell = int(np.searchsorted(cells, starts[labels.firsts[label]], side="right"))
        told[cell] = told[cell] or int(labels.kinds[label])
    return told if sum(map(bool, told)) >= 2 else []
