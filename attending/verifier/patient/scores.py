"""How well a patient was played: Baichuan-M2's three scores (arXiv 2509.02208, 2.1), by rules.

M2 has a model judge them and publishes no prompt. Here privacy and facts are exact as far as a
statement is recognised (`Patient.revealed`), and personification is what can be seen in the words.
"""

import re
from collections.abc import Sequence
from statistics import fmean

from attending.verifier.patient.case import Case
from attending.verifier.patient.faults import Fault
from attending.verifier.patient.lexicon import table
from attending.verifier.patient.simulator import Turn


def privacy_score(turns: Sequence[Turn]) -> float | None:
    """Share of the answers that tell nothing but what was asked for; None without answers."""
    return fmean(not {*t.revealed} - {*t.asked} for t in turns[1:]) if turns[1:] else None


def fact_score(turns: Sequence[Turn]) -> float | None:
    """Share of the answers that neither contradict the record nor invent; None without answers."""
    wrong = {Fault.CONTRADICTION, Fault.FABRICATION}
    return fmean(not wrong & {*turn.said_faults} for turn in turns[1:]) if turns[1:] else None


def personification_score(case: Case, turns: Sequence[Turn]) -> float | None:
    """Mean of two halves: personality (initiative, warmth) and social background (words, money).

    Personality: an E asks something, an I asks nothing; an F shows a feeling, a T none. Social: of
    low literacy no medical term is said; who is short of money, and only they, speaks of it.
    """
    said = " ".join(turn.text for turn in turns)
    if not turns[1:]:
        return None
    signs, persona = table("wording")["signs"][case.language], case.persona
    shows = {name: bool(re.search(words, said, re.IGNORECASE)) for name, words in signs.items()}
    asks = any(re.search("[?？]", turn.text) for turn in turns[1:])
    personality = [asks == (persona.mbti[0] == "E"), shows["feeling"] == (persona.mbti[2] == "F")]
    terms = [term for term in table("wording")["lay"] if term in said.lower()]
    social = [not terms or persona.literacy != "low"]
    social += [not shows["money"] or persona.finances == "constrained"]
    return (fmean(personality) + fmean(social)) / 2
