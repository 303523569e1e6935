"""Rubrics made by rules from K-QA's answers, beside what physicians wrote of the same answers.

    python benchmarks/rubric.py DATA_DIR

Nothing is trained on K-QA. Ten seconds.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from page import Measure, write

from attending.overlap import normalise
from attending.verifier.rubric.check import INTRODUCTION
from attending.verifier.rubric.reference import from_reference
from attending.verifier.sentences import sentences

COVERED = 0.5
KINDS = {"Must_have": "must-have", "Nice_to_have": "nice-to-have"}
ASK = [{"role": "user", "content": ""}]
NOTES = """
K-QA has {answers} answers by physicians, and the statements that physicians drew from each: an
answer must have some ({must:,}), and others are nice to have ({nice:,}). A statement is covered if
a positive criterion has a word overlap F1 of at least {covered} with it: the harmonic mean of the
shares of words, as a bag, that each has of the other, without the introduction ("States:"). Words
are not meaning: a criterion that holds a statement and much more does not cover it, and one that
differs by a "not" does. "sentences" takes each sentence of the answer as a criterion, so the
difference is what resolving pronouns, splitting lists and clauses and dropping filler do. Points:
are the must-haves the weightier? Nothing was trained on K-QA, but the rules were written with these
answers in view.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    text = (parser.parse_args().data / "eval/kqa_201_physician_rubric.jsonl").read_text("utf-8")
    rows = [json.loads(row) for row in text.split("\n") if row]
    total = {kind: sum(len(stated(row, kind)) for row in rows) for kind in KINDS}
    notes = NOTES.format(
        answers=len(rows), must=total["Must_have"], nice=total["Nice_to_have"], covered=COVERED
    )
    measures = [*measured("from_reference", rows, by_rules), *measured("sentences", rows, plainly)]
    print(write("rubric", "Rubrics of reference answers beside physicians'", notes, measures))


def by_rules(answer: str) -> list[tuple[str, int]]:
    found = from_reference("k", ASK, answer).criteria
    return [(INTRODUCTION.sub("", one.text, count=1), one.points) for one in found]


def plainly(answer: str) -> list[tuple[str, int]]:
    return [(sentence, 1) for sentence in sentences(answer)]


def measured(subject: str, rows: Sequence[Any], make: Any) -> list[Measure]:
    """Of one way to make criteria."""
    made = [make(row["Free_form_answer"]) for row in rows]
    signs = Counter(points > 0 for criteria in made for _, points in criteria)
    found = list[Measure]()
    for kind, name in KINDS.items():
        nearest = [
            max((overlap(text, statement), points) for text, points in criteria if points > 0)
            for row, criteria in zip(rows, made, strict=True)
            for statement in stated(row, kind)
        ]
        points = [points for near, points in nearest if near >= COVERED]
        found.append(Measure(f"{name} covered", subject, [len(points) / len(nearest)]))
        if signs[False]:
            mean = sum(points) / len(points)
            found.append(Measure(f"points of a covered {name}", subject, [mean]))
    found.append(Measure("positive criteria an answer", subject, [signs[True] / len(rows)]))
    if signs[False]:
        negative = signs[False] / len(rows)
        found.append(Measure("negative criteria an answer", subject, [negative]))
    return found


def stated(row: Any, kind: str) -> list[str]:
    return [text for text in row[kind] if text.strip()]


def overlap(a: str, b: str) -> float:
    """F1 of two bags of words."""
    first, second = Counter(normalise(a)), Counter(normalise(b))
    return 2 * (first & second).total() / max(1, first.total() + second.total())


if __name__ == "__main__":
    main()
