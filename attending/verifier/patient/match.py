"""What a doctor's message asks for: retrieval by concepts, without a model.

A question is compared with every phrasing of every fact, those that are not so included: what is
nearest to a fact that the patient does not have is answered with no, not with a neighbour. An order
brings the findings that are about what is to be examined (`cues.toml`, topics).
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from attending.verifier.data import table
from attending.verifier.patient.case import Access, Case, Fact
from attending.verifier.patient.lexicon import concepts, stems
from attending.verifier.sentences import sentences

UNKNOWN = 3.0  # weight of a word that no fact has: it speaks against every fact
ENOUGH = 0.40  # of the cosine, for a fact to be what is asked
ENOUGH_APART = 0.85  # for one of several things that a question names
OWN = 0.3  # from which a thing named is a part of what the whole question is about
NEAR = 0.8  # of the best: the second is then as likely meant
SECOND = 0.3  # what a fact's second nearest phrasing counts
ALL = 0.95  # nothing in the question, nor in the phrasing, is left over
SAME = 1.05  # the very words of a phrasing
SAME_WORDS = 0.05  # added for the share of words, as they are, that two phrasings have in common
SINCE = re.compile(r"\b(?:hour|day|week|month|year)s?\b|\bsince\b|[天周月年]", re.IGNORECASE)


class Heard(NamedTuple):
    """What a message asks for."""

    told: tuple[Fact, ...]  # the patient's to tell, in the order asked
    found: tuple[Fact, ...]  # findings of what was ordered
    kinds: tuple[str, ...]  # kinds of facts asked for as a whole
    is_open: bool  # anything at all: "what brings you here?", "anything else?"
    is_order: bool  # an examination or a test is to be done
    is_unclear: bool  # a question has two readings


class Matcher:
    """Of one case."""

    def __init__(self, case: Case) -> None:
        """Index every phrasing of what the patient can tell."""
        self.facts = case.of(Access.TELL)
        self._findings = case.of(Access.EXAMINE)
        self._is_closed = any(not fact.present for fact in self.facts)
        self._bags = [self._bags_of(fact) for fact in self.facts]
        self._own = [frozenset[str]().union(*(bag for bag, _ in one)) for one in self._bags]
        counts = Counter(concept for own in self._own for concept in own)
        size = len(self.facts)
        self._weights = {c: math.log((size + 1) / (n + 0.5)) for c, n in counts.items()}

    def heard(self, message: str, told: Collection[str] = ()) -> Heard:
        """What a message asks for; of findings and near-equal facts first those not `told` yet."""
        asking = list(_questions(message))
        questions = [part for part in asking if not is_open(part) and not is_order(part)]
        orders = {part: self._findings_of(part, told) for part in asking if is_order(part)}
        found = {fact.id: fact for facts in orders.values() for fact in facts}
        kinds: dict[str, None] = {}
        answers: dict[str, Fact] = {}
        is_unclear = False
        for part in [*questions, *(part for part, facts in orders.items() if not facts)]:
            if kind := _kind(part):
                kinds[kind] = None
                own = [fact for fact in self.facts if fact.kind == kind]
                here = [fact for fact in own if fact.present] or (own if len(own) < 3 else [])
                answers.update({fact.id: fact for fact in here})
            else:
                wanted, unclear = self._wanted(part, told)
                answers.update({fact.id: fact for fact in wanted})
                is_unclear |= unclear and part not in orders
        if not answers and not kinds and len(questions) > 1:  # one question in two sentences
            answers = {fact.id: fact for fact in self._wanted(" ".join(questions), told)[0]}
        is_asked = any(map(is_open, asking))
        return Heard(
            (*answers.values(),), (*found.values(),), (*kinds,), is_asked, bool(orders), is_unclear
        )

    def similarity(self, text: str, at: int) -> float:
        """How near a text is to a fact's phrasings; at most `SAME`.

        The cosine of weighted concept sets with the nearest phrasing, and with the second; where
        several facts have the same concepts, the one that says it in the same words wins.
        """
        question, literal = concepts(text), frozenset(stems(text))
        first = second = 0.0
        for bag, word in self._bags[at]:
            if literal == word:
                return SAME
            if shared := question & bag:
                near = self._size(shared) / math.sqrt(self._size(question) * self._size(bag))
                near += SAME_WORDS * len(literal & word) / len(literal | word)
                first, second = max(first, near), max(second, min(first, near))
        return first if len(self._bags[at]) < 2 else (1 - SECOND) * first + SECOND * second

    def _size(self, words: frozenset[str]) -> float:
        return sum(self._weights.get(concept, UNKNOWN) for concept in words)

    def _bags_of(self, fact: Fact) -> list[tuple[frozenset[str], frozenset[str]]]:
        """Concepts and stems of each phrasing; without any, those of what the fact says."""
        texts = dict.fromkeys(fact.asks or (fact.text, fact.says))
        is_dated = not fact.asks and fact.kind != "person" and SINCE.search(fact.text)
        since = {"DURATION", "ONSET"} if is_dated else set[str]()
        return [(c | since, frozenset(stems(t))) for t in texts if (c := concepts(t))]

    def _wanted(self, part: str, told: Collection[str]) -> tuple[list[Fact], bool]:
        """The facts that a question is about, and whether it has two readings.

        First the whole question, then each of the things that it names.
        """
        whole, is_unclear = self._nearest(part, told, ENOUGH)
        if whole is None and concepts(part) <= {"DURATION", "ONSET", "LOCATION"}:
            return self._of_complaint(part), False
        found = [] if whole is None else [whole]
        apart = list(_things(part))
        if len(apart) > 1:
            at = self.facts.index(whole) if whole else -1
            enough = ENOUGH_APART if self._is_closed else ENOUGH
            each = [
                whole
                if whole and self.similarity(thing, at) >= OWN
                else self._nearest(thing, told, enough)[0]
                for thing in apart
            ]
            named = list({fact.id: fact for fact in each if fact}.values())
            found = named if len(named) > 1 else found
        return found, is_unclear and not found

    def _nearest(self, text: str, told: Collection[str], enough: float) -> tuple[Fact | None, bool]:
        """The fact whose phrasing is nearest; None, and that it is unclear, where two are as near.

        Only a closed record, as a questionnaire's is, makes a question unclear. Of a fact and its
        details the fact is meant, of details of one fact the nearest.
        """
        ranked = sorted(
            ((self.similarity(text, at), at) for at in range(len(self.facts))), reverse=True
        )
        if not ranked or ranked[0][0] < enough:
            return None, False
        best = ranked[0][0]
        near = [self.facts[at] for score, at in ranked if score >= NEAR * best]
        if len(near) == 1 or best >= SAME or (best >= ALL and near[0].detail_of and _alike(near)):
            return near[0], False
        whole = next((f for f in near if all(g is f or g.detail_of == f.id for g in near)), None)
        if whole and self.similarity(text, self.facts.index(whole)) >= ALL:
            return whole, False
        if self._is_closed:
            return None, True
        return next((fact for fact in near if fact.id not in told), near[0]), False

    def _of_complaint(self, part: str) -> list[Fact]:
        """Since when, or where, of nothing named: the first fact that says so."""
        asked = concepts(part)
        return [
            f for f, own in zip(self.facts, self._own, strict=True) if f.present and asked & own
        ][:1]

    def _findings_of(self, part: str, told: Collection[str]) -> list[Fact]:
        """What is found by an order: by phrasings of its own, by topic, or by kind."""
        kinds = {_kind(thing) for thing in (part, *_things(part))}
        words = concepts(part)
        tests, regions = (
            _topics(part, table("patient/cues")[name]) for name in ("tests", "topics")
        )
        found = []
        for fact in self._findings:
            is_test = fact.kind in ("test", "laboratory")
            topics = tests if is_test else [] if tests else regions
            if fact.present and (
                fact.kind in kinds
                or any(topic.search(fact.text) for topic in topics)
                or any(concepts(ask) and concepts(ask) <= words for ask in fact.asks)
            ):
                found.append(fact)
        return sorted(found, key=lambda fact: fact.id in told)


def _questions(message: str) -> Iterator[str]:
    """What asks or orders something, in clauses; all sentences where none is marked as such."""
    parts = sentences(message)
    request = table("patient/cues")["questions"]["request"]
    asking = [
        part
        for part in parts
        if part.rstrip(" \"'”’)").endswith(("?", "？"))
        or re.search(request, part, re.IGNORECASE)
        or is_order(part)
    ]
    for part in asking or parts:
        clauses = re.split(table("patient/cues")["questions"]["another"], part, flags=re.IGNORECASE)
        yield from clauses if concepts(clauses[0]) else [part]


def _things(part: str) -> Iterator[str]:
    """What a question names one beside another: "fever, chills or sweats"."""
    for thing in re.split(table("patient/cues")["questions"]["beside"], part, flags=re.IGNORECASE):
        if concepts(thing):
            yield thing


def _topics(part: str, table: Mapping[str, str]) -> list[re.Pattern[str]]:
    """The patterns that an order fits."""
    patterns = (re.compile(words, re.IGNORECASE) for words in table.values())
    return [pattern for pattern in patterns if pattern.search(part)]


def _alike(facts: Sequence[Fact]) -> bool:
    return len({fact.detail_of for fact in facts}) == 1


def _kind(part: str) -> str:
    """The kind of facts that a question names, where it asks for nothing more."""
    asked = concepts(part)
    kinds = table("patient/cues")["kinds"].items()
    named = (kind for kind, phrases in kinds if asked and asked in map(concepts, phrases))
    return next(named, "")


def is_open(part: str) -> bool:
    """Whether a question asks for anything at all."""
    return bool(re.search(table("patient/cues")["questions"]["open"], part, re.IGNORECASE))


def is_order(part: str) -> bool:
    """Whether an examination or a test is to be done."""
    return bool(re.search(table("patient/cues")["questions"]["order"], part, re.IGNORECASE))
