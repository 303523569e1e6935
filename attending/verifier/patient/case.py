"""A case: typed facts and the person who has them.

The file of a case of one's own is JSON, of the fields below. A fact's `access` says who brings it
into a consultation; nothing else does.
"""

import json
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import NonNegativeInt

from attending.config import Config
from attending.errors import ConfigError
from attending.verifier.data import table
from attending.verifier.patient.lexicon import concepts, denies
from attending.verifier.sentences import sentences

Language = Literal["en", "zh"]
NONE = re.compile(r"\b(?:takes?|has|have|uses?) no\b|\bdenies (?:any|all)\b", re.IGNORECASE)
MBTI = r"[EI][SN][TF][JP]"


class Access(StrEnum):
    """How a fact comes to be known in a consultation."""

    TELL = "tell"  # the patient, or who came along, says it when asked
    EXAMINE = "examine"  # only an examination or a test shows it
    NEVER = "never"  # nobody says it: the diagnosis, what is done later


class Fact(Config):
    """One thing that is so, or that is known not to be so."""

    id: str
    """Unique in its case."""
    text: str
    """As its source has it."""
    access: Access
    """Who brings it into the consultation."""
    kind: str = "symptom"
    """symptom, history, medication, allergy, family, social, person; vital, examination,
    laboratory, test."""
    says: str
    """What the patient says, or what is found, when it is asked for; a whole sentence."""
    asks: tuple[str, ...] = ()
    """Phrasings that ask for it; without any, its own words do."""
    detail_of: str = ""
    """The id of the fact that this one tells more about."""
    present: bool = True
    """False: known not to be so; `says` denies it."""


class Persona(Config):
    """Who tells the facts, and how: the script of Baichuan-M2 without its medical part."""

    mbti: str = "ISTJ"
    """One of the 16 types: E asks about treatment, F is moved by tone, and so on."""
    literacy: Literal["low", "average", "high"] = "average"
    """Of health: low says no medical term, high uses them."""
    finances: Literal["constrained", "average", "comfortable"] = "average"
    """Constrained: asks what things cost, and is slow to agree to costly ones."""
    emotion: Literal["calm", "anxious", "irritable", "sad"] = "calm"
    """How it is said."""
    background: str = ""
    """Social background, for an endpoint's wording. It must not contradict the facts."""
    age: NonNegativeInt | None = None
    """In years."""
    sex: Literal["female", "male"] | None = None
    """As the record has it."""
    informant: str = ""
    """Who speaks instead, e.g. mother; empty where the patient does."""


class Case(Config):
    """What a simulated patient is made of."""

    id: str
    """Its name in traces."""
    language: Language = "en"
    """Of the facts and of the conversation."""
    complaint: str
    """What the patient opens with, in their words; it may say one fact, never more."""
    facts: tuple[Fact, ...]
    """Everything that can be asked."""
    persona: Persona = Persona()
    """Who tells it."""
    diagnosis: str = ""
    """Never revealed; a rubric may use it."""
    reference: str = ""
    """A good last answer of the doctor, where one is known."""
    source: str = ""
    """Where the facts come from, with the licence."""

    @classmethod
    def build(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """As every record is built, and played: ConfigError for what no patient could play."""
        case = super().build(values, where)
        names = [fact.id for fact in case.facts]
        if twice := {name for name in names if names.count(name) > 1}:
            wrong = f"fact {min(twice)!r} is there twice; give each an id of its own"
        elif not any(fact.access is Access.TELL and fact.present for fact in case.facts):
            wrong = "it has no fact that the patient can tell; add one"
        elif not re.fullmatch(MBTI, case.persona.mbti):
            wrong = f"{case.persona.mbti!r} is none of the 16 MBTI types, such as ISTJ"
        elif against := conflict(case.persona, case.facts):
            wrong = f"the persona contradicts the record: {against}; change one of them"
        else:
            return case
        raise ConfigError(f"{where or 'case'} {case.id}: {wrong}.")

    def of(self, access: Access) -> tuple[Fact, ...]:
        """The facts with one kind of access."""
        return tuple(fact for fact in self.facts if fact.access is access)


def read_case(path: Path) -> Case:
    """A case of one's own; ConfigError for what is missing, unknown or contradictory."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path.name} is no JSON file of a case ({error}).") from None
    return Case.build(values, where=path.name)


def age_of(text: str) -> int | None:
    """In years, as a vignette gives the patient's: "47-year-old", "10 months old" (0)."""
    if re.search(
        r"\b(?:mother|father|son|daughter|sister|brother|husband|wife|partner)\b.*\d", text
    ):
        return None
    found = re.search(r"\b(\d{1,3})[- ]?(year|month|week|day)s?[- ](?:old|of age)\b|(\d+)岁", text)
    if not found:
        return None
    return int(found[1] or found[3]) if found[2] in ("year", None) else 0


def sex_of(text: str) -> Literal["female", "male"] | None:
    """As the first word tells it that names one."""
    female = r"woman|female|girl|lady|she|her|primigravida|gravida|pregnant|女"
    male = r"man|male|boy|gentleman|he|his|him|男"
    found = re.search(rf"\b(?:({female})|({male}))\b|([女])|([男])", text, re.IGNORECASE)
    return None if not found else "female" if found[1] or found[3] else "male"


def conflict(persona: Persona, facts: tuple[Fact, ...]) -> str:
    """Where a persona's age, sex or background is against the record; empty if nowhere."""
    background = persona.background
    record = " ".join(fact.text for fact in facts if fact.kind == "person" and fact.present)
    known = (age_of(record), sex_of(record))
    for given in ((persona.age, persona.sex), (age_of(background), sex_of(background))):
        for name, one, recorded in zip(("age", "sex"), given, known, strict=True):
            if one is not None and recorded is not None and one != recorded:
                return f"{name} {one}, not {recorded}"
    pregnant = r"(?i)^(?:the patient|patient|she|he) is (?:\w+ )?pregnant|^患者怀孕"
    if persona.sex == "male" and any(re.search(pregnant, f.text) for f in facts if f.present):
        return "a pregnant man"
    for sentence in sentences(background):
        own = concepts(sentence)
        for fact in facts:
            words, patterns = concepts(fact.text), table("patient/cues")["kind"]
            same = len(words & own) >= 0.6 * min(len(words), len(own)) > 0
            kind = patterns.get(fact.kind)  # "takes no medicines" is against any medicine
            same |= bool(kind and NONE.search(fact.text) and re.search(kind, sentence, re.I))
            if same and (denies(sentence) != denies(fact.text)) == fact.present:
                return f"{sentence!r} against {fact.text!r}"
    return ""
