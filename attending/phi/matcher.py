"""Identifiers that their shape or their label tells: compiled patterns, check digits, labels.

Every pattern is bounded, and a match hides no other that overlaps it, so each character's mark
depends on a bounded window around it.
"""

import re
import tomllib
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from attending.overlap import HAN
from attending.phi.checks import CHECKS
from attending.phi.generate import lexicon
from attending.phi.spans import MARK, Canvas
from attending.phi.tokens import KINDS, Tokens

TABLES: dict[str, Any] = tomllib.loads(
    (resources.files("attending.phi") / "patterns.toml").read_text("utf-8")
)
USER = KINDS.index("user")
HAN_FROM, PLACE_REACH = 0x3400, 40  # first Han character; characters a place goes on, either way
VALUE_REACH = 3  # tokens between a label and the first of its value
AROUND = (80, 200)  # characters before and after an anchor in which its pattern may match


class Pattern(NamedTuple):
    """A shape and its conditions; see patterns.toml."""

    category: str
    regex: re.Pattern[str]
    needs: re.Pattern[str] | None
    anchors: re.Pattern[str] | None
    check: Callable[[str], bool] | None
    labels: frozenset[int]
    unless: frozenset[int]
    near: int
    unless_after: re.Pattern[str] | None
    group: str | int


def _parts() -> dict[str, str]:
    """The parts of patterns; those of Chinese names come from the word lists."""
    words = lexicon("zh")
    single = "".join(name for name in words["surname"] if len(name) == 1)
    double = "|".join(name for name in words["surname"] if len(name) > 1)
    titles = sorted({*TABLES["titles"], *words["role"]}, key=len, reverse=True)
    own = {"single": f"[{single}]", "surname": f"(?:{double}|[{single}])"}
    ordinary = {word for name in ("word", "surname_words", "role") for word in words[name]}
    own["ordinary"] = f"(?:{'|'.join(map(re.escape, sorted({*TABLES['not_names'], *ordinary})))})"
    own["title"] = f"(?:{'|'.join(map(re.escape, titles))})"
    return {**TABLES["parts"], **own}


def _compile(table: dict[str, Any]) -> Pattern:
    regex = table["regex"]
    for name, part in PARTS.items():
        regex = regex.replace(f"{{{name}}}", part)
    compiled = re.compile(regex, re.ASCII)
    needs = table.get("needs", "")
    anchors = "|".join(map(re.escape, table["anchor"].split("|"))) if "anchor" in table else ""
    return Pattern(
        table["category"],
        compiled,
        re.compile(f"[{HAN if needs == 'han' else needs}]") if needs else None,
        re.compile(anchors) if anchors else None,
        CHECKS[table["check"]] if "check" in table else None,
        frozenset(map(KINDS.index, table.get("label", ()))),
        frozenset(map(KINDS.index, table.get("unless", ()))),
        table.get("near", 7),
        re.compile(table["unless_after"]) if "unless_after" in table else None,
        "value" if "value" in compiled.groupindex else 0,
    )


PARTS = _parts()
PATTERNS = [_compile(table) for table in TABLES["pattern"]]
PLACES = {
    name: re.compile(text.replace("{state}", PARTS["state"]), re.ASCII)
    for name, text in TABLES["places"].items()
}
CATEGORY = {"user": "id"}
VALUES = {
    KINDS.index(kind): (
        re.compile(TABLES["values"][shape], re.ASCII),
        length,
        CATEGORY.get(kind, kind),
    )
    for kind, (shape, length) in TABLES["values"]["kinds"].items()
}


def paint(text: str, tokens: Tokens, canvas: Canvas) -> None:
    """Mark what the patterns find: surest what was checked, least sure what a label alone tells."""
    for pattern in PATTERNS:
        if pattern.needs and not pattern.needs.search(text):
            continue
        score = 0.99 if pattern.labels else 1.0 if pattern.check else 0.98
        for match in _told(pattern, text, tokens) if pattern.labels else _matches(pattern, text):
            start, end = match.span(pattern.group)
            if pattern.unless and pattern.unless & _kinds_at(tokens, start):
                continue
            before = text[max(0, start - 30) : start]
            if pattern.unless_after is not None and pattern.unless_after.search(before):
                continue
            if pattern.check is None or pattern.check(match.group(pattern.group)):
                canvas.paint(start, end, pattern.category, score)
    _paint_values(text, tokens, canvas)


