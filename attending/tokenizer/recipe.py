"""What a tokenizer run is told: the record behind `recipes/tokenizer/NAME.toml`."""

from typing import Annotated

from pydantic import Field, PositiveInt

from attending.config import Config


class TextConfig(Config):
    """Files of text, below the recipe's `root`."""

    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Globs of `.jsonl` and `.txt` files, both also `.gz`. A .txt file is one text."""
    fields: tuple[str, ...] = ("text",)
    """Fields of a JSON line, each a text or a list of texts; they are joined by empty lines."""


class TokenizerConfig(Config):
    """From text to a tokenizer."""

    vocab_size: PositiveInt = 8_192
    """Tokens in all: a multiple of 128, as fast kernels want it."""
    num_special: int = Field(160, ge=149)
    """Ids below this one are control tokens; those without a name of Baichuan-M1's are reserved."""
    min_frequency: PositiveInt = 2
    """Two neighbours that were seen less often are not merged."""
    root: str = "."
    """Folder that all paths are relative to."""
    text: TextConfig
    """What to train on. Use a corpus' `sample.jsonl`: identifiers and copies are out of it."""
    samples: dict[str, TextConfig] = Field(default={})
    """Texts to measure fertility on, by name, beside the training text. Absent ones are skipped."""
    compare: tuple[str, ...] = ("default",)
    """Sources of other tokenizers to measure beside this one; those not pulled are skipped."""
    sample_bytes: PositiveInt = 1_000_000
    """Fertility is measured on so much of the beginning of each sample."""
