"""Cases: read strictly, chosen by pass rate; generated ones have the answer that they should."""

import asyncio
import json
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import islice, pairwise
from pathlib import Path
from random import Random
from string import Template
from types import SimpleNamespace
from typing import Any

import pytest

from attending import endpoint
from attending.cli import practice
from attending.corpus.split import is_held_out
from attending.errors import ConfigError, UsageError
from attending.rl import tasks
from attending.rl.cases import (
    choose,
    is_affine_only,
    line_of,
    parse_case,
    pass_rates,
    read_cases,
    write_rows,
)
from attending.rl.tasks import DATA, SUBJECTS, make
from attending.rl.types import Case
from attending.verifier.judge.verdict import Verdict
from attending.verifier.rules import check
from tests.conftest import SHARED

TIME = re.compile(r"\b8 [ap]m\b")  # a number that is none of the sum's
MEDQUAD = SHARED / "data/train/medquad_qa.jsonl"
ASKED = [{"role": "user", "content": "6 / 2?"}]
NUMBER = {"kind": "numeric", "answer": 3}
RUBRICS = [{"criterion": "States: 3.", "points": 5, "tags": ["axis:accuracy"]}]
LINE: dict[str, Any] = {"id": "a", "messages": ASKED, "kind": "sums", "rule": NUMBER}
STATED = "Most patients have a weak heart. The heart should be examined every year."
FACTS = {
    "autosomal recessive": "This condition is inherited in an autosomal recessive pattern.",
    "autosomal dominant": "This condition is inherited in an autosomal dominant pattern.",
    "mitochondrial": "It is inherited in a mitochondrial or autosomal dominant pattern.",
}


