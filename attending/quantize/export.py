"""Quantised layers out: GPTQ version 1, compressed-tensors `pack-quantized`, and QQQ.

The layouts are those that `model/quantized.py` reads. Integers and scales go out as they are; what
a format cannot hold is an error, never a silent rounding, with one exception by design: QQQ in
groups splits each scale in two.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attending.artifact import write_json
from attending.chat import Tokenizer
from attending.errors import UsageError
from attending.model.architecture import Architecture
from attending.model.files import read_json
from attending.model.quantized import (
    LINEAR,
    Layer,
    Quantized,
    Scheme,
    qqq_order,
    qqq_scale_order,
    width_fault,
)
from attending.model.weights import save_model

Form = Literal["gptq", "compressed-tensors", "qqq"]
Arrays = dict[str, NDArray[Any]]
REMEDY = "Choose other groups (-1 is a whole row) or another format, or leave it float."
# A kernel's thread block: one of these must divide inputs and outputs.
QQQ_BLOCKS = ((64, 256), (128, 128), (128, 64), (64, 128))


def save_quantized(
    folder: Path,
    arch: Architecture,
    tensors: Mapping[str, Tensor],
    form: Form,
    schemes: Mapping[str, Scheme],
    tokenizer: Tokenizer,
    generation: Mapping[str, Any],
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder; `config.json` is the original one and says how it is quantised.

    Args:
        folder: An existing folder.
        arch: Of the float model.
        tensors: Every tensor under the name it is stored by: of `pack_layer`, and floats.
        form: The format.
        schemes: Layer name -> scheme, of those that were packed.
        tokenizer: With its chat template, if it has one.
        generation: What `generation_config.json` holds.
        facts: More keys for `quantization_config`, such as GPTQ's `damp_percent`.

    Raises:
        UsageError: The format has no way to say this.
    """
    shapes = arch.tensor_shapes()
    linears = [n.removesuffix(".weight") for n in shapes if LINEAR.fullmatch(n[: -len(".weight")])]
    config = quantization_config(form, schemes, linears) | dict(facts or {})
    save_model(folder, arch, tensors, tokenizer, generation)
    written = read_json(folder / "config.json") | {"quantization_config": config}
    write_json(folder / "config.json", written)


def pack_layer(name: str, layer: Quantized, form: Form) -> dict[str, Tensor]:
    """A layer's tensors under the names that they are stored by.

    Args:
        name: Of the module, such as `model.layers.0.mlp.up_proj`.
        layer: Its integers and scales.
        form: The format.

    Raises:
        UsageError: The format cannot hold this layer.
    """
    _require_fit(name, layer, form)
    pack = {"gptq": _gptq, "compressed-tensors": _packed, "qqq": _qqq}[form]
    return {name + part: torch.from_numpy(array) for part, array in pack(name, layer).items()}


def quantization_config(
    form: Form, schemes: Mapping[str, Scheme], linears: Iterable[str]
) -> dict[str, Any]:
    """What `config.json` says under this key, in the words of each format's own library.

    Args:
        form: The format.
        schemes: Layer name -> scheme, of those that are quantised.
        linears: The names of all linear layers, the head too unless it is tied.
    """
    left = [name for name in linears if name not in schemes]
    if not schemes:
        raise UsageError("no layer was quantised: the targets match none of the model's layers.")
    kinds = list(dict.fromkeys(schemes.values()))
    if form == "compressed-tensors":
        # A tied head is none of our tensors, and a `Linear` for the library all the same.
        tied = [] if "lm_head" in (*left, *schemes) else ["lm_head"]
        return _compressed_config(kinds, schemes, left + tied)
    if len({(kind.bits, kind.group, kind.symmetric) for kind in kinds}) > 1:
        raise UsageError(
            f"{form} describes all layers by one scheme, and there are {len(kinds)}: "
            f"{'; '.join(map(str, kinds))}. Take one, or the format compressed-tensors."
        )
    bits, group, symmetric, _ = kinds[0]
    outside = [name for name in left if name != "lm_head"]
    if form == "qqq":
        if outside or "lm_head" in schemes:
            raise UsageError("qqq quantises all linear layers of the blocks, and never the head.")
        return {"quant_method": "qqq", "wbits": bits, "group_size": group}
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": any(kind.act_order for kind in kinds),
        "sym": symmetric,
        "lm_head": "lm_head" in schemes,
        "dynamic": {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in outside},
        "meta": {"quantizer": ["attending"]},
    }


def _compressed_config(
    kinds: list[Scheme], schemes: Mapping[str, Scheme], left: list[str]
) -> dict[str, Any]:
    groups = {}
    for index, kind in enumerate(kinds):
        named = [name for name, scheme in schemes.items() if scheme == kind]
        weights = {
            "num_bits": kind.bits,
            "type": "int",
            "symmetric": kind.symmetric,
            "strategy": "channel" if kind.group < 0 else "group",
            "group_size": None if kind.group < 0 else kind.group,
            "actorder": None,
            "dynamic": False,
        }
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else named,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": left,
        "kv_cache_scheme": None,
    }


