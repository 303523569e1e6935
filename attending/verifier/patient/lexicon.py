"""Words to concepts: what makes "short of breath" and "dyspnoea" the same thing to be asked for.

The tables are `lexicon.toml`, written for the symptoms, histories and habits of a first visit.
"""

import re
import tomllib
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib import resources
from typing import Any

from attending.overlap import HAN, normalise

LONGEST = 5  # words in a phrase of the table


@cache
def table(name: str) -> Mapping[str, Any]:
    """One of the data files beside this module."""
    path = resources.files("attending.verifier.patient") / f"{name}.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))


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
def words(text: str) -> tuple[str, ...]:
    """Stems of the words that carry meaning; a Han text gives its pairs of characters."""
    text = re.sub(r"[’']s\b|[’']", "", text)
    stops = _stops()
    found: list[str] = []
    for token in normalise(text):
        if token in stops:
            continue
        if re.match(rf"[{HAN}]", token):
            found.append(token)
        else:
            found.append(stem(token))
    return tuple(found)


@lru_cache(maxsize=65536)
def concepts(text: str) -> frozenset[str]:
    """The concepts of a text, and the stems that belong to none; the longest phrase wins."""
    tokens, phrases = words(text), _phrases()
    found, at = set[str](), 0
    while at < len(tokens):
        for length in range(min(LONGEST, len(tokens) - at), 0, -1):
            names = phrases.get(tokens[at : at + length])
            if names:
                found |= names
                at += length
                break
        else:
            found.add(tokens[at])
            at += 1
    return frozenset(found)


def denies(text: str) -> bool:
    """Whether a statement says that something is not so; one word decides."""
    return bool(re.search(table("lexicon")["denying"], text, re.IGNORECASE))


@cache
def _stops() -> frozenset[str]:
    return frozenset(str(table("lexicon")["stop"]).split())


@cache
def _phrases() -> Mapping[tuple[str, ...], frozenset[str]]:
    found: dict[tuple[str, ...], frozenset[str]] = {}
    for name, phrases in table("lexicon")["concepts"].items():
        for phrase in phrases:
            key = words(phrase)
            if key:
                found[key] = found.get(key, frozenset()) | {name.upper()}
    return found