def _told(pattern: Pattern, text: str, tokens: Tokens) -> Iterator[re.Match[str]]:
    """A match at every token that one of the pattern's labels speaks of."""
    near = tokens.distance <= pattern.near
    for kind in pattern.labels:
        spoken = ((tokens.label == kind) & near) | (tokens.column == kind)
        for start in tokens.starts[spoken].tolist():
            if match := pattern.regex.match(text, start):
                yield match


def _matches(pattern: Pattern, text: str) -> Iterator[re.Match[str]]:
    """A match at every start that has one."""
    search = pattern.regex.search
    if pattern.anchors is None:
        at = 0
        while match := search(text, at):
            yield match
            at = match.start() + 1
        return
    seen = -1
    for anchor in pattern.anchors.finditer(text):
        at = max(seen + 1, anchor.start() - AROUND[0], 0)
        stop = anchor.end() + AROUND[1]
        while (match := search(text, at, stop)) and match.start() <= anchor.start():
            yield match
            seen = match.start()
            at = seen + 1


def _kinds_at(tokens: Tokens, start: int) -> set[int]:
    """The labels that speak of the token at a match's start."""
    index = min(int(np.searchsorted(tokens.starts, start)), len(tokens.words) - 1)
    return {int(tokens.label[index]), int(tokens.column[index])} - {0}


def fill_places(text: str, canvas: Canvas) -> None:
    """Mark the words that a place known in part goes on with, before and after it."""
    is_place = (canvas.marks == MARK["location"]).astype(np.int8)
    edges = np.flatnonzero(np.diff(is_place, prepend=0, append=0)).tolist()
    for end, start in zip(edges[1:-1:2], edges[2::2], strict=True):
        if start - end <= PLACE_REACH and PLACES["between"].fullmatch(text, end, start):
            canvas.extend(end, start, "location", float(canvas.scores[end - 1]))
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        after = PLACES["after_han" if ord(text[end - 1]) > HAN_FROM else "after"]
        if match := after.match(text, end, end + PLACE_REACH):
            canvas.extend(end, match.end(), "location", float(canvas.scores[end - 1]))
        is_han = ord(text[start]) > HAN_FROM
        before = PLACES["before_han" if is_han else "before"]
        match = before.search(text, max(0, start - PLACE_REACH), start)
        if match and not (is_han and match.start() and ord(text[match.start() - 1]) > HAN_FROM):
            canvas.extend(match.start(), start, "location", float(canvas.scores[start]))


def _is_handle(text: str, start: int, found: str) -> bool:
    """A plain word is an account's name only behind a colon or an equals sign."""
    return not found.isalpha() or text[max(0, start - 9) : start].rstrip()[-1:] in (":", "=", "：")


def _paint_values(text: str, tokens: Tokens, canvas: Canvas) -> None:
    """Mark codes that directly follow their label, or stand below it in a table."""
    near = (tokens.label > 0) & (tokens.distance <= VALUE_REACH)
    for index in np.flatnonzero(near | (tokens.column > 0)).tolist():
        word = tokens.words[index]
        if not ((word.isascii() and word.isalnum()) or word == "@"):
            continue
        for kind in {int(tokens.column[index]), int(tokens.label[index]) * bool(near[index])}:
            if kind not in VALUES:
                continue
            regex, length, category = VALUES[kind]
            start = int(tokens.starts[index])
            if start and text[start - 1].isalnum() and text[start - 1].isascii():
                continue
            match = regex.match(text, start)
            told = match is not None and sum(map(str.isalnum, match.group())) >= length
            if match and told and (kind != USER or _is_handle(text, start, match.group())):
                canvas.paint(start, match.end(), category, 0.95)
