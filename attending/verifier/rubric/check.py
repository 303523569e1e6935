"""Checks before a rubric is used: what it says twice, what has the wrong sign, whether it works.

The wording decides, by the lists in `words.toml`. What needs medical knowledge (is "Recommends
stopping insulin" good or bad?) is left to the judge, who must pass a reference and fail the rest.
"""

import asyncio
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, combinations
from typing import Literal, NamedTuple

from attending.errors import ConfigError
from attending.overlap import HAN, ngrams, normalise
from attending.verifier.data import table
from attending.verifier.judge.verdict import Judge
from attending.verifier.rubric.schema import Rubric
from attending.verifier.rubric.score import score

WORDS = table("rubric/words")
Kind = Literal["duplicate", "opposed", "mirrored", "sign", "gold", "empty", "wrong", "judge"]
ALIKE = 0.6  # Jaccard similarity of word pairs from which two statements may be one


def _starts(*names: str, many: str = "") -> re.Pattern[str]:
    words = "|".join(chain(*(WORDS[name] for name in names)))
    whole = r"(?!(?<=[a-z])[a-z])"  # English words end; Chinese ones just stop
    return re.compile(rf"\s*(?:(?:{words}){whole}[\s,:，：]*){many}", re.I)


SUBJECT, ABSENT, TELLING, VIRTUE = map(_starts, ("subject", "absent", "telling", "virtue"))
MAY_BE_RIGHT, FLAWED = _starts("absent_may_be_right"), _starts("flawed")
INTRODUCTION, FAULT = _starts("introduction", many="+"), _starts("fault", "flawed", "absent")
ENDING = re.compile(r"(?<=[a-z]{3})(?:ly|ing|(?<!e)ed|(?<![eiosu])s|es|e)$")  # of inflection alone
DRUG = re.compile(rf"[{HAN}]|{'|'.join(WORDS['drug'])}")
FUNCTION, NEGATION = frozenset(WORDS["function"]), frozenset(WORDS["negation"])


class Violation(NamedTuple):
    """One thing that is wrong with a rubric."""

    kind: Kind
    criteria: tuple[int, ...]  # their places in the rubric
    text: str


class Admission(NamedTuple):
    """Whether a rubric may be used, and why not."""

    reasons: tuple[Violation, ...]
    scores: tuple[float | None, ...]  # of the reference, the empty answer, and each wrong one

    @property
    def is_admitted(self) -> bool:
        """Nothing speaks against it."""
        return not self.reasons


class _Statement(NamedTuple):
    """What a criterion is about, without the words that introduce it."""

    is_absent: bool  # the criterion is met where it is not said
    words: Counter[str]  # without function words and endings
    turned: tuple[str, ...]  # numbers and negations
    pairs: frozenset[int]


def check(rubric: Rubric) -> list[Violation]:
    """Everything that the wording shows."""
    return [*repeats(rubric), *signs(rubric)]


def refuse(rubric: Rubric) -> None:
    """Raise ConfigError for a criterion that is there twice, or both wanted and unwanted."""
    found = [one.text for one in repeats(rubric) if one.kind != "mirrored"]
    if found:
        raise ConfigError(
            f"rubric {rubric.name!r}: {' '.join(found)} Each statement counts once: remove one."
        )


def repeats(rubric: Rubric) -> Iterator[Violation]:
    """Pairs of criteria about one statement.

    Two statements are one if, after their introductions ("States that", "Fails to mention"), they
    have the same numbers and negations, neither or only one of them has content words of its own,
    none of those may be a drug's, and at least `ALIKE` of their word pairs are common: 5 mg is not
    10 mg, nor prednisone prednisolone. `duplicate`: both say it with one sign. `opposed`: who says
    it wins points by one and loses them by the other. `mirrored`: its presence earns points and its
    absence costs some, so it counts twice; HealthBench does that on purpose.
    """
    statements = [_statement(one.text) for one in rubric.criteria]
    for (i, a), (j, b) in combinations(enumerate(statements), 2):
        own = (a.words - b.words, b.words - a.words)
        is_other = a.turned != b.turned or all(own) or any(map(DRUG.fullmatch, chain(*own)))
        if is_other or len(a.pairs & b.pairs) < ALIKE * len(a.pairs | b.pairs):
            continue
        is_one_sign = (rubric.criteria[i].points > 0) == (rubric.criteria[j].points > 0)
        kind: Kind = "duplicate" if is_one_sign else "mirrored"
        if is_one_sign != (a.is_absent == b.is_absent):
            kind = "opposed"
        texts = " and ".join(f"{k + 1} {rubric.criteria[k].text[:80]!r}" for k in (i, j))
        yield Violation(kind, (i, j), f"criteria {texts} are {kind}.")


