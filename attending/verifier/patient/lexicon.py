"""Words to concepts: what makes "short of breath" and "dyspnoea" the same thing to be asked for.

The tables are `lexicon.toml`, written for the symptoms, histories and habits of a first visit.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache

from attending.overlap import HAN, normalise
from attending.verifier.data import table

LONGEST = 6  # words in a phrase of the table


@lru_cache(maxsize=65536)
def stem(word: str) -> str:
    """Without the endings that a question and its answer differ in; not a linguist's stem."""
    for ending, put in (("ies", "y"), ("sses", "ss"), ("ss", "ss"), ("us", "us"), ("is", "is")):
        if word.endswith(ending):
            return word.removesuffix(ending) + put if len(word) > 4 else word
    word = word[:-1] if word.endswith("s") and len(word) > 3 else word
    for ending in ("ingly", "edly", "ing", "ed", "ly"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz":
                word = word[:-1]
            break
    return word[:-1] if word.endswith("e") and len(word) > 3 else word


@lru_cache(maxsize=65536)
def stems(text: str) -> tuple[str, ...]:
    """Of every word; of Han text each two characters in a row, between those without meaning."""
    plain = re.sub(r"[’']s\b|[’']", "", text)
    empty = table("patient/lexicon")["stop_han"]
    found: list[str] = []
    for part in re.split(rf"((?:(?![{empty}])[{HAN}])+)", plain):
        if re.match(f"[{HAN}]", part) and not re.match(f"[{empty}]", part):
            found += [part[at : at + 2] for at in range(max(1, len(part) - 1))]
        else:
            found += [stem(token) for token in normalise(part) if not re.match(f"[{HAN}]", token)]
    return tuple(found)


@lru_cache(maxsize=65536)
def concepts(text: str) -> frozenset[str]:
    """The concepts of a text, and the stems that belong to none and carry meaning.

    The longest phrase wins, word for word; then once more over what is left without its empty
    words, so that "trouble with your breathing" is "trouble breathing".
    """
    whole, loose = _phrases()
    found, left = _take(stems(text), whole)
    more, left = _take(tuple(token for token in left if token not in _stops()), loose)
    return frozenset(found | more | {*left})


def _take(
    tokens: Sequence[str], phrases: Mapping[tuple[str, ...], frozenset[str]]
) -> tuple[set[str], list[str]]:
    """The concepts of the phrases in a text, and the tokens that are in none."""
    found, left, at = set[str](), list[str](), 0
    while at < len(tokens):
        for length in range(min(LONGEST, len(tokens) - at), 0, -1):
            if names := phrases.get(tuple(tokens[at : at + length])):
                found |= names
                at += length
                break
        else:
            left.append(tokens[at])
            at += 1
    return found, left


def denies(text: str) -> bool:
    """Whether a statement says that something is not so; one word decides."""
    return bool(re.search(table("patient/lexicon")["denying"], text, re.IGNORECASE))


@cache
def _stops() -> frozenset[str]:
    return frozenset(stems(table("patient/lexicon")["stop"]))


@cache
def _phrases() -> tuple[Mapping[tuple[str, ...], frozenset[str]], ...]:
    """To concepts: phrases word for word, and those of several words without the empty ones."""
    whole: dict[tuple[str, ...], frozenset[str]] = {}
    loose: dict[tuple[str, ...], frozenset[str]] = {}
    for name, phrases in table("patient/lexicon")["concepts"].items():
        for key in map(stems, phrases):
            short = tuple(token for token in key if token not in _stops())
            for known, own in ((whole, key), (loose, short)):
                if known is whole or len(own) > 1:
                    known[own] = known.get(own, frozenset()) | {name.upper()}
    return whole, loose
