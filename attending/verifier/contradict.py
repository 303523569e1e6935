"""Constructed contradictions of a medical statement, by rules alone: hard negatives for judges.

A rule that is not sure keeps silent: no contradiction is better than one that is still true. Words
and their opposites are in `contradict.toml`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

from attending.verifier.data import table

WORDS = table("contradict")
NEGATION = WORDS["negation"]
FLAGS = re.IGNORECASE | re.ASCII  # in Unicode an i is more than one letter
OPPOSITE: dict[str, str] = {}
for left, right in [*WORDS["opposites"]["pairs"], *WORDS["opposites"]["one_way"].items()]:
    OPPOSITE.setdefault(left, right)
    if left not in WORDS["opposites"]["one_way"]:
        OPPOSITE.setdefault(right, left)


def _any(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(words, key=len, reverse=True)))


def _pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Whole words; Chinese writes no spaces between its own."""
    han, latin = ([w for w in words if w.isascii() is flag] for flag in (False, True))
    return re.compile(rf"(?<![\w-])(?:{_any(latin)})(?![\w-])|{_any(han) or '(?!)'}", FLAGS)


AUXILIARY = re.compile(
    rf"\b(?:(?P<sub>{'|'.join(NEGATION['subordinators'])})|(?P<aux>{_any(NEGATION['auxiliaries'])})"
    r"|(?P<perfect>has|have)(?= (?:also |often |usually )?(?:been|had|\w+ed)\b)|(?P<own>has|have)"
    rf"|(?P<third>{_any(NEGATION['third_person'])})(?! of| and| or| in\b| are| is|,|\.)"
    rf"|(?<=s )(?P<plural>{_any(NEGATION['plural'])})(?! of| and\b| or\b))(?![\w'-])(?: also\b)?"
)
REMOVAL = dict(NEGATION["removals"])
REMOVABLE, SWAPPED, RANK = _pattern(REMOVAL), _pattern(OPPOSITE), list(OPPOSITE)
NEGATED = re.compile(
    r"\b(?:not|no|never|none|neither|nor|cannot|without|rarely|seldom)\b|n't\b", re.I
)
OPENER = re.compile(rf"(?:{_any(NEGATION['openers'])})\b[^,;]*, ", re.I)
QUANTIFIER = re.compile(rf"(?:{_any(NEGATION['quantifiers'])})\b(?! of\b)", FLAGS)
IMPERATIVE = re.compile(rf"(please )?({_any(NEGATION['imperatives'])})\b(?! of\b| is| are|-)", re.I)
KEEP = _pattern(WORDS["opposites"]["keep"])
RANGE = r"(?<![\w.,/-])(?<!type )(?<!stage )(?<!grade )(\d[\d,]*(?:\.\d+)?)"
NUMBER = re.compile(
    rf"{RANGE}(?:(\s?(?:-|–|to|and|or|至|到)\s?)(\d[\d,]*(?:\.\d+)?))?"
    rf"(?P<unit>[\s-]?(?:%|(?:{WORDS['units']})(?![A-Za-z])|percent\b))"
)
NUMBER_WORD = re.compile(rf"\b({_any(WORDS['number_words'])})(?=[ -](?:{WORDS['units']})\b)", FLAGS)
ENTITIES = {name: _pattern(terms) for name, terms in WORDS["entities"].items()}


