"""What goes out in a format comes back as it was, and what a format cannot hold is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attending
from attending.errors import UsageError
from attending.model.checkpoint import open_checkpoint
from attending.model.quantized import Layer, Quantized, Scheme, stored_shapes
from attending.quantize.export import Form, pack_layer, quantization_config
from tests.quantize.making import decoded, layers, write_quantized

FORMS: list[Form] = ["gptq", "compressed-tensors", "qqq"]
SCHEMES = [
    ("gptq", Scheme(4, 32, True)),
    ("gptq", Scheme(4, 64, False)),
    ("gptq", Scheme(4, 64, True, act_order=True)),
    ("gptq", Scheme(4, 32, False, act_order=True)),
    ("gptq", Scheme(4, -1, True)),
    ("gptq", Scheme(8, 128, True)),
    ("compressed-tensors", Scheme(4, 64, True)),
    ("compressed-tensors", Scheme(4, 32, False)),
    ("compressed-tensors", Scheme(4, -1, False)),
    ("compressed-tensors", Scheme(8, -1, True)),
    ("compressed-tensors", Scheme(8, 128, False)),
    ("qqq", Scheme(4, 128, True)),
    ("qqq", Scheme(4, -1, True)),
]


def there_and_back(layer: Quantized, form: Form) -> tuple[Quantized, dict[str, torch.Tensor]]:
    stored = pack_layer("m", layer, form)
    outputs, inputs = layer.values.shape
    shapes = stored_shapes(form, layer.scheme, outputs, inputs)
    named = {f"m{part}": shape for part, shape in shapes.items()}
    if form == "gptq":
        named["m.g_idx"] = (inputs,)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == named
    found = {name: tensor.numpy() for name, tensor in stored.items()}
    return Layer("m", form, layer.scheme, (outputs, inputs), named).read(found), stored


def same(one: Quantized, other: Quantized) -> None:
    assert one.scheme == other.scheme
    for name in ("values", "scales", "zeros", "groups", "row_scales"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None) and (a is None or np.array_equal(a, b)), name


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_integers_and_scales_come_back_bit_for_bit(form: Form, data: st.DataObject) -> None:
    bits = data.draw(st.sampled_from([4] if form == "qqq" else [4, 8]))
    layer = data.draw(layers(form, bits))
    _, inputs = layer.values.shape
    back, stored = there_and_back(layer, form)
    if form == "qqq" and 0 < layer.group < inputs:  # its second scale is chosen here
        assert np.array_equal(back.values, layer.values) and back.row_scales is not None
        peak = np.abs(layer.dequantise()).max(1)
        np.testing.assert_array_equal(back.row_scales, peak / np.float32(127))
        error = np.abs(back.dequantise() - layer.dequantise())
        assert (error <= back.row_scales[:, None] * 0.6).all()  # half a step, and s_group's own
        layer = back
        back, again = there_and_back(layer, form)
        assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())
    if form == "gptq" and layer.zeros is not None:
        at_zero = layer.zeros == -(1 << bits - 1)  # mirrored, the same weights
        assert np.array_equal(back.scales, np.where(at_zero, -layer.scales, layer.scales))
        assert np.array_equal(back.dequantise(), layer.dequantise())
        layer = back
        back, _ = there_and_back(layer, form)
    same(back, layer)


def test_the_words_of_gptq_by_hand() -> None:
    values = np.zeros((8, 8), np.int8)
    values[0] = np.arange(8) - 8  # output 0, inputs 0 to 7: stored 0 to 7
    scales = np.full((8, 1), -0.5, np.float16)
    stored = pack_layer("m", Quantized(4, -1, values, scales), "gptq")
    assert stored["m.qweight"].shape == (1, 8)
    assert stored["m.qweight"][0, 0].item() == 0x76543210
    assert stored["m.qweight"][0, 1].item() == 0x88888888 - 2**32
    assert stored["m.qzeros"].tolist() == [[0x77777777]]  # 8, less one
    assert stored["m.scales"].dtype == torch.float16 and stored["m.g_idx"].tolist() == [0] * 8
    zeros = np.full((8, 1), -8, np.int8)
    zeros[0] = 7
    mirrored = pack_layer("m", Quantized(4, -1, values, scales, zeros), "gptq")
    assert mirrored["m.qzeros"].tolist() == [[0xEEEEEEEE - 2**32]]  # 0 is 15 with the other sign
    assert mirrored["m.scales"].tolist() == [[-0.5] + [0.5] * 7]
    assert mirrored["m.qweight"][0, :2].tolist() == [0x76543210, 0x77777777]


def test_the_words_of_compressed_tensors_by_hand() -> None:
    values = np.array([np.arange(9) - 8, np.full(9, 7)], np.int8)
    zeros = np.array([[-8], [1]], np.int8)
    layer = Quantized(4, -1, values, np.array([[1], [-2]], np.float32), zeros)
    stored = pack_layer("m", layer, "compressed-tensors")
    assert stored["m.weight_packed"].tolist() == [[0x76543210, 8], [-1, 15]]
    assert stored["m.weight_zero_point"].tolist() == [[0x90]]
    assert stored["m.weight_shape"].tolist() == [2, 9]
    assert stored["m.weight_scale"].tolist() == [[1], [-2]]


@pytest.mark.parametrize(("group", "word"), [(-1, 0x4F372615), (128, 0x7ECAFDB9)])
def test_the_tile_of_qqq_by_hand(group: int, word: int) -> None:
    values = np.zeros((256, 256), np.int8)
    # A thread's first word: outputs 0 and 8 of inputs 0 to 3. By row 8 0 8 0 ... of input 0 0 1 1
    # 2 2 3 3; in groups, with 8 added, 0 0 8 8 of inputs 0 2 0 2 and then of 1 3 1 3.
    values[0, :4], values[8, :4] = (1, 2, 3, 4), (5, 6, 7, -1)
    scales = np.full((256, 1 if group < 0 else 2), 16, np.float16)
    scales[2] = 32
    back, stored = there_and_back(Quantized(4, group, values, scales), "qqq")
    assert np.array_equal(back.values, values)
    words = stored["m.B"].numpy().view(np.uint32)
    assert words[0, 0] == word and len(np.unique(words)) == 2
    if group < 0:
        assert stored["m.s_channel"][0, :9].tolist() == [1, 1, 1, 1, 1, 1, 1, 1, 2]
        assert stored["m.s_group"].shape == (0,)
    else:
        assert stored["m.s_channel"][0, 0].item() == np.float32(64) / np.float32(127)
        assert stored["m.s_group"][0, 0].item() == np.float16(127 / 4)


@pytest.mark.parametrize(("form", "scheme"), SCHEMES)
def test_a_folder_computes_with_the_dequantised_weights(
    tmp_path: Path, form: Form, scheme: Scheme
) -> None:
    made = write_quantized(tmp_path / "m", form, scheme)
    model = attending.load(tmp_path / "m", dtype="float32")
    assert len(made) == 14 and model._checkpoint.quantized("lm_head.weight") is None
    for name, layer in made.items():
        read = model._checkpoint.quantized(f"{name}.weight")
        assert read is not None
        if read.row_scales is None and layer.zeros is None:
            same(read, layer)
        weight = model.decoder.get_parameter(f"{name}.weight")
        bound = 0.6 * decoded(layer).abs().amax(1, keepdim=True) / 127
        error = (weight - decoded(layer)).abs()
        assert (error <= (bound if read.row_scales is not None else 0 * bound)).all()
    assert torch.isfinite(torch.as_tensor(model.logits([[1, 2, 3]]))).all()
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    source = json.loads((tmp_path / "m.float" / "config.json").read_text())
    del config["quantization_config"]
    assert config == source


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_layers_may_stay_float_and_the_head_may_not(tmp_path: Path, form: Form) -> None:
    left = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")
    made = write_quantized(tmp_path / "m", form, Scheme(4, 64, True), left)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert len(made) == 13 and "lm_head" in made
    assert checkpoint.quantized(f"{left[0]}.weight") is None
    assert checkpoint.read(f"{left[0]}.weight").shape == (128, 256)
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    if form == "gptq":
        assert config["lm_head"] and next(iter(config["dynamic"])) == (
            r"-:^model\.layers\.0\.mlp\.down_proj$"
        )
    else:
        assert sorted(config["ignore"]) == sorted(left)


def test_several_schemes_are_several_groups_in_compressed_tensors_alone() -> None:
    schemes = {"a": Scheme(4, 64, True), "b": Scheme(8, -1, True), "c": Scheme(4, 64, True)}
    config = quantization_config("compressed-tensors", schemes, ["a", "b", "c", "lm_head"])
    groups = config["config_groups"].values()
    assert [group["targets"] for group in groups] == [["a", "c"], ["b"]]
    assert [group["weights"]["group_size"] for group in groups] == [64, None]
    with pytest.raises(UsageError, match="one scheme, and there are 2"):
        quantization_config("gptq", schemes, ["a", "b", "c"])
    with pytest.raises(UsageError, match="all linear layers of the blocks"):
        quantization_config("qqq", {"a": Scheme(4, 128, True)}, ["a", "b"])
    with pytest.raises(UsageError, match="no layer was quantised"):
        quantization_config("gptq", {}, ["a"])


VALUES = np.zeros((64, 96), np.int8)
ONES = np.ones((64, 3), np.float16)
ROW = np.ones((64, 1), np.float16)


@pytest.mark.parametrize(
    ("form", "layer", "message"),
    [
        ("gptq", Quantized(4, 64, VALUES, ONES), r"96 inputs, no multiple of 64 \(of \[16, 32\]\)"),
        ("gptq", Quantized(4, 32, VALUES[:60], ONES[:60]), "no multiple of 8 x 8"),
        ("gptq", Quantized(4, 32, VALUES, ROW), r"\(64, 1\).*, not \(64, 3\)"),
        ("gptq", Quantized(4, -1, VALUES, np.full((64, 1), 0.1)), "scales in float16"),
        ("qqq", Quantized(4, -1, VALUES, ROW), "96 inputs and 64 outputs; qqq needs one of"),
        (
            "qqq",
            Quantized(8, -1, np.zeros((128, 128), np.int8), ONES[:1, :1].repeat(128, 0)),
            "4 b",
        ),
        (
            "compressed-tensors",
            Quantized(4, 32, VALUES, ONES, groups=np.arange(96, dtype=np.int32) % 3),
            "static groups",
        ),
        (
            "compressed-tensors",
            Quantized(4, 32, VALUES, ONES, row_scales=np.ones(64, np.float32)),
            "only qqq has",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused(form: Form, layer: Quantized, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pack_layer("m", layer, form)
