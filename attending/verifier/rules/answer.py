"""Rules about a response's answer: a choice, a number, a formula, a phrase, a list.

A response commits itself by "the answer is", "答案是", `####`, a box; weakly by "the diagnosis is".
A final answer outranks the others, unless "wait" comes between; of equals the last one counts.
Without any, a choice is its first or last line, a number its last, a phrase all of it.
"""

import math
import re
import unicodedata
from collections.abc import Mapping

from attending.errors import ConfigError
from attending.overlap import TOKEN
from attending.verifier.rules.formula import compared
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
    plain = {letter: SIGN["lead"].sub("", _fold(own)) for letter, own in options.items()}
    own = {letter: text.strip(' .\n"').lower() for letter, text in plain.items()}
    signs = [(min(rank, 1), _named(line, own)[0]) for rank, line, _ in _committed(text)]
    lines = [line for line in _fold(text).splitlines() if re.search(r"\w", line)]
    ends = [_named(line, own) for line in lines[:1] + lines[-1:]]
    alone = [letter for named, rest in ends if SIGN["alone"].match(rest) for letter in named]
    # A line that is nothing but an option says more than "the cause is".
    order = sorted([*signs, (0.5, alone)], key=lambda sign: -sign[0])
    said = next((named for _, named in order if named), [])
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

    It is the first after an answer's sign, else the first with a unit to know, else the first
    after "dose is", else "is" or "=", of the last line with one, else the last. "Not 5" and "> 5"
    are none.
    """
    wanted = SIGN["number"].search(_fold(str(answer)))
    if wanted is None:
        raise ConfigError(f"rule numeric: the answer {answer!r} is no number.")
    signs = (_worth(line) for rank, line, _ in _committed(text) if rank)
    some = next(filter(None, signs), None) or _weak(_fold(text))
    if not some:
        return verdict(False, "no number")
    found = next((one for one in some if units and one[7] in units), some[0])
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
    """A formula equal to the reference, in LaTeX, by math_verify, which may not take for ever."""
    formula = answer if "$" in answer else f"${answer}$"
    if not extra("math_verify").parse(formula, parsing_timeout=None):
        raise ConfigError(f"rule maths: the answer {answer!r} is no formula.")
    return verdict(*compared(formula, text))


def exact(text: str, answer: str) -> Checked:
    """The same words, whatever the case, width, spacing and punctuation; signs are kept.

    "Diagnosis:" or "The diagnosis is" before them is no part of the answer.
    """
    said = _committed(text)
    firm = [line for rank, line, _ in said if rank][:1]
    parts = firm or [_fold(text), *(line for _, line, _ in said[:1])]
    parts += [SIGN["label"].sub("", part) for part in parts]
    parts += [SIGN["sentence"].split(part)[0] for part in parts]
    return verdict(_words(answer) in map(_words, parts), "compared word by word")


def items(text: str, answer: tuple[str, ...], min_f1: float = 1.0) -> Checked:
    """The same list in any order, bulleted (or the bullets' heads) or with commas; scores F1."""
    said = next((rest for rank, _, rest in _committed(text) if rank), _fold(text))
    wanted = {tuple(_words(part)) for part in answer} - {()}
    parts = SIGN["bullet"].findall(said)
    heads = [
        part if tuple(_words(part)) in wanted else SIGN["head"].sub(r"\2\3", part) for part in parts
    ]
    parts = heads or SIGN["comma"].split(SIGN["label"].sub("", SIGN["box"].sub(r"\1", said)))
    found = {tuple(_words(part)) for part in parts} - {()}
    hits = len(found & wanted)
    precision, recall = hits / max(len(found), 1), hits / max(len(wanted), 1)
    f1 = 2 * hits / max(len(found) + len(wanted), 1)
    return Checked(f1 >= min_f1, f"precision {precision:.2f}, recall {recall:.2f}", f1)


def commitment(text: str) -> str:
    """What a response commits itself to, in words without spaces; without a sign, its one line.

    Empty where there is neither. For answers of which no reference is known.
    """
    found = next((line for rank, line, _ in _committed(text) if rank), None)
    if found is None:
        found = "" if "\n" in text.strip() else _fold(text)
    return "".join(_words(SIGN["sentence"].split(SIGN["label"].sub("", found))[0]))


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


def _numbers(text: str, start: int = 0) -> list[re.Match[str]]:
    """The numbers of a text that it neither denies nor makes a bound."""
    found = [(one, one.end() - len(one[7] or "")) for one in SIGN["number"].finditer(text, start)]
    free = [one for one, end in found if not SIGN["bound"].match(text[end : end + 60])]
    heads = [text[max(0, one.start() - 40) : one.start()] for one in free]
    return [one for one, head in zip(free, heads, strict=True) if not SIGN["hedge"].search(head)]


def _worth(line: str) -> list[re.Match[str]]:
    return _numbers(SIGN["sum"].sub("", line)) or _numbers(line)


def _weak(text: str) -> list[re.Match[str]]:
    """The numbers of a text without an answer's sign, the likeliest first."""
    found = list[re.Match[str]]()
    for line in reversed(text.splitlines()):
        found += [one for _, rest, _ in _committed(line) for one in _worth(rest)]
        signs = [*SIGN["equals"].finditer(line)][:-17:-1]
        found += [one for sign in signs for one in _numbers(line, sign.end())]
    return found + _numbers(text)[::-1]


def _committed(text: str) -> list[tuple[int, str, str]]:
    """Each commitment's rank (2 final, 0 weak), line, and all after it; what counts most first."""
    text, found = _fold(text), list[tuple[bool, int, int]]()
    cue = max((match.end() for match in SIGN["cue"].finditer(text)), default=0)
    for match in SIGN["commit"].finditer(text):
        start, end = match.span()
        rank = 2 if SIGN["final"].search(match[0]) else int(bool(SIGN["answer"].search(match[0])))
        if not SIGN["supposed"].search(text[max(0, start - 80) : start]):
            found.append((rank > 0 and start >= cue, rank, end))
    last = sorted(found, reverse=True)[:16]  # so that a text of signs takes no minutes
    rests = [(rank, text[end:].lstrip(" *_:\n")) for _, rank, end in last]
    lines = [SIGN["box"].sub(r"\1 , ", rest.partition("\n")[0]).strip(" ,") for _, rest in rests]
    return [(rank, line, rest) for (rank, rest), line in zip(rests, lines, strict=True)]


def _named(text: str, options: Mapping[str, str]) -> tuple[list[str], str]:
    """The letters that a text begins with, and what follows them."""
    found, more, told = list[str](), re.match("", text), ""
    while more:
        text = SIGN["lead"].sub("", text[more.end() :])
        if own := _first(text, options, r"(?![A-Za-z0-9])"):
            text = text[len(options[own]) :]
        elif (match := SIGN["letter"].match(text)) and (own := match[1].upper()) in options:
            text = text[match.end() :]
            after = SIGN["lead"].sub("", text)
            its = _first(after, {own: options[own]}, r"(?![A-Za-z0-9])")
            if told := its or _first(after, options, SIGN["ends"].pattern):
                found, text = [*found, told], after[len(options[told]) :]
        else:
            break
        found, more = [*found, own], SIGN["or"].match(text)
        if not more and (comma := re.match(r"\s*[,;]\s*", text)):
            more = comma if _first(text[comma.end() :], options, SIGN["listed"].pattern) else None
    return found, "" if told and SIGN["ends"].match(text) else text


def _first(text: str, options: Mapping[str, str], ends: str) -> str:
    """The letter of the longest option whose own text comes first, before `ends`."""
    fit = [k for k, own in options.items() if own and re.match(re.escape(own) + ends, text, re.I)]
    return max(fit, key=lambda letter: len(options[letter]), default="")
