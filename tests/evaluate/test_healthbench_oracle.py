"""The oracle by hand-computed vectors, and that the random sets reach the cases that matter."""

import json
import random
import re
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from tests.evaluate import healthbench_cases as cases
from tests.evaluate import healthbench_oracle as oracle
from tests.evaluate.making_recorded import sizes, write_recorded

TEMPLATE = (
    "\nTask.\n# Conversation\n<<conversation>>\n# Rubric item\n<<rubric_item>>\nJSON only.\n\n"
)
QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


def rubric(points: int, *tags: str) -> dict[str, Any]:
    return {"criterion": f"Of {points}.", "points": points, "tags": list(tags)}


def row(name: str, *rubrics: dict[str, Any], tags: tuple[str, ...] = ()) -> dict[str, Any]:
    return {"prompt_id": name, "example_tags": list(tags), "rubrics": list(rubrics)}


def line(name: str, *met: bool | None, response: str = "R") -> dict[str, Any]:
    verdicts = [{"criteria_met": one, "explanation": "why"} for one in met]
    return {"prompt_id": name, "response": response, "verdicts": verdicts}


@pytest.mark.parametrize(
    ("reply", "met"),
    [
        ('{"explanation": "e", "criteria_met": true}', True),
        ('```json\n{"explanation": "e", "criteria_met": false}\n```', False),
        ('  ```json{"explanation": "e", "criteria_met": true}```\n', True),
        ('{"explanation": "e", "criteria_met": true}\n```', True),  # the fence's end alone
        ('```\n{"explanation": "e", "criteria_met": true}\n```', None),  # a bare fence stays
        ('```JSON\n{"criteria_met": true}\n```', None),
        ('Sure: {"criteria_met": true}', None),
        ('{"explanation": "e", "criteria_met": "true"}', None),
        ('{"explanation": "e", "criteria_met": 1}', None),
        ('{"explanation": "e", "criteria_met": null}', None),
        ('{"explanation": "e"}', None),
        ("[true]", None),
        ("", None),
    ],
)
def test_only_a_strict_bool_in_a_json_fence_or_none_is_a_verdict(
    reply: str, met: bool | None
) -> None:
    assert oracle.parse(reply)[0] is met


def test_an_explanation_may_be_missing() -> None:
    assert oracle.parse('{"criteria_met": true}') == (True, "No explanation provided")
    assert oracle.parse('{"criteria_met": true, "explanation": "e"}') == (True, "e")


@QUICK
@given(
    st.lists(st.sampled_from(["```", "json", "\n", " ", "\u2028", '{"criteria_met": true}', "`"]))
)
def test_fences_come_off_as_the_reference_s_expression_takes_them_off(parts: list[str]) -> None:
    reply = "".join(parts)
    try:
        said = json.loads(re.sub(r"^```json\s*|\s*```$", "", reply.strip()))
    except json.JSONDecodeError:
        said = {}
    assert oracle.parse(reply)[0] is said.get("criteria_met")


def test_the_grader_reads_the_whole_conversation_and_the_points() -> None:
    asked = [
        {"role": "user", "content": "Hm?"},
        {"role": "assistant", "content": "What?"},
        {"role": "user", "content": "This.\n"},
    ]
    assert oracle.grader_prompt(TEMPLATE, asked, "Rest.", rubric(-8)) == (
        "Task.\n# Conversation\nuser: Hm?\n\nassistant: What?\n\nuser: This.\n\n\nassistant: Rest."
        "\n# Rubric item\n[-8] Of -8.\nJSON only."
    )


def test_a_conversation_that_names_the_other_place_is_altered_as_in_the_reference() -> None:
    asked = [{"role": "user", "content": "<<rubric_item>>"}]
    prompt = oracle.grader_prompt("<<conversation>>|<<rubric_item>>", asked, "A", rubric(3))
    assert prompt == "user: [3] Of 3.\n\nassistant: A|[3] Of 3."
    named = {"criterion": "<<conversation>>", "points": 3}  # comes later: stays
    prompt = oracle.grader_prompt("<<conversation>>|<<rubric_item>>", [], "A", named)
    assert prompt == "assistant: A|[3] <<conversation>>"


def test_the_meta_evaluation_shows_no_points() -> None:
    asked = {
        "prompt": [{"role": "user", "content": "Q"}], "completion": "A", "rubric": "Is kind.",
    }  # fmt: skip
    prompt = oracle.meta_prompt("<<conversation>>|<<rubric_item>>", asked)
    assert prompt == "user: Q\n\nassistant: A|Is kind."


