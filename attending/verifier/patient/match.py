"""Which facts a doctor's message asks for: retrieval by concepts, without a model.

A question is compared with every phrasing of every fact, those that are not so included: what is
nearest to a fact that the patient does not have is answered with no, not with a neighbour.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

from attending.verifier.patient.case import Access, Case, Fact
from attending.verifier.patient.lexicon import concepts, table
from attending.verifier.sentences import sentences

UNKNOWN = 3.0  # weight of a word that no fact has: it speaks against every fact
ENOUGH = 0.40  # of the cosine, for a fact to be what is asked
ENOUGH_MORE = 0.62  # for a further fact, of what the first one leaves unexplained
TIE = 0.97  # of the best: then what was not told yet is meant


class Asked(NamedTuple):
    """What a message asks for."""

    facts: tuple[Fact, ...]  # in the order asked
    is_open: bool  # anything at all: "what brings you here?", "anything else?"
    is_order: bool  # an examination or a test is to be done


class Matcher:
    """Of one case."""

    def __init__(self, case: Case) -> None:
        """Index every phrasing; facts that nobody may reveal are never found."""
        self._facts = [fact for fact in case.facts if fact.access is not Access.NEVER]
        texts = [
            dict.fromkeys((*f.asks, *(() if f.asks else (f.text, f.says)))) for f in self._facts
        ]
        self._bags = [{concepts(text) for text in each} - {frozenset()} for each in texts]
        counts = Counter(c for bags in self._bags for c in frozenset().union(*bags))
        size = len(self._facts)
        self._weights = {c: math.log((size + 1) / (n + 0.5)) for c, n in counts.items()}

    def asked(self, message: str, told: Collection[str] = ()) -> Asked:
        """The facts asked for by a message; of near-equal ones, one not `told` yet."""
        is_order = any(map(_is_order, sentences(message)))
        found: dict[str, Fact] = {}
        for part in _questions(message):
            wanted = [*self._category(part, is_order)] or self._nearest(part, told, is_order)
            found.update({fact.id: fact for fact in wanted})
        if not found and len(parts := _questions(message)) > 1:  # one question in two sentences
            found = {fact.id: fact for fact in self._nearest(" ".join(parts), told, is_order)}
        is_open = not found and any(map(_is_open, _questions(message)))
        return Asked(tuple(found.values()), is_open, is_order)

    def _nearest(self, text: str, told: Collection[str], is_order: bool) -> list[Fact]:
        """The fact whose phrasing is nearest, then one that the rest of the words ask for."""
        found: list[Fact] = []
        left, enough = concepts(text), ENOUGH
        while left and len(found) < 3:
            ranked = sorted(
                (
                    (self.similarity(left, at), at)
                    for at, fact in enumerate(self._facts)
                    if (fact.access is Access.TELL) != is_order
                ),
                reverse=True,
            )
            best = ranked[0][0] if ranked else 0.0
            if best < enough:
                break
            near = [at for score, at in ranked if score >= TIE * best]
            at = next((at for at in near if self._facts[at].id not in told), near[0])
            found.append(self._facts[at])
            left, enough = left - frozenset().union(*self._bags[at]), ENOUGH_MORE
        return found

    def similarity(self, question: frozenset[str], at: int) -> float:
        """Cosine of weighted concept sets with the nearest phrasing of a fact."""
        weigh = self._weights
        size = sum(weigh.get(c, UNKNOWN) for c in question)
        return max(
            (
                sum(weigh[c] for c in question & bag) / math.sqrt(size * sum(weigh[c] for c in bag))
                for bag in self._bags[at]
                if question & bag
            ),
            default=0.0,
        )

    def _category(self, text: str, is_order: bool) -> Sequence[Fact]:
        """All present facts of a kind, where the question names the kind and nothing more."""
        for kind, phrases in table("cues")["kinds"].items():
            if any(concepts(phrase) == concepts(text) for phrase in phrases):
                return [
                    f
                    for f in self._facts
                    if f.kind == kind and f.present and (f.access is Access.TELL) != is_order
                ]
        return ()


def _questions(message: str) -> list[str]:
    """The sentences that ask or order something; all of them where none is marked as such."""
    parts = sentences(message)
    request = table("cues")["questions"]["request"]
    asking = [
        part
        for part in parts
        if part.rstrip(" \"'”’)").endswith(("?", "？"))
        or re.search(request, part, re.IGNORECASE)
        or _is_order(part)
    ]
    return asking or parts


def _is_open(part: str) -> bool:
    return bool(re.search(table("cues")["questions"]["open"], part, re.IGNORECASE))


def _is_order(part: str) -> bool:
    return bool(re.search(table("cues")["questions"]["order"], part, re.IGNORECASE))
