"""What replaces an identifier: stars, a typed placeholder, a consistent surrogate, a keyed hash.

Surrogates, shifted dates and hashes depend on a secret key and, for dates, on the patient: the same
identifier gets the same replacement, intervals between a patient's dates stay as they are, and
without the key neither can be undone by trying values.
"""

import hmac
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from hashlib import sha256
from itertools import cycle
from typing import Literal, get_args

from attending.errors import UsageError
from attending.overlap import HAN
from attending.phi.generate import MONTHS, lexicon
from attending.phi.spans import CATEGORIES

Action = Literal["placeholder", "mask", "surrogate", "shift", "hash", "keep"]
ACTIONS: tuple[str, ...] = get_args(Action)
KEYED = {"surrogate", "shift", "hash"}
MIN_KEY_BYTES = 16
MAX_SHIFT_DAYS = 365
NUMERIC = re.compile(r"(\d{1,4})([-/.年 ]{1,3})(\d{1,2})([-/.月 ]{1,3})(\d{1,4})(日|号)?")
NAMED = re.compile(
    r"(?:(\d{1,2})(?:st|nd|rd|th)?[ -](?:of )?)?([A-Za-z]{3,9})\.?[ -]?"
    r"(?:(\d{1,2})(?:st|nd|rd|th)?)?(,?[ -])(\d{4})"
)


@dataclass(frozen=True, slots=True)
class Policy:
    """Which action each category gets.

    Raises:
        UsageError: An unknown category or action, or an action that needs a key without one.
    """

    default: Action = "placeholder"
    by_category: Mapping[str, Action] = field(default_factory=dict)
    key: bytes = field(default=b"", repr=False)
    patient: str = field(default="", repr=False)  # whose dates move together

    def __post_init__(self) -> None:
        """Check it all before a text is touched."""
        if unknown := set(self.by_category) - set(CATEGORIES):
            raise UsageError(f"no category {sorted(unknown)[0]!r}. Known: {', '.join(CATEGORIES)}.")
        used: set[str] = {self.default, *self.by_category.values()}
        if unknown := used - {*ACTIONS}:
            raise UsageError(f"no action {sorted(unknown)[0]!r}. Known: {', '.join(ACTIONS)}.")
        if "shift" in {self.default, *(a for c, a in self.by_category.items() if c != "date")}:
            raise UsageError(
                "only dates can be shifted: --category date=shift, and another action."
            )
        if used & KEYED and len(self.key) < MIN_KEY_BYTES:
            raise UsageError(
                f"{', '.join(sorted(used & KEYED))} needs a secret key of {MIN_KEY_BYTES} bytes or "
                f"more (--key-variable names the environment variable), got {len(self.key)}. "
                "Without one replacements could be traced back."
            )
        if "shift" in used and not self.patient:
            raise UsageError("dates are shifted by patient: name one (--patient, --patient-field).")

    def replace(self, text: str, category: str) -> str:
        """What stands in the place of an identifier."""
        return REPLACE[self.by_category.get(category, self.default)](self, text, category)


def key_from(variable: str) -> bytes:
    """The secret key in an environment variable; UsageError if it is not there."""
    key = os.environ.get(variable, "").encode()
    if not key:
        raise UsageError(f"environment variable {variable} is empty; put the secret key there.")
    return key


def _digest(policy: Policy, *parts: str) -> bytes:
    return hmac.new(policy.key, "\0".join(parts).encode(), sha256).digest()


def _placeholder(_: Policy, text: str, category: str) -> str:
    return f"[{category.upper()}]"


def _mask(_: Policy, text: str, category: str) -> str:
    return re.sub(r"\w", "*", text)


def _hash(policy: Policy, text: str, category: str) -> str:
    plain = re.sub(r"\W", "", text).casefold()
    return f"[{category.upper()}:{_digest(policy, 'hash', category, plain).hex()[:16]}]"


def _surrogate(policy: Policy, text: str, category: str) -> str:
    """Of the same form; words come from the word lists, digits and letters from the key."""
    if category == "date":  # not by the same days for everybody
        return (_shift if policy.patient else _placeholder)(policy, text, category)
    if category == "age":
        return "90+" if text.isascii() else "九十多"
    if category in ("name", "location"):
        return _surrogate_words(policy, text, category)
    stream = _digest(policy, "surrogate", category, text)
    while len(stream) < len(text):
        stream += _digest(policy, stream.hex())
    return "".join(_other(sign, stream[index]) for index, sign in enumerate(text))


