"""What training the embedded judge is told: the record behind `recipes/judge/NAME.toml`."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from attending.config import Config


class JudgeConfig(Config):
    """The embedded judge's training."""

    documents: int = Field(ge=0)
    """Answers of MedQuAD that statements are taken from, beside all of K-QA's train part."""
    kqa_weight: PositiveFloat
    """Weight of a K-QA pair in the loss; one of MedQuAD, whose statements rules reworded, has 1."""
    epochs: PositiveInt
    """Passes over the pairs."""
    batch: PositiveInt
    """Pairs of a step."""
    rank: PositiveInt
    """Of the adapter of each linear layer."""
    rate: PositiveFloat
    """Peak learning rate, after a twentieth of the steps; it then falls to 0 linearly."""
    reads: Literal["both", "text", "measures"] = "both"
    """What decides: the texts, what is measured on them, or both."""
    seed: int = 0
    """Of the pairs, their order and the first weights."""