def written(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def medquad(tmp_path: Path) -> Path:
    """Subjects of both parts with a planted fact, and answers that state something."""
    rows = list[dict[str, str]]()
    for number in range(900):
        own = {"focus": f"syndrome {number}", "question": f"Is syndrome {number} inherited ?"}
        fact = list(FACTS.values())[number % 3]
        rows.append({**own, "qtype": "inheritance", "answer": f"{fact} {STATED}"})
    return written(tmp_path / "medquad.jsonl", *rows)


def test_what_is_written_reads_back_equal(tmp_path: Path) -> None:
    rows = (
        LINE,
        {"id": "b", "messages": ASKED, "kind": "notes", "rubrics": RUBRICS},
        {"id": "c", "messages": [], "kind": "visits", "patient": "appendicitis"},
    )
    cases = read_cases(written(tmp_path / "cases.jsonl", *rows))
    write_rows(tmp_path / "again.jsonl", map(line_of, cases))
    assert [json.loads(line) for line in (tmp_path / "again.jsonl").open()] == list(rows)
    assert read_cases(tmp_path / "again.jsonl") == cases
    assert cases[0].rule == NUMBER
    assert cases[1].criteria[0].points == 5
    assert cases[2].patient == "appendicitis"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rule": {"kind": "numerik", "answer": 3}}, "unknown kind of rule 'numerik'"),
        ({"rule": {"kind": "numeric"}}, "answer"),
        ({"rule": {"kind": "regex", "pattern": "("}}, "pattern"),
        ({"rubrics": RUBRICS}, "scored by rule, rubrics"),
        ({"rule": None}, "scored by rule"),
        ({"rule": {}}, "give a rule"),
        ({"messages": []}, "only a patient opens"),
        ({"messages": "6 / 2?"}, "end with the user's"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "3"}]}, "end with the user's"),
        ({"messages": [{"role": "user", "content": None}]}, "end with the user's"),
        ({"messages": [{"role": "nurse", "content": "Hm."}, *ASKED]}, "no texts"),
        ({"id": ""}, "id ''"),
        ({"id": 7}, "id 7"),
        ({"kind": None}, "kind None"),
        ({"rules": NUMBER}, "unknown key 'rules'. Did you mean"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = written(tmp_path / "cases.jsonl", LINE, {**LINE, "id": "b", **change})
    with pytest.raises(ConfigError) as raised:
        read_cases(path)
    assert str(raised.value).startswith("cases.jsonl:2: ")
    assert told in str(raised.value)


def test_an_id_twice_names_both_lines(tmp_path: Path) -> None:
    path = written(tmp_path / "cases.jsonl", LINE, {**LINE, "id": "b"}, LINE)
    with pytest.raises(ConfigError, match=r"cases.jsonl:3: id 'a' is that of cases.jsonl:1"):
        read_cases(path)


def test_a_file_without_cases_or_with_half_a_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no case"):
        read_cases(written(tmp_path / "cases.jsonl"))
    (tmp_path / "half.jsonl").write_text('{"id": "a"', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"half.jsonl:1 is no JSON"):
        read_cases(tmp_path / "half.jsonl")


def test_a_rubric_of_faults_alone_is_kept_and_told() -> None:
    row = {"id": "a", "messages": ASKED, "kind": "notes", "rubrics": RUBRICS}
    fault = {"criterion": "States: 4.", "points": -5}
    assert not is_affine_only(parse_case({**row, "rubrics": [*RUBRICS, fault]}))
    assert is_affine_only(parse_case({**row, "rubrics": [fault]}))
    assert not is_affine_only(parse_case(LINE))


def test_cases_are_chosen_by_the_measured_pass_rate() -> None:
    names = {"often": 9, "end": 3, "seldom": 1, "never": 0}
    samples = {name: ["3"] * right + ["4"] * (10 - right) for name, right in names.items()}
    cases = [parse_case({**LINE, "id": name}) for name in (*names, "unasked")]
    rates = asyncio.run(pass_rates(cases, samples))
    assert rates == {"often": 0.9, "end": 0.3, "seldom": 0.1, "never": 0.0}
    chosen = choose(cases, rates, 0.3, 0.8)
    assert [one.id for one in chosen.cases] == ["end"]
    assert chosen[1:] == (2, 1, 1)


def test_criteria_are_passed_by_what_is_worth_more_than_to_meet_none() -> None:
    fault = {"criterion": "States: 4.", "points": -5}
    row = {"id": "a", "messages": ASKED, "kind": "notes", "rubrics": [*RUBRICS, fault]}
    cases, said = [parse_case(row)], ["3", "nothing", "4", "unscored"]

    async def judge(rubric: Any, answer: str) -> list[Verdict]:
        found = (answer in one.text for one in rubric.criteria)
        return [Verdict(None if answer == "unscored" else is_met, "") for is_met in found]

    assert asyncio.run(pass_rates(cases, {"a": said}, judge)) == {"a": pytest.approx(1 / 3)}
    assert asyncio.run(pass_rates(cases, {"a": said})) == {}  # nobody judges
    assert asyncio.run(pass_rates(cases, {"a": ["unscored"]}, judge)) == {}


def test_rubrics_are_not_chosen_without_a_judge(medquad: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="add --judge"):
        practice.cases("rubric", tmp_path / "out.jsonl", count=1, medquad=medquad, model="m")


def test_the_model_is_told_what_the_runs_recipe_tells_the_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    class Model:
        async def chat(self, _: Any, **how: Any) -> Any:
            asked.append(how)
            return SimpleNamespace(text="The answer is 3." if how["seed"] else "none")

    @asynccontextmanager
    async def opened(_: str) -> AsyncIterator[Model]:
        yield Model()

    monkeypatch.setattr(endpoint, "open", opened)
    told, out = tmp_path / "own.toml", tmp_path / "cases.jsonl"
    told.write_text('base = "rules"\n[template]\nenable_thinking = false\n', "utf-8")
    how: dict[str, Any] = {"model": "m", "answers": 2, "low": 0.0, "high": 1.0, "max_tokens": 5}
    practice.cases("dosage", out, count=3, recipe=str(told), **how)
    assert len(read_cases(out)) == 3 and len(asked) == 6
    assert all(one["chat_template_kwargs"] == {"enable_thinking": False} for one in asked)
    practice.cases("dosage", tmp_path / "plain.jsonl", count=3, **how)
    assert all("chat_template_kwargs" not in one for one in asked[6:])


ORACLE: dict[str, Callable[[Any], float]] = {
    "day_sum": lambda v: v["morning"] + v["evening"],
    "left": lambda v: v["whole"] - v["taken"],
    "day_times": lambda v: v["tablets"] * v["doses"],
    "weight": lambda v: v["weight"] * v["dose"],
    "milligrams": lambda v: v["tablets"] * v["strength"],
    "pulse": lambda v: v["beats"] * 60 / 15,
    "tablets_for": lambda v: v["need"] / v["strength"],
    "supply": lambda v: v["whole"] / v["daily"],
    "infusion": lambda v: v["volume"] / v["hours"],
    "drops": lambda v: v["volume"] * v["factor"] / v["minutes"],
    "dilution": lambda v: v["strength"] / v["volume"],
}


@pytest.mark.parametrize("level", [1, 2, 3, 4])
@pytest.mark.parametrize("is_last", [False, True])
def test_the_answer_to_a_dose_is_what_the_numbers_give(level: int, is_last: bool) -> None:
    found = list(islice(tasks._dosage(Random(0), level, (), is_last), 500))
    for one in found:
        assert ORACLE[one.name](one.values) == one.rule["answer"] == int(one.answer)
        assert 0 < one.rule["answer"] <= DATA["largest"][level - 1]
        assert one.rule["answer"] in (one.values["first"], one.values["second"])
        assert one.values["first"] < one.values["second"]


def test_no_answer_to_a_dose_is_likelier_for_being_the_smaller() -> None:
    found = list(islice(tasks._dosage(Random(0), 1, (), False), 2000))
    share = sum(one.rule["answer"] == one.values["first"] for one in found) / len(found)
    assert share == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("kind", "level"), [("dosage", 1), ("dosage", 4), ("format", 2)])
