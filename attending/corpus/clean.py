"""What a text must be: one normal form, and the faults that remove it.

NFC, not NFKC: in a dose or a unit, m² and m2, µg and its look-alikes, are not the same.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from attending.corpus.recipe import QualityConfig
from attending.errors import ConfigError
from attending.overlap import HAN

LINE_END = re.compile(r"\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
# Controls, marks of direction, and what has no width: unseen, so tokens that mean nothing.
UNSEEN = re.compile(
    r"[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff"
    "\U000e0000-\U000e007f]"
)
LINE_TAIL = re.compile(r"[^\S\n]+$", re.MULTILINE)
GAP = re.compile(r"\n{4,}")
BREAK = re.compile(rf"[\s{HAN}]+")
# Told apart besides those asked for; with all 140 of the model, short English becomes Pidgin.
LANGUAGES = (
    "ar bg bn cs da de el en es fa fi fr he hi hu id it ja ko ms nl no pl pt ro ru sv ta th tr "
    "uk vi zh"
)
LANGUAGE_CHARACTERS = 2_000


class Normal(NamedTuple):
    """A text in normal form."""

    text: str
    num_unseen: int  # control and zero-width characters taken out


def normalise(text: str) -> Normal:
    """NFC, one kind of line end, nothing unseen, no trailing spaces, at most two blank lines."""
    text, count = UNSEEN.subn("", LINE_END.sub("\n", text))
    text = LINE_TAIL.sub("", unicodedata.normalize("NFC", text))
    return Normal(GAP.sub("\n\n\n", text).strip(), count)


def fault(text: str, quality: QualityConfig) -> str:
    """Why a normalised text is removed whatever it says; empty if it stays."""
    if not text:
        return "empty"
    if len(text) < quality.min_characters:
        return "too_short"
    if any(len(run) > quality.max_token_characters for run in BREAK.split(text)):
        return "long_token"
    return ""


@cache
def language_of(wanted: Sequence[str]) -> Callable[[str], str]:
    """A function from a text's beginning to its language's code (py3langid, BSD, model inside)."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    try:
        identifier.set_languages(sorted({*LANGUAGES.split(), *wanted}))
    except ValueError as error:
        raise ConfigError(f"quality.languages: {error}; give codes such as en and zh.") from None
    return lambda text: str(identifier.classify(text[:LANGUAGE_CHARACTERS])[0])
