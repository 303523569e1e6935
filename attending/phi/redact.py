"""Texts without their identifiers: whole, as a stream, and with a second look at known names.

The stream gives the same text for every way to cut the input, and never a character that it might
still have to hide: what is within `RIGHT` of the end waits.
"""

import re

from attending.overlap import HAN
from attending.phi import tagger
from attending.phi.actions import Policy
from attending.phi.scan import Marker, Piece, scan
from attending.phi.spans import CATEGORIES, MAX_SPAN, Canvas, Span

WORD = re.compile(rf"[^\W\d_{HAN}]+(?:['’-][^\W\d_{HAN}]+)*")
POSSESSIVE = re.compile("['’][sS]$")
HAN_NAME = re.compile(rf"[{HAN}]{{2,5}}")
STEP = 64  # a stream looks again when so many characters have come


def redact(text: str, policy: Policy | None = None, *, second_pass: bool = False) -> str:
    """A text with its identifiers replaced.

    Args:
        text: Any text.
        policy: What replaces what; default: typed placeholders, `[NAME]`.
        second_pass: Look for other mentions of names found, over the whole text: for corpora.

    Raises:
        PhiError: A part of the filter failed; nothing is returned.
    """
    spans = find_again(text, scan(text)) if second_pass else scan(text)
    policy = policy or Policy()
    parts, at = [], 0
    for span in spans:
        parts += [text[at : span.start], policy.replace(text[span.start : span.end], span.category)]
        at = span.end
    return "".join([*parts, text[at:]])


def find_again(text: str, spans: list[Span]) -> list[Span]:
    """Spans, and every other mention of the names in them; needs the whole text.

    Capitals do not matter. A part of a name that is an ordinary word too ("Will", "May") is not
    looked for.
    """
    names = {text[span.start : span.end] for span in spans if span.category == "name"}
    parts = {part.group() for name in names for part in WORD.finditer(name)}
    known = {part.casefold() for part in parts if len(part) > 2 and part[0].isupper()}
    known -= tagger.shipped().ordinary(known)
    han = {name for name in names if HAN_NAME.fullmatch(name)}
    canvas = Canvas(len(text))
    for word in WORD.finditer(text) if known else ():
        if POSSESSIVE.sub("", word.group()).casefold() in known:
            canvas.paint(word.start(), word.end(), "name", 0.9)
    for first in re.finditer(f"[{''.join({name[0] for name in han})}]", text) if han else ():
        for length in {len(name) for name in han}:
            if text[first.start() : first.start() + length] in han:
                canvas.paint(first.start(), first.start() + length, "name", 0.9)
    for span in spans:
        canvas.paint(span.start, span.end, span.category, max(span.score, 0.91))
    return canvas.spans(text)


class Stream:
    """Redacts a text that comes in pieces."""

    def __init__(self, policy: Policy | None = None) -> None:
        """Nothing is held back longer than RIGHT + MAX_SPAN + STEP characters."""
        self._policy = policy or Policy()
        self._marker = Marker(STEP)
        self._open = ""  # an identifier that has begun, and may go on
        self._category = 0

    def feed(self, piece: str) -> str:
        """Take a piece; give what can be told by now, which may be nothing.

        Raises:
            PhiError: A part failed; the stream gives nothing more.
        """
        return "".join(map(self._told, self._marker.feed(piece)))

    def close(self) -> str:
        """The rest, at the end of the text."""
        return "".join(map(self._told, self._marker.close())) + self._end_span()

    def _told(self, piece: Piece) -> str:
        told = []
        for sign, category in zip(piece.text, piece.marks.tolist(), strict=True):
            if self._open and (category != self._category or len(self._open) == MAX_SPAN):
                told.append(self._end_span())
            if category:
                self._open += sign
                self._category = category
            else:
                told.append(sign)
        return "".join(told)

    def _end_span(self) -> str:
        """The replacement of the open identifier; white space at its ends stays."""
        whole, self._open = self._open, ""
        text = whole.strip()
        if not text:
            return whole
        start = whole.index(text[0])
        new = self._policy.replace(text, CATEGORIES[self._category - 1])
        return whole[:start] + new + whole[start + len(text) :]
