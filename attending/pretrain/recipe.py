"""What a pretraining run is told: the record behind `recipes/pretrain/NAME.toml`."""

from typing import Any, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from attending.config import Config
from attending.train.recipe import TrainConfig
from attending.train.schedule import Phase, Shape


class StageConfig(Config):
    """A stretch of training with one context, mixture and shape of the learning rate."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """For messages."""
    tokens: PositiveInt
    """Targets; rounded up to whole steps."""
    context: PositiveInt
    """Targets of a row; documents are packed into rows and cut at their ends."""
    rope_theta: PositiveFloat
    """Base of the rotary embedding."""
    mixture: dict[str, NonNegativeFloat] = Field(min_length=1)
    """Share of the tokens by the corpus' domains."""
    schedule: Shape = "constant"
    """The learning rate stays, or falls as a cosine from the peak to the final one."""

    @model_validator(mode="after")
    def _draws(self) -> Self:
        if not sum(self.mixture.values()):
            raise ValueError(f"mixture of stage {self.name} has no weight above 0")
        return self


class PretrainConfig(TrainConfig):
    """From token shards to a base model."""

    corpus: str
    """Folder that `attending corpus` wrote."""
    tokenizer: str
    """The tokenizer that the corpus was encoded with: a source, such as a folder."""
    model: dict[str, Any]
    """What stands in `config.json`; end-of-text and begin-of-text ids are the tokenizer's."""
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """In order."""
    seed: int = 0
    """Of the first weights."""
    data_seed: NonNegativeInt = 0
    """Of the order of documents, so that runs may share it."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len({*names}) < len(names):
            raise ValueError(f"stages must have names of their own, not {names}")
        if self.warmup_steps > self.num_steps:
            raise ValueError("optimizer.warmup_tokens is more than all stages have")
        return self

    @property
    def phases(self) -> list[Phase]:
        """The stages as the schedule sees them."""
        return [Phase(-(-s.tokens // self.batch.tokens), s.schedule) for s in self.stages]

    def stage_at(self, step: int) -> StageConfig:
        """The stage that makes a step; before the first, the first, after the last, the last."""
        for stage, phase in zip(self.stages, self.phases, strict=True):
            if step < phase.steps:
                return stage
            step -= phase.steps
        return self.stages[-1]

    def rows_at(self, stage: StageConfig) -> int:
        """Rows of a step, over all ranks."""
        return self.batch.tokens // stage.context

    @property
    def num_steps(self) -> int:
        """Of all stages."""
        return sum(phase.steps for phase in self.phases)

    @property
    def warmup_steps(self) -> int:
        """Rounded up."""
        return -(-self.optimizer.warmup_tokens // self.batch.tokens)
