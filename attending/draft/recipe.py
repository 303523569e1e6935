"""What a run that makes a draft is told: the record behind `recipes/draft/NAME.toml`."""

from typing import Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from attending.config import Config
from attending.corpus.recipe import Format
from attending.train.recipe import TrainConfig
from attending.train.schedule import Shape


class PromptsConfig(Config):
    """Where prompts of one kind are."""

    path: str
    """Files, as a glob below the recipe's `root`."""
    format: Format = "jsonl"
    """How they are read."""
    prompt: str = ""
    """The user's words, of a record's fields, such as `{question}`. Empty: the record has
    `messages`, of which those up to the last of the user's are asked."""
    holdout_key: str = ""
    """What is held out as a whole, from a record's fields. Default: its file and line."""
    only: dict[str, tuple[str, ...]] = Field(default={})
    """Take records where each field named here has one of these values."""
    limit: NonNegativeInt = 0
    """At most so many, drawn by the recipe's seed; 0 takes all."""
    max_tokens: PositiveInt | None = None
    """Of an answer to these; None: as `writing` says."""


class WritingConfig(Config):
    """How the target is asked for its answers."""

    temperature: NonNegativeFloat = 0.0
    """As it will be used: greedy answers train a draft for greedy use."""
    max_tokens: PositiveInt = 512
    """Of an answer."""
    template: dict[str, Any] = Field(default={})
    """What the chat template is told, such as `enable_thinking = false`."""
    engine: dict[str, Any] = Field(default={})
    """Of a model on this machine, as `attending serve` takes it: the path that it will be served
    by."""
    concurrency: PositiveInt = 8
    """Answers under way at once."""


class HeadConfig(Config):
    """The draft's shape, where it is not a layer of its target's."""

    vocabulary: PositiveInt = 32_000
    """Tokens that it can propose: the most frequent of the answers, and those that end one."""
    intermediate_size: PositiveInt | None = None
    """Of its MLP."""
    gated: bool = False
    """Gate the attention's output, as we read Baichuan-M3; no stock engine loads it."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the weights that are written."""


class DraftConfig(TrainConfig):
    """From a model and prompts to a draft head for it."""

    model: str
    """The target: a source, such as `default` or a folder; adapters merged, as `sft` writes it."""
    root: str = "."
    """Folder that the paths of `prompts` begin at."""
    prompts: dict[str, PromptsConfig] = Field(min_length=1)
    """What the target is asked, by name."""
    writing: WritingConfig = WritingConfig()
    """How it answers."""
    dialogues: str = ""
    """Folder where its answers are kept for other runs. Empty: in the run's own, until it ends."""
    shares: PositiveInt = 64
    """Of the target's distribution at a token so many likeliest are learnt from."""
    keep_features: bool = False
    """Keep on disk what was read of the target, beside its answers: it is asked once, not once an
    epoch, and not again by another run. `--dry-run` says how large that is."""
    head: HeadConfig = HeadConfig()
    """What is trained."""
    begin: str = ""
    """A draft to go on from, of this head's shape: for other dialogues, or after its target was
    tuned. Its words stay. Empty: a new one."""
    unroll: PositiveInt = 7
    """Steps that the head goes on from its own states in training."""
    decay: float = Field(0.8, gt=0, le=1)
    """Weight of each step's loss over the one before."""
    epochs: PositiveFloat
    """Times that every answer is seen."""
    context: PositiveInt
    """Tokens of a row; answers are packed into rows and never cut. Longer ones are left out."""
    schedule: Shape = "cosine"
    """The learning rate after the warm-up stays, or falls to the final one."""
    seed: NonNegativeInt = 0
    """Of the first weights, of order and of sampling."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.heldout.prompts:
            raise ValueError("heldout.prompts are for base models; a draft writes nothing")
        if self.compute.precision == "bfloat16" or self.compute.compile or self.compute.recompute:
            raise ValueError("a draft is trained in float32 or float64, not compiled, at present")
        return self
