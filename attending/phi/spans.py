"""What a scan finds: characters marked with a category, and the spans that they form.

A decision is made for each character, from a bounded window around it. A span is a run of equal
marks; only how a run longer than `MAX_SPAN` is cut depends on where it began.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from attending.overlap import HAN

CATEGORIES = (
    "name",
    "location",
    "date",
    "age",
    "phone",
    "fax",
    "email",
    "ssn",
    "mrn",
    "health_plan",
    "account",
    "license",
    "vehicle",
    "device",
    "url",
    "ip",
    "biometric",
    "photo",
    "id",
    "resident_id",
    "passport",
    "wechat",
)
"""HIPAA's eighteen (45 CFR 164.514(b)(2)), then those of mainland China; `date` is all but a year
alone, `age` what is above 89, `location` what is smaller than a state or province."""
MARK = {name: index for index, name in enumerate(CATEGORIES, 1)}
MAX_SPAN = 160
GAP = re.compile(r"[ \n\r]{0,3}[-.,'’·/^&]?[ \n\r]{0,3}")

NAME_RUN = re.compile(
    rf"(?<![{HAN}])[{HAN}]{{2,4}}(?![{HAN}])"
    rf"|(?<![^\W\d_])[^\W\d_{HAN}]{{1,24}}(?:['’-][^\W\d_{HAN}]{{2,24}}){{1,2}}(?![^\W\d_])"
)
"""What is a name as a whole if it is one in part: a short run of Han, a word with hyphens."""

Marks = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Span:
    """text[start:end] in code points; score is 1 for a checked pattern, else a probability."""

    start: int
    end: int
    category: str
    score: float


class Canvas:
    """Marks and scores of a text's characters; a surer category replaces a less sure one."""

    def __init__(self, length: int) -> None:
        """Of a text of so many characters."""
        self.marks: Marks = np.zeros(length, np.uint8)
        self.scores = np.zeros(length, np.float32)

    def paint(self, start: int, end: int, category: str, score: float) -> None:
        """Mark characters, except where a score at least as high stands."""
        weaker = self.scores[start:end] < score
        self.marks[start:end][weaker] = MARK[category]
        self.scores[start:end][weaker] = score

    def extend(self, start: int, end: int, category: str, score: float) -> None:
        """Mark characters where no mark stands."""
        free = self.marks[start:end] == 0
        self.marks[start:end][free] = MARK[category]
        self.scores[start:end][free] = score

    def close_gaps(self, text: str) -> None:
        """Mark what lies between two near marks of one category and holds no letter or digit."""
        bounds = list(runs(self.marks))
        for (_, end), (start, _) in pairwise(bounds):
            same = end < start <= end + 6 and self.marks[end - 1] == self.marks[start]
            if same and GAP.fullmatch(text, end, start):
                self.marks[end:start] = self.marks[start]
                self.scores[end:start] = min(self.scores[end - 1], self.scores[start])

    def fill_names(self, text: str) -> None:
        """Mark the rest of a word or a run of Han characters of which a part is marked a name."""
        for run in NAME_RUN.finditer(text):
            start, end = run.span()
            marked = self.marks[start:end] == MARK["name"]
            if marked.any() and not marked.all():
                self.extend(start, end, "name", float(self.scores[start:end][marked].min()))

    def spans(self, text: str) -> list[Span]:
        """The runs of equal marks, without white space at their ends."""
        found = []
        for start, end in runs(self.marks):
            piece = text[start:end]
            left = start + len(piece) - len(piece.lstrip())
            right = left + len(piece.strip())
            if left < right:
                category = CATEGORIES[self.marks[start] - 1]
                score = round(float(self.scores[left:right].max()), 4)
                found.append(Span(left, right, category, score))
        return found


def runs(marks: Marks) -> Iterator[tuple[int, int]]:
    """Bounds of the runs of equal marks above zero, none longer than `MAX_SPAN`."""
    edges = np.flatnonzero(np.diff(marks, prepend=np.uint8(0), append=np.uint8(0)))
    for start, end in pairwise(edges.tolist()):
        if marks[start]:
            for piece in range(start, end, MAX_SPAN):
                yield piece, min(piece + MAX_SPAN, end)
