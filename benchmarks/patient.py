"""The simulated patient: does it tell what it is asked and nothing else, and end when it should?

    python benchmarks/patient.py CASES

CASES is a folder with DDXPlus' two tables and MediQ's vignettes (`mediq_imedqa_dev.jsonl`). Budget:
1,776 questions of some 5 ms, and the drawing of their patients: half a minute.
"""

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from page import Measure, write

from attending.errors import AttendingError
from attending.verifier.patient.case import Case
from attending.verifier.patient.ddxplus import DDXPlus, read_ddxplus
from attending.verifier.patient.gate import concluded
from attending.verifier.patient.simulator import Patient
from attending.verifier.patient.vignette import NUMBER, access_of

HERE = Path(__file__).parent / "patient"
NOTES = """
The embedded patient, without a model. Each of DDXPlus' 223 evidences is asked by its **own
question** and by a **paraphrase** (`patient/paraphrases.jsonl`), of patients who have it: one drawn
from each condition that lists it, with seven in ten of the condition's other evidences. *Told*: the
reply tells the evidence asked for. *Another told*: it tells another one that the patient has.
*Another told or denied*: or says of another that it is not so. By evidence (each counts once,
however many conditions list it) and over all questions. Otherwise the patient asks back.

**Two or three evidences asked in one message** (`patient/combined.jsonl`, 100 messages, of one
patient): {together:.1%} of what is asked is told or denied, with {others:.2f} others a message.

**The gate ends or goes on rightly for {ends} of 100** last messages of doctors
(`patient/endings.jsonl`) **and for {chat_ends} of 100** in the manner of chat models
(`patient/endings_chat.jsonl`); of each 70 are English, 30 Chinese, half are ends. **{right:.1%} of
372 facts** of 32 vignettes are typed (patient, examination, nobody) as someone labelled them who
had not seen the patterns (`patient/access.jsonl`).

Paraphrases, combined questions and last messages were written by authors who had seen neither how
questions are matched nor the phrasings in `ddxplus.toml`; nobody looked at which of them fail.
Thresholds and patterns were chosen on other paraphrases and messages.
"""
Outcome = tuple[bool, bool, bool]


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (HERE / name).read_text(encoding="utf-8").splitlines()]


def patients(data: DDXPlus, evidence: str) -> Iterator[Case]:
    """One of each condition that lists the evidence, and who has it."""
    for name, row in data.conditions.items():
        if evidence in row["symptoms"] or evidence in row["antecedents"]:
            for seed in range(200):
                case = data.draw(seed, name, 0.7)
                if any(fact.id == evidence and fact.present for fact in case.facts):
                    yield case
                    break


async def ask(case: Case, evidence: str, question: str) -> Outcome:
    turn = await Patient(case).answer(question)
    present = {fact.id for fact in case.facts if fact.present}
    others = {*turn.revealed} - {evidence}
    return evidence in turn.revealed, bool(others & present), bool(others)


async def questioned(data: DDXPlus) -> dict[str, dict[str, list[Outcome]]]:
    """By way of asking and by evidence."""
    own = {code: row["question_en"] for code, row in data.evidences.items()}
    other = {row["id"]: row["text"] for row in rows("paraphrases.jsonl")}
    found: dict[str, dict[str, list[Outcome]]] = {"own question": {}, "paraphrase": {}}
    for code in own:
        cases = list(patients(data, code))
        for way, texts in zip(found, (own, other), strict=True):
            found[way][code] = [await ask(case, code, texts[code]) for case in cases]
    return found


def shares(by_evidence: dict[str, list[Outcome]], at: int) -> tuple[float, float]:
    """Of one outcome: the mean over evidences, and over all questions."""
    means = [sum(one[at] for one in each) / len(each) for each in by_evidence.values()]
    flat = [one[at] for each in by_evidence.values() for one in each]
    return sum(means) / len(means), sum(flat) / len(flat)


def typed(path: Path) -> float:
    """Share of labelled facts whose access is typed as labelled."""
    vignettes = {row["id"]: row["facts"] for row in map(json.loads, path.read_text().splitlines())}
    right = []
    for label in rows("access.jsonl"):
        texts: Sequence[str] = [NUMBER.sub("", fact) for fact in vignettes[label["id"]]]
        right.append(access_of(texts)[label["index"]][0] == label["access"])
    return sum(right) / len(right)


def combined(data: DDXPlus) -> tuple[float, float]:
    """Share of what is asked together that is answered, and others answered, a message."""
    case, asked, told, others = data.draw(3, "Pneumonia", 0.7), 0, 0, 0
    for row in rows("combined.jsonl"):
        turn = asyncio.run(Patient(case).answer(row["text"]))
        asked += len(row["ids"])
        told += len({*turn.revealed} & {*row["ids"]})
        others += len({*turn.revealed} - {*row["ids"]})
    return told / asked, others / len(rows("combined.jsonl"))


def ends(name: str) -> int:
    """Last messages at which the gate ends or goes on as it should."""
    return sum((concluded(row["text"]) is not None) == row["ends"] for row in rows(name))


def main(folder: Path) -> Path:
    found = []
    for way, by_evidence in asyncio.run(questioned(read_ddxplus(folder))).items():
        for at, name in enumerate(("told", "another told", "another told or denied")):
            for of, value in zip(("evidences", "questions"), shares(by_evidence, at), strict=True):
                found.append(Measure(f"{name}, share of {of}", way, [value]))
    together, others = combined(read_ddxplus(folder))
    notes = NOTES.format(
        together=together,
        others=others,
        ends=ends("endings.jsonl"),
        chat_ends=ends("endings_chat.jsonl"),
        right=typed(folder / "mediq_imedqa_dev.jsonl"),
    )
    return write("patient", "What the simulated patient tells", notes, found)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except (IndexError, OSError, AttendingError) as error:
        sys.exit(f"{error}\n{__doc__}")
