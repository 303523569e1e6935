"""Checkpoints in, without torch: safetensors (float or quantised) and GGUF, memory-mapped.

Opening is strict: a tensor that is missing, left over or of another shape is an error that lists
them all. There is no partial load, and no format that can run code.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from attending.chat import Tokenizer
from attending.errors import CheckpointError
from attending.model.architecture import Architecture, parse_config
from attending.model.files import first, gguf_in, read_config, weight_files
from attending.model.gguf_file import Blocks, open_gguf
from attending.model.gguf_tokenizer import tokenizer_config, tokenizer_json
from attending.model.quantized import INTEGER_PARTS, NAMES, Quantized, read_layers

# Tables that old exports stored although they follow from the configuration; and the scales of an
# FP8 cache, which no runner here has.
DERIVED = (".rotary_emb.inv_freq", ".self_attn.k_scale", ".self_attn.v_scale")
# numpy has no bfloat16, so these are its bits; no other tensor is of this type.
BFLOAT16 = np.dtype("<u2")
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BFLOAT16,
}
INTEGERS: dict[str, np.dtype[Any]] = {
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}  # in quantised folders alone
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's architecture and its tensors by official name, each read when asked for."""

    arch: Architecture
    shapes: Shapes
    raw: Callable[[str], NDArray[Any]]
    """Name -> values as stored and mapped from the file, bfloat16 as `BFLOAT16` bits; changing them
    does not change the file. Quantised ones and GGUF: dequantised to float32."""
    tokenizer: Callable[[], Tokenizer]
    """Reads the tokenizer; not before it is called, since weights do not need one."""
    stored: str
    """What most weights are stored as: a dtype, a GGUF type such as Q4_1, or `GPTQ int4`."""
    blocks: Callable[[str], Blocks | None]
    """Name -> a matrix' integers as stored (Q4_0, Q4_1, Q8_0, a quantised folder's in groups that
    the native kernel has); None for any other."""
    quantized: Callable[[str], Quantized | None] = lambda name: None
    """Name -> a layer of a quantised folder as stored; None for any other."""

    def read(self, name: str) -> NDArray[np.float32]:
        """A tensor in float32, which holds float16 and bfloat16 exactly."""
        return as_float32(self.raw(name))


def as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Stored values in float32, bfloat16 from its bits."""
    if values.dtype == BFLOAT16:  # a float32's upper half
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model folder or a GGUF file; reads headers only.

    Raises:
        CheckpointError: No weights, a damaged header, or tensors that do not fit `config.json`.
    """
    gguf = gguf_in(path)
    return _open_safetensors(path, read_config(path)) if gguf is None else _open_gguf(gguf)


def require_exact(complaint: str, expected: Shapes, found: Shapes) -> None:
    """Raise a CheckpointError that begins with `complaint` unless names and shapes are equal."""
    problems = []
    for label, names in (
        ("missing", [n for n in expected if n not in found]),
        ("unexpected", [n for n in found if n not in expected]),
        (
            "misshaped",
            [
                f"{n} {list(found[n])} instead of {list(shape)}"
                for n, shape in expected.items()
                if n in found and tuple(found[n]) != shape
            ],
        ),
    ):
        if names:
            problems.append(f"{len(names)} {label}: {first(names)}")
    if problems:
        raise CheckpointError(f"{complaint} {'; '.join(problems)}.")


def _open_gguf(path: Path) -> Checkpoint:
    file = open_gguf(path)

    def tokenizer() -> Tokenizer:
        return Tokenizer(tokenizer_json(file.metadata), tokenizer_config(file.metadata))

    arch = parse_config(file.hf_config())
    return Checkpoint(arch, file.shapes, file.read, tokenizer, file.stored, file.blocks)


def _open_safetensors(folder: Path, arch: Architecture) -> Checkpoint:
    found: dict[str, NDArray[Any]] = {}
    for file in weight_files(folder):
        found |= map_tensors(file)
    kept = {name: values.shape for name, values in found.items() if not name.endswith(DERIVED)}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    # Some exports store a tied head a second time; that is harmless only if it is the same.
    is_twice = arch.tied and {head, embedding} <= kept.keys()
    if is_twice and _is_same(found[head], found[embedding]):
        del kept[head]

    def tokenizer() -> Tokenizer:
        return Tokenizer.from_folder(folder)

    layers = read_layers(arch, found) if arch.source.get("quantization_config") else {}
    shapes = arch.tensor_shapes()
    expected = {name: shape for name, shape in shapes.items() if name not in layers}
    expected |= {name: shape for one in layers.values() for name, shape in one.parts.items()}
    if layers:  # AutoGPTQ gave every layer a bias
        extra = [n for n in kept.keys() - expected.keys() if n.endswith("_proj.bias")]
        kept = {n: shape for n, shape in kept.items() if n not in extra or found[n].any()}
    what = f"its configuration ({arch.family}, {len(expected)} tensors)"
    require_exact(f"{folder.name}: the tensors do not fit {what}.", expected, kept)
    integers = {n for one in layers.values() for n in one.parts if n.endswith(INTEGER_PARTS)}
    if wrong := [n for n in kept if (found[n].dtype.kind == "i") != (n in integers)]:
        raise CheckpointError(
            f"{folder.name}: {len(wrong)} tensors are stored as integers that should be floats, or "
            f"the other way round: {first(wrong)}. Get the model again."
        )
    if not layers:
        return Checkpoint(arch, kept, found.__getitem__, tokenizer, arch.dtype, lambda name: None)

    def quantized(name: str) -> Quantized | None:
        return layers[name].read(found) if name in layers else None

    def raw(name: str) -> NDArray[Any]:
        layer = quantized(name)
        return found[name] if layer is None else layer.dequantise()

    def blocks(name: str) -> Blocks | None:
        layer = quantized(name)
        return None if layer is None else layer.blocks()

    one = next(iter(layers.values()))
    stored = f"{NAMES[one.method]} int{one.scheme.bits}"
    return Checkpoint(arch, shapes, raw, tokenizer, stored, blocks, quantized)


def _is_same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Equal, or, of two dtypes, equal as far as the coarser one tells (auto-round's heads)."""
    if one.dtype == other.dtype or one.shape != other.shape:
        return np.array_equal(one, other)
    return np.allclose(as_float32(one), as_float32(other), rtol=2**-8, atol=2**-24)


def map_tensors(
    file: Path, dtypes: Mapping[str, np.dtype[Any]] = DTYPES | INTEGERS
) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file; the library checks that the header tells the truth."""
    try:
        with safetensors.safe_open(file, framework="numpy"):
            data = np.memmap(file, np.uint8, "c")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file.name} is damaged or incomplete ({error}); get it again."
        ) from None
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes())
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in dtypes:
            raise CheckpointError(
                f"{file.name}: {name} is stored as {entry['dtype']}; expected {', '.join(DTYPES)}. "
                "Use the unquantised model."
            )
        begin, end = (start + offset for offset in entry["data_offsets"])
        values = data[begin:end].view(np.ndarray).view(dtypes[entry["dtype"]])
        tensors[name] = np.require(values.reshape(entry["shape"]), requirements="A")
    return tensors
