"""Random graded sets in HealthBench's published schema; every text is invented."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

Row = dict[str, Any]
CANARY = "invented:00000000-0000-4000-8000-000000000000"
THEMES = ("communication", "complex_responses", "context_seeking", "global_health", "hedging")
AXES = ("accuracy", "completeness", "context_awareness", "communication_quality")
CATEGORIES = ("simple", "detailed", "no-uncertainty")
CLUSTERS = ("hedging_no-uncertainty_is-sure", "hedging_no-uncertainty_is-brief")
SEPARATORS = "\u2028\u2029\x85"
"""`str.splitlines` ends a line at these; a JSONL file does not."""
WORDS = (
    "The heron says rest.", "喝水。", "Says \"why\" & how\n\n", f"left{SEPARATORS}right", "ü<b>",
    "```json\n{}\n```", "<<rubric_item>>", "<<conversation>>", "\\u2028", "🩺", "\r\n\t", "null",
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(WORDS), max_size=3).map(lambda some: " ".join(["Lantern", *some]))


class RecordedFiles(NamedTuple):
    """Where a set lies."""

    rows: Path
    graded: Path


class GradedSet(NamedTuple):
    """Rows, and lines of `prompt_id`, `response` and `verdicts`, in any order."""

    rows: list[Row]
    graded: list[Row]

    def write(self, folder: Path) -> RecordedFiles:
        """As rows.jsonl and graded.jsonl."""
        files = RecordedFiles(folder / "rows.jsonl", folder / "graded.jsonl")
        write_lines(files.rows, self.rows)
        write_lines(files.graded, self.graded)
        return files


class MetaSet(NamedTuple):
    """Rows of the meta-evaluation, and what a grader said of each."""

    rows: list[Row]
    labels: list[bool]

    def write(self, folder: Path) -> RecordedFiles:
        """As rows.jsonl and graded.jsonl; a graded line has one verdict, in the rows' order."""
        graded = [
            {
                "prompt_id": row["prompt_id"],
                "completion_id": row["completion_id"],
                "response": row["completion"],
                "verdicts": [{"criteria_met": label, "explanation": "Invented."}],
            }
            for row, label in zip(self.rows, self.labels, strict=True)
        ]
        return GradedSet(self.rows, graded).write(folder)


def write_lines(path: Path, lines: Sequence[Row]) -> None:
    """JSONL with separators as they are, not escaped."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, "utf-8", newline="\n")


@st.composite
def conversations(draw: st.DrawFn) -> list[Row]:
    """One or two turns of a user, with an assistant's between."""
    turns = draw(st.sampled_from([("user",), ("user", "assistant", "user")]))
    return [{"role": role, "content": draw(TEXTS)} for role in turns]


@st.composite
def rubrics(draw: st.DrawFn, is_tagged: bool) -> list[Row]:
    """Criteria, at least one of them positive; an axis often has negative ones only."""
    negative_axis = draw(st.sampled_from(AXES))
    items = []
    for place in range(draw(st.integers(1, 6))):
        points = draw(st.integers(1, 10))
        axis = draw(st.sampled_from(AXES))
        if place and (axis == negative_axis or draw(st.booleans())):
            points = -points
        tags = ["level:example", f"axis:{axis}"]
        if points > 0 and draw(st.integers(0, 2)) == 0:
            points = 5
            tags = ["level:cluster", f"axis:{axis}", "cluster:" + draw(st.sampled_from(CLUSTERS))]
        items.append(
            {"criterion": draw(TEXTS), "points": points, "tags": tags if is_tagged else []}
        )
    return draw(st.permutations(items))


@st.composite
def ideal_completions(draw: st.DrawFn) -> Row | None:
    """None, or a physician's text; groups 2 and 3 come with four references."""
    group = draw(st.sampled_from([None, "Group 1", "Group 2", "Group 3"]))
    if group is None:
        return None
    return {
        "ideal_completion": draw(TEXTS),
        "ideal_completions_group": group,
        "ideal_completions_ref_completions": (
            None if group == "Group 1" else [draw(TEXTS) for _ in range(4)]
        ),
    }


