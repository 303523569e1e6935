"""How many tokens a tokenizer makes of a text: fewer are a longer context and a faster answer."""

from collections.abc import Sequence
from typing import NamedTuple

from attending.chat import Tokenizer

HAN_SHARE = 0.1  # with more Han characters than this, white space does not tell words


class Fertility(NamedTuple):
    """Tokens a unit of text, without those that begin and end it."""

    tokens_per_byte: float
    tokens_per_character: float
    tokens_per_word: float | None  # between white space; None for Chinese


def fertility(tokenizer: Tokenizer, texts: Sequence[str]) -> Fertility:
    """Of some texts, each encoded on its own; they must not all be empty."""
    frame = len(tokenizer.encode(""))
    tokens = sum(len(tokenizer.encode(text)) - frame for text in texts)
    size = sum(len(text.encode()) for text in texts)
    characters = sum(map(len, texts))
    han = sum("\u4e00" <= c <= "\u9fff" for text in texts for c in text)
    words = 0 if han > HAN_SHARE * characters else sum(len(text.split()) for text in texts)
    return Fertility(tokens / size, tokens / characters, tokens / words if words else None)
