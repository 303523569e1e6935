"""What every training recipe has in common; a stage's recipe is made of these and its own."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from attending.config import Config
from attending.train.schedule import Rates, SkipRule

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """AdamW, its schedule and its guards."""

    peak: PositiveFloat
    """Learning rate after the warm-up."""
    final: PositiveFloat
    """Learning rate that a cosine stage ends with."""
    warmup_tokens: NonNegativeInt
    """Length of the linear warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay of the two moments."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment. Baichuan-M1's is not published."""
    weight_decay: NonNegativeFloat = 0.1
    """Of matrices, embedding and head among them; not of norms, biases and convolution taps."""
    clip_norm: PositiveFloat = 1.0
    """Largest norm of a step's gradient; longer ones are scaled down."""
    skip_window: NonNegativeInt = 100
    """Norms that the adaptive gradient update looks back on; 0 turns it off."""
    skip_factor: PositiveFloat = 1.2
    """A step is skipped if its norm exceeds this times their mean ..."""
    skip_margin: NonNegativeFloat = 0.1
    """... plus this."""

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.final > self.peak:
            raise ValueError(f"final ({self.final}) must not exceed peak ({self.peak})")
        return self

    @property
    def rates(self) -> Rates:
        """Of the schedule."""
        return Rates(self.peak, self.final)

    @property
    def rule(self) -> SkipRule:
        """Of the adaptive gradient update."""
        return SkipRule(self.skip_window, self.skip_factor, self.skip_margin)


class BatchConfig(Config):
    """Tokens of a step; the same for any number of ranks."""

    tokens: PositiveInt
    """Targets of a step, over all ranks."""
    micro_tokens: PositiveInt
    """Targets of one forward pass of one rank; memory grows with it, the result does not change."""

    def rows(self, context: int) -> tuple[int, int]:
        """Of a step over all ranks, and of a pass of one."""
        return self.tokens // context, self.micro_tokens // context


class ComputeConfig(Config):
    """How it is computed."""

    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """Of products; the weights that are updated are never in half precision. bfloat16 is slower
    than float32 on CPUs without AVX512-BF16 or AMX."""
    recompute: bool = False
    """Keep only the blocks' inputs and compute the rest again in the backward pass: a third more
    work, and a small part of the activations' memory."""
    compile: bool = False
    """Compile the blocks. Takes about half a minute and, on a CPU, a C++ compiler. Not together
    with `recompute`, behind which nothing would be compiled."""

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        if self.compile and self.recompute:
            raise ValueError("compile and recompute exclude each other")
        return self


class StateConfig(Config):
    """What a run can be resumed from."""

    every_tokens: PositiveInt
    """Save after so many targets, and at every stage's end."""
    keep: PositiveInt = 2
    """Older states are removed."""


class HeldoutConfig(Config):
    """Watching on held-out text."""

    every_tokens: PositiveInt
    """Measure at the start, after so many targets, and at the end."""
    max_tokens: PositiveInt = 100_000
    """Of each domain: whole documents until there are so many."""
    final_tokens: PositiveInt = 10_000_000
    """The same at the end of the run."""
    prompts: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts to go on with; the samples are kept in samples.jsonl."""
    sample_tokens: PositiveInt = 40
    """Length of a sample."""


class AssumedConfig(Config):
    """What `--dry-run` reckons with; nothing else uses it."""

    shape: dict[str, Any] | None = None
    """What stands in the `config.json` of a model that is not on this machine."""

    devices: PositiveInt = 1
    """Ranks."""
    memory_gib: PositiveFloat = Field(24.0)
    """Of each."""
    peak_tflops: PositiveFloat = Field(0.328)
    """Products of each at the run's precision, in 10^12 operations a second."""
    share_of_peak: PositiveFloat = Field(0.4, le=1)
    """Of the peak, that training reaches."""


class TrainConfig(Config):
    """What every stage over packed rows is told, beside its own."""

    batch: BatchConfig
    """Tokens of a step; where nothing is cut, rows are not quite full."""
    optimizer: OptimizerConfig
    """AdamW, schedule, guards."""
    compute: ComputeConfig = ComputeConfig()
    """How it is computed."""
    state: StateConfig
    """What it can be resumed from."""
    heldout: HeldoutConfig
    """Watching on what is held out."""
    assumed: AssumedConfig = AssumedConfig()
    """What `--dry-run` reckons with."""
