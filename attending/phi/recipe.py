"""What training the tagger is told: the record behind `recipes/phi/NAME.toml`."""

from pydantic import PositiveInt

from attending.config import Config


class PhiConfig(Config):
    """The tagger's training."""

    notes: PositiveInt
    """Generated notes of each language."""
    epochs: PositiveInt
    """Passes over them."""
    seed: int = 0
    """Of the notes, of what is shown as words never seen, and of the order."""
    hide: dict[str, float]
    """Share of the words with each of the tagger's labels that is shown as words never seen."""
