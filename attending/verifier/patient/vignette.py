"""Cases from vignettes with atomic facts, as MediQ has them (Li et al., NeurIPS 2024).

Every atomic fact becomes one fact, in its own words. Who brings it into a consultation is decided
by patterns (`cues.toml`): what no pattern tells is the patient's, unless findings came before.
"""

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attending.errors import ConfigError
from attending.verifier.data import table
from attending.verifier.patient.case import Access, Case, Fact, age_of, sex_of
from attending.verifier.patient.persona import draw_persona
from attending.verifier.patient.speech import first_person

NUMBER = re.compile(r"^\s*\d+\.\s*")


def access_of(texts: Sequence[str]) -> list[tuple[Access, str]]:
    """For each fact of one vignette, in its order: who brings it in, and its kind."""
    cues, kinds = table("patient/cues")["access"], table("patient/cues")["kind"]
    found: list[tuple[Access, str]] = []
    for text in texts:
        hits = {name for name, cue in cues.items() if re.search(cue, text, re.IGNORECASE)}
        seen = bool(found) and found[-1][0] is Access.EXAMINE
        findings = [name for name in ("laboratory", "test", "vital", "examination") if name in hits]
        if "conclude" in hits and "told" not in hits:
            found.append((Access.NEVER, "conclusion"))
        elif findings and ("told" not in hits or seen):
            found.append((Access.EXAMINE, findings[0]))
        elif seen and "told" not in hits:
            found.append((Access.EXAMINE, found[-1][1]))
        else:
            told = (name for name, cue in kinds.items() if re.search(cue, text, re.IGNORECASE))
            found.append(
                (Access.TELL, "person" if age_of(text) is not None else next(told, "symptom"))
            )
    return found


def read_vignette(row: Mapping[str, Any], seed: int = 0) -> Case:
    """A case of a row with `id`, `facts` (numbered sentences), `answer` and `question`.

    What the question's answer says is never revealed, whoever could know it.
    """
    try:
        texts = [NUMBER.sub("", fact) for fact in row["facts"]]
        name, answer = f"mediq-{row['id']}", str(row.get("answer") or "")
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"a vignette needs `id` and `facts`, a list of texts: {error!r}"
        ) from None
    record = " ".join(texts)
    person = next((text for text in texts if age_of(text) is not None), record)
    gender = str((row.get("patient") or {}).get("gender", "")).lower()
    age, sex = age_of(person), sex_of(person) or sex_of(gender)
    persona = draw_persona(random.Random(f"{seed}/{name}"), age, sex, record)
    facts: list[Fact] = []
    for at, (text, (access, kind)) in enumerate(zip(texts, access_of(texts), strict=True)):
        if answer and len(answer) > 3 and answer.lower() in text.lower():
            access, kind = Access.NEVER, "conclusion"
        says = text if access is not Access.TELL else first_person(text, persona.informant, sex)
        facts.append(Fact(id=f"F{at + 1}", text=text, access=access, kind=kind, says=says))
    told = [fact for fact in facts if fact.access is Access.TELL]
    if not told:
        raise ConfigError(f"{name} has no fact that a patient could tell.")
    symptoms = [fact for fact in told if fact.kind == "symptom"] or told
    first = next(
        (f for f in symptoms if re.match(r"(?:I|My|We|He|She|His|Her)\b", f.says)), symptoms[0]
    )
    return Case.build(
        {
            "id": name,
            "complaint": first.says,
            "facts": tuple(facts),
            "persona": persona,
            "diagnosis": answer if "diagnosis" in str(row.get("question")) else "",
            "source": "MediQ (MedQA development questions), CC BY 4.0",
        }
    )


def read_vignettes(path: Path, seed: int = 0) -> Iterator[Case]:
    """The cases of a JSONL file, one at a time; rows that no patient could play are left out."""
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.strip():
            row = json.loads(line)
            texts = [NUMBER.sub("", fact) for fact in row["facts"]]
            if any(access is Access.TELL for access, _ in access_of(texts)):
                yield read_vignette(row, seed)
