"""A model read block by block gives what the whole decoder gives; layers are matched or refused."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.errors import CheckpointError, UsageError
from attending.model.architecture import parse_config
from attending.model.attend import Packed
from attending.model.quantized import Scheme
from attending.quantize import kv
from attending.quantize.export import Form
from attending.quantize.stream import Stream, matched, stage_of
from tests.model.test_checkpoint import config_of
from tests.model.tiny import FAMILIES, build, configs

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]])
WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
FOUR = Scheme(4, 32, True)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_hidden_states_and_head_are_the_decoders(family: str, data: st.DataObject) -> None:
    decoder = build(data.draw(configs(family)))
    stream = Stream(decoder.arch, decoder.state_dict().__getitem__, batch=2)
    with torch.no_grad():
        expected = decoder(IDS.flatten(), Packed([5] * 3))
        logits = decoder.logits(expected)
    found = stream.hidden(IDS)
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(expected @ stream.head().T, logits, rtol=1e-4, atol=1e-4)


def test_activations_and_cache_are_rounded_where_told() -> None:
    decoder = build(config_of("qwen2"))
    read = decoder.state_dict().__getitem__
    block, x = Stream(decoder.arch, read).block(0), torch.randn(7, decoder.arch.hidden_size)
    rounding = Stream(decoder.arch, read, rounds_activations=True).block(0)
    with torch.no_grad():
        expected = block.mlp.up_proj(kv.int8(x).dequantise())
        assert torch.equal(rounding.mlp.up_proj(x), expected)
        assert not torch.equal(block.mlp.up_proj(x), expected)
    exact = Stream(decoder.arch, read).hidden(IDS)
    for cache in ("fp8", "int8"):
        found = Stream(decoder.arch, read, cache=cache).hidden(IDS)  # type: ignore[arg-type]
        assert 1e-5 < (found - exact).abs().max() < 0.3


def test_a_number_that_is_none_is_named() -> None:
    decoder = build(config_of("llama"))
    weights = dict(decoder.state_dict())
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].clone()
    weights[name][0, 0] = float("nan")
    stream = Stream(decoder.arch, weights.__getitem__)
    stream.block(0)
    with pytest.raises(CheckpointError, match=f"{name} holds values that are no numbers"):
        stream.block(1)


def test_the_layer_map_of_every_family() -> None:
    arch = parse_config(config_of("baichuan_m1") | WIDE)
    found = matched(arch, ".*", True, Scheme(8, -1, True), "compressed-tensors")
    assert len(found) == 5 * len(arch.layers) + 1 and found["lm_head"][1] == 64
    assert [stage_of(name) for name in list(found)[:5]] == [1, 0, 2, 2, 3]
    assert stage_of("lm_head") == 4
    some = matched(arch, r".*mlp\..*", False, FOUR, "compressed-tensors")
    assert len(some) == 3 * len(arch.layers)


def refused(match: str, form: Form = "compressed-tensors", **how: Any) -> None:
    arch = parse_config(config_of("llama") | WIDE | how.pop("config", {}))
    told = {"pattern": ".*", "head": False, "scheme": FOUR, "form": form} | how
    with pytest.raises(UsageError, match=match):
        matched(arch, **told)


def test_what_cannot_be_quantised_is_refused_before_anything_is_computed() -> None:
    refused("matches none of the 14 linear layers", pattern="up_proj")
    refused("no regular expression", pattern="(")
    refused(r"has 96 inputs, no multiple of 64 \(of \[16, 32\]\)", scheme=Scheme(4, 64, True))
    refused("the head is the embedding", head=True, config={"tie_word_embeddings": True})
    refused("needs neighbours", scheme=Scheme(4, 32, True, True))
    refused("qqq needs one of", "qqq", scheme=Scheme(4, -1, True), config={"hidden_size": 64})
