"""EAGLE-3 drafts on the disk (arXiv 2503.01840), without torch: shapes, pair, vocabulary.

The layout is the stock one of SGLang and vLLM. Of our own are `target` and `target_sha256` in
`config.json`, which name the model that a draft was trained for, and `gated` with its tensor.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attending.errors import CheckpointError, ConfigError
from attending.model.architecture import Architecture, parse_config
from attending.model.checkpoint import DTYPES, map_tensors, require_exact
from attending.model.files import read_json, weight_files

CLASS, EMBEDDING, GATE = "LlamaForCausalLMEagle3", "embed_tokens.weight", "g_proj.weight"
# Below `eagle_config` SGLang and SpecForge count layers' outputs, so one less; the same name at the
# top is vLLM's and speculators', and counts inputs as we do (0 is the embedding).
LAYERS = "eagle_aux_hidden_state_layer_ids"
ELSEWHERE = ("norm_before_residual", "norm_before_fc", "fc_norm")
TENSORS = DTYPES | {"I64": np.dtype("<i8"), "BOOL": np.dtype(np.bool_)}
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """What a draft head is, and whose."""

    arch: Architecture
    """Of its one layer: a Llama of the target's hidden size and vocabulary."""
    draft_vocab: int
    """Tokens that it can propose."""
    layers: tuple[int, ...]
    """Features are the residual stream at the input of these layers of the target, from 0."""
    gated: bool = False
    """Attention output times sigmoid(W_g x) before o_proj; see `eagle.GatedAttention`."""
    target: str = ""
    """Name of the model that it was trained for ..."""
    target_sha256: str = ""
    """... and what it was, as `artifact.digest` has it."""

    def tensor_shapes(self, *, has_embedding: bool = False) -> dict[str, tuple[int, ...]]:
        """Stock name -> shape; the embedding is the target's unless a draft brings its own."""
        [spec], hidden, inner = self.arch.layers, self.arch.hidden_size, self.arch.intermediate_size
        rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        inside: dict[str, tuple[int, ...]] = {f"{name}.weight": (hidden,) for name in norms}
        inside |= {f"self_attn.{name}_proj.weight": (kv_rows, 2 * hidden) for name in "kv"}
        inside |= {
            "self_attn.q_proj.weight": (rows, 2 * hidden),
            "self_attn.o_proj.weight": (hidden, rows),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        inside |= {f"self_attn.{GATE}": (rows, 2 * hidden)} if self.gated else {}
        shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, len(self.layers) * hidden)}
        shapes |= {f"midlayer.{name}": shape for name, shape in inside.items()}
        shapes |= {"norm.weight": (hidden,), "lm_head.weight": (self.draft_vocab, hidden)}
        shapes |= {"d2t": (self.draft_vocab,), "t2d": (self.arch.vocab_size,)}
        return shapes | ({EMBEDDING: (self.arch.vocab_size, hidden)} if has_embedding else {})

    def to_config(self) -> dict[str, Any]:
        """The `config.json` to write."""
        return {
            **self.arch.to_config(),
            "architectures": [CLASS],
            "draft_vocab_size": self.draft_vocab,
            "eagle_config": {LAYERS: [at - 1 for at in self.layers], "use_aux_hidden_state": True},
            LAYERS: list(self.layers),
            "gated": self.gated,
            "target": self.target,
            "target_sha256": self.target_sha256,
        }

    def require_target(self, name: str, sha256: str, arch: Architecture) -> None:
        """Raise a CheckpointError unless this model is the one that the draft was trained for."""
        if not self.target_sha256:
            raise CheckpointError(
                f"the draft does not say what it was trained for. If that is {name}, put "
                f'"target": "{name}", "target_sha256": "{sha256}" into its config.json.'
            )
        sizes = self.arch.hidden_size, self.arch.vocab_size
        if sha256 != self.target_sha256 or sizes != (arch.hidden_size, arch.vocab_size):
            raise CheckpointError(
                f"the draft was trained for {self.target} (sha256 {self.target_sha256[:12]}), not "
                f"for {name} (sha256 {sha256[:12]}): take that model, with no file changed, or "
                "train a draft for this one with `attending draft`."
            )
        if self.layers[0] < 0 or self.layers[-1] > len(arch.layers):
            raise CheckpointError(
                f"the draft reads the target at {list(self.layers)}, and {name} has "
                f"{len(arch.layers)} layers: expected 0 to that. Get the draft again."
            )


def feature_layers(num_layers: int) -> tuple[int, int, int]:
    """Low, middle, high: 2, n/2 and n - 3 as engines have it; of shallow models their quarters."""
    low, middle, high = 2, num_layers // 2, num_layers - 3
    if low < middle < high:
        return low, middle, high
    return num_layers // 4, num_layers // 2, -(-3 * num_layers // 4)


