"""What the embedded patient says: a vignette's words in the first person, in a persona's manner.

The rewriting changes persons and nothing else: every number and every other word stays.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Literal

from attending.verifier.patient.case import Case, Fact, Persona
from attending.verifier.patient.lexicon import table

PEOPLE = r"(?:(?:the )?patient|the (?:woman|man|boy|girl|child|infant|newborn))"
SUBJECT, OWNER = rf"(?:{PEOPLE}|he|she)", rf"(?:{PEOPLE}[’']s|his|her)"
SAYS = (
    r"(?:also )?(?:reports?|states?|says|endorses|admits to|notes?|describes|complains of|mentions"
    r"|is complaining of|recalls|presents with|presents complaining of)(?: that| having)?"
)
AGED = re.compile(
    r"^(?:(?:the )?patient is )?(an? \d+[- ](?:year|month|week|day)s?[- ]old(?: [\w-]+){0,4}?"
    r"(?: (?:man|woman|male|female|boy|girl|infant|newborn|child|student|gravida|primigravida))+)\b"
    r"(?: (?=who|with))?",
    re.IGNORECASE,
)
VERBS = {"has": "have", "is": "am", "does": "do", "goes": "go", "was": "was", "doesn't": "don't"}
CAME = {
    "presents": "came",
    "comes": "came",
    "presented": "came",
    "came": "came",
    "is brought": "was brought",
    "was brought": "was brought",
    "complains of": "have",
    "complaining of": "have",
}


def first_person(
    text: str, informant: str = "", sex: Literal["female", "male"] | None = None
) -> str:
    """A fact about the patient as the patient says it; an informant says it of a third person."""
    text = text.strip()
    if denied := re.match(rf"^{SUBJECT} denies (?:any |having |ever )?(.+)$", text, re.IGNORECASE):
        is_deed = re.match(r"\w+ing\b", denied[1]) and informant == ""
        return f"No, I am not {denied[1]}" if is_deed else f"No, no {denied[1]}"
    who = "" if informant else "I"
    third = {"female": "She", "male": "He"}.get(sex or "", "The child")
    if aged := AGED.match(text):
        rest, subject = text[aged.end() :].strip(), who or third
        start = f"{subject} {'am' if who else 'is'} {aged[1][0].lower()}{aged[1][1:]}"
        for verb, put in CAME.items():
            if rest.startswith(f"{verb} "):
                return f"{start}. {subject} {put} {_persons(rest[len(verb) + 1 :], who)}"
        if re.match(r"(?:with|who|whose|and|in|at|on|of)\b|\W", rest) or not rest:
            return f"{start} {_persons(rest, who)}".strip().replace(" .", ".").replace(" ,", ",")
        return f"{start}. {_persons(f'He {rest}', who) if who else f'{subject} {rest}'}"
    said = re.match(rf"^{SUBJECT} {SAYS} (.+)$", text, re.IGNORECASE)
    if said and not informant:
        rest = said[1]
        is_clause = re.match(rf"(?:{SUBJECT}|{OWNER})\b", rest, re.IGNORECASE)
        text = rest if is_clause else f"Patient has {rest}"
    if informant:
        text = re.sub(
            r"^(?:the )?patient[’']s\b",
            {"She": "Her", "He": "His"}.get(third, "Its"),
            text,
            flags=re.I,
        )
        return re.sub(r"^(?:the )?patient\b", third, text, flags=re.IGNORECASE)
    text = _persons(text, who)
    return text[0].upper() + text[1:]


def _persons(text: str, who: str) -> str:
    """He to I, his to my, with the verb that follows; nothing where `who` is empty."""
    if not who:
        return text

    def subject(found: re.Match[str]) -> str:
        adverb, verb = found[1] or "", found[2] or ""
        return f"I{adverb}{' ' if verb else ''}{_agree(verb)}"

    text = re.sub(rf"\b{OWNER}\b(?= \w)", "my", text, flags=re.IGNORECASE)
    adverbs = r"( (?:also|currently|now|only|never|often|still|occasionally|usually|typically))?"
    text = re.sub(rf"\b{SUBJECT}\b{adverbs}(?: ([\w']+))?", subject, text, flags=re.IGNORECASE)
    text = re.sub(
        r"\b(and|but|or|though) (has|is|does|lives|works|feels|takes|drinks|smokes|uses|sees)\b",
        lambda found: f"{found[1]} {_agree(found[2])}",
        text,
    )
    return re.sub(r"\b(?:him|her)self\b", "myself", re.sub(r"\bhim\b", "me", text))


def _agree(verb: str) -> str:
    """The third person's verb in the first."""
    if verb in VERBS:
        return VERBS[verb]
    if re.search(r"(?:ss|sh|ch|x|o)es$", verb):
        return verb[:-2]
    return verb[:-1] if re.search(r"[a-z]{2}[^su]s$", verb) else verb


def lay(text: str, persona: Persona) -> str:
    """Lay words for medical ones, where the persona's literacy is low."""
    if persona.literacy == "low":
        for term, words in table("wording")["lay"].items():
            text = re.sub(rf"\b{term}\b", words, text, flags=re.IGNORECASE)
    return text


def pick(case: Case, turn: int, name: str, *groups: str) -> str:
    """One of the persona's phrases, the same on every run; empty where it has none."""
    found: Any = table("wording")[case.language]
    for group in groups:
        found = found[group]
    options = found.get(name, ())
    if not options or isinstance(options, str):
        return options or ""
    digest = hashlib.sha256(f"{case.id}/{turn}/{name}/{groups}".encode()).digest()
    return str(options[digest[0] % len(options)])


def reply(case: Case, facts: Sequence[Fact], turn: int) -> str:
    """The facts in the persona's manner: now and then an opening by mood, a closing by type."""
    persona = case.persona
    opening = pick(case, turn, "open", persona.emotion) if turn % 3 == 0 else ""
    letter = persona.mbti[turn % 4]
    closing = pick(case, turn, "close", letter) if turn % 2 == 1 else ""
    space = "" if case.language == "zh" else " "
    said = (lay(fact.says, persona) for fact in facts)
    return space.join(part for part in (opening, *said, closing) if part)
