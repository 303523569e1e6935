"""Cases drawn from DDXPlus' conditions and evidences (Fansi Tchango et al., NeurIPS 2022).

Its published tables hold no prevalence, age or sex, and no frequency of an evidence: all are drawn
uniformly here, so these cases say nothing about any population. Whatever a condition does not list
is not so. What the patient says, and the ways it is asked for, are ours (`ddxplus.toml`).
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attending.errors import ConfigError
from attending.verifier.data import table
from attending.verifier.patient.case import Access, Case, Fact
from attending.verifier.patient.persona import draw_persona

AGES = (18, 90)
Rows = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class DDXPlus:
    """The two published tables: `release_conditions.json` and `release_evidences.json`."""

    conditions: Rows
    evidences: Rows

    @classmethod
    def read(cls, conditions: Path, evidences: Path) -> "DDXPlus":
        """Both files; ConfigError for what is not theirs or has evidences without words here."""
        try:
            both = [
                json.loads(file.read_text(encoding="utf-8")) for file in (conditions, evidences)
            ]
            listed = [row[part] for row in both[0].values() for part in ("symptoms", "antecedents")]
            named = set().union(*listed)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{conditions.name}: not DDXPlus' tables ({error!r}).") from None
        unknown = sorted(
            (named | both[1].keys()) - table("patient/ddxplus").keys() | named - both[1].keys()
        )
        if unknown:
            raise ConfigError(f"{evidences.name} has evidences without words here: {unknown[:5]}.")
        return cls(*both)

    def draw(self, seed: int, condition: str = "", share: float = 0.5) -> Case:
        """A case of a condition, or of one drawn; the same for the same seed.

        Args:
            condition: A key of the conditions' table.
            share: Probability that an evidence which the condition lists is so.
        """
        draw = random.Random(f"{seed}/{condition}/{share}")
        name = condition or draw.choice(sorted(self.conditions))
        if name not in self.conditions:
            raise ConfigError(
                f"no condition {name!r}; known: {', '.join(sorted(self.conditions))}."
            )
        sex, age = draw.choice(("female", "male")), draw.randint(*AGES)
        row = self.conditions[name]
        listed = [code for code in (*row["symptoms"], *row["antecedents"]) if self._fits(code, sex)]
        so = {code for code in listed if draw.random() < share}
        first = next((c for c in row["symptoms"] if c in so and self._parent(c) == c), None)
        if first is None:  # every patient comes with something
            first = next(c for c in (*row["symptoms"], *row["antecedents"]) if self._fits(c, sex))
        so.add(first)
        so |= {self._parent(code) for code in so} & self.evidences.keys()
        so |= {code for code in listed if self._parent(code) in so}  # whose pain has no place?
        facts = [self._fact(code, so, sex, draw) for code in self.evidences]
        complaint = next(fact for fact in facts if fact.id == first)
        return Case.build(
            {
                "id": f"ddxplus-{name}-{seed}".replace(" ", "_"),
                "complaint": complaint.says,
                "facts": (*facts, _age_fact(age, sex)),
                "persona": draw_persona(draw, age, sex),  # type: ignore[arg-type]
                "diagnosis": row["condition_name"],
                "source": "DDXPlus, CC BY 4.0; prevalence, age, sex and evidences drawn uniformly",
            }
        )

    def _parent(self, code: str) -> str:
        return str(self.evidences[code]["code_question"])

    def _fits(self, code: str, sex: str) -> bool:
        return sex == "female" or code not in table("patient/ddxplus")["female"]

    def _fact(self, code: str, so: set[str], sex: str, draw: random.Random) -> Fact:
        """An evidence with a value drawn, its denial, or no idea where only its parent is so."""
        row, words, parent = (
            self.evidences[code],
            table("patient/ddxplus")[code],
            self._parent(code),
        )
        question = row["question_en"].strip()
        text, asks = f"{question} No.", (question, *words["asks"])
        says = table("patient/ddxplus")["vague"] if parent in so - {code} else words["deny"]
        if code in so:
            meanings = {key: each["en"] for key, each in row["value_meaning"].items()}
            nothing = table("patient/ddxplus")["nothing"]
            other = table("patient/ddxplus")["only"]["male" if sex == "female" else "female"]
            options = [v for v in row["possible-values"] if meanings.get(v, v) not in nothing]
            options = [v for v in options if not re.search(other, str(meanings.get(v, v)))]
            value = draw.choice(options) if options else ""
            meaning = str(meanings.get(value, value))
            better = table("patient/ddxplus")["locations"] | words.get("values", {})
            said = better.get(meaning, meaning)
            text = f"{question} {meaning or 'Yes.'}"
            says = words["tell"].replace("{value}", said)
            asks += tuple(form.replace("{value}", said) for form in words.get("asks_value", ()))
        return Fact(
            id=code,
            text=text,
            access=Access.TELL,
            kind=words["kind"],
            says=says,
            asks=asks,
            detail_of=parent if parent in self.evidences and parent != code else "",
            present=code in so,
        )


def _age_fact(age: int, sex: str) -> Fact:
    return Fact(
        id="person",
        text=f"The patient is {sex} and {age} years old.",
        access=Access.TELL,
        kind="person",
        says=f"I am {age} years old.",
        asks=("how old are you", "what is your age", "your date of birth", "age"),
    )


def read_ddxplus(folder: Path) -> DDXPlus:
    """Both tables of a folder, under the names that the data set or this project gives them."""
    found: list[Path] = []
    for kind in ("conditions", "evidences"):
        names: Sequence[str] = (f"ddxplus_{kind}.json", f"release_{kind}.json")
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise ConfigError(f"{folder.name} has none of {', '.join(names)}.")
        found.append(path)
    return DDXPlus.read(*found)
