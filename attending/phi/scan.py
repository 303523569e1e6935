"""Find the identifiers in a text: patterns and the tagger on one canvas, then what joins them.

A character's mark depends on at most `LEFT` characters before it and `RIGHT` after it. If any part
fails, `PhiError` says so and nothing is returned.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attending.errors import AttendingError
from attending.phi import matcher, tagger
from attending.phi.spans import Canvas, Marks, Span
from attending.phi.tokens import fold, tokenise

LEFT, RIGHT = 2000, 320
BLOCK = 20_000  # characters scanned at once; each block sees LEFT and RIGHT around it


class PhiError(AttendingError, RuntimeError):
    """A part of the identifier filter failed: nothing may pass."""


def scan(text: str) -> list[Span]:
    """The identifiers of a text, in order.

    Raises:
        PhiError: A part failed; treat the whole text as an identifier.
    """
    canvas = Canvas(len(text))
    at = 0
    for piece in Marker().all([text]):
        canvas.marks[at : at + len(piece.text)] = piece.marks
        canvas.scores[at : at + len(piece.text)] = piece.scores
        at += len(piece.text)
    return canvas.spans(text)


def scan_lines(lines: Iterable[str]) -> Iterator[list[Span]]:
    """The identifiers of every line, in code points from its start; context crosses lines.

    Lines end in a line feed, which belongs to no span; the last may lack it.
    """
    held: list[Piece] = []
    for piece in Marker().all(lines):
        start = 0
        for stop in [at + 1 for at, sign in enumerate(piece.text) if sign == "\n"]:
            yield _line_spans([*held, piece.part(start, stop)])
            held, start = [], stop
        held.append(piece.part(start, len(piece.text)))
    if any(piece.text for piece in held):
        yield _line_spans(held)


def _line_spans(pieces: list["Piece"]) -> list[Span]:
    text = "".join(piece.text for piece in pieces).removesuffix("\n")
    canvas = Canvas(len(text))
    canvas.marks[:] = np.concatenate([piece.marks for piece in pieces])[: len(text)]
    canvas.scores[:] = np.concatenate([piece.scores for piece in pieces])[: len(text)]
    return canvas.spans(text)


class Piece(NamedTuple):
    """Characters whose marks are final."""

    text: str
    marks: Marks
    scores: NDArray[np.float32]

    def part(self, start: int, stop: int) -> "Piece":
        """Some of them."""
        return Piece(self.text[start:stop], self.marks[start:stop], self.scores[start:stop])


class Marker:
    """Marks a text that comes in pieces; what is within RIGHT of the end waits for more."""

    def __init__(self, step: int = BLOCK) -> None:
        """`step`: characters that are marked at once, beside the LEFT and RIGHT around them."""
        self._step = step
        self._text = ""  # at most LEFT characters that are marked, then those that wait
        self._done = 0
        self._error: PhiError | None = None

    def all(self, pieces: Iterable[str]) -> Iterator[Piece]:
        """Mark a whole text."""
        for piece in pieces:
            yield from self.feed(piece)
        yield from self.close()

    def feed(self, piece: str) -> Iterator[Piece]:
        """Take more text; give what is final by now. After a PhiError there is nothing more."""
        self._text += piece
        while len(self._text) - self._done >= RIGHT + self._step:
            yield self._advance(self._done + self._step)

    def close(self) -> Iterator[Piece]:
        """The rest, at the end of the text."""
        yield from self.feed("")
        yield self._advance(len(self._text))

    def _advance(self, stop: int) -> Piece:
        if self._error:
            raise self._error
        window = self._text[: stop + RIGHT]
        try:
            canvas = _mark_block(window)
        except PhiError as error:
            self._error = error
            raise
        whole = Piece(window, canvas.marks, canvas.scores).part(self._done, stop)
        cut = max(0, stop - LEFT)
        self._text, self._done = self._text[cut:], stop - cut
        return whole


def _mark_block(text: str) -> Canvas:
    try:
        text = fold(text)
        canvas = Canvas(len(text))
        tokens = tokenise(text)
        matcher.paint(text, tokens, canvas)
        tagger.shipped().paint(text, tokens, canvas)
        canvas.fill_names(text)
        matcher.fill_places(text, canvas)
        canvas.close_gaps(text)
        return canvas
    except Exception as error:  # noqa: BLE001  (whatever failed, nothing may pass)
        raise PhiError(
            f"the identifier filter failed ({type(error).__name__}): nothing was let through. "
            "Report this with the version; do not send the text."
        ) from None