def shape_fault(name: str, scheme: Scheme, outputs: int, inputs: int, form: Form) -> str | None:
    """Why a format cannot hold a layer of this shape, in words."""
    if form == "qqq" and (scheme[:1] + scheme[2:3], scheme.group in (-1, 128)) != ((4, True), True):
        return f"{name} is {scheme}; qqq has 4 bits, symmetric, in groups of 128 or by row"
    if fault := width_fault(Layer(name, form, scheme, (outputs, inputs), {})):
        return fault
    if scheme.act_order and form != "gptq":  # compressed-tensors 0.19 drops the list of groups
        return f"{name} is in the order of activations; {form} needs neighbours (static groups)"
    if form == "qqq" and not any(
        inputs % rows == 0 and outputs % columns == 0 for rows, columns in QQQ_BLOCKS
    ):
        return f"{name} has {inputs} inputs and {outputs} outputs; qqq needs one of {QQQ_BLOCKS}"
    return None


def _require_fit(name: str, layer: Quantized, form: Form) -> None:
    outputs, inputs = layer.values.shape
    fault = shape_fault(name, layer.scheme, outputs, inputs, form)
    groups = 1 if layer.group < 0 else inputs // layer.group
    shapes = {array.shape for array in (layer.scales, layer.zeros) if array is not None}
    if fault is None and shapes != {(outputs, groups)}:
        fault = f"{name} has scales and zero points {shapes}, not {(outputs, groups)}"
    elif fault is None and layer.row_scales is not None and form != "qqq":
        fault = f"{name} has a second scale to each row, which only qqq has"
    if fault is not None:
        raise UsageError(f"{fault}. {REMEDY}")


def _gptq(name: str, layer: Quantized) -> Arrays:
    """Version 1 has no zero point of 0: such groups go out mirrored, with the scale's sign."""
    inputs, middle = layer.values.shape[1], 1 << layer.bits - 1
    values = layer.values.astype(np.int16) + middle
    scales = _halves(name, layer.scales)
    groups = layer.groups
    if groups is None:
        groups = np.arange(inputs, dtype=np.int32) // (inputs if layer.group < 0 else layer.group)
    zeros = np.full(scales.shape, middle, np.int16)
    if layer.zeros is not None:
        zeros = layer.zeros.astype(np.int16) + middle
        mirrored, top = zeros == 0, 2 * middle - 1
        values = np.where(mirrored[:, groups], top - values, values)
        zeros, scales = np.where(mirrored, top, zeros), np.where(mirrored, -scales, scales)
    return {
        ".qweight": np.ascontiguousarray(_words(values, layer.bits).T),
        ".qzeros": _words(zeros.T - 1, layer.bits),
        ".scales": np.ascontiguousarray(scales.T),
        ".g_idx": groups.astype(np.int32),
    }


def _packed(name: str, layer: Quantized) -> Arrays:
    middle = 1 << layer.bits - 1
    arrays: Arrays = {
        ".weight_packed": _words(layer.values.astype(np.int16) + middle, layer.bits),
        ".weight_scale": np.ascontiguousarray(layer.scales),
        ".weight_shape": np.array(layer.values.shape, np.int64),
    }
    if layer.zeros is not None:
        words = _words(layer.zeros.T.astype(np.int16) + middle, layer.bits)
        arrays[".weight_zero_point"] = np.ascontiguousarray(words.T)
    return arrays


def _qqq(name: str, layer: Quantized) -> Arrays:
    """In groups: scale = s_channel x s_group, where s_channel is the row's 8-bit scale."""
    outputs, inputs = layer.values.shape
    grouped = 0 < layer.group < inputs
    values = layer.values + np.int8(8) if grouped else layer.values & np.int8(15)
    grid = values.T.reshape(inputs // 16, 16, outputs // 16, 16).transpose(0, 2, 1, 3)
    placed = grid.reshape(-1, 1024)[:, qqq_order(grouped)].reshape(inputs // 16, -1)
    rows = layer.scales.astype(np.float32)[:, 0] / np.float32(16)
    halves: NDArray[np.float16] = np.empty(0, np.float16)
    if grouped:
        scales = layer.scales
        if layer.row_scales is None:
            peak = np.abs(layer.dequantise()).max(axis=1)
            rows = np.where(peak > 0, peak, 127).astype(np.float32) / np.float32(127)
            scales = layer.scales.astype(np.float32) / rows[:, None]
            scales = np.clip(scales, -65504, 65504)  # past 127 only where all values are 0
        else:
            rows = layer.row_scales
        tiles = scales.astype(np.float16).T.reshape(-1, 64)
        halves = tiles[:, qqq_scale_order(True)].reshape(-1, outputs)
    rows = rows.reshape(-1, 32)[:, qqq_scale_order(False)].reshape(1, outputs)
    return {".B": _words(placed, 4), ".s_channel": rows, ".s_group": halves}


def _words(values: NDArray[Any], bits: int) -> NDArray[np.int32]:
    """[..., n] non-negative integers -> [..., W] words, the first in the lowest bits."""
    spare = -values.shape[-1] % (32 // bits)
    raw = np.pad(values.astype(np.uint8), [(0, 0)] * (values.ndim - 1) + [(0, spare)])
    if bits == 4:
        raw = raw[..., 0::2] | raw[..., 1::2] << np.uint8(4)
    return np.ascontiguousarray(raw).view(np.int32)


def _halves(name: str, scales: NDArray[Any]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        halves = scales.astype(np.float16)
    if not np.array_equal(halves.astype(scales.dtype), scales):
        raise UsageError(
            f"{name}: gptq stores scales in float16, and these would change. Round the scales "
            "first and the weights by them, or take the format compressed-tensors."
        )
    return halves