def test_a_completion_s_id_is_the_hash_of_both_texts_joined() -> None:
    sha256_of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert oracle.completion_id("a", "bc") == sha256_of_abc


@pytest.mark.parametrize(
    ("points", "met", "score"),
    [
        ((7, 5, 10, -6), (True, False, True, True), 0.5),  # 11 of 22
        ((7, 5, 10, -6), (True, True, True, False), 1.0),
        ((7, 5, 10, -6), (False, False, False, True), -6 / 22),
        ((7, -10, -10, -10, -6), (False, True, True, True, True), -36 / 7),  # about -5.14
        ((5, -5), (True, True), 0.0),
        ((-6, -1), (True, False), None),
        ((), (), None),
        ((7, 5), (True, None), None),
    ],
)
def test_an_example_s_score(
    points: tuple[int, ...], met: tuple[bool | None, ...], score: float | None
) -> None:
    assert oracle.example_score([rubric(one) for one in points], met) == score


def test_a_verdict_too_few_is_no_score() -> None:
    with pytest.raises(ValueError, match="1 verdicts for 2 criteria"):
        oracle.example_score([rubric(1), rubric(2)], [True])


TAGGED = row(
    "a",
    rubric(7, "level:example", "axis:accuracy"),
    rubric(5, "level:cluster", "axis:completeness", "cluster:c"),
    rubric(10, "level:example", "axis:accuracy"),
    rubric(-6, "level:example", "axis:completeness"),
    rubric(-4, "level:example", "axis:communication_quality"),
    tags=("theme:hedging", "physician_agreed_category:simple"),
)


def test_scores_of_tags() -> None:
    overall = 11 / 22
    assert oracle.tag_scores(TAGGED, [True, False, True, True, False]) == {
        "theme:hedging": overall,
        "physician_agreed_category:simple": overall,
        "axis:accuracy": 1.0,  # 17 of 17
        "axis:completeness": -6 / 5,  # never clipped
        "level:example": 11 / 17,
        "level:cluster": 0.0,
        "cluster:c": 0.0,
    }  # communication_quality has negative items only: skipped
    assert oracle.tag_scores(TAGGED, [True, False, None, True, False]) == {}


def test_null_verdicts_leave_bounds() -> None:
    rubrics = [rubric(6), rubric(4), rubric(-5)]
    assert oracle.score_bounds(rubrics, [True, None, None]) == (0.1, 1.0)  # 1 and 10 of 10
    assert oracle.score_bounds(rubrics, [True, False, False]) == (0.6, 0.6)


def test_only_means_are_clipped_and_each_counts_the_examples_that_have_it() -> None:
    examples = [
        {"overall_score": -2.0, "axis:a": -1.0},
        {"overall_score": 1.0},
        {"overall_score": 1.0, "axis:a": 0.5},
        {"overall_score": 0.5},
    ]
    assert oracle.aggregate(examples) == {
        "overall_score": 0.125,  # (-2 + 1 + 1 + 0.5) / 4; clipped ones would give 0.625
        "overall_score:n_samples": 4,
        "axis:a": 0.0,  # -0.25
        "axis:a:n_samples": 2,
    }


def test_the_bootstrap_s_deviation_is_of_clipped_means() -> None:
    # Of 0 and 1: means 0, 0.5, 0.5, 1 with deviation sqrt(0.125). Of -1 and 1: clipped to
    # 0, 0, 0, 1, mean 0.25, variance 3/16.
    assert oracle.exact_bootstrap_std([0.0, 1.0])[0] == pytest.approx(0.125**0.5)
    assert oracle.exact_bootstrap_std([-1.0, 1.0])[0] == pytest.approx((3 / 16) ** 0.5)
    assert oracle.exact_bootstrap_std([-1.0, -3.0])[0] == 0
    assert oracle.exact_bootstrap_std([0.7])[0] == 0
    exact, tolerance = oracle.exact_bootstrap_std([0.1, 0.9, 0.4, 0.2, 0.7], resamples=40_000)
    assert exact == pytest.approx((0.0904 / 5) ** 0.5)  # nothing clips: variance (ddof 0) by n
    assert tolerance < 0.05 * exact


