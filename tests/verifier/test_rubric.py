"""Rubrics as rows, and both scores by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from attending.errors import ConfigError, UsageError
from attending.verifier import Criterion, Rubric, affine_score, score
from attending.verifier.rubric.schema import parse_rubric, read_rubrics, write_rubrics
from attending.verifier.rubric.score import bounds

ROW: dict[str, Any] = {
    "prompt_id": "p1",
    "prompt": [{"role": "user", "content": "Chest pain\u2028since 3 h"}],
    "rubrics": [
        {
            "criterion": "Advises calling emergency services.",
            "points": 10,
            "tags": ["axis:accuracy"],
        },
        {"criterion": "Fails to ask about breathing.", "points": -4, "tags": []},
    ],
    "example_tags": ["theme:emergency_referrals"],
    "canary": None,
}
ASK = ({"role": "user", "content": "q"},)


def criteria(*points: int) -> list[Criterion]:
    return [Criterion(f"c{number}", each) for number, each in enumerate(points)]


def test_healthbench_scores_what_is_met_over_what_is_positive() -> None:
    assert score(criteria(7, 5, 10, -6), [True, False, True, True]) == 11 / 22
    assert score(criteria(1, -10), [False, True]) == -10  # one answer is not clipped
    assert score(criteria(-5, -1), [True, False]) is None  # nothing positive
    assert score(criteria(5, 5), [True, None]) is None  # unscored is no verdict


def test_the_affine_score_is_baichuan_m3s() -> None:
    # (7 + 10 - 6 + 6) / (7 + 5 + 10 + 6)
    assert affine_score(criteria(7, 5, 10, -6), [True, False, True, True]) == 17 / 28
    assert affine_score(criteria(7, -3), [True, False]) == 1
    assert affine_score(criteria(7, -3), [False, True]) == 0
    assert affine_score(criteria(-3, -1), [True, False]) == 1 / 4  # (-3 + 4) / 4
    assert affine_score([], []) is None
    assert affine_score(criteria(5), [None]) is None


def test_bounds_hold_every_score_that_a_missing_verdict_allows() -> None:
    assert bounds(criteria(5, 5, -4), [True, None, None]) == (0.1, 1.0)  # (5 - 4) / 10, 10 / 10
    assert bounds(criteria(5, -5), [True, False]) == (1.0, 1.0)
    assert bounds(criteria(-5), [None]) is None
    with pytest.raises(UsageError, match="1 verdicts for 2 criteria"):
        bounds(criteria(5, 5), [True])


@pytest.mark.parametrize("points", [0, 11, -11, 2.0, True, "3", None])
def test_points_are_integers_from_minus_ten_to_ten_without_zero(points: Any) -> None:
    with pytest.raises(ConfigError, match="points"):
        Criterion("c", points)


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    """Its other keys too; and only a line feed ends a row, whatever the texts hold."""
    file = tmp_path / "rows.jsonl"
    write_rubrics(file, [parse_rubric(ROW), parse_rubric(ROW | {"prompt_id": "p2"})])
    assert "\u2028" in file.read_text(encoding="utf-8")
    first, second = read_rubrics(file)
    assert (first.row(), second.name) == (ROW, "p2")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"rubrics": [{"criterion": "c", "points": 0}]},
            "rows.jsonl:2: criterion 'c' has 0 points",
        ),
        ({"rubrics": [{"points": 1}]}, "rows.jsonl:2 is no row"),
        ({"rubrics": 3}, "rows.jsonl:2 is no row"),
        ({"prompt": []}, "no conversation"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "ends with 'assistant'"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(ROW)}\n{json.dumps(ROW | change)}\n")
    with pytest.raises(ConfigError, match=told):
        list(read_rubrics(file))


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n{")
    with pytest.raises(ConfigError, match=r"rows.jsonl:2 is no JSON"):
        list(read_rubrics(tmp_path / "rows.jsonl"))


def test_an_empty_criterion_is_refused() -> None:
    with pytest.raises(ConfigError, match="without text"):
        Rubric("r", ASK, (Criterion(" ", 1),))
