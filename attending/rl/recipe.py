"""What a reinforcement learning run is told: the record behind `recipes/rl/NAME.toml`."""

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
from attending.evaluate.forgetting import ForgettingConfig
from attending.train.recipe import AssumedConfig, ComputeConfig, OptimizerConfig, StateConfig
from attending.verifier.judge.ask import JudgeOptions

Share = Annotated[float, Field(ge=0, le=1)]


class SamplerConfig(Config):
    """Who writes the answers: this process' engine, or vLLM."""

    weights: Literal["w8", "w4-32", "w4-64", "w4-128", "float"] = "w8"
    """Of the engine, packed anew after every update; `float` computes as the trainer does."""
    running: PositiveInt = 16
    """Answers side by side."""
    threads: PositiveInt | None = None
    """None takes every core."""
    address: str | tuple[str, ...] | None = None
    """Of vLLM's servers instead; the weights are written to `folder`, which they serve from."""
    folder: str | None = None
    """Model folder that all see."""
    api_key_variable: str | None = None
    """Environment variable with the server's key."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if bool(self.address) != bool(self.folder):
            raise ValueError("address and folder belong together: give both or neither")
        return self


class RewardConfig(Config):
    """From verdicts to rewards."""

    form: Literal["affine", "clipped"] = "affine"
    """Of a rubric's score in [0, 1]: Baichuan-M3's printed form, or HealthBench's."""
    length_threshold: Share | None = None
    """Baichuan-M2's reward for short answers, where some 80 % of a group score above this; None:
    off."""
    length_scale: PositiveFloat = 4.0
    """c of that reward, c / sqrt(tokens); M2's is 4, for answers of thousands of tokens. Of fifty
    tokens it is 0.57 and outweighs the score: take less for short ones."""
    count_thinking: bool = True
    """Whether thinking counts as length; M2's report does not say."""


class LossConfig(Config):
    """See `loss.py`; M2 published none of these numbers."""

    level: Literal["token", "sequence"] = "token"
    """Of the ratio: M2's improved GRPO, or GSPO."""
    eps_low: PositiveFloat = 0.2
    """How far a ratio may fall below 1 ..."""
    eps_high: PositiveFloat = 0.28
    """... and rise above it; DAPO's numbers. GSPO's are 3e-4 and 4e-4."""
    most_weight: PositiveFloat = 2.0
    """At which the weight of a token is cut that the sampler found less likely than the trainer."""
    advantage: Literal["group_mean", "group_std"] = "group_mean"
    """M2's, or GRPO's."""


class DialogueConfig(Config):
    """Consultations with simulated patients, for cases that name one."""

    turns: PositiveInt = 6
    """Of the doctor, before the reply that is reinforced: from 0 to one less; in watching, all."""
    most_facts: PositiveInt = 2
    """New facts that a reply is worth 1 for."""


class ClusterConfig(Config):
    """Roles on a Ray cluster, for `--ray`."""

    trainers: PositiveInt = 1
    """Ranks, a GPU each."""
    generator_gpus: PositiveInt = 1
    """Of a vLLM server: its tensor parallelism. There are as many as the GPUs left over hold."""
    verifier_gpus: NonNegativeInt = 0
    """Of a vLLM server of the model that `judge` names; rules need none."""
    port: Annotated[int, Field(ge=1024, le=60_000)] = 29500
    """Of the rendezvous; servers take those behind it."""


class WatchConfig(Config):
    """When to look, to warn and to stop."""

    every_steps: PositiveInt = 10
    """Held-out cases are answered at the start, after so many steps, and at the end."""
    heldout_cases: PositiveInt = 100
    """The first so many."""
    heldout_answers: PositiveInt = 1
    """To each; more than one are sampled, one is the likeliest."""
    samples: PositiveInt = 2
    """Groups of a step that are kept to read, with all their answers."""
    alarm_steps: PositiveInt = 20
    """Warn when the reward rose over so many steps while held-out scores fell, or lengths doubled,
    or nearly all answers are cut."""
    max_mismatch: PositiveFloat = 0.1
    """Nats a token, KL(sampler || trainer); above it the run stops."""
    min_entropy: NonNegativeFloat = 0.0
    """Nats a token; below it the run stops."""
    max_unscored: Share = 0.5
    """Share of a step's answers without a verdict; above it the run stops."""


