"""Which facts a doctor's message asks for: retrieval by concepts, without a model.

A question is compared with every phrasing of every fact, those that are not so included: what is
nearest to a fact that the patient does not have is answered with no, not with a neighbour.
"""

import math
import re
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from attending.verifier.patient.case import Access, Case, Fact
from attending.verifier.patient.lexicon import concepts, stems, table
from attending.verifier.sentences import sentences

UNKNOWN = 3.0  # weight of a word that no fact has: it speaks against every fact
ENOUGH = 0.40  # of the cosine, for a fact to be what is asked
ENOUGH_MORE = 0.75  # for a further fact, of what the first one leaves unexplained
NEAR = 0.8  # of the best: the second is then as likely meant
SECOND = 0.3  # what a fact's second nearest phrasing counts
SAME = 1.05  # the very words of a phrasing
SAME_WORDS = 0.05  # added for the share of words, as they are, that two phrasings have in common


class Heard(NamedTuple):
    """What a message asks for."""

    facts: tuple[Fact, ...]  # in the order asked
    kinds: tuple[str, ...]  # kinds of facts asked for as a whole
    is_open: bool  # anything at all: "what brings you here?", "anything else?"
    is_order: bool  # an examination or a test is to be done


class Matcher:
    """Of one case."""

    def __init__(self, case: Case) -> None:
        """Index every phrasing; facts that nobody may reveal are never found."""
        self._facts = [fact for fact in case.facts if fact.access is not Access.NEVER]
        self._is_closed = any(not fact.present for fact in self._facts)
        texts = [dict.fromkeys(fact.asks or (fact.text, fact.says)) for fact in self._facts]
        self._bags = [
            [(c, frozenset(stems(t))) for t in one if (c := concepts(t))] for one in texts
        ]
        self._said = [tuple(map(concepts, (fact.says, fact.text))) for fact in self._facts]
        self._own = [frozenset[str]().union(*(bag for bag, _ in one)) for one in self._bags]
        counts = Counter(concept for own in self._own for concept in own)
        size = len(self._facts)
        self._weights = {c: math.log((size + 1) / (n + 0.5)) for c, n in counts.items()}

    def asked(self, message: str, told: Collection[str] = ()) -> Heard:
        """The facts asked for by a message; of near-equal ones, one not `told` yet."""
        asking = _questions(message)
        firsts = {clauses[0] for clauses in asking}
        parts = [clause for clauses in asking for clause in clauses]
        closed = [part for part in parts if not _is_open(part)]
        kinds = {part: named for part in closed if (named := _kind(part))}
        found: dict[str, Fact] = {}
        for part in closed:
            if part in kinds:
                wanted = self._of_kind(part, kinds[part])
            else:
                wanted = self._nearest(part, told, ENOUGH if part in firsts else ENOUGH_MORE)
            found.update({fact.id: fact for fact in wanted})
        if not found and not kinds and len(closed) > 1:  # one question in two sentences
            found = {fact.id: fact for fact in self._nearest(" ".join(closed), told)}
        is_ordered = any(map(is_order, parts))
        return Heard(tuple(found.values()), tuple(kinds.values()), closed != parts, is_ordered)

    def similarity(self, text: str, at: int, words: frozenset[str] | None = None) -> float:
        """How near a text, or some of its concepts, is to a fact's phrasings; at most `SAME`.

        The cosine of weighted concept sets with the nearest phrasing, and with the second; where
        several facts have the same concepts, the one that says it in the same words wins.
        """
        question = concepts(text) if words is None else words
        size, weigh, literal = self._size(question), self._weights, frozenset(stems(text))
        first = second = 0.0
        for bag, word in self._bags[at]:
            if shared := question & bag:
                near = sum(weigh[c] for c in shared) / math.sqrt(size * self._size(bag))
                near += SAME_WORDS * len(literal & word) / len(literal | word)
                if literal == word:
                    return SAME
                first, second = max(first, near), max(second, min(first, near))
        return first if len(self._bags[at]) < 2 else (1 - SECOND) * first + SECOND * second

    def _size(self, words: frozenset[str]) -> float:
        return sum(self._weights.get(concept, UNKNOWN) for concept in words)

    def stated(self, text: str) -> tuple[float, Fact] | None:
        """The fact of any access whose words a statement is nearest to, and the cosine."""
        said = concepts(text)

        def near(at: int) -> float:
            return max(
                sum(self._weights.get(c, UNKNOWN) for c in said & own)
                / (math.sqrt(self._size(said) * self._size(own)) or 1.0)
                for own in self._said[at]
            )

        best, at = max(((near(at), at) for at in range(len(self._facts))), default=(0.0, -1))
        return (best, self._facts[at]) if best else None

    def _nearest(self, text: str, told: Collection[str], enough: float = ENOUGH) -> list[Fact]:
        """The fact whose phrasing is nearest, then one that the rest of the words ask for.

        Where the record is closed, as a questionnaire's is, two that are as near are two readings
        of the question: then none is meant, and the doctor is to ask again.
        """
        found: list[Fact] = []
        left, able = concepts(text), self._able(text)
        while left and len(found) < 3:
            ranked = sorted(((self.similarity(text, at, left), at) for at in able), reverse=True)
            if not ranked or ranked[0][0] < enough:
                break
            near = [at for score, at in ranked if score >= NEAR * ranked[0][0]]
            if self._is_closed and len(near) > 1 and ranked[0][0] < SAME:
                break
            at = next((at for at in near if self._facts[at].id not in told), near[0])
            found.append(self._facts[at])
            left, enough = (left - self._own[at]) & self._weights.keys(), ENOUGH_MORE
        return found

    def _of_kind(self, text: str, kind: str) -> list[Fact]:
        """All present facts of a kind that the question can bring out."""
        facts = (self._facts[at] for at in self._able(text))
        return [fact for fact in facts if fact.kind == kind and fact.present]

    def _able(self, text: str) -> list[int]:
        """What a question can bring out: findings for an order, else what the patient tells."""
        wanted = Access.EXAMINE if is_order(text) else Access.TELL
        return [at for at, fact in enumerate(self._facts) if fact.access is wanted]