@QUICK
@given(st.lists(st.integers(-20, 10).map(lambda tenths: tenths / 10), min_size=1, max_size=5))
def test_drawn_deviations_come_near_the_exact_one(values: list[float]) -> None:
    exact, tolerance = oracle.exact_bootstrap_std(values)
    drawn = oracle.bootstrap_std(values, np.random.default_rng(0))
    assert abs(drawn - exact) <= tolerance


def test_a_sample_is_drawn_with_seed_0_and_repeats_follow_as_a_whole() -> None:
    rows = [row(str(place)) for place in range(10)]

    def names(**how: int) -> list[str]:
        return [one["prompt_id"] for one in oracle.chosen(rows, **how)]

    assert names(limit=3) == ["6", "9", "0"]  # random.Random(0).sample(range(10), 3)
    assert names(limit=3, repeats=2) == ["6", "9", "0", "6", "9", "0"]
    assert names(limit=10) == names(limit=11) == names() == [str(place) for place in range(10)]


def test_worst_at_k_averages_minima_and_clips_last() -> None:
    # a: minima of pairs 0, 0, 0.5; b: -1, -1, 0.
    replicates = {"a": [0.5, 0.0, 1.0], "b": [0.0, -1.0, 1.0]}
    assert oracle.worst_at_k(replicates) == pytest.approx(
        {1: 0.25, 2: 0.0, 3: 0.0}  # (0.5 + 0) / 2; (1/6 - 2/3) / 2 < 0; -0.5
    )
    assert oracle.worst_at_k({"a": [0.9, 0.6, 1.0], "b": [-0.2, 0.4, 0.4]}) == pytest.approx(
        {1: (2.5 + 0.6) / 6, 2: (2.1 + 0.0) / 6, 3: 0.2}
    )
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        oracle.worst_at_k({"a": [1.0], "b": [1.0, 0.5]})


def test_consensus_rows_are_the_main_rows_clustered_items() -> None:
    other = row("b", rubric(3, "level:example", "axis:accuracy"))
    untagged = {"prompt_id": "c", "rubrics": [{"criterion": "x", "points": 1}]}
    graded = [line("b", True), line("a", False, True, False, False, False), line("c", True)]
    rows, lines = oracle.consensus([TAGGED, other, untagged], graded)
    assert rows == [{**TAGGED, "rubrics": [TAGGED["rubrics"][1]]}]
    assert lines == [line("a", True)]
    assert oracle.results(rows, lines).metrics["overall_score"] == 1.0
    assert len(TAGGED["rubrics"]) == 5  # the main row stays whole


def test_physicians_texts_and_references_by_group() -> None:
    def ideal(group: int, references: list[str] | None) -> dict[str, Any]:
        return {
            "prompt_id": f"of {group}",
            "ideal_completions_data": {
                "ideal_completion": f"Text {group}",
                "ideal_completions_group": f"Group {group}",
                "ideal_completions_ref_completions": references,
            },
        }

    rows = [
        ideal(2, list("abcd")),
        {"prompt_id": "none", "ideal_completions_data": None},
        ideal(1, None),
        ideal(3, list("efgh")),
        {**ideal(1, None), "prompt_id": "later"},
    ]
    assert oracle.physician_completions(rows, "Group 1") == [
        ("of 1", "Text 1"),
        ("later", "Text 1"),
    ]
    assert oracle.physician_completions(rows, "Group 3") == [("of 3", "Text 3")]
    assert oracle.references(rows, "Group 2") == [("of 2", text) for text in "abcd"]
    with pytest.raises(ValueError, match="Group 1"):
        oracle.references(rows, "Group 1")
    with pytest.raises(ValueError, match="3 references of of 2"):
        oracle.references([ideal(2, list("abc"))], "Group 2")


def test_results_of_a_set_by_hand() -> None:
    rows = [TAGGED, row("b", rubric(4, "axis:accuracy"), rubric(-8, "axis:accuracy"))]
    graded = [
        line("b", False, True),  # -2
        line("a", True, False, True, True, False),  # 0.5
        line("b", True, False),  # 1
        line("a", True, True, True, False, False),  # 1
    ]
    found = oracle.results(rows, graded)
    assert found.overall == found.unclipped == 0.125
    assert found.metrics["overall_score"] == 0.125
    assert found.metrics["theme:hedging"] == 0.75
    assert found.metrics["axis:accuracy"] == 0.25  # (1 + 1 - 2 + 1) / 4: means of ratios
    assert found.metrics["axis:accuracy:n_samples"] == 4
    assert found.metrics["axis:completeness"] == 0.0  # (-1.2 + 1) / 2
    assert found.worst_at_k == {1: 0.125, 2: 0.0}
    assert (found.n_unscored, found.bounds) == (0, (0.125, 0.125))


