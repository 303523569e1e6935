"""What a mid-training run is told: the record behind `recipes/midtrain/NAME.toml`."""

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from attending.config import Config
from attending.evaluate.forgetting import ForgettingConfig
from attending.train.recipe import TrainConfig
from attending.train.schedule import Phase, Shape

Name = Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]  # also of metrics
PartLoss = Literal["cross_entropy", "masked_cross_entropy", "self_constraint"]


class PartConfig(Config):
    """Documents that share a loss."""

    share: NonNegativeFloat
    """Of the tokens, beside the other parts' shares; 0: it is only watched."""
    domain: str | None = None
    """All documents of this domain of the corpus, but those whose source another part names."""
    sources: tuple[str, ...] = ()
    """All documents of these sources of the corpus."""
    loss: PartLoss = "cross_entropy"
    """`cross_entropy`: every token of the text. `masked_cross_entropy`: the notes in it, the text
    around them is context (the corpus' `notes`). `self_constraint`: divergence from the teacher,
    whatever the text says."""
    weight: PositiveFloat = 1.0
    """Of each token's loss; Baichuan-M2's are not published."""
    is_kept: bool = False
    """What training must not cost: its held-out bits count as forgetting."""

    @model_validator(mode="after")
    def _draws(self) -> Self:
        if self.domain is None and not self.sources:
            raise ValueError("a part needs a domain or sources")
        return self


class MidtrainConfig(TrainConfig):
    """From a model and token shards to a model of the domain."""

    model: str
    """What is gone on from: a source, such as `default` or a folder."""
    teacher: str | None = None
    """What `self_constraint` stays near, with the same tokenizer; None: the model itself, frozen
    as it begins."""
    corpus: str
    """Folder that `attending corpus` wrote with the model's tokenizer."""
    parts: dict[Name, PartConfig] = Field(min_length=1)
    """By name; Baichuan-M2 mixes medical, general and maths 2:2:1."""
    divergence: Literal["reverse", "forward"] = "reverse"
    """`reverse` is KL(model || teacher), as Baichuan-M2 prints it; `forward` the other way."""
    tokens: PositiveInt
    """Of all parts; rounded up to whole steps."""
    context: PositiveInt
    """Tokens of a row; documents are packed into rows and cut at their ends."""
    schedule: Shape = "cosine"
    """The learning rate after the warm-up stays, or falls to the final one."""
    interpolation: float = Field(1.0, gt=0, le=1)
    """How far from the start to the trained weights the model that comes out is (the mixing
    coefficient of WiSE-FT, arXiv 2109.01903). Below 1, what training cost comes back sooner than
    what it taught goes; the states that are gone on from stay whole."""
    forgetting: ForgettingConfig = ForgettingConfig()
    """What is compared before and after."""
    seed: NonNegativeInt = 0
    """Of the order of documents."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.warmup_steps > self.num_steps:
            raise ValueError("optimizer.warmup_tokens is more than tokens")
        if not any(part.share for part in self.parts.values()):
            raise ValueError("no part has a share above 0")
        if self.teacher and not self.needs_teacher:
            raise ValueError("a teacher is named and no part has the loss self_constraint")
        return self

    @property
    def needs_teacher(self) -> bool:
        """Whether a part has the loss that asks it."""
        return self.constrained_share > 0

    @property
    def constrained_share(self) -> float:
        """Of the tokens, that the teacher reads too."""
        shares = [(part.share, part.loss == "self_constraint") for part in self.parts.values()]
        return sum(share for share, asked in shares if asked) / sum(share for share, _ in shares)

    @property
    def num_steps(self) -> int:
        """Rounded up."""
        return -(-self.tokens // self.batch.tokens)

    @property
    def warmup_steps(self) -> int:
        """Rounded up."""
        return -(-self.optimizer.warmup_tokens // self.batch.tokens)

    @property
    def phases(self) -> list[Phase]:
        """For the schedule."""
        return [Phase(self.num_steps, self.schedule)]
