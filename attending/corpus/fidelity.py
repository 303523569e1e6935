"""Whether a rewriting may stand for its source: what a machine can check without understanding.

Baichuan-M2 rephrases for coherence and adds "nothing that is not in, or strictly derivable from,
the source". Numbers with their units, drug names and length are compared. Not seen: two doses
that changed places, a number in words, a negation that was lost.
"""

import re
import tomllib
from functools import cache
from importlib import resources
from typing import Any

ROOM = resources.files("attending")
PROMPTS = ROOM / "corpus" / "prompts"
WIDE = str.maketrans("０１２３４５６７８９．，％－\u2212", "0123456789.,%--")
NUMBER = r"(?:(?<![\w)\]])-)?\d+(?:[.,]\d+)*"  # the minus of a range is none
THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")


def unfaithful(source: str, text: str, length_ratio: tuple[float, float]) -> str:
    """Why a rewriting may not stand for its source; empty if it may.

    `length_ratio` holds the least and the greatest length of the text, in lengths of the source.
    """
    if not text:
        return "empty"
    start = text.casefold().lstrip(" \"'“*#")
    for reason in ("refusal", "preamble"):
        words = tuple(_table()[reason])
        if start.startswith(words) and not source.casefold().startswith(words):
            return reason
    if not length_ratio[0] <= len(text) / max(1, len(source)) <= length_ratio[1]:
        return "length"
    for kind, find in (("number", numbers), ("drug", drugs)):
        before, after = find(source), find(text)
        if before != after:
            return f"{kind}_lost" if before - after else f"{kind}_added"
    return ""


def numbers(text: str) -> set[str]:
    """Every number with its unit in one spelling: "1.5 mg/kg"; 1,000 is 1000, but 5.0 is not 5."""
    number, unit = _patterns()
    found = set()
    for match in number.finditer(text.translate(WIDE)):
        value, units = (
            match[1],
            [_spellings()[one.casefold()] for one in unit.findall(match[2] or "")],
        )
        value = value.replace(",", "") if THOUSANDS.fullmatch(value) else value
        found.add(f"{value} {'/'.join(units)}".rstrip())
    return found


def drugs(text: str) -> set[str]:
    """The drug names in a text that the identifier filter's lexicons know, in lower case."""
    return set(_drug_pattern().findall(text.casefold()))


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads((PROMPTS / "fidelity.toml").read_text("utf-8"))


@cache
def _spellings() -> dict[str, str]:
    return {word.casefold(): unit for unit, words in _table()["units"].items() for word in words}


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Of a number with its units, and of one unit."""
    unit = _any_of(_spellings())
    units = rf"(?:{unit})(?:\s?(?:/|每|per )\s?(?:{unit}))*"
    return re.compile(rf"({NUMBER})(?:[ \u00a0\u2009-]?({units}))?", re.I), re.compile(unit, re.I)


@cache
def _drug_pattern() -> re.Pattern[str]:
    files = sorted((ROOM / "phi" / "lexicon").iterdir(), key=lambda file: file.name)
    tables = [tomllib.loads(f.read_text("utf-8")) for f in files if f.name.endswith(".toml")]
    return re.compile(_any_of({name.casefold() for table in tables for name in table["drug"]}))


def _any_of(words: Any) -> str:
    """A pattern of whole words, the longest first; Chinese has no borders of words."""
    return "|".join(
        (r"(?<![a-zA-Z])" if w[0].isascii() and w[0].isalpha() else "")
        + re.escape(w)
        + (r"(?![a-zA-Z])" if w[-1].isascii() and w[-1].isalpha() else "")
        for w in sorted(words, key=lambda word: (-len(word), word))
    )
