"""Hadamard matrices of the sizes that models have, and decoders whose logits a rotation keeps."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attending.model.architecture import parse_config
from attending.model.attend import Packed
from attending.model.decoder import Decoder
from attending.quantize.rotate import Rotation, folded, hadamard, rotate, rotated
from tests.model.tiny import FAMILIES, build, configs

DOUBLE = torch.float64


@pytest.mark.parametrize("size", [1, 2, 12, 20, 24, 28, 36, 44, 60, 64, 108, 128, 240, 576, 1536])
def test_hadamard(size: int) -> None:
    found = hadamard(size)
    assert found is not None and found.abs().eq(1).all()
    assert torch.equal(found @ found.T, size * torch.eye(size, dtype=DOUBLE))


def test_twelve_by_hand() -> None:
    """Paley's of 11: squares 1, 3, 4, 5, 9."""
    found = hadamard(12)
    assert found is not None
    assert found[0].tolist() == [1] * 12
    assert found[1].tolist() == [-1, 1, -1, 1, -1, -1, -1, 1, 1, 1, -1, 1]  # of 0 - j


@pytest.mark.parametrize("size", [3, 6, 9, 92, 172])
def test_no_hadamard_is_found(size: int) -> None:
    assert hadamard(size) is None


@pytest.mark.parametrize(
    ("size", "core"), [(576, 36), (1536, 12), (5120, 20), (27648, 108), (64, 1), (18, 9), (7, 7)]
)
def test_rotations_are_orthogonal(size: int, core: int) -> None:
    rotation = Rotation.random(size, seed=1)
    assert len(rotation.right) == core and len(rotation.left) * core == size
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    turned = rotation.turn(x)
    assert torch.allclose(turned @ turned.T, x @ x.T, rtol=1e-9)
    if size < 1000:
        matrix = rotation.matrix()
        assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=DOUBLE), atol=1e-12)
        assert torch.allclose(turned, x @ matrix, atol=1e-12)
        assert torch.allclose(rotation.turn_rows(x.T), matrix.T @ x.T, atol=1e-12)
        twice = torch.cat([x, 2 * x], 1)
        assert torch.allclose(rotation.turn(twice), torch.cat([turned, 2 * turned], 1))


def test_an_outlier_is_spread() -> None:
    x = torch.zeros(576)
    x[77] = 24.0
    assert torch.allclose(Rotation.random(576, 0).turn(x).abs(), torch.ones(576, dtype=DOUBLE))


def test_seeds() -> None:
    first, same, other = (Rotation.random(36, seed) for seed in (5, 5, 6))
    assert torch.equal(first.signs, same.signs) and not torch.equal(first.signs, other.signs)


def logits(decoder: Decoder, ids: Tensor) -> Tensor:
    return decoder.logits(decoder(ids, Packed([len(ids) - 3, 3])))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
@torch.no_grad()
def test_logits_stay(family: str, data: st.DataObject, seed: int) -> None:
    """Biases, norms, windows, convolution and NormHead included, all of them random."""
    config: dict[str, Any] = data.draw(configs(family))
    decoder = build(config, seed, DOUBLE)
    ids = torch.randint(0, config["vocab_size"], (19,))
    turned = rotate(decoder, seed)
    wanted, found = logits(decoder, ids), logits(turned, ids)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-9
    assert torch.allclose(turned.head_weight(), turned.lm_head.weight)
    for name, weight in turned.named_parameters():
        if "layernorm" in name or name == "model.norm.weight":
            assert weight.eq(1).all()
    before, after = (d.model.layers[0].mlp.up_proj.weight for d in (decoder, turned))
    assert not torch.allclose(before, after)


def test_the_architecture_says_what_changed() -> None:
    config = {"model_type": "baichuan_m1", "vocab_size": 16, "hidden_size": 8, "rope_theta": 1e4}
    config |= {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    arch = parse_config(config | {"max_position_embeddings": 64, "eos_token_id": 2})
    written = parse_config(rotated(arch).to_config())
    assert arch.norm_head and not written.norm_head and written == rotated(arch)
    llama = parse_config(config | {"model_type": "llama", "max_position_embeddings": 64})
    tied = parse_config(llama.to_config() | {"tie_word_embeddings": True})
    assert tied.tied and not llama.norm_head
    assert parse_config(rotated(tied).to_config()) == rotated(tied)
    assert "lm_head.weight" in rotated(tied).tensor_shapes()


def test_tensors_come_one_by_one_in_the_dtype_read() -> None:
    config = {"model_type": "llama", "vocab_size": 16, "hidden_size": 8, "rope_theta": 1e4}
    config |= {"intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"max_position_embeddings": 64, "tie_word_embeddings": True}
    decoder = build(config, dtype=torch.bfloat16)
    weights = decoder.state_dict()
    read, shapes = (
        folded(decoder.arch, weights.__getitem__, 0),
        rotated(decoder.arch).tensor_shapes(),
    )
    found = {name: read(name) for name in shapes}
    assert {name: tuple(value.shape) for name, value in found.items()} == shapes
    assert all(value.dtype == torch.bfloat16 for value in found.values())
