"""What quantising is told: the record behind `recipes/quantize/NAME.toml`."""

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
from attending.corpus.recipe import Format
from attending.evaluate.forgetting import ForgettingConfig
from attending.evaluate.recipe import SamplingConfig
from attending.model.quantized import Scheme
from attending.quantize.distill import Distillation
from attending.quantize.export import Form
from attending.quantize.grid import Grid
from attending.quantize.kv import Cache
from attending.quantize.signed import SignedRounding
from attending.train.recipe import AssumedConfig

Method = Literal["plain", "gptq", "signed", "gptq+signed"]


class PartConfig(Config):
    """Text of one domain: documents, dialogues, or prompts that the model answers itself."""

    path: str
    """Files, as a glob below the recipe's `root`."""
    format: Format = "jsonl"
    """How they are read."""
    prompt: str = ""
    """What a user says, of a record's fields: `{a}` is field a."""
    text: str = ""
    """The reply to it; without a prompt, a document. Empty: the model writes the reply."""
    id: str = ""
    """Of the record, of its fields. Default: its file and number."""
    holdout_key: str = ""
    """What is held out as a whole, of a record's fields. Default: the id."""
    share: PositiveFloat = 1.0
    """Its part of the samples, beside the other parts' shares."""

    @model_validator(mode="after")
    def _says(self) -> Self:
        if not (self.prompt or self.text):
            raise ValueError("a part needs a prompt, a text, or both")
        return self


class CalibrationConfig(Config):
    """Text to round by, and other text to judge by: what is held out (one in fifty)."""

    root: str = "."
    """Folder that the paths of `parts` begin at."""
    parts: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]+$")], PartConfig] = Field(min_length=1)
    """By domain, which the gate reports by."""
    samples: PositiveInt = 128
    """To round by."""
    evaluation: PositiveInt = 32
    """To judge by."""
    length: Annotated[int, Field(ge=2)] = 512
    """Tokens of a sample; documents follow one another and are cut at its end."""
    sampling: SamplingConfig = SamplingConfig(max_tokens=256)
    """How the model writes its replies."""
    replies: str | None = None
    """A .jsonl file that keeps them for other runs; None: they are written anew for this one."""


class GateConfig(ForgettingConfig):
    """What quantising may cost; above any limit the run ends with exit code 3."""

    suite: str = "quantization"
    """A recipe of `attending eval`, asked with the weights before and after."""
    max_perplexity_rise: NonNegativeFloat | None = None
    """Of any domain, as a share of the float model's."""
    max_divergence: NonNegativeFloat | None = None
    """Mean KL(float || quantised) of any domain, in nats a token."""
    max_tail_divergence: NonNegativeFloat | None = None
    """Its 99.9th percentile over the tokens of a domain, in nats."""
    max_flips: NonNegativeFloat | None = None
    """Share of a domain's tokens whose likeliest successor is another."""
    max_choice_flips: NonNegativeFloat | None = None
    """Share of a multiple-choice task's questions answered otherwise."""


class QuantizeConfig(Config):
    """From a float model to a folder of few bits."""

    model: str
    """A source; floats, or a GGUF."""
    method: Method
    """Plain rounding; GPTQ; signed-gradient rounding; or that from where GPTQ ends."""
    rotate: bool = False
    """Fold random Hadamard rotations into the weights first (QuaRot's that cost nothing later)."""
    form: Form = "compressed-tensors"
    """Of the folder."""
    bits: Literal[4, 8] = 4
    """Of an integer."""
    group: int = 128
    """Inputs that share a scale; -1: all of an output (per channel)."""
    symmetric: bool = True
    """Zero is the middle of the integers; its scales may be negative (but for QQQ)."""
    layers: str = ".*"
    """Which linear layers of the blocks, as a regular expression of the whole name, such as
    `.*mlp.*`."""
    head: bool = False
    """The output head, too."""
    search: NonNegativeInt = 0
    """Ranges that are tried for each scale, besides the plain one."""
    damping: NonNegativeFloat = 0.01
    """GPTQ: added to the Hessian's diagonal, as a share of its mean."""
    act_order: bool = True
    """GPTQ: inputs of large activations first."""
    static_groups: bool = True
    """GPTQ: groups are neighbours whatever the order; otherwise `desc_act`, in format gptq only."""
    signed: SignedRounding = SignedRounding()
    """Signed rounding: 50 steps at rate 0.005 are AutoRound's light recipe, 200 its default, 1000
    its best. From GPTQ's end the ranges stay, since its integers fit its scales."""
    distill: Distillation = Distillation()
    """Scales and norms learnt through the whole model, once all blocks are rounded."""
    kv: Cache = "float16"
    """How keys and values are to be cached; the gate rounds them so, and `config.json` says so."""
    floats: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """Of what is not quantised."""
    calibration: CalibrationConfig
    """Text."""
    gate: GateConfig = GateConfig()
    """What it may cost."""
    device: str = "cpu"
    """As torch names it; a block at a time goes there."""
    batch: PositiveInt = 8
    """Samples of a forward pass; memory grows with it, the result does not change."""
    seed: NonNegativeInt = 0
    """Of rotations, order of samples, and which texts come first."""
    assumed: AssumedConfig = AssumedConfig()
    """What `--dry-run` reckons with."""

    @property
    def grid(self) -> Grid:
        """The integers; QQQ's kernel knows no negative scale."""
        group = None if self.group < 0 else self.group
        return Grid(self.bits, group, self.symmetric, full_range=self.form != "qqq")

    @property
    def scheme(self) -> Scheme:
        """Of every layer that is quantised."""
        act_order = self.by_gptq and self.act_order and not self.static_groups and self.group > 0
        return Scheme(self.bits, self.group, self.symmetric, act_order)

    @property
    def by_gptq(self) -> bool:
        """Whether Hessians are needed."""
        return self.method.startswith("gptq")

    @property
    def by_signs(self) -> bool:
        """Whether blocks are fitted."""
        return self.method.endswith("signed")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.group != -1 and self.group < 1:
            raise ValueError(f"group is {self.group}: -1 (per channel), or inputs a group")
        if not self.static_groups and self.by_signs:
            raise ValueError("signed rounding needs neighbours: static_groups = true")
        if self.form == "qqq" and (self.bits, self.symmetric, self.head) != (4, True, False):
            raise ValueError("qqq is 4 bits, symmetric, and leaves the head float")
        if self.form == "qqq" and self.distill.epochs:
            raise ValueError("qqq's scales are integers, which are not learnt: distill.epochs = 0")
        return self
