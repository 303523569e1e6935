"""Quantised layers and folders of small random models, for tests of every format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from attending.chat import Tokenizer
from attending.model.architecture import parse_config
from attending.model.quantized import LINEAR, Quantized, Scheme
from attending.quantize.export import Form, pack_layer, save_quantized
from tests.engine.folders import CONFIG, write_model
from tests.model.tiny import build

MODEL: dict[str, Any] = CONFIG | {
    "vocab_size": 304,  # the tokenizer's, padded
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}


def plain(weight: NDArray[np.float32], scheme: Scheme, seed: int = 0) -> Quantized:
    """Plain rounding, about half of the symmetric scales negative, as AutoRound has them."""
    inputs, middle = weight.shape[1], 1 << scheme.bits - 1
    size = inputs if scheme.group < 0 else scheme.group
    order = np.argsort(np.random.default_rng(seed).random(inputs)) // size
    groups = (order if scheme.act_order else np.arange(inputs) // size).astype(np.int32)
    cut = np.stack([weight[:, groups == g] for g in range(inputs // size)], axis=1)
    if scheme.symmetric:
        peak = np.take_along_axis(cut, np.abs(cut).argmax(-1)[..., None], -1)[..., 0]
        scales, zeros = (peak / -middle).astype(np.float16), None
    else:
        low, high = np.minimum(cut.min(-1), 0), np.maximum(cut.max(-1), 0)
        scales = ((high - low) / (2 * middle - 1)).astype(np.float16)
        zeros = np.clip(np.rint(-low / scales) - middle, -middle, middle - 1).astype(np.int8)
    steps = np.rint(weight / scales.astype(np.float32)[:, groups])
    if zeros is not None:
        steps += zeros[:, groups]
    values = np.clip(steps, -middle, middle - 1).astype(np.int8)
    listed = groups if scheme.act_order else None
    return Quantized(scheme.bits, scheme.group, values, scales, zeros, listed)


def write_quantized(
    folder: Path, form: Form, scheme: Scheme, left: tuple[str, ...] = ("lm_head",), **config: Any
) -> dict[str, Quantized]:
    """A folder in a format, rounded plainly; the layers that it holds by name."""
    source = write_model(folder.with_name(folder.name + ".float"), **MODEL | config)
    tokenizer = Tokenizer.from_folder(source)
    arch = parse_config(json.loads((source / "config.json").read_text()))
    tensors, layers = dict(build(MODEL | config).state_dict()), {}
    for name in [n.removesuffix(".weight") for n in tensors if n.endswith(".weight")]:
        if LINEAR.fullmatch(name) and name not in left:
            layers[name] = plain(tensors.pop(f"{name}.weight").numpy(), scheme)
            tensors |= pack_layer(name, layers[name], form)
    schemes = {name: layer.scheme for name, layer in layers.items()}
    folder.mkdir()
    save_quantized(folder, arch, tensors, form, schemes, tokenizer, {})
    return layers


@st.composite
def layers(draw: st.DrawFn, form: Form, bits: int = 4) -> Quantized:
    """Any integers, scales of both signs and zero points that a format can hold."""
    step, group = 128 if form == "qqq" else 64 if form == "gptq" else 1, -1
    outputs = step * draw(st.integers(1, 2)) if step > 1 else draw(st.integers(1, 40))
    sizes = {"qqq": [-1, 128], "gptq": [-1, 32, 64, 128]}.get(form, [-1, 8, 32, 64, 96, 128])
    group = draw(st.sampled_from(sizes))
    inputs = draw(st.integers(1, 5)) * (group if group > 0 else step if step > 1 else 7)
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    middle = 1 << bits - 1
    low = -7 if form == "qqq" and group < 0 else -middle
    values = generator.integers(low, middle, (outputs, inputs)).astype(np.int8)
    shape = (outputs, 1 if group < 0 else inputs // group)
    scales = (generator.normal(size=shape) * 0.01).astype(np.float16)
    zeros = groups = None
    if form != "qqq" and draw(st.booleans()):
        zeros = generator.integers(-middle, middle, shape).astype(np.int8)
    if form == "gptq" and group > 0 and shape[1] > 1 and draw(st.booleans()):
        groups = generator.permutation(np.arange(inputs, dtype=np.int32) // group)
    return Quantized(bits, group, values, scales, zeros, groups)


def decoded(layer: Quantized) -> torch.Tensor:
    return torch.from_numpy(layer.dequantise())