def test_a_seed_decides_the_cases(kind: str, level: int) -> None:
    first, again, other = (list(make(kind, 60, seed, level)) for seed in (0, 0, 1))
    assert first == again
    assert {one.id for one in first} != {one.id for one in other}
    assert len({one.id for one in first}) == len({question(one) for one in first}) == 60
    assert list(make(kind, 20, 0, level)) == first[:20]
    assert all(parse_case(tasks_line(one)) == one for one in first)


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_sums_of_the_held_out_part_are_not_trained_on(level: int) -> None:
    drawn = [
        list(islice(tasks._dosage(Random(0), level, (), last), 2000)) for last in (False, True)
    ]
    train, held_out = ({one.key for one in own} for own in drawn)
    assert train
    assert held_out
    assert not train & held_out
    per_task = defaultdict[str, set[str]](set)
    for one in drawn[0]:
        per_task[one.like].add(one.key)
    assert min(map(len, per_task.values())) > 5, "an example would be the question itself"


def test_wordings_and_subjects_of_the_held_out_part_are_not_trained_on() -> None:
    train, held_out = (list(make("format", 100, 0, 1, part=part)) for part in ("train", "held_out"))
    lasts = [re.compile(pattern_of(one["wordings"][-1])) for one in DATA["format"]]
    both = [{subject_of(case) for case in own} for own in (train, held_out)]
    assert not both[0] & both[1]
    for own, is_last in ((train, False), (held_out, True)):
        for one in own:
            assert any(last.search(question(one)) for last in lasts) is is_last


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_what_is_answered_before_a_question_is_right_and_trained_on(part: tasks.Part) -> None:
    level = 2
    trained = islice(tasks._dosage(Random(0), level, (), False), 4000)
    by_numbers = {(one.name, tuple(numbers_of(one.values))): one.answer for one in trained}
    for case in make("dosage", 40, 0, level, part=part):
        assert len(case.messages) == 1 + 2 * DATA["shots"]["dosage"][level - 1]
        assert [turn["role"] for turn in case.messages[:2]] == ["user", "assistant"]
        name = case.id.split("/")[1]
        known = {numbers for own, numbers in by_numbers if own == name}
        for shot, said in pairwise(case.messages[:-1]):
            if said["role"] == "assistant":
                numbers = tuple(sorted(map(int, re.findall(r"\d+", TIME.sub("", shot["content"])))))
                assert numbers in known
                assert by_numbers[name, numbers] == said["content"]
                assert shot["content"] != question(case)


GOOD: dict[str, Callable[[Any], str]] = {
    "first_word": lambda rule: re.search(r"i:(\w+)", rule["pattern"])[1] + " it is.",  # type: ignore[index]
    "no_comma": lambda _: "Rest and water.",
    "short": lambda _: "Rest and water.",
    "sentences": lambda rule: "It is so. " * (2 if rule["kwargs"][0]["num_sentences"] == 2 else 1),
    "words": lambda rule: "well " * rule["max"],
    "capitals": lambda _: "REST AND WATER.",
    "lower_case": lambda _: "rest and water.",
    "list": lambda rule: "- rest\n" * int(re.search(r"{(\d)}", rule["pattern"])[1]),  # type: ignore[index]
    "json": lambda rule: json.dumps(dict.fromkeys(rule["keys"], "rest")),
    "ending": lambda rule: "Rest. " + re.search(r"i\)([\w ]+)", rule["pattern"])[1] + ".",  # type: ignore[index]
}
PROSE = "It is, in short, a disease. " * 12  # of no form that is asked for


@pytest.mark.parametrize("level", [1, 2, 3])
def test_an_answer_of_the_form_that_was_asked_for_passes(level: int) -> None:
    seen = set[str]()
    for case in make("format", 150, 0, level):
        name = case.id.split("/")[1]
        assert case.rule is not None
        assert check(case.rule, GOOD[name](case.rule)).passed, case
        assert not check(case.rule, PROSE).passed, case
        seen.add(name)
    assert seen == {one["name"] for one in DATA["format"] if str(level) in one["levels"]}


