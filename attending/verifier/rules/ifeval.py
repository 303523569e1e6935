"""IFEval: 25 kinds of instruction that a program can check (Zhou et al. 2023, arXiv 2311.07911).

What the paper leaves open is as in the published checkers, which the tests compare. Two things
differ on purpose: py3langid tells the language, because the published langdetect varies from run
to run and takes English in capitals for another language; and any character may be the letter to
count, where the published checker draws one by chance for `#`.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from statistics import fmean
from string import Formatter
from typing import Any

from attending.config import suggest
from attending.errors import ConfigError
from attending.verifier.rules.rule import DATA, Checked, extra
from attending.verifier.rules.text import identify

Kwargs = dict[str, Any]
OWN = DATA["ifeval"]
KINDS: dict[str, list[str]] = OWN["kinds"]


def instructions(
    text: str, instruction_id_list: tuple[str, ...], kwargs: tuple[Kwargs, ...], loose: bool = False
) -> Checked:
    """All instructions of a prompt, named as the data set's columns are; the score is a share."""
    names = instruction_id_list
    if not names or len(names) != len(kwargs):
        counts = f"{len(names)} instructions and {len(kwargs)} kwargs"
        raise ConfigError(f"rule ifeval has {counts}: give one of each, at least once.")
    pairs = zip(names, kwargs, strict=True)
    broken = [name for name, own in pairs if not follows(text, name, own, loose=loose)]
    return Checked(not broken, f"not followed: {broken}", 1 - len(broken) / len(names))


def accuracy(followed: Iterable[Sequence[bool]]) -> tuple[float, float]:
    """The shares of prompts with every instruction followed, and of instructions."""
    rows = [list(row) for row in followed]
    return fmean(map(all, rows)), fmean(chain.from_iterable(rows))


def follows(text: str, name: str, kwargs: Mapping[str, Any], *, loose: bool = False) -> bool:
    """Whether a response follows an instruction, as `keywords:existence`; an empty one never does.

    Null kwargs, as some copies of the data have, are as if absent. If loose, one of eight variants
    of the response is enough.

    Raises:
        ConfigError: Unknown instruction or relation, unknown or missing argument.
    """
    if name not in KINDS:
        raise ConfigError(f"unknown instruction {name!r}.{suggest(name, KINDS)}")
    takes = {field for part in KINDS[name] for _, field, *_ in Formatter().parse(part) if field}
    given = {key: value for key, value in kwargs.items() if value is not None}
    for key in sorted(given.keys() ^ takes):
        what = "lacks the" if key in takes else "has an unknown"
        raise ConfigError(f"{name} {what} argument {key!r}.{suggest(key, takes)}")
    listed = next((key for key, value in given.items() if isinstance(value, list)), "")
    every = [given | {listed: item} for item in given[listed]] if listed else [given]
    tried = [one for one in (variants(text) if loose else [text]) if one.strip()]
    return any(all(_holds(one, KINDS[name], own) for own in every) for one in tried)


def variants(text: str) -> list[str]:
    """Without its first line, its last, both or neither; each with `*` and without."""
    lines = text.split("\n")
    cut = [text, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return cut + [one.replace("*", "") for one in cut]


def _holds(text: str, kind: Sequence[str], own: Mapping[str, Any]) -> bool:
    safe = {key: re.escape(str(value).strip()) for key, value in own.items()}
    count = 0
    for part in kind[:-2]:
        if part.startswith("@"):
            measure, *arguments = part.format(**own).split()
            count += MEASURES[measure](text, *arguments)
        else:
            count += sum(map(bool, map(str.strip, re.findall(part.format(**safe), text, re.I))))
    relation, bound = kind[-2].format(**own), int(kind[-1].format(**own))
    held = {"at least": count >= bound, "less than": count < bound, "exactly": count == bound}
    if relation not in held:
        raise ConfigError(f"unknown relation {relation!r}.{suggest(relation, held)}")
    return held[relation]


def _parts(divider: str, text: str) -> list[str]:
    """What stands between dividers; only the outermost may be empty, then uncounted, else none."""
    parts = [part.strip() for part in re.split(divider, text)]
    return [part for part in parts if part] if all(parts[1:-1]) else []


def _first_word(text: str, nth: str, count: str, first_word: str) -> bool:
    parts = [*map(str.strip, text.split("\n\n")), *[""] * int(nth)]
    word = re.match(r"'*\"*([^\s.,?!'\"]*)", parts[int(nth) - 1])
    enough = sum(map(bool, parts)) == int(count) >= int(nth)
    return enough and word is not None and word[1].lower() == first_word.lower()


def _postscript(text: str, marker: str) -> bool:
    return bool(re.search(re.sub(r"\\\.(?=\w)", r"\\.\\s?", re.escape(marker)), text, re.I))


def _json(text: str) -> bool:
    try:
        json.loads(re.sub(OWN["fence"], "", text.strip()).strip())
    except ValueError:
        return False
    return True


MEASURES: dict[str, Callable[..., int]] = {
    "@language": lambda text, code: identify(text) in ("", code),
    "@sentences": lambda text: (
        len(extra("punkt").sent_tokenize(text)) + bool(re.search(OWN["last_mark"], text))
    ),
    "@paragraphs": lambda text: len(_parts(r"\s?\*\*\*\s?", text)),
    "@first_word": _first_word,
    "@postscript": _postscript,
    "@json": _json,
    "@responses": lambda text: len(both := _parts(r"\*{6}", text)) == 2 and len({*both}),
    "@capitals": lambda text: sum(map(str.isupper, re.split(OWN["treebank"], text))),
    "@upper": str.isupper,
    "@lower": str.islower,
}