class RlConfig(Config):
    """From a chat model and cases to a chat model that scores better on them."""

    model: str
    """What is gone on from: a source."""
    cases: str
    """JSONL file of cases to learn from (`rl/cases.py`)."""
    heldout: str
    """JSONL file of cases that are only watched."""
    template: dict[str, Any] = Field(default={})
    """What the chat template is told, such as `enable_thinking = false`."""
    judge: str | None = None
    """Who judges rubrics: `embedded`, `embedded:FOLDER`, an address, or a model on this machine."""
    reporter: str | None = None
    """Another judge, of held-out cases only; None: the same."""
    judging: JudgeOptions = JudgeOptions()
    """How a judge is asked."""
    steps: PositiveInt
    """Updates."""
    prompts: PositiveInt
    """Cases of a step, over all ranks."""
    group: Annotated[int, Field(ge=2)] = 8
    """Answers to each."""
    updates: PositiveInt = 1
    """Steps made on each draw of answers."""
    max_tokens: PositiveInt
    """Of an answer, and the constant that the loss divides by."""
    max_prompt: PositiveInt = 1024
    """Cases with longer prompts are left out and counted."""
    micro_tokens: PositiveInt
    """Rows of a forward pass, at most; a group with its one prompt is never split."""
    share_prompts: bool = True
    """A group's prompt is computed once, and groups that agree are not; False, for measuring what
    that saves: all answers, each behind a prompt of its own."""
    sampler: SamplerConfig = SamplerConfig()
    """Who writes."""
    dialogue: DialogueConfig = DialogueConfig()
    """Consultations, of cases with a patient."""
    reward: RewardConfig = RewardConfig()
    """What an answer is worth."""
    loss: LossConfig = LossConfig()
    """What is minimised."""
    optimizer: OptimizerConfig
    """AdamW, its guards; after the warm-up the rate stays at `peak`. Warm-up is in tokens as if
    all answers were `max_tokens` long."""
    compute: ComputeConfig = ComputeConfig()
    """How it is computed."""
    state: StateConfig
    """What it can be resumed from; tokens as if all answers were `max_tokens` long."""
    watch: WatchConfig = WatchConfig()
    """When to look, to warn and to stop."""
    forgetting: ForgettingConfig = ForgettingConfig()
    """What is compared before and after."""
    cluster: ClusterConfig = ClusterConfig()
    """Who takes how many GPUs, for `--ray`."""
    assumed: AssumedConfig = AssumedConfig()
    """For `--dry-run`."""
    seed: NonNegativeInt = 0
    """Of the order of cases and of sampling."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.steps % self.updates:
            raise ValueError(f"steps must be a multiple of updates ({self.updates})")
        if self.compute.compile:
            raise ValueError("compute.compile: passes differ in length, each would be compiled")
        longest = self.max_prompt + self.group * self.max_tokens
        if self.micro_tokens < longest:
            raise ValueError(
                f"micro_tokens must hold a whole group: max_prompt + group x max_tokens = {longest}"
            )
        return self

    @property
    def num_samples(self) -> int:
        """Of a step, over all ranks."""
        return self.prompts * self.group

    @property
    def warmup_steps(self) -> int:
        """Rounded up."""
        return -(-self.optimizer.warmup_tokens // self.draw_tokens)

    @property
    def draw_tokens(self) -> int:
        """Of a draw of answers, as if all were `max_tokens` long."""
        return self.num_samples * self.max_tokens

    def tokens_of(self, step: int) -> int:
        """Written until then, counted so."""
        return step // self.updates * self.draw_tokens
