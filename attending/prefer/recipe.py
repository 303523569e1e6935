"""What a run of preference training is told: the record behind `recipes/prefer/NAME.toml`."""

from typing import Literal, Self

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
from attending.train.recipe import (
    AssumedConfig,
    ComputeConfig,
    HeldoutConfig,
    OptimizerConfig,
    StateConfig,
)
from attending.train.schedule import Phase, learning_rate

Method = Literal["dpo", "tdpo1", "tdpo2", "elo", "reward", "ppo"]
# Who reads which part of a recipe; with another method it would have no effect.
READERS: dict[str, tuple[Method, ...]] = {
    "pairs": ("dpo", "tdpo1", "tdpo2"),
    "sample": ("elo", "ppo"),
    "ppo": ("ppo",),
    "reference": ("dpo", "tdpo1", "tdpo2", "ppo"),
    "forgetting": ("dpo", "tdpo1", "tdpo2", "elo", "ppo"),
}


class UnitConfig(Config):
    """A step's pairs or, for elo and ppo, questions."""

    units: PositiveInt
    """Of a step, over all ranks."""
    max_tokens: int = Field(ge=2)
    """Of a sample, prompt and answer together; rows with longer ones are left out and counted."""
    micro_tokens: PositiveInt
    """Of one forward pass of one rank, at most. A pair, or a question's group, is never split: it
    must fit at `max_tokens` each."""


class PairConfig(Config):
    """Learning from pairs."""

    beta: PositiveFloat = 0.1
    """How dear it is to leave the reference model; 0.1 in TDPO's code."""
    alpha: NonNegativeFloat = 0.5
    """tdpo2: weight of the divergences' difference; 0.5 in TDPO's code."""


class SampleConfig(Config):
    """Learning from what the model samples, at temperature 1 from its whole distribution."""

    group: int = Field(4, ge=2)
    """Answers or chains of thought to a question."""
    max_tokens: PositiveInt = 128
    """Of one."""
    bridge: str = Field("\n\nAnswer: ", min_length=1)
    """elo: text between the chain of thought and the true answer; not trained on."""
    direct_term: bool = False
    """elo: also learn the true answer behind the chain. Baichuan-M1 prints the loss without."""


class PpoConfig(Config):
    """Baichuan-M1 published none of these numbers; the defaults are the field's."""

    updates: PositiveInt = 2
    """Steps made on each draw of sampled answers."""
    clip: float = Field(0.2, gt=0, lt=1)
    """How far the ratio of probabilities may leave 1, and a value the one at sampling."""
    value_weight: NonNegativeFloat = 0.1
    """Of the critic's error beside the policy's loss."""
    penalty: NonNegativeFloat = 0.05
    """Of a token's log-ratio to the reference model, taken off its reward."""
    lam: float = Field(0.95, ge=0, le=1)
    """Of generalized advantage estimation; rewards are not discounted."""
    reward_model: str | None = None
    """Folder that `method = "reward"` wrote; None: each row's own `rule`."""


class PreferConfig(Config):
    """From a chat model and preferences to a chat model, or a reward model."""

    method: Method
    """Pairs: dpo, tdpo1, tdpo2, reward (a reward model). Sampled answers: elo, ppo."""
    model: str
    """Source of the model to start from."""
    reference: str | None = None
    """Source of the frozen model to stay near; None: the model as it begins."""
    data: str
    """JSONL file: `prompt` (messages) with `chosen` and `rejected`, or `answer` (elo), or `rule`
    (ppo)."""
    steps: PositiveInt
    """Updates."""
    batch: UnitConfig
    """What a step is made of."""
    pairs: PairConfig = PairConfig()
    """dpo, tdpo1, tdpo2."""
    sample: SampleConfig = SampleConfig()
    """elo, ppo."""
    ppo: PpoConfig = PpoConfig()
    """ppo."""
    optimizer: OptimizerConfig
    """AdamW, its guards, and a cosine from `peak` to `final`. Warm-up is reckoned as if all samples
    were `batch.max_tokens` long."""
    compute: ComputeConfig = ComputeConfig()
    """How it is computed."""
    state: StateConfig
    """What it can be resumed from."""
    heldout: HeldoutConfig
    """Watching: `prompts` to go on with."""
    forgetting: ForgettingConfig = ForgettingConfig()
    """What is compared before and after."""
    assumed: AssumedConfig = AssumedConfig()
    """For `--dry-run`."""
    seed: NonNegativeInt = 0
    """Of the order of rows and of sampling."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in READERS:
            default = type(self).model_fields[name].default
            if not self.reads(name) and getattr(self, name) != default:
                raise ValueError(f"{name} has no effect with method = {self.method}: leave it out")
        if self.is_alone and self.compute.precision == "bfloat16":
            raise ValueError(f"{self.method} needs whole weights: set compute.precision = float32")
        if self.compute.compile:
            raise ValueError("compute.compile: batches differ in length, each would be compiled")
        if not self.units_per_pass:
            least = self.batch.max_tokens * self.width
            raise ValueError(f"batch.micro_tokens must hold a whole unit: at least {least}")
        if self.steps % self.updates:
            raise ValueError(f"steps must be a multiple of ppo.updates ({self.updates})")
        return self

    def reads(self, part: str) -> bool:
        """Whether the method has a use for a part of the recipe."""
        return self.method in READERS[part]

    @property
    def is_alone(self) -> bool:
        """Whether the method runs in one process: it samples, or has a head beside the decoder."""
        return self.method in ("elo", "reward", "ppo")

    @property
    def width(self) -> int:
        """Samples of a unit."""
        return self.sample.group if self.reads("sample") else 2

    @property
    def units_per_pass(self) -> int:
        """As many as fit at their longest, so that all ranks make as many passes."""
        return self.batch.micro_tokens // (self.batch.max_tokens * self.width)

    @property
    def updates(self) -> int:
        """Steps made on one draw of units."""
        return self.ppo.updates if self.reads("ppo") else 1

    def rate(self, step: int) -> float:
        """Of learning, for the step that is about to be made."""
        tokens = self.batch.units * self.width * self.batch.max_tokens
        warmup = -(-self.optimizer.warmup_tokens // tokens)
        return learning_rate(step, [Phase(self.steps, "cosine")], warmup, self.optimizer.rates)
