"""Generated notes with every identifier's place: what the tagger is trained on.

Fragments (`lexicon/fragments.LANG.txt`) are mixed at random, their slots filled from word lists and
forms (`formats.toml`), then roughened: hard line breaks, capitals, small letters. Nobody in them
exists.
"""

import random
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import NamedTuple

from attending.phi.checks import resident_check_digit
from attending.phi.spans import CATEGORIES, Span

LANGUAGES = ("en", "zh")
SLOT = re.compile(r"\{(\w+)(?:\.(\w+))?\}")
FORM = re.compile(r"(?:(\d+)\|)?(.*)", re.DOTALL)
SLOTS_OF = {
    "name": "name last first last_first initials surname minority pinyin",
    "location": "address street city county county_whole zip hospital org place district estate "
    "village",
    "date": "date date_words",
    "age": "age90",
    "phone": "phone landline phone_words",
    "health_plan": "plan",
    "vehicle": "plate vin",
}
CATEGORY = {name: name for name in CATEGORIES} | {
    slot: category for category, slots in SLOTS_OF.items() for slot in slots.split()
}
"""Slots that are identifiers; the others stand for ordinary words. Every `age` is marked, for the
tagger to learn what an age is: it keeps those above 89 by itself."""
ALPHABETS = {
    "#": "0123456789",
    "^": "ABCDEFGHJKLMNPRSTUVWXYZ",
    "_": "abcdefghijklmnopqrstuvwxyz",
    "~": "ABCDEFGHJKLMNPRSTUVWXYZ0123456789",
    "%": "0123456789abcdef",
}
MONTHS = [
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
]
HAN = "〇一二三四五六七八九"
NAME_DOT = re.compile("[·•・．.]")


class Note(NamedTuple):
    """A text and its identifiers, in order."""

    text: str
    spans: list[Span]


def generate(language: str, count: int, seed: int) -> Iterator[Note]:
    """Notes of 6 to 24 fragments; the same for the same seed."""
    writer = Writer(language, random.Random(f"{language} {seed}"))
    for _ in range(count):
        yield writer.note()


@cache
def lexicon(language: str) -> dict[str, list[str]]:
    """The word lists of a language."""
    path = resources.files("attending.phi") / "lexicon" / f"lexicon.{language}.toml"
    lists: dict[str, list[str]] = tomllib.loads(path.read_text("utf-8"))
    return lists


@cache
def fragments(language: str) -> list[str]:
    """The fragments of a language, with their slots."""
    path = resources.files("attending.phi") / "lexicon" / f"fragments.{language}.txt"
    lines = path.read_text("utf-8").replace("{county} County", "{county_whole}").splitlines()
    kept = [line for line in lines if line and not line.startswith("#")]
    return [line.replace("\\n", "\n").replace("\\t", "\t") for line in kept]


@cache
def forms(language: str) -> dict[str, tuple[list[str], list[int]]]:
    """The forms of each slot, and their weights."""
    path = resources.files("attending.phi") / "formats.toml"
    tables: dict[str, list[str]] = tomllib.loads(path.read_text("utf-8"))[language]
    found = {}
    for slot, texts in tables.items():
        parsed = [FORM.fullmatch(text) for text in texts]
        weights = [int(match[1] or 1) for match in parsed if match]
        found[slot] = ([match[2] for match in parsed if match], weights)
    return found


