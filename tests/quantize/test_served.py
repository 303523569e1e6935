"""The native engine computes with the integers of a quantised folder, exactly as stored."""

from pathlib import Path

import numpy as np
import pytest

import attending
from attending.engine.native import pack
from attending.model.checkpoint import open_checkpoint
from attending.model.quantized import Quantized, Scheme
from attending.quantize.export import Form
from tests.quantize.making import write_quantized

EIGHT = "int8 in groups of 32"


@pytest.mark.parametrize(
    ("form", "scheme", "words"),
    [
        ("gptq", Scheme(4, 64, True), f"int4 in groups of 64 and {EIGHT}"),
        ("gptq", Scheme(4, 128, True), f"int4 in groups of 128 and {EIGHT}"),
        ("gptq", Scheme(4, 32, False), f"int4 in groups of 32 and {EIGHT}"),
        ("gptq", Scheme(4, -1, True), f"int4 in groups of 128 and {EIGHT}"),
        ("gptq", Scheme(4, 64, True, act_order=True), EIGHT),
        ("compressed-tensors", Scheme(8, 128, False), f"int8 in groups of 128 and {EIGHT}"),
        ("compressed-tensors", Scheme(4, 16, True), EIGHT),
        ("qqq", Scheme(4, -1, True), f"int4 in groups of 128 and {EIGHT}"),
        (
            "qqq",
            Scheme(4, 128, True),
            f"int4 in groups of 128 and int8 in groups of 128 and {EIGHT}",
        ),
    ],
)
def test_stored_integers_are_packed(tmp_path: Path, form: Form, scheme: Scheme, words: str) -> None:
    made = write_quantized(tmp_path / "m", form, scheme)
    checkpoint = open_checkpoint(tmp_path / "m")
    packed = pack.open_packed(checkpoint, tmp_path / "packed")
    assert packed.path == {"weights": words}
    has_blocks = scheme.group != 16 and not scheme.act_order
    for name in made:
        blocks, exact = checkpoint.blocks(f"{name}.weight"), checkpoint.read(f"{name}.weight")
        assert (blocks is not None) == has_blocks
        if blocks is not None:
            error = np.abs(pack.dequantise(blocks) - exact)
            is_exact = scheme.symmetric and form != "qqq"  # else a float32 became a float16
            assert error.max() <= (0 if is_exact else np.abs(exact).max() / 1000)
    inner = packed.matrices["0.gate_up"]
    assert (inner.bits == scheme.bits) == has_blocks or inner.bits == 8
    assert inner.has_minimum == (not scheme.symmetric or not has_blocks)


@pytest.mark.parametrize("native", [True, False])
def test_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    write_quantized(tmp_path / "m", "gptq", Scheme(4, 64, True))
    options = {"activations": "float32"} if native else {"dtype": "float32"}
    model = attending.load(tmp_path / "m", threads=1, **options)
    assert model.is_native == native
    reference = attending.load(tmp_path / "m", dtype="float32")
    reply = model.chat([{"role": "user", "content": "fever?"}], temperature=0, max_tokens=8)
    expected = reference.chat([{"role": "user", "content": "fever?"}], temperature=0, max_tokens=8)
    assert reply.text == expected.text and reply.output_tokens == expected.output_tokens
    stored = "int4 in groups of 64" if native else "GPTQ int4 computed as float32"
    assert model.path["weights"].startswith(stored)


def test_a_matrix_of_parts_that_are_stored_in_different_ways(tmp_path: Path) -> None:
    left = ("lm_head", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj")
    write_quantized(tmp_path / "m", "gptq", Scheme(4, 128, True), left)
    checkpoint = open_checkpoint(tmp_path / "m")
    packed = pack.open_packed(checkpoint, tmp_path / "packed")
    assert (packed.matrices["0.qkv"].bits, packed.matrices["0.qkv"].group) == (8, 32)
    assert (packed.matrices["1.qkv"].bits, packed.matrices["1.qkv"].group) == (4, 128)
    names = [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv"]
    parts = [pack._stored_or_rounded(checkpoint, name, "stored") for name in names]
    for before, after in zip(parts, pack._alike(parts), strict=True):
        assert np.array_equal(pack.dequantise(before), pack.dequantise(after))


def test_what_float16_cannot_hold_is_not_packed() -> None:
    values, wide = np.ones((2, 64), np.int8), np.full((2, 1), 1e5, np.float32)
    assert Quantized(4, 64, values, wide).blocks() is None
    tiny = np.array([[0.01], [1e-9]], np.float32)  # is nothing beside the largest
    assert Quantized(4, 64, values, tiny).blocks() is not None
    assert Quantized(4, 64, values, tiny[1:].repeat(2, 0)).blocks() is None
    zeros = np.full((2, 1), 7, np.int8)
    assert Quantized(4, 64, values, wide / 10, zeros).blocks() is None  # -scale x 15 is too large
