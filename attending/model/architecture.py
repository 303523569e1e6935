"""What a `config.json` says, as one typed record: Llama, Qwen2, Qwen3 and Baichuan-M1 by values.

No torch here: planning and serving read architectures too. Nothing is guessed: a key that would
change the mathematics in a way the decoder does not implement is an error that names it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from attending.config import suggest
from attending.errors import CheckpointError

Family = Literal["llama", "qwen2", "qwen3", "baichuan_m1"]
RopeKind = Literal["default", "linear", "llama3", "yarn"]

PAGE_TOKENS = 64
"""Tokens of a cache page, in every runner."""

CLASS_NAMES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "baichuan_m1": "BaichuanM1ForCausalLM",
}

QUANTISED = ("gptq", "compressed-tensors", "qqq", "auto-round")
"""The quantised folders that `quantized.py` reads, by `quant_method`."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al. 2021), half-split, over the whole head."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_context: int = 0
    """Positions of the pretraining; used by llama3 and yarn."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Multiplies cos and sin (YaRN's temperature, Peng et al. 2023, eq. 22)."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The attention shape of one layer; layers of one model may differ."""

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    """A token sees itself and the `window - 1` tokens before it; None: all before it."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Everything the decoder needs to know; immutable and free of file formats."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerSpec, ...]
    rope: Rope
    norm_eps: float
    context: int
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied: bool
    conv_window: int
    """Tokens that Baichuan-M1's convolution over K and V mixes: 2, or 1 for none (an ablation)."""
    norm_head: bool
    """The output head's rows are used at unit length (Baichuan-M1's NormHead)."""
    eos_ids: tuple[int, ...]
    initializer_range: float
    dtype: str
    """Of the stored weights: `float32`, `bfloat16` or `float16`."""
    source: Mapping[str, Any] = field(compare=False)
    """The `config.json` this was read from; written back, so no key is lost."""

    @property
    def is_m1(self) -> bool:
        """Baichuan-M1: packed projections, K/V short convolution."""
        return self.family == "baichuan_m1"

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The windows that layers have, None first, then ascending: the groups of cache pages."""
        return tuple(sorted({spec.window for spec in self.layers}, key=lambda window: window or 0))

    @property
    def qk_norm(self) -> bool:
        """RMSNorm over each head of Q and K before the rotation (Qwen3)."""
        return self.family == "qwen3"

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Official name -> shape of every tensor a checkpoint must hold, no more and no fewer."""
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden)
        }
        for spec in self.layers:
            at = f"model.layers.{spec.index}"
            shapes |= {f"{at}.{name}.weight": (hidden,) for name in NORMS}
            shapes |= {f"{at}.self_attn.{k}": v for k, v in self._attention_shapes(spec).items()}
            for name, shape in (
                ("gate_proj", (inner, hidden)),
                ("up_proj", (inner, hidden)),
                ("down_proj", (hidden, inner)),
            ):
                shapes[f"{at}.mlp.{name}.weight"] = shape
                if self.mlp_bias:
                    shapes[f"{at}.mlp.{name}.bias"] = shape[:1]
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def num_parameters(self) -> int:
        """Count of all weights, a tied embedding once."""
        return sum(math.prod(shape) for shape in self.tensor_shapes().values())

    def to_config(self) -> dict[str, Any]:
        """The `config.json` to write: the one read, of floats, under names every reader knows."""
        scaling = _rope_values(self.source) | {"rope_type": self.rope.kind}
        scaling.pop("rope_theta", None)
        other = ("rope_parameters", "dtype", "quantization_config")
        plain = {k: v for k, v in self.source.items() if k not in other}
        return {
            **plain,
            "architectures": [CLASS_NAMES[self.family]],
            "model_type": self.family,
            "rope_theta": self.rope.theta,
            "rope_scaling": scaling if self.rope.kind != "default" else None,
            "torch_dtype": self.dtype,
        }

    def _attention_shapes(self, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        hidden, rows = self.hidden_size, spec.num_heads * spec.head_dim
        kv_rows = spec.num_kv_heads * spec.head_dim
        shapes: dict[str, tuple[int, ...]] = {"o_proj.weight": (hidden, rows)}
        if self.out_bias:
            shapes["o_proj.bias"] = (hidden,)
        if self.is_m1:
            shapes["W_pack.weight"] = (rows + 2 * kv_rows, hidden)
            if self.conv_window > 1:
                shapes["conv_k"] = shapes["conv_v"] = (1, 1, spec.num_kv_heads, 1, 2)
            return shapes
        for name, size in (("q_proj", rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
            shapes[f"{name}.weight"] = (size, hidden)
            if self.qkv_bias:
                shapes[f"{name}.bias"] = (size,)
        if self.qk_norm:
            shapes["q_norm.weight"] = shapes["k_norm.weight"] = (spec.head_dim,)
        return shapes


KV_CACHE = "attending_kv_cache"
"""Of `config.json`: what a folder's cache was measured with; known to this package only."""
NORMS = ("input_layernorm", "post_attention_layernorm")


def page_bytes(arch: Architecture, value_bytes: int, kept_rows: int = 1) -> tuple[int, ...]:
    """Memory of one page of each group over the group's layers, raw rows included."""
    rows = PAGE_TOKENS + arch.is_m1 * kept_rows
    values = {window: 0 for window in arch.windows}
    for spec in arch.layers:
        values[spec.window] += 2 * spec.num_kv_heads * spec.head_dim * rows
    return tuple(count * value_bytes for count in values.values())


def parse_config(config: Mapping[str, Any]) -> Architecture:
    """Read a Hugging Face `config.json`, of transformers 4 or 5.

    Raises:
        CheckpointError: A key is missing, of the wrong type, or asks for what is not implemented.
    """
    read = _Keys(config)
    name = read.text("model_type", None)
    if name not in get_args(Family):
        raise CheckpointError(
            f"model_type {name!r} is not implemented.{suggest(name, get_args(Family))}"
        )
    family: Family = name  # type: ignore[assignment]
    _refuse_unimplemented(config, family)
    context = read.integer("max_position_embeddings", None)
    qwen = family in ("qwen2", "qwen3")
    attention_bias = read.flag("attention_bias", False) and family in ("llama", "qwen3")
    eos = config.get("eos_token_id")
    return Architecture(
        family=family,
        vocab_size=read.integer("vocab_size", None),
        hidden_size=read.integer("hidden_size", None),
        intermediate_size=read.integer("intermediate_size", None),
        layers=_layers(read, family, config),
        rope=_rope(config, context),
        norm_eps=read.number("rms_norm_eps", 1e-6),
        context=context,
        qkv_bias=family == "qwen2" or attention_bias,
        out_bias=attention_bias,
        mlp_bias=family == "llama" and read.flag("mlp_bias", False),
        tied=read.flag("tie_word_embeddings", False),
        conv_window=read.integer("conv_window", 2) if family == "baichuan_m1" else 1,
        # False is ours alone: what a rotation was folded into, see quantize/rotate.py.
        norm_head=family == "baichuan_m1" and read.flag("norm_head", True),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        initializer_range=read.number("initializer_range", 0.02) or 0.02,  # 0: nothing was drawn
        dtype=_dtype(config, "bfloat16" if qwen else "float32"),
        source=dict(config),
    )


class _Keys:
    """Typed access to a config; a default of None means required."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def integer(self, key: str, default: int | None) -> int:
        return int(self._get(key, default, int, "a whole number above 0", lambda v: v > 0))

    def number(self, key: str, default: float | None) -> float:
        return float(self._get(key, default, (int, float), "a number above 0", lambda v: v > 0))

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._get(key, default, bool, "true or false"))

    def text(self, key: str, default: str | None) -> str:
        return str(self._get(key, default, str, "a string"))

    def _get(self, key: str, default: Any, kind: Any, expected: str, good: Any = None) -> Any:
        value = self._config.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"config.json lacks {key!r}, which must be {expected}.")
        wrong_bool = isinstance(value, bool) and kind is not bool
        if wrong_bool or not isinstance(value, kind) or (good and not good(value)):
            raise CheckpointError(f"config.json: {key} is {value!r}; expected {expected}.")
        return value


def _refuse_unimplemented(config: Mapping[str, Any], family: Family) -> None:
    act = config.get("hidden_act") or "silu"
    if act not in ("silu", "swish"):
        raise CheckpointError(f"config.json: hidden_act is {act!r}; only 'silu' is implemented.")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        if method not in QUANTISED:
            raise CheckpointError(
                f"this checkpoint is quantised by {method!r}, which is not implemented."
                f"{suggest(method, QUANTISED)} Use the unquantised model or a GGUF file of it."
            )
    if (config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError("config.json: partial_rotary_factor other than 1 is not implemented.")
    if family == "baichuan_m1":
        for key, values in (("conv_window", (2, 1)), ("tie_word_embeddings", (False,))):
            if config.get(key, values[0]) not in values:
                raise CheckpointError(
                    f"config.json: {key} is {config[key]!r}; Baichuan-M1 has {values[0]}."
                )


def _layers(read: _Keys, family: Family, config: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    hidden, count = read.integer("hidden_size", None), read.integer("num_hidden_layers", None)
    heads = read.integer("num_attention_heads", None)
    kv_heads = read.integer("num_key_value_heads", heads)
    windows = _windows(read, family, config, count)
    specs = []
    for index, window in enumerate(windows):
        num_heads, num_kv = heads, kv_heads
        if family == "baichuan_m1" and window is not None:
            num_heads = read.integer("num_swa_attention_heads", heads)
            num_kv = read.integer("num_swa_key_value_heads", kv_heads)
        derived = 128 if family == "qwen3" else hidden // num_heads
        # M1's two layer kinds have different head sizes, so a single `head_dim` cannot apply.
        head_dim = derived if family == "baichuan_m1" else read.integer("head_dim", derived)
        if num_heads % num_kv or head_dim % 2:
            raise CheckpointError(
                f"config.json: layer {index} has {num_heads} heads, {num_kv} key-value heads and "
                f"head size {head_dim}; heads must divide into key-value heads, the size be even."
            )
        specs.append(LayerSpec(index, num_heads, num_kv, head_dim, window))
    return tuple(specs)


def _windows(
    read: _Keys, family: Family, config: Mapping[str, Any], count: int
) -> list[int | None]:
    """Sliding window of each layer, by each family's own keys."""
    if family == "llama":
        return [None] * count
    if family == "baichuan_m1":
        sliding = set(config.get("sliding_window_layers") or ())
        if not all(isinstance(i, int) and 0 <= i < count for i in sliding):
            raise CheckpointError(
                f"config.json: sliding_window_layers names layers outside 0..{count - 1}."
            )
        window = read.integer("sliding_window", None) if sliding else None
        return [window if i in sliding else None for i in range(count)]
    if not read.flag("use_sliding_window", False):
        return [None] * count
    window = read.integer("sliding_window", 4096)
    kinds = config.get("layer_types")
    if kinds is None:
        first = 28 if config.get("max_window_layers") is None else config["max_window_layers"]
        return [window if i >= first else None for i in range(count)]
    names = {"full_attention": None, "sliding_attention": window}
    if len(kinds) != count or any(kind not in names for kind in kinds):
        raise CheckpointError(
            f"config.json: layer_types must hold {count} of {', '.join(names)}; got {kinds!r}."
        )
    return [names[kind] for kind in kinds]


def _rope(config: Mapping[str, Any], context: int) -> Rope:
    """RoPE of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`)."""
    values = _rope_values(config)
    theta = values.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0
    kind: Any = values.get("rope_type", values.get("type", "default"))
    if kind not in get_args(RopeKind):
        raise CheckpointError(
            f"RoPE kind {kind!r} is not implemented.{suggest(str(kind), get_args(RopeKind))}"
        )
    read = _Keys(values)
    if (values.get("partial_rotary_factor") or 1.0) != 1.0:
        raise CheckpointError("config.json: partial_rotary_factor other than 1 is not implemented.")
    if kind == "default":
        return Rope(theta=float(theta))
    original = int(values.get("original_max_position_embeddings") or context)
    factor = read.number("factor", context / original if kind == "yarn" else None)
    return Rope(
        theta=float(theta),
        kind=kind,
        factor=factor,
        original_context=original,
        low_freq_factor=read.number("low_freq_factor", None if kind == "llama3" else 1.0),
        high_freq_factor=read.number("high_freq_factor", None if kind == "llama3" else 4.0),
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        truncate=read.flag("truncate", True),
        attention_factor=_attention_factor(values, factor) if kind == "yarn" else 1.0,
    )


def _attention_factor(values: Mapping[str, Any], factor: float) -> float:
    """YaRN's scale of cos and sin: given, or 0.1 m ln(factor) + 1 (a ratio of two in DeepSeek)."""
    given = values.get("attention_factor")
    if given is not None:
        return float(given)

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    top, bottom = values.get("mscale"), values.get("mscale_all_dim")
    return scale(top) / scale(bottom) if top and bottom else scale(1.0)


def _rope_values(config: Mapping[str, Any]) -> dict[str, Any]:
    return dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})


def _dtype(config: Mapping[str, Any], default: str) -> str:
    name = str(config.get("torch_dtype") or config.get("dtype") or default)
    if name not in ("float32", "bfloat16", "float16"):
        raise CheckpointError(f"config.json: dtype {name!r}; expected float32, bfloat16, float16.")
    return name
