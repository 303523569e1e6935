"""Quantised folders are read as their formats mean them, and damage is named."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attending.errors import CheckpointError
from attending.model.checkpoint import open_checkpoint
from attending.model.files import SINGLE, read_config
from attending.model.quantized import Quantized, Scheme, require_float
from attending.model.weights import load_decoder
from tests.model.tiny import FAMILIES
from tests.quantize.making import decoded, write_quantized

Change = Callable[[dict[str, Tensor], dict[str, Any]], None]
AT = "model.layers.0.self_attn.q_proj"
SYMMETRIC, ASYMMETRIC = Scheme(4, 32, True), Scheme(4, 32, False)
ORDERED = Scheme(4, 32, True, act_order=True)


def rewrite(folder: Path, change: Change) -> None:
    weights, file = load_file(folder / SINGLE), folder / "config.json"
    config = json.loads(file.read_text())
    change(weights, config["quantization_config"])
    save_file({name: t.contiguous() for name, t in weights.items()}, folder / SINGLE)
    file.write_text(json.dumps(config))


def zeros_of(weights: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for name, tensor in weights.items() if name.endswith("qzeros")]


def to_v2(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["checkpoint_format"] = "gptq_v2"
    for tensor in zeros_of(weights):
        tensor += 0x11111111


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC, Scheme(4, -1, False), ORDERED])
def test_both_versions_of_gptq_are_the_same_weights(tmp_path: Path, scheme: Scheme) -> None:
    made = write_quantized(tmp_path / "m", "gptq", scheme)
    rewrite(tmp_path / "m", to_v2)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.stored == "GPTQ int4"
    for name, layer in made.items():
        assert np.array_equal(checkpoint.read(f"{name}.weight"), layer.dequantise())


def test_a_zero_point_of_zero_that_was_stored_by_borrowing_comes_back(tmp_path: Path) -> None:
    made = write_quantized(tmp_path / "m", "gptq", ASYMMETRIC)

    def borrow(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
        weights[f"{AT}.qzeros"][:] = 0x00000010 - 0x11111111  # 1 for the second output, else 0

    rewrite(tmp_path / "m", borrow)
    layer = open_checkpoint(tmp_path / "m").quantized(f"{AT}.weight")
    assert layer is not None and layer.zeros is not None
    assert layer.zeros[:8, 0].tolist() == [-8, -7, -8, -8, -8, -8, -8, -8]
    assert np.array_equal(layer.values, made[AT].values)


def test_compressed_tensors_in_the_order_of_activations(tmp_path: Path) -> None:
    made = write_quantized(tmp_path / "m", "compressed-tensors", SYMMETRIC)
    order = torch.randperm(128) // 32

    def shuffle(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
        for name in made:
            inputs = made[name].values.shape[1]
            weights[f"{name}.weight_g_idx"] = (
                order.int() if name == AT else torch.arange(inputs, dtype=torch.int32) // 32
            )

    rewrite(tmp_path / "m", shuffle)
    checkpoint = open_checkpoint(tmp_path / "m")
    expected = made[AT].values * made[AT].scales.astype(np.float32)[:, order.numpy()]
    assert np.array_equal(checkpoint.read(f"{AT}.weight"), expected)
    other = AT.replace("q_proj", "k_proj")
    assert np.array_equal(checkpoint.read(f"{other}.weight"), made[other].dequantise())
    assert checkpoint.blocks(f"{AT}.weight") is None
    assert checkpoint.blocks(f"{other}.weight") is not None


@pytest.mark.parametrize("target", [AT, "re:.*q_proj", "re:.*layers.0.*"])
def test_a_name_comes_before_an_expression_and_that_before_a_class(
    tmp_path: Path, target: str
) -> None:
    made = write_quantized(tmp_path / "m", "compressed-tensors", SYMMETRIC)

    def target_twice(weights: dict[str, Tensor], config: dict[str, Any]) -> None:
        right = config["config_groups"]["group_0"]
        wrong = {**right, "weights": {**right["weights"], "num_bits": 8}}
        classes = "re:.*q_proj" if target == AT else "Linear"
        config["config_groups"] = {
            "a": {**wrong, "targets": [classes]},
            "b": {**right, "targets": [target, *(name for name in made if name != AT)]},
        }

    rewrite(tmp_path / "m", target_twice)
    assert len(open_checkpoint(tmp_path / "m").shapes) == 21


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path: Path, family: str) -> None:
    hybrid = {"num_swa_attention_heads": 8, "num_swa_key_value_heads": 2, "sliding_window": 5}
    made = write_quantized(
        tmp_path / "m",
        "gptq",
        SYMMETRIC,
        (),
        model_type=family,
        sliding_window_layers=[1],
        head_dim=32,
        **hybrid,
    )
    decoder = load_decoder(open_checkpoint(tmp_path / "m"))
    assert len(made) == (11 if family == "baichuan_m1" else 15)
    for name, layer in made.items():
        assert torch.equal(decoder.get_parameter(f"{name}.weight"), decoded(layer))
    assert "quantization_config" not in decoder.arch.to_config()  # what is trained on is float


def test_the_bias_that_auto_gptq_gave_every_layer_is_dropped_if_it_is_nothing(
    tmp_path: Path,
) -> None:
    write_quantized(tmp_path / "m", "gptq", SYMMETRIC)
    rewrite(tmp_path / "m", lambda weights, _: weights.update({f"{AT}.bias": torch.zeros(128)}))
    assert f"{AT}.bias" not in open_checkpoint(tmp_path / "m").shapes
    rewrite(tmp_path / "m", lambda weights, _: weights.update({f"{AT}.bias": torch.ones(128)}))
    with pytest.raises(CheckpointError, match=r"1 unexpected: .*q_proj\.bias"):
        open_checkpoint(tmp_path / "m")


def damaged(folder: Path, form: Any, scheme: Scheme, change: Change) -> str:
    write_quantized(folder, form, scheme)
    rewrite(folder, change)
    with pytest.raises(CheckpointError) as error:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.shapes:
            checkpoint.read(name)
    return str(error.value)


def drop(*parts: str) -> Change:
    def change(weights: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in [name for name in weights if name.endswith(parts)]:
            del weights[name]

    return change


def put(part: str, value: Any) -> Change:
    def change(weights: dict[str, Tensor], _: dict[str, Any]) -> None:
        if isinstance(value, Tensor):
            weights[AT + part] = value
        else:
            weights[AT + part].view(-1)[0] = value

    return change


def say(**values: Any) -> Change:
    return lambda _, config: config.update(values)


def weights_say(**values: Any) -> Change:
    return lambda _, config: config["config_groups"]["group_0"]["weights"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{AT}.qzeros"), "1 missing: .*q_proj.qzeros"),
        (
            drop(f"{AT}.qweight", f"{AT}.qzeros", f"{AT}.scales"),
            "missing: .*q_proj.weight; 1 unexpected: .*g_idx",
        ),
        (drop("g_idx"), "14 missing: .*g_idx and 9 more"),
        (put(".g_idx", 4), "g_idx names groups outside 0 to 3"),
        (put(".scales", float("nan")), "q_proj is damaged: its scales hold values that are no num"),
        (put(".qweight", torch.zeros(8, 128, dtype=torch.int32)), r"1 misshaped: .*\[8, 128\]"),
        (
            put(".qweight", torch.zeros(16, 128)),
            "1 tensors are stored as integers that should be floats, or",
        ),
        (put(".qzeros", 0), "q_proj is damaged: config.json says sym, but not all zero points"),
        (say(checkpoint_format="gptq_v2"), "says sym, but not all zero points are 8"),
        (say(group_size=96), r"14 layers do not .*128 inputs, no multiple of 96 \(of \[16, 32, 64"),
        (say(group_size=0), "group_size is 0; expected -1"),
        (say(group_size=None), "group_size is None"),
        (say(bits=3), "bits is 3, which is not implemented. Known: 4, 8. Use the float"),
        (say(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
        (say(dynamic={"+:.*mlp.*": {"bits": 8}}), "only exclusions are read"),
        (lambda _, config: config.pop("group_size"), "group_size is None"),
        (say(dynamic=3), "quantization_config is damaged .*TypeError"),
        (say(quant_method="awq"), "quantised by 'awq', which is not implemented"),
        (say(quant_method="auto-round", packing_format="auto_round"), "packing_format is"),
        (drop(".qweight", ".qzeros", ".scales", ".g_idx"), "none of its 15 linear layers is"),
    ],
)
def test_damage_in_gptq_is_named(tmp_path: Path, change: Change, message: str) -> None:
    text = damaged(tmp_path / "m", "gptq", ORDERED, change)
    assert re.search(message, text), text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (say(ignore=[]), "missing: lm_head.weight_packed, .*; 1 unexpected: lm_head.weight"),
        (say(ignore=["lm_head", AT]), "1 missing: .*q_proj.weight; 4 unexpected"),
        (put(".weight_shape", 64), r"its weight_shape is \[64, 128\]"),
        (drop(f"{AT}.weight_zero_point"), "1 missing: .*weight_zero_point"),
        (weights_say(num_bits=8), "42 misshaped|28 misshaped"),
        (weights_say(num_bits=3), "num_bits is 3"),
        (weights_say(strategy="tensor"), "strategy is 'tensor'"),
        (weights_say(type="float"), "type is 'float'"),
        (weights_say(actorder="group"), "14 missing: .*weight_g_idx"),
        (weights_say(group_size=48), "no multiple of 48"),
        (
            lambda _, c: c["config_groups"]["group_0"].update(format="int-quantized"),
            "format is 'in",
        ),
        (lambda _, config: config.pop("config_groups"), "is damaged .*config_groups"),
        (say(transform_config={"config_groups": {}}), "transform_config is"),
        (say(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is 'sparse-24"),
    ],
)
def test_damage_in_compressed_tensors_is_named(
    tmp_path: Path, change: Change, message: str
) -> None:
    text = damaged(tmp_path / "m", "compressed-tensors", ASYMMETRIC, change)
    assert re.search(message, text), text


def test_damage_in_qqq_is_named(tmp_path: Path) -> None:
    text = damaged(tmp_path / "m", "qqq", Scheme(4, -1, True), say(wbits=8))
    assert "wbits is 8" in text
    text = damaged(tmp_path / "n", "qqq", Scheme(4, -1, True), drop("s_channel"))
    assert "14 missing" in text and "s_channel" in text


def test_a_float_model_is_asked_for_where_one_is_needed(tmp_path: Path) -> None:
    write_quantized(tmp_path / "m", "gptq", SYMMETRIC)
    require_float(read_config(tmp_path / "m.float"), "m.float")
    with pytest.raises(CheckpointError, match=r"m is quantised already \(GPTQ\).*the float model"):
        require_float(read_config(tmp_path / "m"), "m")


def test_dequantising_by_hand() -> None:
    values = np.array([[1, -8, 7, 0], [2, 2, 2, 2]], np.int8)
    scales = np.array([[0.5, -2], [1, 4]], np.float16)
    zeros = np.array([[0, 7], [-8, 2]], np.int8)
    expected = [[0.5, -4, 0, 14], [10, 10, 0, 0]]
    assert Quantized(4, 2, values, scales, zeros).dequantise().tolist() == expected
    order = np.array([1, 0, 1, 0], np.int32)
    mixed = Quantized(4, 2, values, scales, zeros, order).dequantise()
    assert mixed.tolist() == [[12, -4, 0, 0], [0, 10, 0, 10]]
    rows = Quantized(4, 2, values, scales, row_scales=np.array([0.25, 1], np.float32))
    assert rows.dequantise().tolist() == [[0, -1, -3.5, 0], [2, 2, 8, 8]]  # 0.5 is rounded to 0