def signs(rubric: Rubric) -> Iterator[Violation]:
    """Criteria whose points do not fit their wording.

    A negative criterion describes what a bad answer does ("Fails to ...", "Incorrectly states
    ..."), a positive one what a good answer does. "Does not recommend antibiotics" may be either.
    """
    for place, one in enumerate(rubric.criteria):
        words = fault_or_virtue(one.text)
        if words == ("fault" if one.points > 0 else "virtue"):
            told = f"criterion {place + 1} {one.text[:80]!r} has {one.points:+d} points"
            yield Violation("sign", (place,), f"{told}, but describes a {words}.")


async def admit(
    rubric: Rubric,
    judge: Judge,
    gold: str,
    wrong: Sequence[str] = (),
    *,
    least: float = 0.6,
    most: float = 0.4,
    margin: float = 0.3,
) -> Admission:
    """Whether the judge, with this rubric, tells a good answer from none and from wrong ones.

    The reference must `score` at least `least`; the empty answer and each wrong one at most `most`
    and `margin` below the reference. The judge is asked about the empty answer as about any other:
    one that finds something in nothing must not be used. A verdict that is missing admits nothing.
    """
    reasons = [one for one in check(rubric) if one.kind != "mirrored"]
    wanted = [one.points > 0 for one in rubric.criteria]
    if not any(wanted):
        none = Violation("gold", (), "no criterion has positive points: nothing is wanted.")
        return Admission((*reasons, none), ())
    names: list[tuple[Kind, str]] = [("gold", "the reference"), ("empty", "the empty answer")]
    names += [("wrong", f"wrong answer {number}") for number in range(1, len(wrong) + 1)]
    answers = (gold, "", *wrong)
    verdicts = await asyncio.gather(*(judge(rubric, answer) for answer in answers))
    met = [[verdict.met for verdict in each] for each in verdicts]
    scores = [score(rubric.criteria, each) for each in met]
    reference = scores[0]
    limit = most if reference is None or reference < least else min(most, reference - margin)
    for (kind, name), each, value in zip(names, met, scores, strict=True):
        is_gold = kind == "gold"
        if value is None:
            places = [place for place, is_met in enumerate(each) if is_met is None]
            told = f"the judge left {len(places)} criteria of {name} unscored."
            reasons.append(Violation("judge", tuple(places), told))
        elif (value < least) if is_gold else (value > limit):
            places = [p for p, is_met in enumerate(each) if (is_met == wanted[p]) != is_gold]
            expected = f"at least {least:.2f}" if is_gold else f"at most {limit:.2f}"
            told = f"{name} scores {value:.2f}, expected {expected}."
            reasons.append(Violation(kind, tuple(places), told))
    return Admission(tuple(reasons), tuple(scores))


def fault_or_virtue(text: str) -> str:
    """What a criterion's wording describes; empty where it may be either."""
    text = SUBJECT.sub("", text, count=1) if SUBJECT.match(text) else text
    if missing := ABSENT.match(text):
        may_be_right, rest = MAY_BE_RIGHT.match(text), text[missing.end() :]
        if any(map(FLAWED.match, (rest, f"gives {rest}"))) or (may_be_right and FAULT.match(rest)):
            return "virtue"  # a fault that is not there
        return "" if may_be_right and not TELLING.match(rest) else "fault"
    return "fault" if FAULT.match(text) else "virtue" if VIRTUE.match(text) else ""


def _statement(text: str) -> _Statement:
    tokens, is_absent = normalise(text), False
    for start in (SUBJECT, ABSENT, INTRODUCTION):
        if begin := start.match(text):
            text, is_absent = text[begin.end() :], is_absent or start is ABSENT
    tokens = normalise(text) or tokens
    turned = sorted(t for t in tokens if t in NEGATION or any(map(str.isdigit, t)))
    words = [ENDING.sub("", token) for token in tokens if token not in FUNCTION]
    pairs = frozenset(ngrams(words, 2).tolist())
    return _Statement(is_absent, Counter(words), tuple(turned), pairs)
