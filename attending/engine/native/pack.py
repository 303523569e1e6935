"""Weights as the kernel reads them: packed once into a file, memory-mapped ever after.

The stored integers of a GGUF file in Q4_0, Q4_1 or Q8_0, and of a quantised folder in groups of a
multiple of 32, are kept exactly; everything else becomes 8 bits in groups of 32, or what is asked
for, by plain rounding. Query, key and value lie in one matrix, gate and up in another; this exists
here only. `kernel.cpp` describes the layout.
"""

import fcntl
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from attending.artifact import write_json
from attending.errors import CheckpointError, UsageError
from attending.model.architecture import Architecture
from attending.model.gguf_file import Blocks
from attending.sources import cache_dir

Floats = NDArray[np.float32]
VERSION = 3
TILE, GROUP, ALIGN = 16, 32, 64
MAX_HEAD = 512  # values of a head, by the kernel's buffers
GOLDEN = 0.618034  # its multiples lie evenly between 0 and 1
SLICE_VALUES = 1 << 22  # rounded at once: the temporaries take some 16 bytes each
OUTSIDE = ("model.embed_tokens.weight", "lm_head.weight")  # of the blocks: at least 8 bits
FILE, INDEX, LOCK = "weights.bin", "index.json", "lock"
# Bits, inputs that share a scale, and whether zero is in the middle. A grid from the smallest to
# the largest weight is finer, so it is what floats are rounded to unless asked otherwise.
FORMATS = {"w8": (8, 32, False), "w8s": (8, 32, True)}
FORMATS |= {f"w4-{group}": (4, group, False) for group in (32, 64, 128)}
FORMATS |= {f"w4s-{group}": (4, group, True) for group in (32, 64, 128)}


