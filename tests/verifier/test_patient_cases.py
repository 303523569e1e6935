"""Cases: typed facts that contain what they came from, and personas that fit the record."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from attending.errors import ConfigError, UsageError
from attending.verifier.data import table
from attending.verifier.patient.case import Access, Case, Fact, age_of, read_case, sex_of
from attending.verifier.patient.ddxplus import DDXPlus, read_ddxplus
from attending.verifier.patient.find import find_case
from attending.verifier.patient.persona import TYPES, draw_persona
from attending.verifier.patient.vignette import NUMBER, access_of, read_vignette, read_vignettes
from tests.conftest import SHARED

CASES = SHARED / "data/patient_cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="../shared/data is not here")
ROW = {
    "id": 7,
    "question": "Which is the most likely diagnosis?",
    "answer": "Acute pyelonephritis",
    "facts": [
        "1. A 34-year-old woman comes to the emergency department with flank pain for 2 days.",
        "2. She reports chills.",
        "3. She denies vaginal discharge.",
        "4. She takes metformin.",
        "5. Her mother has hypertension.",
        "6. Her temperature is 38.9°C.",
        "7. Examination shows costovertebral angle tenderness.",
        "8. There is no rebound.",
        "9. Urinalysis shows white blood cell casts.",
        "10. The physician orders ceftriaxone.",
        "11. This is acute pyelonephritis.",
    ],
}
ACCESS = [*["tell"] * 5, *["examine"] * 4, "never", "never"]


def case(**changes: Any) -> Case:
    facts = [
        {"id": "a", "text": "The patient is a 30-year-old woman.", "access": "tell",
         "kind": "person", "says": "I am 30."},
        {"id": "b", "text": "She does not smoke.", "access": "tell", "says": "I don't smoke."},
        {"id": "m", "text": "She takes no medicines.", "access": "tell", "kind": "medication",
         "says": "None."},
    ]  # fmt: skip
    return Case.build({"id": "c", "complaint": "I cough.", "facts": facts} | changes)


def test_a_vignette_keeps_every_fact_in_its_words_and_types_it() -> None:
    found = read_vignette(ROW)
    assert [fact.text for fact in found.facts] == [NUMBER.sub("", f) for f in ROW["facts"]]  # type: ignore[attr-defined]
    assert [fact.access.value for fact in found.facts] == ACCESS
    kinds = [fact.kind for fact in found.facts[:6]]
    assert kinds == ["person", "symptom", "symptom", "medication", "family", "vital"]
    assert (found.persona.age, found.persona.sex) == (34, "female")
    assert "CC BY" in found.source


def test_only_an_answer_that_is_a_diagnosis_is_one() -> None:
    assert read_vignette(ROW).diagnosis == "Acute pyelonephritis"
    assert read_vignette(ROW | {"question": "Which drug is best?"}).diagnosis == ""


def test_what_answers_the_question_is_never_told() -> None:
    row = ROW | {"facts": ["1. A 34-year-old woman has fever.", "2. She has acute pyelonephritis."]}
    assert read_vignette(row).facts[1].access is Access.NEVER


@needs_cases
def test_all_vignettes_contain_their_facts_and_tell_no_answer() -> None:
    path = CASES / "mediq_imedqa_dev.jsonl"
    rows = {f"mediq-{row['id']}": row for row in map(json.loads, path.read_text().splitlines())}
    cases = list(read_vignettes(path))
    assert len(cases) > 0.98 * len(rows)
    for each in cases:
        row = rows[each.id]
        assert [fact.text for fact in each.facts] == [NUMBER.sub("", one) for one in row["facts"]]
        told = " ".join(fact.says for fact in each.facts if fact.access is not Access.NEVER)
        assert len(row["answer"]) <= 3 or row["answer"].lower() not in told.lower()


def test_a_childs_mother_speaks_of_the_child() -> None:
    facts = ["1. A 5-year-old boy is brought by his mother.", "2. Patient has had a fever."]
    found = read_vignette({"id": 1, "facts": facts})
    assert found.persona.informant == "mother"
    assert found.facts[1].says == "He has had a fever."


def test_findings_after_an_examination_stay_findings() -> None:
    texts = ["He has a cough.", "Physical examination shows a mass.", "There is mild redness."]
    assert [access for access, _ in access_of(texts)] == ["tell", "examine", "examine"]


def tables(tmp_path: Path) -> DDXPlus:
    """Two conditions over evidences that are known here, with values of our own."""
    evidences = {
        code: {
            "code_question": "E_53" if code in ("E_54", "E_56") else code,
            "question_en": f"Do you have {code}? ",
            "value_meaning": {"V_1": {"en": "NA"}, "V_2": {"en": "a cramp"}}
            if code == "E_54"
            else {},
            "possible-values": {"E_54": ["V_1", "V_2"], "E_56": [0, 5, 10]}.get(code, []),
        }
        for code in ("E_91", "E_201", "E_53", "E_54", "E_56", "E_79", "E_167")
    }
    conditions = {
        "Flu": {"condition_name": "Influenza", "symptoms": {"E_91": {}, "E_201": {}},
                "antecedents": {"E_79": {}, "E_167": {}}},
        "Colic": {"condition_name": "Colic", "symptoms": {"E_54": {}, "E_56": {}, "E_53": {}},
                  "antecedents": {}},
    }  # fmt: skip
    for name, value in (("conditions", conditions), ("evidences", evidences)):
        (tmp_path / f"release_{name}.json").write_text(json.dumps(value))
    return read_ddxplus(tmp_path)


def test_a_drawn_case_has_what_its_condition_lists_and_denies_the_rest(tmp_path: Path) -> None:
    data = tables(tmp_path)
    for seed in range(60):
        found = data.draw(seed)
        so = {fact.id for fact in found.facts if fact.present} - {"person"}
        listed = {
            "Influenza": {"E_91", "E_201", "E_79", "E_167"},
            "Colic": {"E_54", "E_56", "E_53"},
        }
        assert so and so <= listed[found.diagnosis]
        assert "E_53" in so or not {"E_54", "E_56"} & so  # a detail needs what it is a detail of
        assert found.persona.sex == "female" or "E_167" not in so
        assert found.diagnosis.lower() not in " ".join(f.says for f in found.facts).lower()
        for fact in found.facts:
            if fact.id == "E_54" and fact.present:
                assert fact.says == "I would describe the pain as cramping."
                assert fact.text == "Do you have E_54? a cramp"
            if fact.id in ("E_54", "E_56") and "E_53" in so:
                assert fact.present  # whose pain has no place and no strength?
            if fact.id == "E_91" and not fact.present:
                assert fact.says == table("patient/ddxplus")["E_91"]["deny"]


def test_a_drawn_case_repeats_and_another_seed_differs(tmp_path: Path) -> None:
    data = tables(tmp_path)
    assert data.draw(3) == data.draw(3)
    assert len({data.draw(seed).model_dump_json() for seed in range(8)}) == 8
    with pytest.raises(ConfigError, match="no condition 'Plague'"):
        data.draw(0, "Plague")


@needs_cases
def test_every_condition_of_ddxplus_can_be_drawn_whole() -> None:
    data = read_ddxplus(CASES)
    assert (len(data.conditions), len(data.evidences)) == (49, 223)
    for name, row in data.conditions.items():
        found = data.draw(1, name, share=1.0)
        so = {fact.id for fact in found.facts if fact.present}
        wanted = {*row["symptoms"], *row["antecedents"]}
        assert so >= (
            wanted
            if found.persona.sex == "female"
            else wanted - {*table("patient/ddxplus")["female"]}
        )
        assert len(found.facts) == 224
        assert not any("{" in fact.says for fact in found.facts)


def test_personas_fit_the_record_and_reach_all_types() -> None:
    draw = random.Random(0)
    drawn = [draw_persona(draw, 40, "male") for _ in range(400)]
    assert {one.mbti for one in drawn} == {*TYPES} and len(TYPES) == 16
    assert draw_persona(draw, 3, "male", "brought by his grandmother").informant == "grandmother"
    assert {one.informant for one in drawn} == {""}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"persona": {"age": 31}}, "age 31, not 30"),
        ({"persona": {"sex": "male"}}, "sex male, not female"),
        ({"persona": {"background": "She smokes a pack a day."}}, "against 'She does not smoke.'"),
        ({"persona": {"background": "He is a retired nurse."}}, "sex male, not female"),
        ({"persona": {"background": "45 years old, a teacher."}}, "age 45, not 30"),
        ({"persona": {"background": "Takes warfarin every day."}}, "against 'She takes no"),
        ({"persona": {"mbti": "ABCD"}}, "'ABCD' is none of the 16 MBTI types"),
        ({"persona": {"literacy": "none"}}, "literacy"),
        ({"facts": []}, "no fact that the patient can tell"),
        ({"fact": []}, "Did you mean 'facts'"),
    ],
)
def test_a_case_that_cannot_be_played_is_refused(changes: dict[str, Any], message: str) -> None:
    assert case(persona={"age": 30, "sex": "female", "background": "Works as a nurse."})
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        case(**changes)


def test_a_fact_that_is_there_twice_is_refused() -> None:
    twice = [fact.model_dump(mode="json") for fact in case().facts[:1] * 2]
    with pytest.raises(ConfigError, match="fact 'a' is there twice"):
        case(facts=twice)


def test_ages_and_sexes_are_read() -> None:
    assert (age_of("A 47-year-old man"), age_of("10 months old"), age_of("67岁")) == (47, 0, 67)
    assert age_of("Her mother is 35 years old.") is None
    assert (sex_of("The newborn girl"), sex_of("He"), sex_of("患者女"), sex_of("It")) == (
        *("female", "male", "female"),
        None,
    )


def test_cases_are_found_by_name(tmp_path: Path) -> None:
    assert find_case("appendicitis").diagnosis == "acute appendicitis"
    assert find_case("肺炎").language == "zh"
    own = tmp_path / "own.json"
    own.write_text(case().model_dump_json())
    assert find_case(str(own)) == read_case(own) == case()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(ROW) + "\n")
    assert find_case(f"{rows}:7").id == "mediq-7"
    tables(tmp_path)
    assert find_case(f"{tmp_path}:Flu", seed=2).diagnosis == "Influenza"
    with pytest.raises(UsageError, match="Did you mean 'appendicitis'"):
        find_case("apendicitis")
    with pytest.raises(UsageError, match="no vignette '8'"):
        find_case(f"{rows}:8")
    own.write_text("{")
    with pytest.raises(ConfigError, match=r"own\.json is no JSON file of a case"):
        read_case(own)


def test_facts_are_sorted_by_access() -> None:
    found = find_case("appendicitis")
    assert {fact.id for fact in found.of(Access.NEVER)} == {"diagnosis"}
    assert all(isinstance(fact, Fact) for fact in found.of(Access.EXAMINE))
