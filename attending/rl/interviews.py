"""Simulated patients as cases of the third stage, and interviews with them to be tuned on first.

A small model that was never shown one does not ask; it cannot be reinforced for what it never does.
A scripted doctor, who reads the patient's record, asks what stands in it, one or two questions a
turn, in the record's own varied phrasings, among them what turns out not to be so, and concludes.
What it says is in `interview.toml`. A question that the patient would not understand, as its rules
read it, is not asked. Conditions and vignettes are held out by their names' hash: `names` decides
it for cases and interviews alike.
"""

import re
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from random import Random
from string import Template
from typing import Any

from attending.corpus.split import draw
from attending.errors import UsageError
from attending.rl.tasks import HELD_OUT, Part
from attending.rl.types import Case
from attending.verifier.patient.case import Access, Fact
from attending.verifier.patient.case import Case as PatientCase
from attending.verifier.patient.ddxplus import read_ddxplus
from attending.verifier.patient.find import find_case
from attending.verifier.patient.match import Matcher
from attending.verifier.patient.simulator import Patient, render
from attending.verifier.patient.vignette import read_vignettes
from attending.verifier.rubric.schema import read_lines

WORDS: Any = tomllib.loads((resources.files("attending.rl") / "interview.toml").read_text("utf-8"))
TESTED = "overlaps_medqa_or_mmlu_test"  # a vignette's field
TURNS, FEW = (3, 7), 2  # questions' turns of an interview; facts that the conclusion names
NOT_SO = 0.25  # share of the questions whose answer is no
TRIES = 4  # wordings of a question
MOST_TRIES = 10  # interviews begun for each that is wanted


def names(source: Path | None, part: Part) -> list[str]:
    """What `verifier.patient.find` calls the patients of one part, in order.

    Args:
        source: DDXPlus' folder, or a JSONL file of vignettes; those that stand in a test set are
            left out.
        part: One in five is held out.

    Raises:
        UsageError: There is no source.
    """
    if source is None:
        raise UsageError("patients are made of DDXPlus' tables or of vignettes: give --patients.")
    if source.is_dir():
        keys = sorted(read_ddxplus(source).conditions)
    else:
        tested = {str(r.get("id")) for _, r in read_lines(source) if r.get(TESTED)}
        found = (case.id.removeprefix("mediq-") for case in read_vignettes(source))
        keys = [key for key in found if key not in tested]
    is_last = part == "held_out"
    return [f"{source}:{k}" for k in keys if (draw("held out", k) % HELD_OUT == 0) == is_last]


def patients(source: Path | None, count: int, seed: int, part: Part) -> Iterator[Case]:
    """So many cases of the third stage, each another patient; UsageError if there are fewer."""
    own = names(source, part)
    if count > len(own):
        raise UsageError(f"there are {len(own)} patients of part {part!r}, not {count}.")
    for name in Random(f"patient/{seed}").sample(own, count):
        yield Case(f"patient/{name.rpartition(':')[2]}", (), "patient", patient=name)


async def interviews(
    source: Path | None, count: int, seed: int, part: Part = "train"
) -> list[dict[str, Any]]:
    """So many dialogues, as `attending sft` reads them; `seed` draws patients and words.

    Raises:
        UsageError: They would be of held-out patients, or fewer.
    """
    if part != "train":
        raise UsageError("interviews are to be learnt from: the held-out patients stay unseen.")
    own, found = names(source, "train"), list[dict[str, Any]]()
    for number in range(MOST_TRIES * count if own else 0):
        if len(found) == count:
            break
        rng = Random(f"interview/{seed}/{number}")
        name = rng.choice(own)
        if messages := await interview(find_case(name, rng.randrange(2**31)), rng):
            key = name.rpartition(":")[2]
            found.append({"id": f"{key}/{number}", "patient": key, "messages": messages})
    if len(found) < count:
        raise UsageError(f"the patients gave {len(found)} interviews of {count}: ask for fewer.")
    return found


async def interview(case: PatientCase, rng: Random) -> list[dict[str, str]]:
    """One, with the doctor's instructions; empty where less than two facts can be asked for."""
    patient, matcher, told = Patient(case), Matcher(case), set[str]()
    told |= {*patient.open().revealed}
    left = _order(case, rng)
    for _ in range(rng.randint(*TURNS)):
        asked = ""
        for place in range(rng.choice((1, 1, 2))):
            while left:
                fact = left.pop(0)
                if fact.id not in told and (said := _ask(matcher, fact, told, rng)):
                    lead = rng.choice(WORDS["second" if place and asked else "first"])
                    is_inner = lead and not lead.endswith(". ")
                    said = said[0].lower() + said[1:] if is_inner else said
                    asked += (" " if asked else "") + lead + said
                    break
        if not asked:
            break
        reply = await patient.answer(asked)
        if reply.end:
            return []
        told |= {*reply.revealed}
    known = [fact for fact in case.facts if fact.id in told and fact.present]
    if len(patient.turns) < 3 or len(known) < 2:
        return []
    rng.shuffle(known)
    said = " ".join(f'"{fact.says}"' for fact in known[:FEW])
    form = rng.choice(WORDS["end"]["known" if case.diagnosis else "unknown"])
    values = {"diagnosis": case.diagnosis, "said": said, "close": rng.choice(WORDS["end"]["close"])}
    if not (await patient.answer(Template(form).substitute(values))).end:
        return []  # the gate takes something that was said for a question
    system = {"role": "system", "content": render("doctor", case.language)}
    return [system, *patient.conversation[:-1]]


def _order(case: PatientCase, rng: Random) -> list[Fact]:
    """What is asked for, symptoms mostly first, a detail behind what it is of."""
    so = [fact for fact in case.of(Access.TELL) if fact.present]
    others = [f for f in case.of(Access.TELL) if not f.present and not f.detail_of and f.asks]
    picked = [*so, *rng.sample(others, min(len(others), round(NOT_SO * len(so))))]
    late = {fact.id: (fact.kind != "symptom") * 0.7 + rng.random() for fact in picked}
    behind = {fact.id: 1 + late[fact.detail_of] for fact in picked if fact.detail_of in late}
    return sorted(picked, key=lambda fact: late[fact.id] + behind.get(fact.id, 0))


def _ask(matcher: Matcher, fact: Fact, told: set[str], rng: Random) -> str:
    """A question that the patient takes to be about the fact; empty if none is found."""
    own = [text for text in fact.asks if re.match(WORDS["question"], text, re.I)]
    own = own or WORDS["kind"].get(fact.kind, WORDS["open"])
    for text in rng.sample(own, min(len(own), TRIES)):
        end = "." if text.startswith("Tell") else "?"
        asked: str = text[:1].upper() + text[1:].rstrip(" ?.") + end
        heard = matcher.heard(asked, told)
        if heard.is_open or any(fact.id == one.id for one in heard.told):
            return asked
    return ""
