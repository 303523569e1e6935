"""Quantised safetensors, without torch: GPTQ (v1 and v2), compressed-tensors packed, and QQQ.

All three store a linear layer of N outputs and K inputs as integers, several to a 32-bit word, with
scales for groups of inputs. Here they are one record, `Quantized`; `quantize/export.py` writes it.
Layouts: AutoGPTQ and GPTQModel; compressed-tensors' `pack-quantized`; QQQ (Zhang et al. 2024, arXiv
2406.09904) for its Marlin kernel.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attending.config import suggest
from attending.errors import CheckpointError
from attending.model.architecture import Architecture
from attending.model.gguf_file import Blocks

Floats = NDArray[np.float32]
Shape = tuple[int, ...]
Parts = Mapping[str, NDArray[Any]]
LINEAR = re.compile(r"model\.layers\.\d+\..+_proj|model\.layers\.\d+\..+\.W_pack|lm_head")
NAMES = {"gptq": "GPTQ", "compressed-tensors": "compressed-tensors", "qqq": "QQQ"}
INTEGER_PARTS = (".qweight", ".qzeros", "g_idx", ".B", "_packed", "_zero_point", "_shape")
MARKS = {"gptq": (".qweight", ".qzeros", ".scales"), "qqq": (".B", ".s_channel")}
# A QQQ tile: 64 outputs by 16 inputs lie in 128 words, 8 bytes to each thread of a tensor core.
QQQ_TILE = (64, 16)


class Scheme(NamedTuple):
    """How a layer is quantised."""

    bits: int
    """4 or 8."""
    group: int
    """Inputs that share a scale; -1: all of a row's."""
    symmetric: bool
    """No zero points."""
    act_order: bool = False
    """Inputs of a group are not neighbours; a list says which group each is in."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """A linear layer: weight[n, k] = scales[n, g] (values[n, k] - zeros[n, g]), g = groups[k].

    QQQ's groups have a second scale: weight = row_scales[n] round(scales[n, g] values[n, k]), the
    rounding to int8 being its kernel's.
    """

    bits: int
    """4 or 8."""
    group: int
    """Inputs that share a scale; -1: all of a row's."""
    values: NDArray[np.int8]
    """[N, K], from -8 to 7 in 4 bits."""
    scales: NDArray[Any]
    """[N, G], float16 or float32; may be negative."""
    zeros: NDArray[np.int8] | None = None
    """[N, G], in the range of the values; None is symmetric."""
    groups: NDArray[np.int32] | None = None
    """[K], the group of each input; None: neighbours."""
    row_scales: Floats | None = None
    """[N], QQQ in groups only."""

    @property
    def scheme(self) -> Scheme:
        """Without the numbers."""
        return Scheme(self.bits, self.group, self.zeros is None, self.groups is not None)

    def dequantise(self) -> Floats:
        """[N, K]; exact where scales are float16, since 11 and 8 bits fit into a float32."""
        if self.row_scales is not None:
            return self.in_rows().dequantise()
        steps = self.values.astype(np.float32)
        scales = self.scales.astype(np.float32)
        if self.groups is not None:
            if self.zeros is not None:
                steps -= self.zeros[:, self.groups]
            return np.multiply(steps, scales[:, self.groups], out=steps)
        cut = steps.reshape(*scales.shape, -1)
        if self.zeros is not None:
            cut -= self.zeros[..., None]
        cut *= scales[..., None]
        return steps

    def blocks(self) -> Blocks | None:
        """The integers as stored, for the native kernel; None if it has no such groups.

        Scales, and minima (-scale x zero point), become float16; None too if one would be off by
        more than 1/2048 of the largest. GPTQ's scales are float16 already.
        """
        if self.row_scales is not None:
            return self.in_rows().blocks()
        inputs, middle = self.values.shape[1], 1 << self.bits - 1
        size = 128 if self.group < 0 else self.group
        unit = next((unit for unit in (128, 64, 32) if size % unit == 0), None)
        if unit is None or self.groups is not None:
            return None
        scale, minimum = _half(self.scales.astype(np.float32)), None
        if self.zeros is not None:
            low = self.scales.astype(np.float32) * -(self.zeros.astype(np.float32) + middle)
            if (minimum := _half(low)) is None:
                return None
        if scale is None:
            return None
        times = -(-inputs // unit) if self.group < 0 else size // unit
        halves = [half if half is None else np.repeat(half, times, 1) for half in (scale, minimum)]
        values = (self.values.astype(np.int16) + middle).astype(np.uint8)
        return Blocks(self.bits, values, halves[0], halves[1])  # type: ignore[arg-type]

    def in_rows(self) -> "Quantized":
        """QQQ in groups as its kernel multiplies it: int8, a scale to each row."""
        wide = np.repeat(self.scales.astype(np.float32), self.group, 1) * self.values
        values = np.clip(np.rint(wide), -128, 127).astype(np.int8)
        assert self.row_scales is not None
        return Quantized(8, -1, values, self.row_scales[:, None])


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantised layer of a folder, its numbers not yet read."""

    name: str
    """Of the module: its weight's without `.weight`."""
    method: str
    """A key of `NAMES`."""
    scheme: Scheme
    shape: tuple[int, int]
    """[N, K]."""
    parts: Mapping[str, Shape]
    """Name -> shape of what is stored."""
    is_v1: bool = True
    """GPTQ: zero points are stored less one."""

    def read(self, found: Parts) -> Quantized:
        """Decode the stored tensors.

        Raises:
            CheckpointError: Scales are no numbers, groups out of range, or the parts disagree.
        """
        decode = {"gptq": _gptq, "compressed-tensors": _packed, "qqq": _qqq}[self.method]
        layer = decode(self, lambda part: found[self.name + part])
        for scales in (layer.scales, layer.row_scales):
            if scales is not None and not np.isfinite(scales).all():
                raise _damaged(self.name, "its scales hold values that are no numbers")
        return layer


def read_layers(arch: Architecture, found: Parts) -> dict[str, Layer]:
    """Weight name -> layer, of every quantised one in a folder.

    Raises:
        CheckpointError: What `quantization_config` says is not implemented, does not fit the
            model's widths, or no layer is quantised.
    """
    config = arch.source["quantization_config"]
    method = {"auto-round": "gptq"}.get(config["quant_method"], config["quant_method"])
    is_v1 = config.get("checkpoint_format") != "gptq_v2"
    shapes = {name.removesuffix(".weight"): shape for name, shape in arch.tensor_shapes().items()}
    linears = {name: shape for name, shape in shapes.items() if LINEAR.fullmatch(name)}
    try:
        schemes = _schemes(config, method, linears)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"config.json: quantization_config is damaged ({error!r})") from None
    layers = {}
    for name, scheme in schemes.items():
        if method in MARKS and not any(name + mark in found for mark in MARKS[method]):
            continue  # exports name what they left out in many ways; a part missing is found later
        outputs, inputs = linears[name]
        parts = stored_shapes(method, scheme, outputs, inputs)
        if f"{name}.g_idx" in found:
            parts[".g_idx"] = (inputs,)
        named = {name + part: shape for part, shape in parts.items()}
        layers[f"{name}.weight"] = Layer(name, method, scheme, (outputs, inputs), named, is_v1)
    if not layers:
        raise CheckpointError(
            f"config.json says that the model is quantised ({method}), but none of its "
            f"{len(linears)} linear layers is. Get the model again."
        )
    if unfit := [fault for layer in layers.values() if (fault := width_fault(layer))]:
        raise CheckpointError(
            f"{len(unfit)} layers do not fit their groups: {'; '.join(unfit[:5])}"
        )
    return layers