def test_an_option_is_right_for_its_subject_in_either_place(medquad: Path) -> None:
    facts = {json.loads(line)["focus"]: json.loads(line)["answer"] for line in medquad.open()}
    right, wrong, places = Counter[str](), Counter[str](), Counter[str]()
    for case in make("options", 400, 0, 2, medquad):
        assert case.rule is not None
        options, answer = case.rule["options"], case.rule["answer"]
        subject = re.search(r"syndrome \d+", question(case), re.I)
        assert subject is not None
        assert FACTS[options[answer]] in facts[subject[0].lower()]
        other = options["B" if answer == "A" else "A"]
        assert other not in facts[subject[0].lower()], "the answer names what would be wrong"
        assert check(case.rule, options[answer]).passed
        assert not check(case.rule, other).passed
        assert re.findall("|".join(FACTS), question(case))[:2] == [options["A"], options["B"]]
        right[options[answer]] += 1
        wrong[other] += 1
        places[answer] += 1
    assert places["A"] == pytest.approx(200, abs=15)
    # Of this pair the second is never wrong for the third fact, whose answer names it.
    assert right["autosomal recessive"] == pytest.approx(wrong["autosomal recessive"], abs=50)


@pytest.mark.parametrize(("kind", "level"), [("options", 2), ("rubric", 1), ("format", 1)])
def test_subjects_are_held_out_as_the_corpus_holds_them_out(
    medquad: Path, kind: str, level: int
) -> None:
    parts: tuple[tuple[tasks.Part, bool], ...] = (("train", False), ("held_out", True))
    for part, is_last in parts:
        for case in make(kind, 8, 0, level, medquad, part):
            subjects = re.findall(r"syndrome \d+", question(case), re.I)
            assert [is_held_out(one.lower()) for one in subjects] == [is_last]
            before = " ".join(turn["content"] for turn in case.messages[:-1])
            assert not any(map(is_held_out, re.findall(r"syndrome \d+", before.lower())))


def test_a_rubric_is_what_the_answer_states(medquad: Path) -> None:
    case = next(make("rubric", 1, 0, 1, medquad))
    assert re.fullmatch(r"Is syndrome \d+ inherited\?", question(case))
    texts = [one.text for one in case.criteria if one.points > 0]
    assert texts[0] == "States: Most patients have a weak heart."
    assert "heart should be examined every year" in texts[1]
    assert len(case.criteria) <= DATA["rubric"]["criteria"][0]
    assert parse_case(tasks_line(case)) == case


def test_what_cannot_be_made_is_refused(tmp_path: Path, medquad: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown kind of case 'dosages'\. Did you mean"):
        next(make("dosages", 1, 0, 1))
    with pytest.raises(UsageError, match="made of MedQuAD"):
        next(make("options", 1, 0, 1))
    with pytest.raises(UsageError, match="0 cases of kind 'dosage', level 9"):
        next(make("dosage", 1, 0, 9))
    with pytest.raises(UsageError, match=r"there are \d+ cases of kind 'rubric'"):
        list(make("rubric", 1000, 0, 1, medquad))
    path = written(tmp_path / "rows.jsonl", {"focus": "gout", "qtype": "treatment"})
    with pytest.raises(ConfigError, match=r"rows.jsonl:1 lacks 'question'"):
        next(make("options", 1, 0, 1, path))


def test_every_name_in_a_wording_is_given() -> None:
    common = {"dosage": {"drug", "first", "second"}, "format": {"focus"}}
    for kind, known in common.items():
        for one in DATA[kind]:
            for values in one["levels"].values():
                for wording in one["wordings"]:
                    assert {*Template(wording).get_identifiers()} <= known | {*values}, wording
    for one in DATA["options"]:
        for wording in one["wordings"]:
            assert {*Template(wording).get_identifiers()} == {"focus", "first", "second"}


@pytest.mark.skipif(not MEDQUAD.exists(), reason="no shared/data beside the repository")
@pytest.mark.parametrize("level", [1, 2, 3])
def test_medquad_has_options_of_every_level(level: int) -> None:
    cases = list(make("options", 60, 0, level, MEDQUAD))
    assert len({case.messages[-1]["content"] for case in cases}) == 60
    assert all(len(case.messages) == 9 for case in cases)


def subject_of(case: Case) -> str:
    """Of a format's question: not the stroke in heat stroke."""
    return max((one for one in SUBJECTS if one in question(case)), key=len)


def question(case: Case) -> str:
    return case.messages[-1]["content"]


def tasks_line(case: Case) -> dict[str, Any]:
    return json.loads(json.dumps(line_of(case)))  # type: ignore[no-any-return]


def pattern_of(wording: str) -> str:
    return re.sub(r"\\\$\w+", ".+", re.escape(wording))


def numbers_of(values: tasks.Row) -> list[int]:
    """As the wordings say them."""
    known = {"drug", "first", "second"}
    return sorted(value for name, value in values.items() if name not in known)