def contradict(sentence: str, others: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What cannot be true if the sentence is, most reliable first, each with its kind.

    Kinds are `negation`, `opposite`, `number` and, with a term of the same class out of `others`
    (other texts on the subject, or terms), `entity`; the last may happen to be true as well.

    Returns:
        Nothing for a question, and where no rule is sure.
    """
    text = sentence.strip().replace("’", "'")
    if not text or text.endswith(("?", "？")):
        return []
    kinds = {
        "negation": _negate(text),
        "opposite": _oppose(text),
        "number": _renumber(text),
        "entity": _rename(text, others),
    }
    made = {new: kind for kind, found in reversed(kinds.items()) for new in reversed([*found])}
    return [(new, kind) for new, kind in reversed(made.items()) if new != text]


def _negate(text: str) -> Iterator[str]:
    for longer, shorter in NEGATION["chinese"]:
        if longer in text:
            yield text.replace(longer, shorter, 1)
            return
        if shorter in text and not any(word in text for word in NEGATION["chinese_not"]):
            yield text.replace(shorter, longer, 1)
            return
    opener = OPENER.match(text)
    start = opener.end() if opener else 0
    if negated := NEGATED.findall(text):
        is_sure = not re.search(r"not (?:only|necessar|yet|all|every)|no one\b", text, re.I)
        if len(negated) == 1 and NEGATED.search(text, start) and is_sure:
            yield from _without_not(text)
        return
    if hit := IMPERATIVE.match(text):
        yield f"{'Please do' if hit[1] else 'Do'} not {hit[2].lower()}{text[hit.end() :]}"
        return
    if hit := QUANTIFIER.match(text):
        if re.match(rf"{re.escape(hit[0])} \w+s\b|{hit[0]} (?:people|of)\b", text):
            yield _cased(NEGATION["quantifiers"][hit[0].lower()], hit[0]) + text[hit.end() :]
        return
    waiting = 0  # subordinate clauses whose own verb is still to come
    for hit in AUXILIARY.finditer(text, start):
        if hit["sub"]:
            waiting += 1
        elif waiting:
            waiting -= 1
        elif re.match(r" (?:be |been )?(?:only|either|both|all|the only)\b", text[hit.end() :]):
            return
        else:
            yield text[: hit.start()] + _negated(hit) + text[hit.end() :]
            return


def _negated(hit: re.Match[str]) -> str:
    if hit["aux"]:
        return str(NEGATION["auxiliaries"][hit["aux"]])
    if hit["perfect"]:
        return f"{hit['perfect']} not"
    if hit["own"]:
        return "does not have" if hit["own"] == "has" else "do not have"
    third = NEGATION["third_person"].get(hit["third"])
    return f"does not {third}" if third else f"do not {hit['plural']}"


def _without_not(text: str) -> Iterator[str]:
    if hit := re.match(r"(?:do not|don't|never) (?=\w)", text, re.I):
        yield _cased(text[hit.end() :], text)
    elif hit := REMOVABLE.search(text):
        new = REMOVAL[hit[0].lower()]
        is_plural = re.match(r" \w+(?<!s)s\b| (?:\w+ ){1,2}\w+s\b", text[hit.end() :])
        new = new.removesuffix(" a") if is_plural else new
        yield text[: hit.start()] + _cased(new, hit[0]) + text[hit.end() :]


def _oppose(text: str) -> Iterator[str]:
    kept = [range(hit.start(), hit.end()) for hit in KEEP.finditer(text)]
    hits = [
        hit
        for hit in SWAPPED.finditer(text)
        if not any(hit.start() in span or hit.end() - 1 in span for span in kept)
    ]
    words = [hit[0].lower() for hit in hits]
    for hit in sorted(hits, key=lambda hit: RANK.index(hit[0].lower())):
        word = hit[0].lower()
        before = text[: hit.start()]
        is_graded = re.search(r"\b(?:more|less|most|least|as|how|so) $", before, re.I)
        is_adverb = not before and not IMPERATIVE.match(text)
        if words.count(word) == 1 and OPPOSITE[word] not in words and not (is_graded or is_adverb):
            if article := re.search(r"\b(an?) $", before, re.I):
                n = "n" if OPPOSITE[word][0] in "aeiou" else ""
                before = f"{before[: article.start()]}{article[1][0]}{n} "
            yield before + _cased(OPPOSITE[word], hit[0]) + text[hit.end() :]


def _renumber(text: str) -> Iterator[str]:
    for hit in NUMBER.finditer(text):
        old = [float(part.replace(",", "")) for part in (hit[1], hit[3]) if part]
        if 1 in old[:1] and len(old) == 1:
            continue  # its noun stands in the singular
        divisor = next((d for d in (3, 4) if all(v % d == 0 and v > d for v in old)), 1 / 3)
        if re.search("%|percent", hit["unit"]) and max(old) / divisor > 100:
            divisor = 3
        comma = "," if "," in hit[0] else ""
        new = (f"{round(value / divisor, 1):{comma}.10g}" for value in old)
        yield text[: hit.start()] + (hit[2] or "").join(new) + text[hit.start("unit") :]
    for hit in NUMBER_WORD.finditer(text):
        new_word = WORDS["number_words"][hit[0].lower()]
        yield text[: hit.start()] + _cased(new_word, hit[0]) + text[hit.end() :]


def _rename(text: str, others: Sequence[str]) -> Iterator[str]:
    for pattern in ENTITIES.values():
        old = {hit.lower() for hit in pattern.findall(text)}
        new = [term for other in others for term in pattern.findall(other)]
        new = [term for term in new if term.lower() not in old]
        if len(old) == 1 and new:
            first = pattern.search(text)[0]  # type: ignore[index]  # it was found above
            yield pattern.sub(_cased(new[0].lower(), first), text)


def _cased(new: str, old: str) -> str:
    return new[:1].upper() + new[1:] if old[:1].isupper() else new
