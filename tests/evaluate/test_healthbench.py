"""HealthBench's scores beside an independent computation; its grader, its trial, its bad rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from attending.cli import app
from attending.errors import AttendingError, ConfigError, ReplyError, UsageError
from attending.evaluate import compare, results, scores
from attending.evaluate.healthbench.grader import (
    CONVERSATION,
    ITEM,
    Grader,
    Template,
    read_reply,
    read_template,
)
from attending.evaluate.healthbench.meta import Meta
from attending.evaluate.healthbench.task import HealthBench, recorded, worst_at_k
from attending.evaluate.recipe import EvalConfig
from attending.evaluate.sample import Sample
from attending.evaluate.tasks import build
from attending.verifier.judge.verdict import Verdict
from tests.evaluate import healthbench_oracle as oracle
from tests.evaluate.healthbench_cases import GradedSet, MetaSet, graded_sets, meta_sets, write_lines

WITH_FILES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
ROW: dict[str, Any] = {
    "prompt_id": "one",
    "prompt": [{"role": "user", "content": "A tablet fell\u2028under the bed."}],
    "rubrics": [
        {"criterion": "Advises to throw it away.", "points": 7, "tags": ["axis:accuracy"]},
        {"criterion": "Asks which tablet.", "points": 5, "tags": ["axis:completeness"]},
        {"criterion": "Says what to do next time.", "points": 10},
        {"criterion": "Advises to take two instead.", "points": -6, "tags": ["axis:accuracy"]},
    ],
}


def task_of(path: Path, **changes: Any) -> Any:
    told = {"kind": "healthbench", "data": str(path), **changes}
    return build(EvalConfig.build({"tasks": {"healthbench": told}}).tasks["healthbench"], None)


def row_of(made: GradedSet, folder: Path, **changes: Any) -> dict[str, Any]:
    files = made.write(folder)
    task = task_of(files.rows, **changes)
    return scores.row(task, recorded(task, files.graded), seed=0, resamples=200)


def agree(found: dict[str, Any], wanted: oracle.Results) -> None:
    assert found["score"] == pytest.approx(wanted.overall, abs=1e-12)
    assert found["bounds"] == pytest.approx(wanted.bounds, abs=1e-12)
    assert found["unscored"] * (found["n_answers"] + wanted.n_unscored) == pytest.approx(
        wanted.n_unscored
    )
    if wanted.unclipped is None:
        return
    assert found["unclipped"] == pytest.approx(wanted.unclipped, abs=1e-12)
    figures = {"overall_score": found["score"], "overall_score:n_samples": found["n_answers"]}
    for tag, part in found["parts"].items():
        figures |= {tag: part["score"], f"{tag}:n_samples": part["n_answers"]}
    assert figures == pytest.approx(wanted.metrics, abs=1e-12)
    if wanted.worst_at_k and len(wanted.worst_at_k) > 1:
        assert found["more"]["worst_at_k"] == pytest.approx(wanted.worst_at_k, abs=1e-12)


@WITH_FILES
@given(made=graded_sets())
def test_scores_are_those_of_an_independent_computation(made: GradedSet, tmp_path: Path) -> None:
    agree(row_of(made, tmp_path), oracle.results(*made))


@WITH_FILES
@given(made=graded_sets(has_nulls=True, is_even=False))
def test_unscored_verdicts_are_bounded_not_counted(made: GradedSet, tmp_path: Path) -> None:
    agree(row_of(made, tmp_path), oracle.results(*made))


@WITH_FILES
@given(made=graded_sets(tags="full"))
def test_the_consensus_subset_is_made_of_full_rows(made: GradedSet, tmp_path: Path) -> None:
    rows, graded = oracle.consensus(*made)
    if not any(sum(c["points"] > 0 for c in row["rubrics"]) for row in rows):
        return
    rows = [row for row in rows if any(c["points"] > 0 for c in row["rubrics"])]
    names = {row["prompt_id"] for row in rows}
    kept = GradedSet(
        [row for row in made.rows if row["prompt_id"] in names],
        [line for line in graded if line["prompt_id"] in names],
    )
    agree(row_of(kept, tmp_path, subset="consensus"), oracle.results(rows, kept.graded))


@WITH_FILES
@given(made=graded_sets(max_rows=1, max_repeats=5))
def test_the_references_deviation_is_that_of_all_resamples(made: GradedSet, tmp_path: Path) -> None:
    files = made.write(tmp_path)
    task = task_of(files.rows)
    samples = recorded(task, files.graded)
    found = scores.row(task, samples, seed=1, resamples=1000)
    values = [one.grade.score for one in samples if one.grade.score is not None]
    std, tolerance = oracle.exact_bootstrap_std(values)
    assert found["bootstrap_std"] == pytest.approx(std, abs=tolerance)


def test_the_command_prints_one_number_at_the_top_and_nothing_else(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [ROW])
    met = [True, False, True, True]
    told = [{"criteria_met": one, "explanation": "so"} for one in met]
    line = {"prompt_id": "one", "response": "Throw it away.", "verdicts": told}
    write_lines(tmp_path / "graded.jsonl", [line])
    files = ["--rows", str(tmp_path / "rows.jsonl"), "--graded", str(tmp_path / "graded.jsonl")]
    ran = CliRunner().invoke(app, ["eval", "healthbench", *files, "--json"])
    printed = json.loads(ran.stdout)
    assert ran.exit_code == 0
    assert printed["overall"] == 11 / 22
    assert printed["n"] == 1
    assert printed["interval"] is None  # one conversation has none
    assert printed["parts"]["axis:accuracy"]["score"] == 1 / 7
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rubrics": [{"criterion": "Bad.", "points": -3}]}, "no criterion with positive points"),
        ({"rubrics": [{"criterion": "Bad.", "points": 0}]}, "0 points"),
        ({"prompt": []}, "no conversation"),
        ({"rubrics": None}, "no row of prompt_id"),
    ],
)
def test_a_row_that_cannot_be_scored_is_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    write_lines(tmp_path / "rows.jsonl", [{**ROW, **changes}])
    with pytest.raises(ConfigError, match=says):
        task_of(tmp_path / "rows.jsonl")


def test_a_prompt_that_is_there_twice_is_refused_by_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [ROW, ROW])
    with pytest.raises(ConfigError, match="'one'"):
        task_of(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"prompt_id": "two", "verdicts": []}, "no such prompt_id"),
        ({"prompt_id": "one", "verdicts": [{"criteria_met": True}]}, "1 verdicts for 4"),
        ({"prompt_id": "one", "verdicts": [{"criteria_met": "true"}] * 4}, "true, false or null"),
        ({"prompt_id": "one", "verdicts": [True] * 4}, "true, false or null"),
    ],
)
def test_recorded_verdicts_that_do_not_fit_are_refused(
    line: dict[str, Any], says: str, tmp_path: Path
) -> None:
    write_lines(tmp_path / "rows.jsonl", [ROW])
    write_lines(tmp_path / "graded.jsonl", [line])
    with pytest.raises(ConfigError, match=says):
        recorded(task_of(tmp_path / "rows.jsonl"), tmp_path / "graded.jsonl")


def test_a_line_separator_inside_a_text_ends_no_row(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [ROW, {**ROW, "prompt_id": "two"}])
    assert "\u2028" in (tmp_path / "rows.jsonl").read_text("utf-8")
    assert [one.id for one in task_of(tmp_path / "rows.jsonl").examples] == ["one", "two"]


def test_worst_at_k_by_hand() -> None:
    found = worst_at_k([[0.2, 0.8], [0.6, -1.0]])
    assert found == pytest.approx({1: 0.15, 2: 0.0})  # k = 2: (0.2 - 1.0) / 2, clipped


# The grader


@given(text=st.text() | st.sampled_from(["", "```", "null", "[true]", '"a"', "{}"]))
def test_replies_are_read_as_the_reference_reads_them(text: str) -> None:
    for reply in (text, f"```json\n{text}\n```"):
        met, explanation = oracle.parse(reply)
        if met is None:
            with pytest.raises(ReplyError):
                read_reply(reply)
        else:
            assert read_reply(reply).criteria_met is met
            assert read_reply(reply).explanation == explanation


@pytest.mark.parametrize(
    "told",
    [
        {"criteria_met": True},
        {"criteria_met": False, "explanation": "no"},
        {"criteria_met": "true"},
        {"criteria_met": 1},
        {"criteria_met": None},
        {"explanation": "yes"},
    ],
)
@pytest.mark.parametrize("form", ["{}", "```json\n{}\n```", "```\n{}\n```", " {}```", "{} {}"])
def test_a_verdict_is_true_or_false_and_nothing_else(told: dict[str, Any], form: str) -> None:
    reply = form.replace("{}", json.dumps(told))
    met, explanation = oracle.parse(reply)
    if met is None:
        with pytest.raises(ReplyError):
            read_reply(reply)
    else:
        assert read_reply(reply) == read_reply(json.dumps(told))
        assert (read_reply(reply).criteria_met, read_reply(reply).explanation) == (met, explanation)


@WITH_FILES
@given(made=graded_sets(max_rows=2))
def test_the_grader_is_asked_as_the_reference_asks(made: GradedSet, tmp_path: Path) -> None:
    text = f"Read.\n{CONVERSATION}\n---\n{ITEM}\nReply."
    judge = Grader.__new__(Grader)
    judge.template = Template(text, "t", "")
    assume(ITEM not in json.dumps(made.rows))  # there it is left as it is, on purpose
    task = task_of(made.write(tmp_path).rows)
    for example, row in zip(task.examples, made.rows, strict=True):
        rubric = task.rubric(example)
        for criterion, told in zip(rubric.criteria, row["rubrics"], strict=True):
            asked = judge.question(rubric, "An answer.", criterion).text
            assert asked == oracle.grader_prompt(text, row["prompt"], "An answer.", told)


def test_a_placeholder_inside_a_conversation_stays_what_it_is(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": f"What is {ITEM}?"}]
    write_lines(tmp_path / "rows.jsonl", [{**ROW, "prompt": turns}])
    task = task_of(tmp_path / "rows.jsonl")
    judge = Grader.__new__(Grader)
    judge.template = read_template()
    rubric = task.rubric(task.examples[0])
    asked = judge.question(rubric, "a", rubric.criteria[0]).text
    assert f"user: What is {ITEM}?\n\nassistant: a" in asked
    assert "[7] Advises to throw it away." in asked


def test_a_template_is_read_out_of_a_module_that_is_not_run(tmp_path: Path) -> None:
    module = tmp_path / "scorer.py"
    text = f"  Grade {CONVERSATION} by {ITEM}.\n"
    module.write_text(
        f"import nothing_of_this_name\nOTHER = 'x'\nGRADER: str = {text!r}.strip()\n1 / 0\n"
    )
    found = read_template(str(module))
    assert found.text == text.strip()
    assert found == read_template(f"{module}#GRADER")._replace(name=found.name)
    assert len(found.sha256) == 64
    plain = tmp_path / "grader.txt"
    plain.write_text(text)
    assert read_template(str(plain)).sha256 == found.sha256
    for wrong in (f"{module}#OTHER", f"{module}#NONE", str(tmp_path / "none.py")):
        with pytest.raises(AttendingError):
            read_template(wrong)
    module.write_text(f"A = {text!r}\nB = {text!r}\n")
    with pytest.raises(UsageError, match="#NAME"):
        read_template(str(module))
    assert read_template(f"{module}#B").sha256 == found.sha256


def test_a_system_message_that_the_model_saw_is_seen_by_the_grader(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [ROW])
    task = task_of(tmp_path / "rows.jsonl", sampling={"system": "You are helpful."})
    assert task.rubric(task.examples[0]).conversation[0]["content"] == "You are helpful."


# Physicians


@WITH_FILES
@given(made=graded_sets(tags="full"), answers=st.sampled_from(["physicians", "references"]))
def test_physicians_texts_are_the_datas(made: GradedSet, answers: str, tmp_path: Path) -> None:
    listed = oracle.physician_completions if answers == "physicians" else oracle.references
    groups = ["Group 1", "Group 2", "Group 3"][answers == "references" :]
    wanted = {group: listed(made.rows, group) for group in groups}
    files = made.write(tmp_path)
    if not any(wanted.values()):
        with pytest.raises(ConfigError):
            task_of(files.rows, answers=answers)
        return
    task = task_of(files.rows, answers=answers)
    found: dict[str, list[tuple[str, str]]] = {group: [] for group in groups}
    for example in task.examples:
        [group] = [tag for tag in example.tags if tag.startswith("group:")]
        for repeat in range(task.repeats):
            told = (example.id, task.given(example, repeat).text)
            found[group.removeprefix("group:")].append(told)
    assert found == wanted


# The judge on trial


@WITH_FILES
@given(made=meta_sets())
def test_agreement_is_that_of_an_independent_computation(made: MetaSet, tmp_path: Path) -> None:
    files = made.write(tmp_path)
    config = EvalConfig.build({"tasks": {"m": {"kind": "meta", "data": str(files.rows)}}})
    task = Meta(config.tasks["m"], None)
    labels = {id(row): label for row, label in zip(made.rows, made.labels, strict=True)}
    waiting = [(row, labels[id(row)]) for row in made.rows]
    samples = []
    for example in task.examples:
        verdicts = []
        for own in example.data["rows"]:
            keys = ("completion_id", "rubric", "category", "binary_labels")
            at = next(
                i
                for i, (row, _) in enumerate(waiting)
                if all(row.get(key) == own.get(key) for key in keys)
            )
            verdicts.append(Verdict(waiting.pop(at)[1], ""))
        answer = task.given(example, 0)
        samples.append(Sample(example, answer, task.grade(example, answer, verdicts)))
    found = scores.row(task, samples, seed=0, resamples=50)
    wanted = oracle.meta(made.rows, made.labels)
    assert found["score"] == pytest.approx(wanted["pairwise_model_f1_balanced"])
    assert found["more"]["precision_met"] == pytest.approx(
        wanted["pairwise_model_precision_pos"] or 0.0
    )
    assert found["more"]["recall_not_met"] == pytest.approx(
        wanted["pairwise_model_recall_neg"] or 0.0
    )
    for category in {row["category"] for row in made.rows}:
        value = wanted[f"{category}: pairwise_model_f1_balanced"]
        if value is not None:
            assert found["parts"][category]["score"] == pytest.approx(value)


def test_results_of_other_judges_or_templates_are_no_comparison(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [ROW])
    line = {"prompt_id": "one", "response": "x", "verdicts": [{"criteria_met": True}] * 4}
    config = EvalConfig.build(
        {"tasks": {"healthbench": {"kind": "healthbench", "data": str(tmp_path / "rows.jsonl")}}}
    )
    task = HealthBench(config.tasks["healthbench"], None)  # type: ignore[arg-type]
    for name, judge in (("a", "J"), ("b", "J"), ("c", "K")):
        write_lines(tmp_path / f"{name}.jsonl", [line])
        graded = tmp_path / f"{name}.jsonl"
        results.recorded(config, [task], "healthbench", graded, judge, None, tmp_path / name)
    both = compare.combine([tmp_path / "a", tmp_path / "b"], tmp_path / "ab")
    assert [one["difference"] for one in both["pairs"]] == [0.0]
    assert (tmp_path / "ab/report.html").is_file()
    with pytest.raises(UsageError, match="another judge"):
        compare.combine([tmp_path / "a", tmp_path / "c"], tmp_path / "ac")
    assert not (tmp_path / "ac").exists()
