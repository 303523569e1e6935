"""A large recorded set of HealthBench's form and size, for tests of speed; all text is invented."""

import random
import uuid
from pathlib import Path
from typing import Any

from tests.evaluate.healthbench_cases import (
    AXES,
    CANARY,
    CATEGORIES,
    CLUSTERS,
    THEMES,
    RecordedFiles,
    write_lines,
)

SUBJECTS = ("The heron", "A lantern keeper", "The ferry nurse", "Somebody in the mill", "医生")
DEEDS = ("asks about", "writes down", "forgets", "weighs", "explains", "advises against", "说明")
THINGS = ("the fever", "a blue tablet", "the sleep diary", "an old scar", "the tide table", "药物")


def text(drawing: random.Random, sentences: int) -> str:
    """Sentences that mean nothing, about 40 characters each."""
    return " ".join(
        f"{drawing.choice(SUBJECTS)} {drawing.choice(DEEDS)} {drawing.choice(THINGS)} at "
        f"{drawing.randrange(24)} o'clock."
        for _ in range(sentences)
    )


def sizes(drawing: random.Random, rows: int, criteria: int) -> list[int]:
    """Numbers of criteria, from 2 to 48 a row, that sum to `criteria`.

    Raises:
        ValueError: No such numbers exist.
    """
    if not 2 * rows <= criteria <= 48 * rows:
        raise ValueError(f"{criteria} criteria in {rows} rows: expected 2 to 48 a row.")
    counts = [2] * rows
    for _ in range(criteria - 2 * rows):
        place = drawing.randrange(rows)
        while counts[place] == 48:
            place = drawing.randrange(rows)
        counts[place] += 1
    return counts


def _row(drawing: random.Random, count: int) -> dict[str, Any]:
    rubrics = []
    for place in range(count):
        points, tags = drawing.randint(1, 10), ["level:example"]
        if place == 0:  # a consensus item is worth 5, and each row keeps a positive one
            points, tags = 5, ["level:cluster", "cluster:" + drawing.choice(CLUSTERS)]
        elif drawing.random() < 0.3:
            points = -points
        tags.append("axis:" + drawing.choice(AXES))
        rubrics.append({"criterion": text(drawing, 3), "points": points, "tags": tags})
    category = "physician_agreed_category:" + drawing.choice(CATEGORIES)
    return {
        "example_tags": ["theme:" + drawing.choice(THEMES), category],
        "ideal_completions_data": None,
        "prompt": [{"role": "user", "content": text(drawing, 12)}],
        "prompt_id": str(uuid.UUID(int=drawing.getrandbits(128), version=4)),
        "rubrics": rubrics,
        "canary": CANARY,
    }


def write_recorded(
    folder: Path, rows: int = 5000, criteria: int = 48_562, seed: int = 0
) -> RecordedFiles:
    """Write rows.jsonl and graded.jsonl, one response to each row; the same bytes for a seed."""
    drawing = random.Random(seed)
    made, graded = [], []
    for count in sizes(drawing, rows, criteria):
        row = _row(drawing, count)
        made.append(row)
        verdicts = [
            {"criteria_met": drawing.random() < 0.5, "explanation": text(drawing, 5)}
            for _ in row["rubrics"]
        ]
        response = text(drawing, 40)
        graded.append({"prompt_id": row["prompt_id"], "response": response, "verdicts": verdicts})
    files = RecordedFiles(folder / "rows.jsonl", folder / "graded.jsonl")
    write_lines(files.rows, made)
    write_lines(files.graded, graded)
    return files
