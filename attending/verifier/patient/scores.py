"""How well a patient was played: Baichuan-M2's three scores (arXiv 2509.02208, 2.1), by rules.

M2 has a model judge them and publishes no prompt. Here privacy and facts are exact as far as a
statement is recognised (`factual.py`), whoever wrote it, and personification is what can be seen in
the words.
"""

import re
from collections.abc import Sequence
from statistics import fmean

from attending.verifier.data import table
from attending.verifier.patient import factual
from attending.verifier.patient.case import Access, Case
from attending.verifier.patient.faults import Fault
from attending.verifier.patient.simulator import Turn


def privacy_score(case: Case, turns: Sequence[Turn]) -> float | None:
    """Share of the answers that tell nothing but what was asked for; None without answers."""
    return _share_without(case, turns, {Fault.LEAK})


def fact_score(case: Case, turns: Sequence[Turn]) -> float | None:
    """Share of the answers that neither contradict the record nor invent; None without answers."""
    return _share_without(case, turns, {Fault.CONTRADICTION, Fault.FABRICATION})


def personification_score(case: Case, turns: Sequence[Turn]) -> float | None:
    """Mean of two halves: personality (initiative, warmth) and social background (words, money).

    Personality: an E asks something, an I asks nothing; an F shows a feeling, a T none. Social: of
    low literacy no medical term is said; who is short of money, and only they, speaks of it.
    """
    said = " ".join(turn.text for turn in turns)
    if not turns[1:]:
        return None
    signs, persona = table("patient/wording")["signs"][case.language], case.persona
    shows = {name: bool(re.search(words, said, re.IGNORECASE)) for name, words in signs.items()}
    asks = any(re.search("[?？]", turn.text) for turn in turns[1:])
    personality = [asks == (persona.mbti[0] == "E"), shows["feeling"] == (persona.mbti[2] == "F")]
    terms = [term for term in table("patient/wording")["lay"] if term in said.lower()]
    social = [not terms or persona.literacy != "low"]
    social += [not shows["money"] or persona.finances == "constrained"]
    return (fmean(personality) + fmean(social)) / 2


def _share_without(case: Case, turns: Sequence[Turn], wrong: set[Fault]) -> float | None:
    """Of the answers after the opening, the share that has none of some faults."""
    facts, told = {fact.id: fact for fact in case.facts}, {*(turns[0].revealed if turns else ())}
    good = []
    for turn in turns[1:]:
        meant = [facts[name] for name in turn.asked]
        spoken = turn.text.partition(table("patient/wording")[case.language]["findings"])[0]
        spoken_of = [fact for fact in meant if fact.access is Access.TELL]
        good.append(not wrong & {*factual.faults(case, spoken, spoken_of, told)})
        told |= {*turn.revealed}
    return fmean(good) if good else None