def eagle_config(
    target: Architecture,
    draft_vocab: int,
    *,
    name: str = "",
    sha256: str = "",
    gated: bool = False,
    intermediate_size: int | None = None,
) -> EagleConfig:
    """Of a new draft, shaped as a full layer of its target; M1's kinds become a Llama's.

    Args:
        target: The model to draft for.
        draft_vocab: Tokens that the draft can propose.
        name: The target's.
        sha256: The target's.
        gated: See `EagleConfig`.
        intermediate_size: Of its MLP; None: the target's.

    Raises:
        ConfigError: The vocabulary is larger than the target's.
    """
    if draft_vocab > target.vocab_size:
        raise ConfigError(
            f"a draft vocabulary of {draft_vocab:,} is more than the target's "
            f"{target.vocab_size:,}: lower it."
        )
    spec = next((one for one in target.layers if one.window is None), target.layers[0])
    plain = {
        "model_type": "llama",
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": intermediate_size or target.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": target.norm_eps,
        "rope_theta": target.rope.theta,
        "max_position_embeddings": target.context,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "initializer_range": target.initializer_range,
        "torch_dtype": "float32",
        "bos_token_id": target.source.get("bos_token_id"),
        "eos_token_id": list(target.eos_ids),
    }
    layers = feature_layers(len(target.layers))
    return EagleConfig(parse_config(plain), draft_vocab, layers, gated, name, sha256)


def parse_eagle(config: Mapping[str, Any], target: Architecture | None = None) -> EagleConfig:
    """Read a draft's `config.json`.

    Args:
        config: Its contents.
        target: Decides the layers where the file does not name them, as stock files may not.

    Raises:
        CheckpointError: It asks for what is not implemented, or is no draft's.
    """
    told = config.get("eagle_config") or {}
    odd = [name for name in ELSEWHERE if config.get(name) or told.get(name)]
    odd += ["norm_output = false"] if config.get("norm_output") is False else []
    if odd or config.get("num_hidden_layers") != 1 or config.get("attention_bias"):
        raise CheckpointError(
            f"a draft with {', '.join(odd) or 'other than one layer, or biases'} is not read; "
            "expected stock EAGLE-3: one Llama layer without biases."
        )
    layers = config.get(LAYERS) or told.get(LAYERS)
    if not layers:
        layers = target and feature_layers(len(target.layers))
    size = config.get("draft_vocab_size") or config.get("vocab_size")
    if not layers or not isinstance(size, int):
        raise CheckpointError(
            f"config.json names no eagle_config.{LAYERS}, or no draft_vocab_size: is it a draft's?"
        )
    if len(layers) != 3 or not all(type(at) is int for at in layers) or [*layers] != sorted(layers):
        raise CheckpointError(
            f"{LAYERS}={layers!r}: expected three layers of the target, ascending."
        )
    if not config.get(LAYERS) and told.get(LAYERS):
        layers = [at + 1 for at in layers]
    arch = parse_config({**config, "model_type": "llama"})
    gated, target_name = bool(config.get("gated")), str(config.get("target") or "")
    pair = target_name, str(config.get("target_sha256") or "")
    return EagleConfig(arch, size, tuple(layers), gated, *pair)


def open_eagle(
    folder: Path, target: Architecture | None = None
) -> tuple[EagleConfig, dict[str, NDArray[Any]]]:
    """A draft's configuration and its tensors as stored, memory-mapped; see `checkpoint.DTYPES`.

    Raises:
        CheckpointError: Tensors are missing, unexpected or misshaped (listed), or the two
            vocabulary maps contradict each other.
    """
    config = parse_eagle(read_json(folder / "config.json"), target)
    found: dict[str, NDArray[Any]] = {}
    for file in weight_files(folder):
        found |= map_tensors(file, TENSORS)
    require_exact(
        f"{folder.name}: the tensors do not fit a draft of its configuration.",
        config.tensor_shapes(has_embedding=EMBEDDING in found),
        {name: values.shape for name, values in found.items()},
    )
    d2t, t2d = found["d2t"], found["t2d"]
    used = np.arange(len(d2t)) + d2t
    if d2t.dtype != np.int64 or not np.array_equal(used, np.flatnonzero(t2d)):
        raise CheckpointError(
            f"{folder.name}: d2t and t2d do not name the same tokens, ascending: get it again."
        )
    return config, found


def choose_vocabulary(counts: Ids, size: int, stop_ids: Iterable[int]) -> tuple[Ids, NDArray[Any]]:
    """The most frequent tokens, and those that end an answer whatever their count.

    Args:
        counts: [V], how often each token was learnt.
        size: How many to take; of equally frequent ones the lower ids.
        stop_ids: Always among them.

    Returns:
        d2t [size] int64, what is added to a draft id to make it a target id; t2d [V] bool, which
        target ids there are.

    Raises:
        ConfigError: The size is no number of tokens of this vocabulary.
    """
    stops = sorted(set(stop_ids))
    if not len(stops) <= size <= len(counts) or size < 1:
        raise ConfigError(
            f"a draft vocabulary of {size:,}: expected {max(len(stops), 1)} (tokens that end an "
            f"answer) to {len(counts):,} (the target's)."
        )
    ranked = counts.astype(np.float64)
    ranked[stops] = np.inf
    used = np.sort(np.argsort(-ranked, kind="stable")[:size])
    t2d = np.zeros(len(counts), np.bool_)
    t2d[used] = True
    return used - np.arange(size), t2d