def test_an_unscored_response_counts_nowhere_but_in_the_bounds() -> None:
    rows = [row("b", rubric(4), rubric(-2))]
    found = oracle.results(rows, [line("b", True, False), line("b", None, False)])
    assert (found.overall, found.metrics["overall_score:n_samples"]) == (1.0, 1)
    assert (found.n_unscored, found.bounds) == (1, (0.5, 1.0))
    assert found.worst_at_k == {1: 1.0}  # one prompt, one scored response
    found = oracle.results(rows, [line("b", None, None)])
    assert (found.overall, found.metrics, found.worst_at_k) == (None, {}, None)
    assert found.bounds == (0.0, 1.0)  # -0.5 is clipped


META = [
    {"category": "x", "binary_labels": labels, "anonymized_physician_ids": ids}
    for labels, ids in [
        ([True, True], ["p", "q"]),
        ([True, False], ["q", "r"]),
        ([False], ["p"]),
        ([False, False, True], ["p", "q", "r"]),
    ]
]
META[3]["category"] = "y"


def test_pairwise_figures_of_a_grader() -> None:
    # pairs (grader, physician): TT TT | TT TF | TF | FF FF FT
    figures = oracle.meta(META, [True, True, True, False])
    assert figures == pytest.approx(
        figures
        | {
            "pairwise_model_precision_pos": 3 / 5,
            "pairwise_model_recall_pos": 3 / 4,
            "pairwise_model_f1_pos": 2 / 3,
            "pairwise_model_precision_neg": 2 / 3,
            "pairwise_model_recall_neg": 1 / 2,
            "pairwise_model_f1_neg": 4 / 7,
            "pairwise_model_f1_balanced": 13 / 21,  # not of majorities, not a mean of categories
            "pairwise_model_precision_balanced": 19 / 30,
            "x: pairwise_model_precision_pos": 3 / 5,
            "x: pairwise_model_recall_pos": 1.0,
            "x: pairwise_model_precision_neg": None,
            "x: pairwise_model_f1_neg": 0.0,  # physicians named it, the grader never
            "x: pairwise_model_f1_balanced": 3 / 8,
            "y: pairwise_model_precision_neg": 2 / 3,
        }
    )
    assert len(figures) == 27


def test_a_class_that_nobody_named_has_no_f1_and_one_never_agreed_on_has_0() -> None:
    assert oracle.pairwise([(True, True)])["pairwise_model_f1_pos"] == 1.0
    assert oracle.pairwise([(True, True)])["pairwise_model_f1_balanced"] is None
    assert oracle.pairwise([(True, False), (False, True)])["pairwise_model_f1_balanced"] == 0.0


def test_physicians_against_each_other() -> None:
    # p: TT | FF FT; q: TT TF | FF FT; r: FT | TF TF
    found = oracle.physicians(META)
    assert set(found) == {"p", "q", "r"}
    assert found["p"]["pairwise_physician_precision_pos"] == 1.0
    assert found["p"]["pairwise_physician_recall_pos"] == 0.5
    assert found["p"]["pairwise_physician_precision_neg"] == 0.5
    assert found["q"]["pairwise_physician_precision_pos"] == 0.5
    assert found["r"]["pairwise_physician_f1_balanced"] == 0.0
    pooled = oracle.physicians_pooled(META)  # 10 pairs: TT twice, FF twice, TF thrice, FT thrice
    assert pooled["pairwise_physician_precision_pos"] == 2 / 5
    assert pooled["pairwise_physician_f1_balanced"] == pytest.approx(2 / 5)


def scores(made: cases.GradedSet) -> list[float | None]:
    by_id = {one["prompt_id"]: one for one in made.rows}
    return [
        oracle.example_score(
            by_id[one["prompt_id"]]["rubrics"], [v["criteria_met"] for v in one["verdicts"]]
        )
        for one in made.graded
    ]


def has_negative_tag(made: cases.GradedSet) -> bool:
    for one in made.rows:
        tags = {tag for item in one["rubrics"] for tag in item.get("tags", [])}
        for tag in tags:
            if all(r["points"] < 0 for r in one["rubrics"] if tag in r["tags"]):
                return True
    return False


def is_clipped(made: cases.GradedSet) -> bool:
    found = oracle.results(*made)
    return found.unclipped is not None and found.unclipped < 0 == found.overall