class Writer:
    """Writes notes of one language from one stream of random numbers."""

    def __init__(self, language: str, rng: random.Random) -> None:
        """`rng` is used up as notes are written."""
        self._language, self._rng = language, rng
        self._words, self._forms = dict(lexicon(language)), forms(language)
        for slot, name in (("road", "street"), ("estate_any", "estate")):
            self._words[slot] = self._words.get(name, [])
        self._words["hospital_name"] = self._words["hospital"]
        self._words["estate_name"] = [n for n in self._words["estate_any"] if n.isalpha()]
        self._words["surname_any"] = self._words.get("surname", [])
        given = self._words.get("given_one", []) + self._words.get("given_two", [])
        self._words["given_char"] = sorted(set("".join(given)))
        self._words["surname_top"] = self._words["surname_any"][:100]
        self._words["minority_any"] = self._words.get("minority", [])
        parts = [NAME_DOT.split(name) for name in self._words["minority_any"]]
        self._words["minority_first"] = [part[0] for part in parts]
        self._words["minority_last"] = [part[-1] for part in parts]

    def note(self) -> Note:
        """One note."""
        parts: list[str] = []
        spans: list[Span] = []
        length = 0
        gap = self._rng.choices(["\n", "\n\n", " ", "  "], [6, 2, 2, 1])[0]
        for fragment in self._rng.sample(fragments(self._language), self._rng.randint(6, 24)):
            text, found = self._roughen(*self.fill(fragment))
            spans += [Span(s.start + length, s.end + length, s.category, 1.0) for s in found]
            parts += [text, gap]
            length += len(text) + len(gap)
        text = "".join(parts).rstrip()  # a value may end in a space
        return Note(text, [Span(s.start, min(s.end, len(text)), s.category, 1.0) for s in spans])

    def fill(self, fragment: str) -> tuple[str, list[Span]]:
        """A fragment with its slots filled, and where its identifiers are."""
        text, spans, at = "", [], 0
        for slot in SLOT.finditer(fragment):
            text += fragment[at : slot.start()]
            at = slot.end()
            value = self.value(slot[1])
            if slot[1] in CATEGORY:
                spans.append(Span(len(text), len(text) + len(value), CATEGORY[slot[1]], 1.0))
            text += value
        return text + fragment[at:], spans

    def value(self, slot: str, form: str = "") -> str:
        """A value for a slot; see formats.toml."""
        if slot.isupper():
            return self.value(slot.lower()).upper()
        if form:
            text = self.value(slot).lower()
            return re.sub(r"[^a-z]", "", text) if form == "letters" else text
        if slot in self._forms:
            texts, weights = self._forms[slot]
            chosen = self._rng.choices(texts, weights)[0]
            return self._shape(self._expand(chosen, slot.startswith(("date", "time"))))
        if slot in self._words:
            text = self._rng.choice(self._words[slot])
            return self._shape(text, "#") if slot in ("lab", "vital", "code", "dose") else text
        return self._number(slot)

    def _expand(self, form: str, is_moment: bool) -> str:
        parts = self._moment() if is_moment else {}

        def part(match: re.Match[str]) -> str:
            name = match[1]
            if name.lower() not in parts:
                return self.value(name, match[2] or "")
            text = parts[name.lower()]
            return text.upper() if name.isupper() else text.lower() if match[2] else text

        return SLOT.sub(part, form)

    def _moment(self) -> dict[str, str]:
        """The parts of one day and time, as text."""
        year, month, day = self._day()
        hour, minute = self._rng.randint(0, 23), self._rng.randint(0, 59)
        suffix = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}.get(day, "th")
        name = MONTHS[month - 1]
        parts = {"y": f"{year}", "yy": f"{year % 100:02}", "m": f"{month}", "mm": f"{month:02}"}
        parts |= {"d": f"{day}", "dd": f"{day:02}", "month": name, "mon": name[:3], "th": suffix}
        parts |= {"hh": f"{hour:02}", "mi": f"{minute:02}", "hour": f"{hour % 12 or 12}"}
        years = "".join(HAN[int(sign)] for sign in parts["y"])
        return parts | {"han_y": years, "han_m": _han(month), "han_d": _han(day)}

    def _day(self) -> tuple[int, int, int]:
        return self._rng.randint(1925, 2026), self._rng.randint(1, 12), self._rng.randint(1, 28)

    def _number(self, slot: str) -> str:
        """Slots that are numbers of their own kind."""
        if slot == "initial":
            return self._rng.choice("ABCDEFGHIJKLMNOPRSTVW")
        if slot.startswith("resident"):
            return self._resident(slot)
        low, high = {"age": (1, 89), "n": (1, 30), "year": (1960, 2026)}[slot]
        return str(self._rng.randint(low, high))

    def _resident(self, slot: str) -> str:
        year, month, day = self._day()
        number = self._shape(f"[1-6]#####{year}{month:02}{day:02}###")
        whole = number + resident_check_digit(number)
        return {
            "resident": whole,
            "resident_spaced": f"{whole[:6]} {whole[6:14]} {whole[14:]}",
            "resident_old": number[:6] + number[8:17],
            "resident_masked": f"{whole[:6]}********{whole[14:]}",
        }[slot]

    def _shape(self, form: str, signs: str = "#^_~%") -> str:
        def digit(match: re.Match[str]) -> str:
            return str(self._rng.randint(int(match[1]), int(match[2])))

        form = re.sub(r"\[(\d)-(\d)\]", digit, form)
        return "".join(
            self._rng.choice(ALPHABETS[sign]) if sign in signs else sign for sign in form
        )

    def _roughen(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """Other letters' case, other line breaks, fewer marks."""
        chance = self._rng.random()
        if chance < 0.06:
            text = "".join(sign.lower() if len(sign.lower()) == 1 else sign for sign in text)
        elif chance < 0.12:
            text = "".join(sign.upper() if len(sign.upper()) == 1 else sign for sign in text)
        elif chance < 0.2:
            return self.wrap(text, spans)
        elif chance < 0.23:
            text = text.replace(",", " ").replace("，", " ")
        elif chance < 0.25:
            text = text.replace(":", " ").replace("：", " ")
        return text, spans

    def wrap(self, text: str, spans: list[Span]) -> tuple[str, list[Span]]:
        """Break lines at a column: English at spaces, Chinese anywhere, identifiers too."""
        is_chinese = self._language == "zh"
        width = self._rng.randint(18, 90)
        indent = self._rng.choice(["", "", "", "  ", "\u3000\u3000"])
        moved, lead, column, parts = [0], [], 0, []
        for sign in text:
            column = 0 if sign == "\n" else column + 1
            breaks = column > width and (is_chinese or sign == " ")
            column = 0 if breaks else column
            cut = "\n" + indent if breaks else ""
            parts.append(cut + sign if is_chinese else cut or sign)
            lead.append(len(cut) if is_chinese else 0)
            moved.append(moved[-1] + len(parts[-1]))
        found = [Span(moved[s.start] + lead[s.start], moved[s.end], s.category, 1.0) for s in spans]
        return "".join(parts), found


def _han(number: int) -> str:
    tens, ones = divmod(number, 10)
    return ("" if not tens else "十" if tens == 1 else f"{HAN[tens]}十") + (
        HAN[ones] if ones else ""
    )