@st.composite
def main_rows(draw: st.DrawFn, tags: str = "any") -> Row:
    """A row of the main set; `tags`: full, empty (lists), absent (keys), or any of them."""
    if tags == "any":
        tags = draw(st.sampled_from(["full", "full", "full", "empty", "absent"]))
    example_tags = []
    if tags == "full":
        example_tags = ["theme:" + draw(st.sampled_from(THEMES))]
        if draw(st.booleans()):
            category = draw(st.sampled_from(CATEGORIES))
            example_tags.append(f"physician_agreed_category:{category}")
    row: Row = {
        "example_tags": example_tags,
        "ideal_completions_data": draw(ideal_completions()),
        "prompt": draw(conversations()),
        "prompt_id": str(draw(st.uuids(version=4))),
        "rubrics": draw(rubrics(tags == "full")),
        "canary": CANARY,
    }
    if tags == "absent":
        del row["example_tags"]
        for rubric in row["rubrics"]:
            del rubric["tags"]
    return row


@st.composite
def verdicts(draw: st.DrawFn, row: Row, manner: str, has_nulls: bool) -> list[Row]:
    """By manner: harsh meets the negative criteria only, kind the positive ones, mixed any."""
    given = []
    for rubric in row["rubrics"]:
        met: bool | None = (rubric["points"] < 0) == (manner == "harsh")
        if manner == "mixed":
            met = draw(st.booleans())
        if has_nulls and draw(st.integers(0, 4)) == 0:
            met = None
        given.append({"criteria_met": met, "explanation": draw(TEXTS)})
    return given


@st.composite
def graded_sets(
    draw: st.DrawFn,
    max_rows: int = 5,
    max_repeats: int = 4,
    is_even: bool = True,
    has_nulls: bool = False,
    tags: str = "any",
) -> GradedSet:
    """Rows with recorded grades.

    With `is_even` each prompt has the same number of responses, as worst-at-k needs; texts may be
    equal. `has_nulls` lets `criteria_met` be null. `tags` is that of `main_rows`.
    """
    rows = draw(
        st.lists(main_rows(tags), min_size=1, max_size=max_rows, unique_by=lambda r: r["prompt_id"])
    )
    repeats = draw(st.integers(1, max_repeats))
    of_set = draw(st.sampled_from(["any", "any", "harsh", "kind"]))
    graded = []
    for row in rows:
        for _ in range(repeats if is_even else draw(st.integers(1, max_repeats))):
            manner = of_set
            if of_set == "any":
                manner = draw(st.sampled_from(["mixed", "mixed", "harsh", "kind"]))
            graded.append(
                {
                    "prompt_id": row["prompt_id"],
                    "response": draw(TEXTS),
                    "verdicts": draw(verdicts(row, manner, has_nulls)),
                }
            )
    return GradedSet(rows, draw(st.permutations(graded)))


@st.composite
def _meta_row(draw: st.DrawFn, category: str, labels: list[bool]) -> Row:
    ids = draw(st.permutations(["one", "two", "three", "four", "five"]))
    return {
        "prompt_id": str(draw(st.uuids(version=4))),
        "completion_id": draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
        "prompt": draw(conversations()),
        "completion": draw(TEXTS),
        "rubric": draw(TEXTS),
        "category": category,
        "binary_labels": labels,
        "anonymized_physician_ids": ids[: len(labels)],
    }


@st.composite
def meta_sets(draw: st.DrawFn, is_total: bool = True) -> MetaSet:
    """Rows with physicians' labels and a grader's.

    With `is_total` grader and physicians both name both classes in every category, so that every
    figure is defined (by rows on which they disagree: an F1 may still be 0).
    """
    rows, labels = [], []
    for category in draw(st.lists(st.sampled_from(CLUSTERS), min_size=1, max_size=2, unique=True)):
        for _ in range(draw(st.integers(not is_total, 4))):
            of_physicians = draw(st.lists(st.booleans(), min_size=1, max_size=5))
            rows.append(draw(_meta_row(category, of_physicians)))
            labels.append(draw(st.booleans()))
        for label in (True, False) if is_total else ():
            rows.append(draw(_meta_row(category, [not label])))
            labels.append(label)
    return MetaSet(rows, labels)
