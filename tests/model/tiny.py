"""Random small models of every family: config.json contents drawn by hypothesis."""

from typing import Any

import torch
from hypothesis import strategies as st

from attending.model.architecture import PAGE_TOKENS, Architecture, parse_config
from attending.model.attend import PagePool
from attending.model.decoder import Decoder

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn_tuned": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "attention_factor": 1.3,
        "truncate": False,
    },
}
WINDOWS = st.one_of(st.integers(1, 9), st.sampled_from([63, 64, 65, 100, 130]))
FAMILIES = ("llama", "qwen2", "qwen3", "baichuan_m1")


@st.composite
def configs(draw: st.DrawFn, family: str) -> dict[str, Any]:
    """A small config.json of a family, over everything that changes its mathematics."""
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads, size = kv_heads * groups, draw(st.sampled_from([4, 8, 16]))
    layers = draw(st.integers(1, 4))
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": draw(st.integers(11, 60)),
        "hidden_size": heads * size,
        "intermediate_size": draw(st.integers(4, 40)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "rope_theta": draw(st.sampled_from([10_000.0, 1_000_000.0])),
        "max_position_embeddings": 128,
        "tie_word_embeddings": family != "baichuan_m1" and draw(st.booleans()),
        "initializer_range": 0.3,
        "torch_dtype": "float32",
    }
    if family == "baichuan_m1":
        return config | _m1(draw, heads, layers)
    rope = ROPES[draw(st.sampled_from(sorted(ROPES)))]
    config["rope_scaling"] = dict(rope) or None
    if family != "llama":
        config |= {
            "use_sliding_window": draw(st.booleans()),
            "sliding_window": draw(WINDOWS),
            "max_window_layers": draw(st.integers(0, layers)),
        }
    if family != "qwen2":
        config["attention_bias"] = draw(st.booleans())
        config["head_dim"] = draw(st.sampled_from([4, 8, 12]))
    if family == "llama":
        config["mlp_bias"] = draw(st.booleans())
    return config


def _m1(draw: st.DrawFn, heads: int, layers: int) -> dict[str, Any]:
    """Layer kinds with their own head counts and sizes, as the released model has."""
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    swa_kv = draw(st.sampled_from(divisors))
    sliding = draw(st.lists(st.integers(0, layers - 1), unique=True))
    return {
        "num_swa_attention_heads": heads * draw(st.sampled_from([1, 2])),
        "num_swa_key_value_heads": swa_kv,
        "sliding_window": draw(WINDOWS),
        "sliding_window_layers": sorted(sliding),
        "conv_window": 2,
    }


def build(config: dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder with random weights, biases and norms included, so that none hides at 0 or 1."""
    arch: Architecture = parse_config(config)
    decoder = Decoder(arch)
    generator = torch.Generator().manual_seed(seed)
    decoder.init_weights(generator)
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.dim() == 1:
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return decoder.to(dtype).eval()


def pool_of(decoder: Decoder, num_pages: int) -> PagePool:
    """So many pages for each group of layers."""
    return PagePool(decoder.arch, [num_pages] * len(decoder.arch.windows), torch.float64)


def tables(arch: Architecture, pages: torch.Tensor, cached: int) -> list[torch.Tensor]:
    """A table of each group, every one in another order; -1 where its window sees nothing."""
    found = []
    for group, window in enumerate(arch.windows):
        table = pages.roll(group)
        if window is not None:  # the last token's page stays: M1 goes on from its raw row
            table[: max(0, cached + 1 - max(window, 2)) // PAGE_TOKENS] = -1
        found.append(table)
    return found
