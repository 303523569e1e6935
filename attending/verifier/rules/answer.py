"""Rules about a response's answer: a choice, a number, a formula, a phrase, a list.

A response commits itself by "the answer is", "答案是", `####` or a box, and the last time counts.
Where it never does, a choice is its first or last line, a number its last, a phrase all of it.
"""

import math
import re
import unicodedata
from collections.abc import Mapping

from attending.errors import ConfigError
from attending.overlap import TOKEN
from attending.verifier.rules.rule import DATA, Checked, extra, verdict

FOLDS: dict[str, str] = DATA["answer"].pop("folds")
SIGN = {name: re.compile(pattern) for name, pattern in DATA["answer"].items()}
WORD = re.compile(rf"{SIGN['signed'].pattern}|{TOKEN.pattern}(?:[-+](?!\w))?")


def choice(text: str, options: dict[str, str], answer: str) -> Checked:
    """The letter of one option; its own text counts as its letter.

    Two letters in the last place that names any, or a letter with another one's text, do not pass.
    """
    if answer not in options:
        raise ConfigError(f"rule choice: the answer {answer!r} is none of {', '.join(options)}.")
    own = {letter: _fold(text).strip(" .").casefold() for letter, text in options.items()}
    said = next((named for rest in _committed(text) if (named := _named(rest, own)[0])), [])
    if not said:
        lines = [line for line in _fold(text).splitlines() if re.search(r"\w", line)]
        alone = [_named(line, own) for line in lines[:1] + lines[-1:]]
        said = [letter for named, rest in alone if SIGN["alone"].match(rest) for letter in named]
    letters = sorted({*said})
    if len(letters) != 1:
        return verdict(False, f"different answers: {', '.join(letters)}" if said else "no answer")
    return verdict(letters == [answer], f"answers {letters[0]}")


def numeric(
    text: str,
    answer: float | str,
    relative: float = 1e-6,
    absolute: float = 0.0,
    units: dict[str, float] | None = None,
) -> Checked:
    """A number, near enough to the reference by either tolerance.

    `units` has those to know, each with its size in the reference's; another one does not pass,
    none is the reference's. Without it units are not looked at, and `50%` is both 50 and 0.5.
    """
    wanted = SIGN["number"].search(_fold(str(answer)))
    if wanted is None:
        raise ConfigError(f"rule numeric: the answer {answer!r} is no number.")
    places = [part for rest in _committed(text) for part in (rest.rpartition("=")[2], rest)]
    found = next(filter(None, map(SIGN["number"].search, places)), None)
    found = found or next(iter([*SIGN["number"].finditer(_fold(text))][::-1]), None)
    if found is None:
        return verdict(False, "no number")
    head, rest, unit = found.string[: found.start()], found.string[found.end() :], found[7]
    if SIGN["another"].match(rest) or SIGN["before"].search(head[-40:]):
        return verdict(False, f"different answers: {head[-20:]}{found[0]}{rest[:20]}")
    if units and unit and unit not in units:
        return verdict(False, f"unit {unit!r}, not of {', '.join(units)}")
    scales = [units.get(unit, 1.0)] if units else [1.0]
    if not units and (unit == "%") != (wanted[7] == "%"):
        scales = [1.0, 100.0, 0.01]
    value, goal = _value(found), _value(wanted)
    near = (math.isclose(value * s, goal, rel_tol=relative, abs_tol=absolute) for s in scales)
    return verdict(any(near), f"answers {found[0].strip()}")


def maths(text: str, answer: str) -> Checked:
    """A formula equal to the reference, in LaTeX, by math_verify.

    In this process, without the library's time limit: it takes signals, which a thread has not.
    What looks endless is refused, by sight alone; give hostile text to a process with a limit.
    """
    library = extra("math_verify")
    gold = library.parse(answer if "$" in answer else f"${answer}$", parsing_timeout=None)
    if not gold:
        raise ConfigError(f"rule maths: the answer {answer!r} is no formula.")
    if SIGN["heavy"].search(text):
        return verdict(False, "a power or factorial too large to compute")
    found = library.parse(text, parsing_timeout=None)
    passed = bool(found) and library.verify(gold, found, timeout_seconds=None)
    return verdict(passed, f"answers {found[-1]}" if found else "no formula")


def exact(text: str, answer: str) -> Checked:
    """The same words, whatever the case, width, spacing and punctuation; signs are kept."""
    said = next(iter(_committed(text)), text)
    parts = (said, SIGN["sentence"].split(said)[0])
    return verdict(_words(answer) in map(_words, parts), "compared word by word")


def items(text: str, answer: tuple[str, ...], min_f1: float = 1.0) -> Checked:
    """The same list in any order, bulleted or with commas; the score is F1."""
    text = _fold(text)
    said = text[max((match.end() for match in SIGN["commit"].finditer(text)), default=0) :]
    parts = SIGN["bullet"].findall(said) or SIGN["comma"].split(SIGN["box"].sub(r"\1", said))
    found, wanted = ({tuple(_words(part)) for part in some} - {()} for some in (parts, answer))
    hits = len(found & wanted)
    precision, recall = hits / max(len(found), 1), hits / max(len(wanted), 1)
    f1 = 2 * hits / max(len(found) + len(wanted), 1)
    return Checked(f1 >= min_f1, f"precision {precision:.2f}, recall {recall:.2f}", f1)


def _fold(text: str) -> str:
    for pattern, instead in FOLDS.items():
        text = re.sub(pattern, instead, text)
    return unicodedata.normalize("NFKC", text).replace("−", "-").replace("⁄", "/")


def _words(text: str) -> list[str]:
    return WORD.findall(re.sub(r"(?<=\d),(?=\d{3})", "", _fold(text)).casefold())


def _value(number: re.Match[str]) -> float:
    sign, whole, top, e, ten, bottom, _ = number.groups()
    part = float(f"{top.replace(',', '')}e{e or ten or 0}") / (float(bottom or 1) or math.nan)
    return float(f"{sign}1") * (float(whole or 0) + part)


def _committed(text: str) -> list[str]:
    """What follows each commitment on its line, or on the next, last first; boxes are opened."""
    text = _fold(text)
    last = [*SIGN["commit"].finditer(text)][-16:]  # so that a text of signs takes no minutes
    rests = [text[match.end() :].lstrip(" *_:\n") for match in last]
    return [SIGN["box"].sub(r"\1 , ", rest.partition("\n")[0]).strip(" ,") for rest in rests[::-1]]


def _named(text: str, options: Mapping[str, str]) -> tuple[list[str], str]:
    """The letters that a text begins with, and what follows them."""
    text, found = SIGN["lead"].sub("", text), list[str]()
    if own := _first(text, options, r"(?![A-Za-z0-9])"):
        return [own], text[len(options[own]) :]
    while (match := SIGN["letter"].match(text)) and match[1].upper() in options:
        found, text = [*found, match[1].upper()], text[match.end() :]
        if not (more := SIGN["or"].match(text)):
            break
        text = SIGN["lead"].sub("", text[more.end() :])
    own = _first(text, options, SIGN["ends"].pattern)
    return ([*found, own], "") if found and own else (found, text)


def _first(text: str, options: Mapping[str, str], ends: str) -> str:
    """The letter of the longest option whose own text comes first, before `ends`."""
    fit = [k for k, own in options.items() if own and re.match(re.escape(own) + ends, text, re.I)]
    return max(fit, key=lambda letter: len(options[letter]), default="")