class Weights(Protocol):
    """Where weights come from: a checkpoint, or a model that is being trained."""

    @property
    def arch(self) -> Architecture:
        """Of the tensors."""

    def read(self, name: str, /) -> Floats:
        """One tensor in float32."""

    @property
    def blocks(self) -> Callable[[str], Blocks | None]:
        """Its integers and scales, if it is stored in groups of 32."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed model, mapped: matrices and vectors by name."""

    arch: Architecture
    path: Mapping[str, str]
    """What is computed with, in words: `weights`, ..."""
    matrices: Mapping[str, "Matrix"]
    vectors: Mapping[str, Floats]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One packed matrix and where its bytes lie."""

    outputs: int
    inputs: int
    bits: int
    group: int
    has_minimum: bool
    data: NDArray[np.uint8]
    bias: Floats | None


def quantise(
    weight: Floats, bits: int, group: int, *, symmetric: bool, is_spread: bool = False
) -> Blocks:
    """Plain rounding of [N, K] by groups of inputs, some rows at a time.

    Symmetric: the value of largest magnitude in a group decides the scale. In 4 bits it takes -8
    itself, so a scale may be negative; in 8 bits it takes 127. Asymmetric: from the smallest to
    the largest value; where it `is_spread`, in one to two steps fewer than the bits hold, another
    fraction in every group, so that weights which lay on another grid lie anywhere on this one:
    on the same one each would be rounded back, whatever small update it has had.
    """
    rows = max(1, SLICE_VALUES // weight.shape[1])
    slices = [weight[at : at + rows] for at in range(0, len(weight), rows)]
    return _joined(
        [_round(part, bits, group, symmetric=symmetric, is_spread=is_spread) for part in slices]
    )


def _round(weight: Floats, bits: int, group: int, *, symmetric: bool, is_spread: bool) -> Blocks:
    outputs, inputs = weight.shape
    groups = -(-inputs // group)
    cut = np.zeros((outputs, groups * group), np.float32)
    cut[:, :inputs] = weight
    cut = cut.reshape(outputs, groups, group)
    middle, minimum = 1 << bits - 1, None
    if symmetric:
        at = np.abs(cut).argmax(-1)[..., None]
        peak = np.take_along_axis(cut, at, -1)[..., 0]
        scale = _half(peak / -8 if bits == 4 else np.abs(peak) / 127)
        shifted = cut
    else:
        minimum = _half(np.minimum(cut.min(-1), 0))
        steps = np.full((outputs, groups), (1 << bits) - 1, np.float32)
        if is_spread:
            steps -= 1 + (np.arange(outputs * groups) * GOLDEN % 1).reshape(steps.shape)
        scale = _half((np.maximum(cut.max(-1), 0) - minimum) / steps)
        shifted, middle = cut - minimum[..., None].astype(np.float32), 0
    wide = scale.astype(np.float32)[..., None]
    found = np.divide(shifted, wide, out=np.zeros_like(cut), where=wide != 0)
    values = np.clip(np.rint(found) + middle, 0, (1 << bits) - 1).astype(np.uint8)
    values = values.reshape(outputs, -1)[:, :inputs]
    return Blocks(bits, values, scale, minimum)


def dequantise(matrix: Blocks) -> Floats:
    """[N, K], exactly what the kernel computes with."""
    bits, values, scale, minimum = matrix
    group = group_of(matrix)
    wide = np.repeat(scale.astype(np.float32), group, 1)[:, : values.shape[1]]
    if minimum is None:
        return wide * (values.astype(np.float32) - (1 << bits - 1))
    low = np.repeat(minimum.astype(np.float32), group, 1)[:, : values.shape[1]]
    return wide * values.astype(np.float32) + low


def group_of(matrix: Blocks) -> int:
    """Inputs that share a scale: 32, 64 or 128."""
    inputs, groups = matrix.values.shape[1], matrix.scale.shape[1]
    return next(group for group in (32, 64, 128) if groups == -(-inputs // group))


def tiles(matrix: Blocks) -> NDArray[np.uint8]:
    """The kernel's layout: [tiles, blocks, bytes of a block]."""
    bits, values, scale, minimum = matrix
    group = group_of(matrix)
    outputs, inputs = values.shape
    count, blocks = -(-outputs // TILE), -(-inputs // group)
    whole = np.zeros((count * TILE, blocks * group), np.uint8)
    whole[:outputs, :inputs] = values
    cut = whole.reshape(count, TILE, blocks, group // GROUP, 8, 4).transpose(0, 2, 3, 4, 1, 5)
    if bits == 4:
        cut = cut[:, :, :, :4] | cut[:, :, :, 4:] << 4
    halves = [scale] if minimum is None else [scale, minimum]
    heads = np.zeros((len(halves), count * TILE, blocks), np.float16)
    heads[:, :outputs] = halves
    heads = heads.reshape(-1, count, TILE, blocks).transpose(1, 3, 0, 2)
    head = np.ascontiguousarray(heads).view(np.uint8).reshape(count, blocks, -1)
    body = np.ascontiguousarray(cut).reshape(count, blocks, -1)
    return np.concatenate([head, body], axis=2)


def open_packed(weights: Weights, folder: Path, form: str = "stored") -> Packed:
    """Map the packed weights in a folder; pack them first if they are not there, or outdated.

    Args:
        weights: Of the model.
        folder: For these weights and this `form` alone; made if need be.
        form: `stored` or one of `FORMATS`.
    """
    packed = _mapped(weights.arch, folder)
    if packed is not None:
        return packed
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK).open("wb") as lock:  # others wait, and find it done
            fcntl.flock(lock, fcntl.LOCK_EX)
            packed = _mapped(weights.arch, folder)
            if packed is None:
                _pack(weights, folder, form)
                packed = _mapped(weights.arch, folder)
    except OSError as error:
        size = sum(map(math.prod, weights.arch.tensor_shapes().values())) * 9 // 8
        raise UsageError(
            f"the weights cannot be packed into the cache: {error.strerror}. It needs at most "
            f"{size / 2**20:,.0f} MiB in {cache_dir()}; ATTENDING_CACHE names another folder."
        ) from None
    if packed is None:
        raise CheckpointError(f"{folder.name}: the packed weights cannot be read back.")
    return packed


def _pack(weights: Weights, folder: Path, form: str) -> None:
    """Write under another name, then the index that makes the file count."""
    draft = folder / f"{FILE}.tmp"  # of one that was killed: written over
    try:
        with draft.open("wb") as file:
            index = _write(file, weights, form)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    index["written_ns"] = draft.stat().st_mtime_ns  # another's hand shows
    draft.replace(folder / FILE)
    write_json(folder / INDEX, index)


def _mapped(arch: Architecture, folder: Path) -> Packed | None:
    """None if there is nothing whole of this version."""
    try:
        index = json.loads((folder / INDEX).read_text("utf-8"))
        data = np.asarray(np.memmap(folder / FILE, np.uint8, "r"))
        written = (folder / FILE).stat().st_mtime_ns
        known = (VERSION, len(data), written)
        if (index["version"], index["bytes"], index["written_ns"]) != known:
            return None

        def part(at: int, size: int) -> NDArray[np.uint8]:
            if not 0 <= at <= at + size <= len(data):  # the kernel would read beyond the file
                raise ValueError(f"bytes {at} to {at + size} of {len(data)}")
            return data[at : at + size]

        def floats(place: list[int] | None) -> Floats | None:
            return None if place is None else part(place[0], 4 * place[1]).view(np.float32)

        matrices = {
            name: Matrix(**facts, data=part(*place), bias=floats(bias))
            for name, (facts, place, bias) in index["matrices"].items()
        }
        vectors = {name: cast(Floats, floats(place)) for name, place in index["vectors"].items()}
        return Packed(arch, {"weights": index["weights"]}, matrices, vectors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(file: IO[bytes], weights: Weights, form: str) -> dict[str, Any]:
    """The bytes of all matrices and vectors, one matrix in memory at a time; the index of them."""
    at, kinds = 0, set()

    def put(array: NDArray[Any]) -> list[int]:
        nonlocal at
        start = -(-at // ALIGN) * ALIGN
        file.write(bytes(start - at))
        file.write(np.ascontiguousarray(array).data)
        at = start + array.nbytes
        return [start, array.nbytes]

    def vector(values: Floats) -> list[int]:
        start, size = put(padded_floats(values.astype(np.float32)))
        return [start, size // 4]

    vectors = {}
    for name in _vectors(weights.arch):
        values = weights.read(name)
        _require_finite(name, values)
        vectors[name] = vector(values)
    matrices: dict[str, list[Any]] = {}
    for name, parts in _matrices(weights.arch).items():
        found = [_stored_or_rounded(weights, part, form) for part in parts]
        if name.endswith("gate_up"):
            pair = _alike(found)
            body = np.stack([tiles(part) for part in pair], axis=1)
            body = body.reshape(-1, *body.shape[2:])
            outputs, one = 2 * -(-pair[0].values.shape[0] // TILE) * TILE, pair[0]
        else:
            one = _joined(_alike(found))
            body, outputs = tiles(one), one.values.shape[0]
        kinds.add(f"int{one.bits} in groups of {group_of(one)}")
        facts = {
            "outputs": outputs,
            "inputs": one.values.shape[1],
            "bits": one.bits,
            "group": group_of(one),
            "has_minimum": one.minimum is not None,
        }
        bias = _bias(weights, name, parts)
        matrices[name] = [facts, put(body), None if bias is None else vector(bias)]
    words = " and ".join(sorted(kinds))
    return {
        "version": VERSION,
        "weights": words,
        "vectors": vectors,
        "matrices": matrices,
        "bytes": at,
    }


def _vectors(arch: Architecture) -> list[str]:
    """Tensors that stay float32: norms and convolutions."""
    shapes = arch.tensor_shapes()
    return [name for name, shape in shapes.items() if len(shape) != 2 and not name.endswith("bias")]


def _matrices(arch: Architecture) -> dict[str, list[str]]:
    """The kernel's matrices, each with the tensors that it is made of."""
    matrices = {"embedding": ["model.embed_tokens.weight"]}
    for spec in arch.layers:
        at = f"model.layers.{spec.index}"
        qkv = ["W_pack"] if arch.is_m1 else ["q_proj", "k_proj", "v_proj"]
        matrices[f"{spec.index}.qkv"] = [f"{at}.self_attn.{name}.weight" for name in qkv]
        matrices[f"{spec.index}.out"] = [f"{at}.self_attn.o_proj.weight"]
        matrices[f"{spec.index}.gate_up"] = [f"{at}.mlp.{n}_proj.weight" for n in ("gate", "up")]
        matrices[f"{spec.index}.down"] = [f"{at}.mlp.down_proj.weight"]
    if not arch.tied:
        matrices["head"] = ["lm_head.weight"]
    return matrices


def _stored_or_rounded(weights: Weights, name: str, form: str) -> Blocks:
    outside = name in OUTSIDE
    is_norm_head = name == "lm_head.weight" and weights.arch.norm_head
    stored = weights.blocks(name) if form == "stored" and not is_norm_head else None
    if stored is not None:
        for halves in (stored.scale, stored.minimum):
            _require_finite(name, halves)
        return stored
    values = weights.read(name)
    _require_finite(name, values)
    if is_norm_head:  # rows of unit length, as the decoder's NormHead has them
        values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    bits, group, symmetric = FORMATS["w8" if outside or form == "stored" else form]
    # Else a model that was rounded before and then tuned a little would be served as it was before.
    return quantise(values, bits, group, symmetric=symmetric, is_spread=bits == 8)


def _require_finite(name: str, values: NDArray[Any] | None) -> None:
    if values is not None and not np.isfinite(values).all():
        raise CheckpointError(
            f"{name} holds values that are no numbers: the weights are damaged. Get them again."
        )


def _alike(parts: Sequence[Blocks]) -> list[Blocks]:
    """The same bits, kind and groups in all parts of a matrix, without changing any weight."""
    unit = min(map(group_of, parts))
    parts = [_in_groups(part, unit) for part in parts]
    if len({(part.bits, part.minimum is None) for part in parts}) == 1:
        return parts
    return [
        part._replace(bits=8, minimum=_half(part.scale.astype(np.float32) * -(1 << part.bits - 1)))
        if part.minimum is None
        else part._replace(bits=8)
        for part in parts
    ]


def _in_groups(part: Blocks, unit: int) -> Blocks:
    """Smaller groups, that is the same scales several times."""
    times, count = group_of(part) // unit, -(-part.values.shape[1] // unit)
    halves = [part.scale] if part.minimum is None else [part.scale, part.minimum]
    finer = [np.repeat(half, times, 1)[:, :count] for half in halves]
    return part._replace(scale=finer[0], minimum=None if part.minimum is None else finer[1])


def _joined(parts: Sequence[Blocks]) -> Blocks:
    """Outputs one below the other."""
    first, minima = parts[0], [part.minimum for part in parts if part.minimum is not None]
    return Blocks(
        first.bits,
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.scale for part in parts]),
        np.concatenate(minima) if minima else None,
    )


def _bias(weights: Weights, name: str, parts: Sequence[str]) -> Floats | None:
    """[outputs], in the order of the matrix' rows."""
    names = [part.removesuffix("weight") + "bias" for part in parts]
    if names[0] not in weights.arch.tensor_shapes():
        return None
    values = [weights.read(each) for each in names]
    if not name.endswith("gate_up"):
        return np.concatenate(values)
    return np.stack(
        [padded_floats(each, TILE).reshape(-1, TILE) for each in values], axis=1
    ).reshape(-1)


def padded_floats(values: Floats, multiple: int = 128) -> Floats:
    """Flat, with zeros to a multiple, as the kernel reads it."""
    flat = values.reshape(-1)
    return np.pad(flat, (0, -len(flat) % multiple))


def _half(values: NDArray[Any]) -> NDArray[np.float16]:
    limit = np.finfo(np.float16).max
    halves: NDArray[np.float16] = np.clip(values, -limit, limit).astype(np.float16)
    return halves