def _questions(message: str) -> list[list[str]]:
    """The sentences that ask or order something, in clauses; all of them if none is marked so."""
    parts = sentences(message)
    request = table("cues")["questions"]["request"]
    asking = [
        part
        for part in parts
        if part.rstrip(" \"'”’)").endswith(("?", "？"))
        or re.search(request, part, re.IGNORECASE)
        or is_order(part)
    ]
    return [_clauses(part) for part in asking or parts]


def _clauses(part: str) -> list[str]:
    """The questions of a sentence; an order's parts, each an order by itself."""
    if not is_order(part):
        clauses = re.split(table("cues")["questions"]["another"], part, flags=re.IGNORECASE)
        return clauses if concepts(clauses[0]) else [part]
    verb = re.search(table("cues")["questions"]["order"], part, re.IGNORECASE)
    first, *rest = re.split(r",\s*(?:and )?|\band\b|[，、；]|再|并", part)
    return [first, *(one if is_order(one) else f"{verb[0] if verb else ''} {one}" for one in rest)]


def _kind(part: str) -> str:
    """The kind of facts that a question names, where it asks for nothing more."""
    asked = concepts(part)
    kinds = table("cues")["kinds"].items()
    return next((kind for kind, phrases in kinds if asked in map(concepts, phrases)), "")


def _is_open(part: str) -> bool:
    return bool(re.search(table("cues")["questions"]["open"], part, re.IGNORECASE))


def is_order(part: str) -> bool:
    """Whether an examination or a test is to be done."""
    return bool(re.search(table("cues")["questions"]["order"], part, re.IGNORECASE))