def _other(sign: str, byte: int) -> str:
    for first, count in (("0", 10), ("a", 26), ("A", 26)):
        if 0 <= ord(sign) - ord(first) < count:
            return chr(ord(first) + byte % count)
    return sign


def _surrogate_words(policy: Policy, text: str, category: str) -> str:
    """Word by word, so that a person's name and its parts stay one person's."""
    if re.search(f"[{HAN}]", text):
        lists = ("surname", "given_one") if category == "name" else ("city",)
        return "".join(_choose(policy, lexicon("zh")[name], name, text) for name in lists)
    name = "family" if category == "name" else "city"
    entries = [word for word in lexicon("en")[name] if word.isalpha()]

    def other(match: re.Match[str]) -> str:
        word = match.group()
        if word in lexicon("en")["state"]:
            return word  # no identifier
        if word.isdigit():
            stream = cycle(_digest(policy, category, word))
            return "".join(map(_other, word, stream))
        new = _choose(policy, entries, category, word.casefold())
        new = new[:1] if len(word) == 1 else new
        return new.upper() if word.isupper() else new.lower() if word.islower() else new

    return re.sub(r"[^\W_]+(?:['’][^\W_]+)?", other, text)


def _choose(policy: Policy, entries: list[str], *parts: str) -> str:
    return entries[int.from_bytes(_digest(policy, *parts)[:8]) % len(entries)]


def _shift(policy: Policy, text: str, category: str) -> str:
    """The date moved by the patient's number of days; one that is not whole becomes [DATE].

    A day and a month without a year cannot be moved exactly (leap years), so they are hidden.
    """
    span = 2 * MAX_SHIFT_DAYS
    days = int.from_bytes(_digest(policy, "shift", policy.patient)[:4]) % span - MAX_SHIFT_DAYS
    days += days >= 0  # never by nothing
    for pattern, move in ((NUMERIC, _move_numeric), (NAMED, _move_named)):
        if match := pattern.fullmatch(text):
            try:
                return move(match, timedelta(days=days))
            except (ValueError, OverflowError):
                break
    return _placeholder(policy, text, category)


def _move_numeric(match: re.Match[str], by: timedelta) -> str:
    first, one, second, two, last, end = match.groups(default="")
    if len(first) == 4:
        moved = date(int(first), int(second), int(last)) + by
        parts = [f"{moved.year}", f"{moved.month:0{len(second)}}", f"{moved.day:0{len(last)}}"]
    elif len(last) == 4:
        if int(first) <= 12 and int(second) <= 12 and first != second and one != ".":
            raise ValueError("day and month cannot be told apart")
        by_day = int(first) > 12 or one == "."
        month, day = (second, first) if by_day else (first, second)
        moved = date(int(last), int(month), int(day)) + by
        pair = (moved.day, moved.month) if by_day else (moved.month, moved.day)
        parts = [f"{pair[0]:0{len(first)}}", f"{pair[1]:0{len(second)}}", f"{moved.year}"]
    else:
        raise ValueError("no century")
    return f"{parts[0]}{one}{parts[1]}{two}{parts[2]}{end}"


def _move_named(match: re.Match[str], by: timedelta) -> str:
    before, month, after, gap, year = match.groups(default="")
    if bool(before) == bool(after):
        raise ValueError("one day")
    number = [name[:3] for name in MONTHS].index(month[:3].title()) + 1
    moved = date(int(year), number, int(before or after)) + by
    name = MONTHS[moved.month - 1]
    name = name if len(month) > 3 or month.lower() == "may" else name[:3]
    name = name.upper() if month.isupper() else name
    return (
        f"{moved.day} {name}{gap}{moved.year}" if before else f"{name} {moved.day}{gap}{moved.year}"
    )


def _keep(_: Policy, text: str, category: str) -> str:
    return text


REPLACE: dict[Action, Callable[[Policy, str, str], str]] = {
    "placeholder": _placeholder,
    "mask": _mask,
    "surrogate": _surrogate,
    "shift": _shift,
    "hash": _hash,
    "keep": _keep,
}
