"""Rules about a response's form: pattern, JSON, sections, thinking, length, language."""

import json
import re
from collections.abc import Callable
from functools import cache
from typing import Literal

from attending.config import suggest
from attending.errors import ConfigError
from attending.overlap import HAN
from attending.verifier.rules.rule import DATA, Checked, extra, verdict

LANGUAGES = DATA["text"]["languages"].split()
COUNTED = {
    "characters": re.compile(r"\S"),
    "words": re.compile(rf"[^\W{HAN}]+(?:['’.,-][^\W{HAN}]+)*|[{HAN}]"),
    "han": re.compile(f"[{HAN}]"),
}


def regex(text: str, pattern: re.Pattern[str], full: bool = False) -> Checked:
    """A pattern in Python's syntax occurs, or is all of the response."""
    found = bool(pattern.fullmatch(text.strip()) if full else pattern.search(text))
    return verdict(found, f"{'matches' if found else 'does not match'} {pattern.pattern}")


def json_value(text: str, keys: tuple[str, ...] = ()) -> Checked:
    """The response, or the fenced block that it is, parses (RFC 8259); if keys, as an object."""
    fenced = re.fullmatch(DATA["text"]["fence"], text.strip())
    try:
        value = json.loads(fenced[1] if fenced else text, parse_constant=int)
    except (ValueError, RecursionError) as error:
        return verdict(False, f"no JSON: {error}")
    lacks = [key for key in keys if not isinstance(value, dict) or key not in value]
    return verdict(not lacks, f"lacks {lacks}")


def sections(text: str, names: tuple[str, ...]) -> Checked:
    """Headings in this order, each at its line's start, alone or before a colon; scores a share."""
    start, lacks = 0, list[str]()
    for name in names:
        heading = re.compile(rf"(?im)^[-+•>【#*_ \t\d.)、]*{re.escape(name)}[*_ \t]*(?:[:：】]|$)")
        match = heading.search(text, start)
        start, lacks = (match.end(), lacks) if match else (start, [*lacks, name])
    return Checked(not lacks, f"lacks {lacks}", 1 - len(lacks) / max(len(names), 1))


def think(response: str) -> Checked:
    """One pair of think tags, then an answer, and no tag elsewhere."""
    return verdict(bool(re.fullmatch(DATA["text"]["think"], response)), "form of the think tags")


def length(
    text: str, unit: Literal["characters", "words", "han"], min: int = 0, max: int | None = None
) -> Checked:
    """Characters but spaces, words (a Han character is one), or Han characters; both inclusive."""
    count = len(COUNTED[unit].findall(text))
    passed = min <= count <= (count if max is None else max)
    return verdict(passed, f"{count} {unit}, wanted {min} to {'any' if max is None else max}")


def language(text: str, code: str, by: Literal["model", "script"] = "model") -> Checked:
    """In the language of a code, as `de`; by script only zh or en, and without a model."""
    known = LANGUAGES if by == "model" else ["en", "zh"]
    if code not in known:
        raise ConfigError(f"rule language: unknown code {code!r}.{suggest(code, known)}")
    found = identify(text) if by == "model" else script(text)
    return verdict(found == code, f"is {found or 'in no language'}")


def script(text: str) -> str:
    """`zh`, `en` or nothing, by most of the letters; a Han character weighs as much as four."""
    han = 4 * len(COUNTED["han"].findall(text))
    latin = sum(letter.isascii() and letter.isalpha() for letter in text)
    others = sum(map(str.isalpha, text)) - han // 4 - latin
    return "zh" if han > latin + others else "en" if latin > han + others else ""


def identify(text: str) -> str:
    """The code of a text's language, told by py3langid; empty where it has no letters."""
    return _identifier()(text) if any(map(str.isalpha, text)) else ""


@cache
def _identifier() -> Callable[[str], str]:
    langid = extra("py3langid.langid")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
    identifier.set_languages(LANGUAGES)
    return lambda text: str(identifier.classify(text)[0])
