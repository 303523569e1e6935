"""The factual unit's rules: what a reply states, and whether it may.

They read any wording, whoever wrote it. What they cannot see is a statement in words that no fact
has and no number: that is the model's part (`prompts/factual.*.jinja`).
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cache

from attending.verifier.data import table
from attending.verifier.patient.case import Case, Fact
from attending.verifier.patient.faults import Fault
from attending.verifier.patient.lexicon import concepts, denies
from attending.verifier.sentences import sentences

LEAKED = 0.6  # cosine from which a sentence states a fact
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def revealed(case: Case, text: str, meant: Sequence[Fact] = ()) -> tuple[str, ...]:
    """Ids of the facts that a reply states: those meant, as far as said, and any it is near.

    Questions and the patient's stock phrases (`wording.toml`) state nothing.
    """
    found: dict[str, None] = {}
    for part in _statements(text):
        words = concepts(part)
        said = [fact.id for fact in meant if _share(words, fact) >= 0.5]
        if not said and not denies(part):
            facts = [fact for fact in case.facts if fact.present]
            near = max(facts, key=lambda fact: _cosine(words, fact), default=None)
            said = [near.id] if near and _cosine(words, near) >= LEAKED else []
        found.update(dict.fromkeys(said))
    return tuple(found)


def faults(
    case: Case, text: str, meant: Sequence[Fact] = (), told: Collection[str] = ()
) -> list[Fault]:
    """Of a wording of some facts, given those told before.

    A leak states a fact that was neither meant nor told; a contradiction denies a fact that is
    meant, or the reverse; a fabrication has a number that is in none of them.
    """
    found = []
    if {*revealed(case, text, meant)} - {fact.id for fact in meant} - {*told}:
        found.append(Fault.LEAK)
    turned = (
        _share(concepts(fact.says), part) >= 0.7 and denies(part) != denies(fact.says)
        for part in _statements(text)
        for fact in meant
    )
    if any(turned):
        found.append(Fault.CONTRADICTION)
    known = [fact for fact in case.facts if fact.id in told] + list(meant)
    stated = " ".join([*(f"{fact.text} {fact.says}" for fact in known), case.complaint])
    if {*NUMBER.findall(text)} - {*NUMBER.findall(stated)}:
        found.append(Fault.FABRICATION)
    return found


def _statements(text: str) -> Iterator[str]:
    for part in sentences(text):
        if not part.rstrip().endswith(("?", "？")) and part.strip() not in _stock():
            yield part


def _share(words: frozenset[str], other: Fact | str) -> float:
    """Of the words, those that another statement has."""
    own = concepts(other if isinstance(other, str) else other.says)
    return len(words & own) / len(words) if words else 0.0


def _cosine(words: frozenset[str], fact: Fact) -> float:
    sides = [concepts(fact.says), concepts(fact.text)]
    return max(len(words & own) / math.sqrt(len(words) * len(own) or 1.0) for own in sides)


@cache
def _stock() -> frozenset[str]:
    """Every phrase of the wording's table, sentence by sentence."""

    def phrases(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield from sentences(value)
        elif isinstance(value, list):
            for each in value:
                yield from phrases(each)
        elif isinstance(value, dict):
            for each in value.values():
                yield from phrases(each)

    return frozenset(phrases([table("patient/wording")["en"], table("patient/wording")["zh"]]))
