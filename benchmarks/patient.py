"""The simulated patient: does it tell what it is asked and nothing else, and end when it should?

    python benchmarks/patient.py DDXPLUS_FOLDER

Every evidence is asked by its own question and by a paraphrase whose author had not seen how
questions are matched (`patient/paraphrases.jsonl`), of patients that have it: one drawn from each
condition that lists it. `patient/endings.jsonl` are 100 last messages of doctors, by the same
author.
"""

import asyncio
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from attending.verifier.patient.case import Case
from attending.verifier.patient.ddxplus import DDXPlus, read_ddxplus
from attending.verifier.patient.gate import concluded
from attending.verifier.patient.simulator import Patient

HERE = Path(__file__).parent / "patient"


def rows(name: str) -> list[dict[str, str]]:
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


async def ask(case: Case, evidence: str, question: str) -> tuple[bool, bool, bool]:
    """Whether it told the evidence, another that is so, another that is or is not."""
    turn = await Patient(case).answer(question)
    present = {fact.id for fact in case.facts if fact.present}
    others = {*turn.revealed} - {evidence}
    return evidence in turn.revealed, bool(others & present), bool(others)


async def measure(data: DDXPlus) -> dict[str, list[tuple[str, tuple[bool, bool, bool]]]]:
    own = {code: row["question_en"] for code, row in data.evidences.items()}
    other = {row["id"]: row["text"] for row in rows("paraphrases.jsonl")}
    found: dict[str, list[tuple[str, tuple[bool, bool, bool]]]] = {"own": [], "paraphrase": []}
    for code in own:
        for case in patients(data, code):
            found["own"].append((code, await ask(case, code, own[code])))
            found["paraphrase"].append((code, await ask(case, code, other[code])))
    return found


if __name__ == "__main__":
    data = read_ddxplus(Path(sys.argv[1]))
    found = asyncio.run(measure(data))
    for name, each in found.items():
        codes = {c for c, _ in each}
        print(
            name, len(codes), len(each), [sum(x[i] for _, x in each) / len(each) for i in range(3)]
        )
        by = {}
        for c, x in each:
            by.setdefault(c, []).append(x)
        print(
            "  per evidence",
            [sum(sum(x[i] for x in v) / len(v) for v in by.values()) / len(by) for i in range(3)],
        )
    good = sum((concluded(r["text"]) is not None) == r["ends"] for r in rows("endings.jsonl"))
    print("endings", good)
