"""Interviews of a scripted doctor: what is asked is told, what is held out is in none."""

import asyncio
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

from attending.cli import practice
from attending.errors import UsageError
from attending.rl.cases import parse_case, read_cases
from attending.rl.interviews import WORDS, interview, interviews, names, patients
from attending.sft.recipe import SftConfig
from attending.verifier.patient.case import Case
from attending.verifier.patient.gate import concluded
from attending.verifier.patient.simulator import Patient, render
from tests.conftest import SHARED

TABLES = SHARED / "data/patient_cases"
FACTS = ("smoke", "drink alcohol", "wheeze", "itch", "vomit", "snore", "limp", "faint")
needs_tables = pytest.mark.skipif(
    not TABLES.exists(), reason="no shared/data beside the repository"
)


def case_of(diagnosis: str = "asthma") -> Case:
    facts: list[dict[str, Any]] = [
        {
            "id": f"F{at}",
            "text": f"The patient does {word}.",
            "access": "tell",
            "says": f"I do {word}." if at < 6 else f"No, I don't {word}.",
            "asks": [f"do you {word}", f"any {word}ing", f"{word}ing", f"have you begun to {word}"],
            "present": at < 6,
        }
        for at, word in enumerate(FACTS)
    ]
    told = {"id": "own", "complaint": "I do wheeze.", "facts": facts, "diagnosis": diagnosis}
    return Case.build(told)


@pytest.fixture
def vignettes(tmp_path: Path) -> Path:
    """Forty patients with the same complaints; the last stands in a test set."""
    facts = ["1. A 40-year-old man comes to the clinic.", "2. He has had a cough for two weeks."]
    facts += ["3. He takes lisinopril.", "4. His mother has asthma.", "5. He smokes every day."]
    path = tmp_path / "vignettes.jsonl"
    rows = [{"id": n, "facts": facts, "overlaps_medqa_or_mmlu_test": n == 39} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.parametrize("diagnosis", ["asthma", ""])
def test_what_is_asked_is_told_and_the_end_is_one(diagnosis: str) -> None:
    case, made = case_of(diagnosis), 0
    for seed in range(20):
        messages = asyncio.run(interview(case, Random(seed)))
        if not messages:
            continue
        made += 1
        roles = [one["role"] for one in messages]
        assert roles == ["system", *["user", "assistant"] * (len(messages) // 2)]
        assert messages[0]["content"] == render("doctor", "en")
        *asked, last = [one["content"] for one in messages if one["role"] == "assistant"]
        assert 2 <= len(asked) <= 7 and all(text.count("?") in (1, 2) for text in asked)
        assert concluded(last) and not any(map(concluded, asked))
        assert not diagnosis or diagnosis in last
        patient = Patient(case)
        known = {*patient.open().revealed}
        for text in asked:
            reply = asyncio.run(patient.answer(text))
            assert {*reply.revealed} - known, f"nothing new is told to {text!r}"
            known |= {*reply.revealed}
        quoted = re.findall(r'"([^"]+)"', last)
        assert len(quoted) == 2
        assert {*quoted} <= {f.says for f in case.facts if f.id in known and f.present}
    assert made > 15


def test_a_seed_decides_an_interview_and_wordings_vary() -> None:
    one, same, other = (asyncio.run(interview(case_of(), Random(seed))) for seed in (3, 3, 4))
    assert one == same != other
    texts = {
        message["content"]
        for seed in range(20)
        for message in asyncio.run(interview(case_of(), Random(seed)))
        if message["role"] == "assistant"
    }
    assert sum("begun to wheeze" in text for text in texts) < len(texts) / 2
    assert len({text.split("?")[0] for text in texts}) > 15


def test_held_out_patients_are_cases_and_in_no_interview(vignettes: Path) -> None:
    train, held = (names(vignettes, part) for part in ("train", "held_out"))
    assert len(train) + len(held) == 39 and not {*train} & {*held} and len(held) > 2
    assert f"{vignettes}:39" not in [*train, *held]
    made = asyncio.run(interviews(vignettes, 30, 0))
    assert len(made) == 30
    assert {f"{vignettes}:{one['patient']}" for one in made} <= {*train}
    with pytest.raises(UsageError, match="the held-out patients stay unseen"):
        asyncio.run(interviews(vignettes, 3, 0, "held_out"))
    cases = list(patients(vignettes, len(held), 0, "held_out"))
    assert {case.patient for case in cases} == {*held}
    with pytest.raises(UsageError, match=r"there are \d patients of part 'held_out', not 39"):
        list(patients(vignettes, 39, 0, "held_out"))
    with pytest.raises(UsageError, match="give --patients"):
        names(None, "train")


def test_the_verb_writes_what_sft_and_rl_read(vignettes: Path, tmp_path: Path) -> None:
    talks, cases = tmp_path / "cases" / "interviews.jsonl", tmp_path / "patients.jsonl"
    practice.cases("interview", talks, count=5, patients=vignettes)
    practice.cases("patient", cases, count=5, patients=vignettes)
    rows = [json.loads(line) for line in talks.read_text("utf-8").splitlines()]
    assert len(rows) == 5 and {*rows[0]} == {"id", "patient", "messages"}
    config = SftConfig.load("interviews", "sft")
    assert {*re.findall(r"{(\w+)}", config.data["interviews"].holdout_key)} <= {*rows[0]}
    found = read_cases(cases)
    assert all(case.patient and not case.messages for case in found)
    assert parse_case({"id": "x", "kind": "patient", "patient": found[0].patient})


def test_what_the_doctor_ends_with_ends_a_consultation() -> None:
    for close in WORDS["end"]["close"]:
        for form in (*WORDS["end"]["known"], *WORDS["end"]["unknown"]):
            told = form.replace("$said", '"I have a cough."').replace("$close", close)
            assert concluded(told.replace("$diagnosis", "pneumonia")), told


@needs_tables
def test_ddxplus_is_interviewed(tmp_path: Path) -> None:
    made = asyncio.run(interviews(TABLES, 6, 0))
    held = {name.rpartition(":")[2] for name in names(TABLES, "held_out")}
    assert len(made) == 6 and 5 <= len(held) <= 15
    assert not held & {one["patient"] for one in made}