def require_float(arch: Architecture, name: str) -> None:
    """CheckpointError if a folder is quantised already; a GGUF, whatever it holds, passes."""
    if config := arch.source.get("quantization_config"):
        raise CheckpointError(
            f"{name} is quantised already ({NAMES.get(config['quant_method'], 'AutoRound')}), and "
            "rounding it twice would add both errors. Take the float model that it was made from "
            "(its card names it)."
        )


def stored_shapes(method: str, scheme: Scheme, outputs: int, inputs: int) -> dict[str, Shape]:
    """Suffix -> shape of each tensor that a layer is stored as."""
    bits, group, symmetric, act_order = scheme
    groups = 1 if group < 0 else inputs // group
    words, over = -(-inputs * bits // 32), -(-outputs * bits // 32)
    if method == "gptq":
        shapes: dict[str, Shape] = {".qweight": (words, outputs), ".qzeros": (groups, over)}
        return (
            shapes | {".scales": (groups, outputs)} | ({".g_idx": (inputs,)} if act_order else {})
        )
    if method == "qqq":
        middle = (groups, outputs) if 0 < group < inputs else (0,)
        return {".B": (inputs // 16, outputs * 2), ".s_channel": (1, outputs), ".s_group": middle}
    shapes = {".weight_packed": (outputs, words), ".weight_scale": (outputs, groups)}
    shapes |= {".weight_shape": (2,)}
    shapes |= {} if symmetric else {".weight_zero_point": (over, groups)}
    return shapes | ({".weight_g_idx": (inputs,)} if act_order else {})


def width_fault(layer: Layer) -> str | None:
    """What does not divide, in words."""
    (outputs, inputs), group = layer.shape, layer.scheme.group
    if group > 0 and inputs % group:
        sizes = (128,) if layer.method == "qqq" else (16, 32, 64, 128, 256)
        fit = [size for size in sizes if inputs % size == 0]
        return f"{layer.name} has {inputs} inputs, no multiple of {group} (of {fit or 'none'})"
    tile = {"gptq": 2 * (32 // layer.scheme.bits,), "qqq": QQQ_TILE}.get(layer.method, (1, 1))
    if outputs % tile[0] or inputs % tile[1]:
        return f"{layer.name} is {outputs} x {inputs}, no multiple of {tile[0]} x {tile[1]}"
    return None


def unpack(words: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """[..., W] words -> [..., count] integers; the first lies in the lowest bits."""
    raw = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    if bits == 4:
        raw = np.stack((raw & 15, raw >> 4), axis=-1).reshape(*raw.shape[:-1], -1)
    return raw[..., :count]


def qqq_order(grouped: bool) -> NDArray[np.intp]:
    """[1024]: which value of a tile, [input tile of 4][16][16], lies at each place of its words."""
    thread, block, half, row = np.ogrid[:32, :4, :2, :4]
    order = 16 * (4 * (thread % 4) + row) + thread // 4 + 8 * half + 256 * block
    mixed = (0, 2, 4, 6, 1, 3, 5, 7) if grouped else (4, 0, 5, 1, 6, 2, 7, 3)
    flat: NDArray[np.intp] = order.reshape(-1, 8)[:, mixed].reshape(-1)
    return flat


def qqq_scale_order(grouped: bool) -> NDArray[np.intp]:
    """Which output's scale lies at each place: of 64 (by group), or of 32 (by row)."""
    if grouped:
        return np.arange(64).reshape(8, 8).T.reshape(-1)
    return (2 * np.arange(4)[:, None] + (0, 1, 8, 9, 16, 17, 24, 25)).reshape(-1)


def _gptq(layer: Layer, part: Callable[[str], NDArray[Any]]) -> Quantized:
    (outputs, inputs), bits = layer.shape, layer.scheme.bits
    middle = 1 << bits - 1
    values = unpack(part(".qweight").T, bits, inputs)
    # One added to every integer of a word at once: so a zero point of 0, which version 1 stores by
    # borrowing from the next integer, comes back.
    one = sum(1 << at for at in range(0, 32, bits)) if layer.is_v1 else 0
    words = (part(".qzeros").view(np.uint32) + np.uint32(one)).view(np.int32)
    zeros = _signed(unpack(words, bits, outputs).T, middle)
    if layer.scheme.symmetric and zeros.any():
        raise _damaged(layer.name, f"config.json says sym, but not all zero points are {middle}")
    groups = part(".g_idx") if layer.name + ".g_idx" in layer.parts else None
    return Quantized(
        bits,
        layer.scheme.group,
        _signed(values, middle),
        np.ascontiguousarray(_float(part(".scales")).T),
        None if layer.scheme.symmetric else zeros,
        _out_of_order(layer, groups),
    )


def _packed(layer: Layer, part: Callable[[str], NDArray[Any]]) -> Quantized:
    (outputs, inputs), bits = layer.shape, layer.scheme.bits
    middle, zeros, groups = 1 << bits - 1, None, None
    if tuple(part(".weight_shape")) != layer.shape:
        raise _damaged(layer.name, f"its weight_shape is {part('.weight_shape').tolist()}")
    if not layer.scheme.symmetric:
        zeros = _signed(unpack(part(".weight_zero_point").T, bits, outputs).T, middle)
    if layer.scheme.act_order:
        groups = _out_of_order(layer, part(".weight_g_idx"))
    values = _signed(unpack(part(".weight_packed"), bits, inputs), middle)
    scales = _float(part(".weight_scale"))
    return Quantized(bits, layer.scheme.group, values, scales, zeros, groups)


def _qqq(layer: Layer, part: Callable[[str], NDArray[Any]]) -> Quantized:
    (outputs, inputs), group = layer.shape, layer.scheme.group
    grouped = 0 < group < inputs
    placed = unpack(part(".B"), 4, outputs * 16).reshape(-1, 1024)
    cut = np.empty_like(placed)
    cut[:, qqq_order(grouped)] = placed
    grid = cut.reshape(inputs // 16, outputs // 16, 16, 16).transpose(1, 3, 0, 2)
    stored = grid.reshape(outputs, inputs)
    rows = np.empty(outputs, np.float32)
    rows.reshape(-1, 32)[:, qqq_scale_order(False)] = part(".s_channel").reshape(-1, 32)
    if not grouped:  # in two's complement, which the kernel reads as the upper half of a byte
        return Quantized(4, group, _signed(stored ^ np.uint8(8), 8), rows[:, None] * np.float32(16))
    scales = np.empty((inputs // group, outputs), np.float16)
    placed_scales = part(".s_group").reshape(-1, 64)
    scales.reshape(-1, 64)[:, qqq_scale_order(True)] = placed_scales
    return Quantized(4, group, _signed(stored, 8), np.ascontiguousarray(scales.T), row_scales=rows)


def _out_of_order(layer: Layer, groups: NDArray[Any] | None) -> NDArray[np.int32] | None:
    """The group of each input, unless neighbours share it."""
    inputs, group = layer.shape[1], layer.scheme.group
    plain = np.arange(inputs) // (inputs if group < 0 else group)
    if groups is None or np.array_equal(groups, plain):
        return None
    if groups.min() < 0 or groups.max() > plain[-1]:
        raise _damaged(layer.name, f"its g_idx names groups outside 0 to {plain[-1]}")
    return groups.astype(np.int32)


def _schemes(config: Mapping[str, Any], method: str, linears: Iterable[str]) -> dict[str, Scheme]:
    """Module -> scheme, as `quantization_config` says."""
    if method == "compressed-tensors":
        _require("transform_config", config.get("transform_config") or {}, ({},))
        sparse = (config.get("sparsity_config") or {}).get("format", "dense")
        _require("sparsity_config", sparse, ("dense",))
        return {name: scheme for name in linears if (scheme := _targeted(name, config))}
    key = "bits" if "bits" in config else "wbits"
    _require(key, config.get(key), (4,) if method == "qqq" else (4, 8))
    symmetric, act_order = True, False
    if method == "gptq":
        _require("checkpoint_format", config.get("checkpoint_format", "gptq"), ("gptq", "gptq_v2"))
        if config["quant_method"] == "auto-round":
            _require("packing_format", config.get("packing_format"), ("auto_round:auto_gptq",))
        if more := [key for key in config.get("dynamic") or () if not key.startswith("-:")]:
            raise CheckpointError(f"config.json: dynamic has {more}; only exclusions are read.")
        symmetric, act_order = config.get("sym", True), config.get("desc_act", False)
    scheme = Scheme(config[key], _group(config), bool(symmetric), bool(act_order))
    return dict.fromkeys(linears, scheme)


def _targeted(name: str, config: Mapping[str, Any]) -> Scheme | None:
    """compressed-tensors' scheme for a module: by exact name, then by expression, then by class."""

    def rank(target: str) -> int | None:
        if target.startswith("re:"):
            return 1 if re.match(target[3:], name) else None
        return {name: 0, "Linear": 2}.get(target)

    if any(rank(target) is not None for target in config.get("ignore") or ()):
        return None
    fits = [
        (place, target, group)
        for group in config["config_groups"].values()
        for target in group["targets"]
        if (place := rank(target)) is not None
    ]
    if not fits:
        return None
    scheme = min(fits, key=lambda fit: fit[:2])[2]
    weights = scheme["weights"]
    _require("format", scheme.get("format") or config.get("format"), ("pack-quantized",))
    _require("type", weights.get("type", "int"), ("int",))
    _require("num_bits", weights["num_bits"], (4, 8))
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    _require("strategy", strategy, ("group", "channel"))
    size = _group(weights) if strategy == "group" else -1
    act_order = weights.get("actorder") in (True, "group", "dynamic")
    return Scheme(weights["num_bits"], size, weights.get("symmetric", True), act_order)


def _group(config: Mapping[str, Any]) -> int:
    size = config.get("group_size")
    if not isinstance(size, int) or isinstance(size, bool) or not (size == -1 or size > 0):
        raise CheckpointError(f"config.json: group_size is {size!r}; expected -1 or inputs a group")
    return size


def _require(key: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise CheckpointError(
            f"config.json: quantization_config's {key} is {value!r}, which is not implemented."
            f"{suggest(str(value), map(str, known))} Use the float model or another rounding."
        )


def _signed(values: NDArray[np.uint8], middle: int) -> NDArray[np.int8]:
    return np.ascontiguousarray(values - np.uint8(middle)).view(np.int8)  # wraps, as it should


def _float(values: NDArray[Any]) -> NDArray[Any]:
    """As stored; bfloat16 bits as float32."""
    is_bits = values.dtype == np.uint16
    return (values.astype(np.uint32) << 16).view(np.float32) if is_bits else values


def _half(values: Floats) -> NDArray[np.float16] | None:
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    limit = np.abs(values).max(initial=0) / 2048
    is_near = np.abs(half.astype(np.float32) - values).max(initial=0) <= limit
    return half if is_near else None


def _damaged(name: str, what: str) -> CheckpointError:
    return CheckpointError(f"{name} is damaged: {what}. Get the model again.")
