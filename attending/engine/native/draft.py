"""A draft's weights as the kernel reads them: rounded to 8 bits when it is opened."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attending.engine.native.pack import (
    FORMATS,
    MAX_HEAD,
    TILE,
    Matrix,
    padded_floats,
    quantise,
    tiles,
)
from attending.errors import UsageError
from attending.model.checkpoint import as_float32
from attending.model.eagle_files import EMBEDDING, EagleConfig
from attending.model.gguf_file import Blocks

Floats = NDArray[np.float32]
LAYER = ("qkv", "out", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class PackedDraft:
    """A draft in the kernel's layout."""

    config: EagleConfig
    matrices: Mapping[str, Matrix]
    """`fc`, `head`, those of `LAYER`, and `embedding` where it has its own."""
    vectors: Mapping[str, Floats]
    """By stock name."""
    target_ids: NDArray[np.int32]
    """Of each word of the head."""


def pack_draft(config: EagleConfig, found: Mapping[str, NDArray[Any]]) -> PackedDraft:
    """What `open_eagle` gives.

    Raises:
        UsageError: A gated draft, or larger heads than the kernel's: torch's runner has those.
    """
    if (size := config.arch.layers[0].head_dim) > MAX_HEAD:
        raise UsageError(
            f"the draft's heads have {size} values, and the kernel's end at {MAX_HEAD}: give a "
            "dtype, as --dtype float32, or another draft."
        )
    if config.gated:
        raise UsageError(
            "a gated draft is run by torch alone: give a dtype, as --dtype float32, or another "
            "draft."
        )
    at = "midlayer"
    names = {
        "fc": ["fc.weight"],
        "head": ["lm_head.weight"],
        "qkv": [f"{at}.self_attn.{name}_proj.weight" for name in "qkv"],
        "out": [f"{at}.self_attn.o_proj.weight"],
        "gate_up": [f"{at}.mlp.{name}_proj.weight" for name in ("gate", "up")],
        "down": [f"{at}.mlp.down_proj.weight"],
    }
    names |= {"embedding": [EMBEDDING]} if EMBEDDING in found else {}
    bits, group, symmetric = FORMATS["w8"]
    matrices = {}
    for name, parts in names.items():
        values = [as_float32(found[part]) for part in parts]
        if name == "gate_up":  # a tile of each by turns
            body = np.stack(
                [tiles(quantise(v, bits, group, symmetric=symmetric)) for v in values], 1
            )
            body, outputs = body.reshape(-1, *body.shape[2:]), 2 * -(-len(values[0]) // TILE) * TILE
        else:
            rounded: Blocks = quantise(np.concatenate(values), bits, group, symmetric=symmetric)
            body, outputs = tiles(rounded), len(rounded.values)
        data = np.ascontiguousarray(body).reshape(-1)
        matrices[name] = Matrix(outputs, values[0].shape[1], bits, group, True, data, None)
    vectors = {
        n: padded_floats(as_float32(v)) for n, v in found.items() if n.endswith("norm.weight")
    }
    d2t = found["d2t"]
    ids = (np.arange(len(d2t)) + d2t).astype(np.int32)
    return PackedDraft(config, matrices, vectors, ids)
