"""Where sentences end, in English and Chinese: the one splitter of rubrics and judges."""

import re

from attending.overlap import HAN
from attending.verifier.data import table

WORDS = table("sentences")
CLOSING = r"[\"'”’」』》）)\]*_]*"
END = re.compile(rf"[。！？!?]+{CLOSING}|(?<![.…])(?:\.+|…+){CLOSING}(?=\s|$|[{HAN}])")
WORD = re.compile(r"[\w.]*\w(?=\W*$)")
MARKER = re.compile(
    r"\s*(?:[-*•·–—#]+(?:\s+|(?=[A-Z]))|\(?\d{1,2}[.)、](?!\d)\s*|[（(]?[一二三四五六七八九十]+[）)、])*"
)
BREAK = re.compile(r"\n\s*(?![a-z\s])|\n\s*\n")  # a line that begins in lower case goes on
EMPHASIS = re.compile(r"\*\*|__|`")


def sentences(text: str) -> list[str]:
    """The sentences in order, in one line each, without list markers, emphasis and what is empty.

    A line's end is a sentence's end, unless the next line goes on in lower case.
    """
    found = []
    for line in BREAK.split(EMPHASIS.sub("", text)):
        start = 0
        for end in [*(m.end() for m in END.finditer(line) if _ends(line, m)), len(line)]:
            piece = " ".join(line[start:end].split())
            found.append(piece[MARKER.match(piece).end() :])  # type: ignore[union-attr]
            start = end
    return [piece for piece in found if re.search(r"\w", piece)]


def _ends(line: str, stop: re.Match[str]) -> bool:
    """Whether what looks like a sentence's end is one, and no abbreviation's."""
    word = WORD.search(line[max(0, stop.start() - 40) : stop.start()])
    if not word or stop[0][0] != ".":
        return True
    name, after = word[0].lower(), line[stop.end() :].lstrip()[:1]
    is_short = "." in name or (name.isalpha() and len(name) <= 3)
    return not (
        name in WORDS["never"]
        or (after.islower() and (is_short or name in WORDS["before_small"]))
        or (after.isdecimal() and name in WORDS["before_digit"])
    )