def has_equal_responses(made: cases.GradedSet) -> bool:
    return max(Counter((o["prompt_id"], o["response"]) for o in made.graded).values()) > 1


def has_clipped_tag(made: cases.GradedSet) -> bool:
    found = oracle.results(*made)
    return bool(found.overall) and any(
        value == 0 for name, value in found.metrics.items() if name.startswith("axis:")
    )


def has_another_order(made: cases.GradedSet) -> bool:
    names = [one["prompt_id"] for one in made.rows]
    return [one["prompt_id"] for one in made.graded[: len(names)]] != names


def lacks_keys_of_tags(made: cases.GradedSet) -> bool:
    return any("example_tags" not in one for one in made.rows)


REACHED: dict[str, Callable[[cases.GradedSet], bool]] = {
    "a tag with negative items only": has_negative_tag,
    "a score below zero": lambda made: min(s for s in scores(made) if s is not None) < 0,
    "a mean that clips": is_clipped,
    "a tag that clips where the mean does not": has_clipped_tag,
    "four responses": lambda made: len(made.graded) == 4 * len(made.rows) > 4,
    "equal responses to one prompt": has_equal_responses,
    "empty tags": lambda made: any(one.get("example_tags") == [] for one in made.rows),
    "no keys of tags": lacks_keys_of_tags,
    "a separator": lambda made: any("\u2028" in one["response"] for one in made.graded),
    "lines in another order": has_another_order,
    "consensus": lambda made: 0 < len(oracle.consensus(*made)[0]) < len(made.rows),
}


@pytest.mark.parametrize("name", REACHED)
def test_the_random_sets_reach(name: str) -> None:
    quick = settings(QUICK, max_examples=400, phases=[Phase.generate], derandomize=True)
    find(cases.graded_sets(), REACHED[name], settings=quick)


@QUICK
@given(cases.graded_sets(is_even=False, has_nulls=True))
def test_random_sets_are_of_the_schema_and_come_back_from_their_files(
    tmp_path_factory: pytest.TempPathFactory, made: cases.GradedSet
) -> None:
    files = made.write(tmp_path_factory.mktemp("set"))
    for path, lines in zip(files, made, strict=True):
        read = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
        assert [json.loads(text) for text in read] == lines
    by_id = {one["prompt_id"]: one["rubrics"] for one in made.rows}
    assert len(by_id) == len(made.rows)
    for rubrics in by_id.values():
        assert max(item["points"] for item in rubrics) > 0
        assert all(0 < abs(item["points"]) <= 10 for item in rubrics)
    assert all(len(one["verdicts"]) == len(by_id[one["prompt_id"]]) for one in made.graded)
    low, high = oracle.results(*made).bounds
    assert 0 <= low <= high <= 1


@QUICK
@given(cases.graded_sets())
def test_worst_at_1_is_the_mean_and_more_are_never_better(made: cases.GradedSet) -> None:
    found = oracle.results(*made)
    worst = found.worst_at_k
    assert worst is not None
    assert worst[1] == pytest.approx(found.overall)
    assert sorted(worst.values(), reverse=True) == pytest.approx(list(worst.values()))
    assert found.unclipped == pytest.approx(
        statistics.mean(s for s in scores(made) if s is not None)
    )


@QUICK
@given(cases.meta_sets())
def test_total_meta_sets_define_every_figure(made: cases.MetaSet) -> None:
    figures = oracle.meta(*made)
    assert all(value is not None and 0 <= value <= 1 for value in figures.values())
    pooled = oracle.physicians_pooled(made.rows)
    symmetric = [pooled[f"pairwise_physician_{name}_pos"] for name in ("precision", "recall")]
    assert symmetric[0] == symmetric[1]  # every pair counts both ways


def test_a_recorded_set_has_the_real_one_s_size_and_is_scored(tmp_path: Path) -> None:
    files = write_recorded(tmp_path, rows=100, criteria=971)
    rows, graded = ([json.loads(t) for t in p.read_text("utf-8").split("\n") if t] for p in files)
    assert len(rows) == len(graded) == 100
    assert sum(len(one["verdicts"]) for one in graded) == 971
    assert oracle.results(rows, graded).metrics["overall_score:n_samples"] == 100
    before = files.graded.read_bytes()
    assert write_recorded(tmp_path, rows=100, criteria=971).graded.read_bytes() == before
    with pytest.raises(ValueError, match="2 to 48"):
        sizes(random.Random(0), 2, 3)
