"""A GGUF file read as if it were a Hugging Face model folder: configuration and tensors.

The `gguf` package dequantises. The header is parsed here, because its reader takes seconds for a
vocabulary, and because no length in a damaged file may be believed before it has met a bound.
"""

import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from attending.config import suggest
from attending.errors import CheckpointError
from attending.model import gguf_tokenizer
from attending.model.architecture import parse_config
from attending.model.gguf_tokenizer import TABLES, Json, Metadata, get

Scalar = TypeVar("Scalar", bound=np.generic)
STRING, ARRAY = 8, 9
CODES = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
SIZE = struct.Struct("<Q").unpack_from
NUMBERS = {kind: np.dtype(f"<{code}") for kind, code in CODES.items()}
MAX_HEADER_BYTES, MAX_ITEMS = 1 << 26, 1 << 20  # several times the largest vocabulary's
CHUNK_VALUES = 1 << 18  # dequantised at once: temporaries stay in the cache, twice as fast
PART_NAME = re.compile(r"(.+-)\d{5}(-of-(\d{5})\.gguf)")
LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.")
ROPE_FACTORS = "rope_freqs.weight"
SCALE, MINIMUM = ("scale", "<f2"), ("minimum", "<f2")
BLOCKS: dict[GGMLQuantizationType, tuple[int, list[Any]]] = {
    GGMLQuantizationType.Q4_0: (4, [SCALE, ("values", "u1", 16)]),
    GGMLQuantizationType.Q4_1: (4, [SCALE, MINIMUM, ("values", "u1", 16)]),
    GGMLQuantizationType.Q8_0: (8, [SCALE, ("values", "u1", 32)]),
}
EXPECTED = "expected a whole GGUF of version 2 or 3, little-endian: download it again"


class Blocks(NamedTuple):
    """A quantised matrix exactly as stored: weight = scale * value + minimum, in blocks of 32."""

    bits: int
    """4 or 8."""
    values: NDArray[np.uint8]
    """[N, K]: 0 to 15, or 0 to 255 (Q8_0's signed values plus 128)."""
    scale: NDArray[np.float16]
    """[N, K / 32]."""
    minimum: NDArray[np.float16] | None
    """[N, K / 32]; None is symmetric: -8 scales in 4 bits, -128 in 8."""


class Tensor(NamedTuple):
    """One tensor where it lies in the file: rows first, bytes not yet read."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open file, its tensors by Hugging Face name; safe to use from several threads."""

    metadata: Metadata
    config: Json
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, Tensor]

    @property
    def stored(self) -> str:
        """The type that holds most bytes."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            sizes[tensor.kind.name] += tensor.data.nbytes
        return max(sizes, key=sizes.__getitem__)

    def hf_config(self) -> Json:
        """The contents of `config.json`."""
        return dict(self.config)

    def read(self, name: str) -> NDArray[np.float32]:
        """One tensor, dequantised into a new array; rows that GGUF permutes are put back in order.

        Raises:
            CheckpointError: There is no such tensor, or its type cannot be dequantised.
        """
        if name not in self.tensors:
            raise CheckpointError(f"there is no tensor {name!r}.{suggest(name, self.tensors)}")
        return self._in_order(name, _dequantised(name, self.tensors[name]))

    def blocks(self, name: str) -> Blocks | None:
        """A matrix of Q4_0, Q4_1 or Q8_0 undisturbed, its rows in order; None for any other."""
        kind, shape, data = self.tensors[name]
        if kind not in BLOCKS or len(shape) != 2:
            return None
        bits, fields = BLOCKS[kind]
        stored = data.view(np.dtype(fields)).reshape(shape[0], -1)
        raw: NDArray[np.uint8] = stored["values"]
        if bits == 4:  # a byte holds values i and i + 16
            raw = np.concatenate((raw & np.uint8(15), raw >> np.uint8(4)), axis=-1)
        values = (raw if bits == 4 else raw ^ np.uint8(128)).reshape(shape)
        minimum = self._in_order(name, stored["minimum"]) if MINIMUM in fields else None
        scale = self._in_order(name, stored["scale"])
        return Blocks(bits, self._in_order(name, values), scale, minimum)

    def _in_order(self, name: str, rows: NDArray[Scalar]) -> NDArray[Scalar]:
        permuted = TABLES["architectures"][self.config["model_type"]]["permuted"]
        if LAYER_NAME.sub("", name).rpartition(".")[0] not in permuted:
            return np.ascontiguousarray(rows)
        pairs = rows.reshape(-1, self.config["head_dim"] // 2, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)


def open_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file, or a split one by any of its parts; reads headers only.

    Raises:
        CheckpointError: The file is damaged or incomplete, or its model is not implemented.
    """
    metadata, found = _read_parts(path)
    arch, known = get(metadata, "general.architecture", str), TABLES["architectures"]
    if arch not in known:
        raise CheckpointError(f"architecture {arch!r} is not implemented.{suggest(arch, known)}")
    config = _config(metadata, arch, found)
    shapes = parse_config(config).tensor_shapes()
    expected = {_gguf_name(name): shape for name, shape in shapes.items()}
    present = {name: tensor.shape for name, tensor in found.items() if name != ROPE_FACTORS}
    if wrong := sorted({name for name, _ in expected.items() ^ present.items()}):
        lines = [f"{k}: {present.get(k, 'absent')}, not {expected.get(k, 'known')}" for k in wrong]
        listed = "\n  ".join([f"{len(wrong)} tensors do not fit the configuration:", *lines[:20]])
        raise CheckpointError(f"{path.name}: {listed}\nConvert the model again.")
    return GGUFFile(metadata, config, shapes, {name: found[_gguf_name(name)] for name in shapes})


def part_files(path: Path) -> list[Path]:
    """All parts of a split file, by the name of one, whether they are there or not."""
    match = PART_NAME.fullmatch(path.name)
    count = int(match[3]) if match else 0
    names = (f"{match[1]}{n:05d}{match[2]}" for n in range(1, count + 1)) if match else ()
    return [path.with_name(name) for name in names] or [path]


def _gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    layer, stem = LAYER_NAME.match(stem), TABLES["tensors"][LAYER_NAME.sub("", stem)]
    return f"blk.{layer[1]}.{stem}.{suffix}" if layer else f"{stem}.{suffix}"


def _dequantised(name: str, tensor: Tensor) -> NDArray[np.float32]:
    kind, (block_values, block_bytes) = tensor.kind, GGML_QUANT_SIZES[tensor.kind]
    blocks = tensor.data.reshape(-1, block_bytes)
    values = np.empty((len(blocks), block_values), np.float32)
    step = CHUNK_VALUES // block_values
    try:
        for at in range(0, len(blocks), step):
            chunk = dequantize(blocks[at : at + step].reshape(1, -1), kind)
            values[at : at + step] = chunk.reshape(-1, block_values)
    except NotImplementedError:
        raise CheckpointError(f"{name}: cannot dequantise {kind.name}; use another file.") from None
    return values.reshape(tensor.shape)


def _config(metadata: Metadata, arch: str, tensors: Mapping[str, Tensor]) -> Json:
    """The contents of `config.json`; a key that would change the arithmetic unseen is an error."""
    facts, embedding = TABLES["architectures"][arch], tensors.get("token_embd.weight")
    own = {k.removeprefix(f"{arch}."): v for k, v in metadata.items() if k.startswith(f"{arch}.")}
    sizes = {name: get(own, key, int) for name, key in TABLES["sizes"].items()}
    # More layers than tensors cannot be right; the comparison of tensors will say so.
    sizes["num_hidden_layers"] = min(sizes["num_hidden_layers"], len(tensors))
    heads = sizes["num_attention_heads"]
    head_dim = get(own, "attention.key_length", int, sizes["hidden_size"] // max(heads, 1))
    same = dict.fromkeys(("attention.value_length", "rope.dimension_count"), head_dim)
    neutral = TABLES["neutral"] | facts["neutral"] | same
    if changed := {k: own[k] for k in own.keys() & neutral.keys() if own[k] != neutral[k]}:
        raise CheckpointError(f"{arch} is implemented for {neutral} only, not {changed!s:.200}.")
    config = {
        "architectures": [facts["class"]],
        "model_type": arch,
        "vocab_size": embedding.shape[0] if embedding else 1,
        **sizes,
        "num_key_value_heads": get(own, "attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "rms_norm_eps": get(own, "attention.layer_norm_rms_epsilon", float),
        "rope_parameters": _rope(own, head_dim, tensors.get(ROPE_FACTORS)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float32",
    }
    config |= {k: any(re.search(v, n) for n in tensors) for k, v in facts["biases"].items()}
    if window := get(own, "attention.sliding_window", int, 0):
        config |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 0}
    if "tokenizer.ggml.tokens" in metadata:
        _, _, special, ends = gguf_tokenizer.read_vocabulary(metadata)
        config |= {"bos_token_id": special.get("bos"), "eos_token_id": ends or None}
    return config


def _rope(own: Metadata, head_dim: int, factors: Tensor | None) -> Json:
    """`rope_parameters`: scaled as the keys say, or by Llama 3's rule if the factors obey it."""
    kind = get(own, "rope.scaling.type", str, "none" if factors is None else "llama3")
    theta, known = get(own, "rope.freq_base", float, 10_000.0), TABLES["rope"]
    given = {k for k in own if k.startswith("rope.scaling.")} - {*TABLES["rope_ignored"]["keys"]}
    if kind not in known or given - known[kind].keys() or (kind == "llama3") != bool(factors):
        raise CheckpointError(f"rope scaling {kind!r} by {sorted(given)} is not one of {known}.")
    rope: Json = {"rope_theta": theta, "rope_type": "default" if kind == "none" else kind}
    rope |= {known[kind][k]: get(own, k, int if "length" in k else float) for k in given}
    if not factors:
        return rope
    rule, values = TABLES["llama3_rule"], _dequantised(ROPE_FACTORS, factors)
    low, high, context = rule.values()
    if factors.shape == (head_dim // 2,):
        waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
        share = np.clip((context / waves - low) / (high - low), 0, 1)
        if np.allclose(values * ((1 - share) / values.max() + share), 1, rtol=1e-5, atol=0):
            return {**rope, **rule, "factor": float(values.max())}
    raise CheckpointError(f"{ROPE_FACTORS} is not of Llama 3's rule, {rule}; use another model.")


def _read_parts(path: Path) -> tuple[Metadata, dict[str, Tensor]]:
    """The keys of the first part and the tensors of all; most files are a part alone."""
    paths = part_files(path)
    if missing := [part.name for part in paths if not part.is_file()]:
        raise CheckpointError(f"{len(missing)} of {len(paths)} files are missing: {missing[:9]}.")
    parts = []
    for part in paths:
        try:
            parts.append(_parse(np.asarray(np.memmap(part, np.uint8, "r"))))
        except ValueError as error:
            raise CheckpointError(f"{part.name}: {error}; {EXPECTED}.") from None
    metadata, total = parts[0][0], sum(len(tensors) for _, tensors in parts)
    tensors = {name: tensor for _, some in parts for name, tensor in some.items()}
    if not len(tensors) == total == get(metadata, "split.tensors.count", int, total):
        raise CheckpointError(f"the parts of {path.name} do not belong together; {EXPECTED}.")
    return metadata, tensors


def _parse(data: NDArray[np.uint8]) -> tuple[Json, dict[str, Tensor]]:
    header = _Header(data)
    magic, version = bytes(header.take(4)), header.number(4)
    tensor_count, key_count = header.number(8), header.number(8)
    if magic != b"GGUF" or version not in (2, 3) or max(tensor_count, key_count) > MAX_ITEMS:
        raise ValueError(f"{magic!r}, version {version}, {tensor_count} tensors, {key_count} keys")
    metadata: Json = {}
    for _ in range(key_count):
        key, kind = header.string(), header.number(4)
        if key in metadata:
            raise ValueError(f"key {key} occurs twice")
        if kind == ARRAY:
            metadata[key] = header.values(header.number(4), header.number(8))
        else:
            metadata[key] = header.values(kind, 1)[0]
    infos = []
    for _ in range(tensor_count):
        name, rank = header.string(), header.number(4)
        if not 1 <= rank <= 4:
            raise ValueError(f"tensor {name} has {rank} dimensions")
        shape = tuple(header.number(8) for _ in range(rank))[::-1]
        infos.append((name, shape, GGMLQuantizationType(header.number(4)), header.number(8)))
    align = get(metadata, "general.alignment", int, 32)
    if align < 8 or align & (align - 1):
        raise ValueError(f"the alignment is {align}")
    base, tensors = -(-header.at // align) * align, {}
    for name, shape, kind, offset in infos:
        block_values, block_bytes = GGML_QUANT_SIZES[kind]
        start, size = base + offset, math.prod(shape) // block_values * block_bytes
        if name in tensors or 0 in shape or shape[-1] % block_values or offset % align:
            raise ValueError(f"tensor {name} {shape} occurs twice, is empty, or breaks a block")
        if start + size > len(data):
            raise ValueError(f"tensor {name} ends at byte {start + size} of {len(data)}")
        tensors[name] = Tensor(kind, shape, data[start : start + size])
    return metadata, tensors


class _Header:
    """Reads front to back; raises ValueError where it would pass the end."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.view, self.at = data.data[:MAX_HEADER_BYTES], 0

    def take(self, size: int) -> memoryview:
        self.at += size
        if self.at > len(self.view):
            raise ValueError(f"the header ends before byte {self.at}")
        return self.view[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """A vocabulary and its merges are a hundred thousand: no call for each."""
        view, at, found = self.view, self.at, []
        try:
            for _ in range(count):
                (size,) = SIZE(view, at)
                at += 8 + size
                found.append(str(view[at - size : at], "utf-8"))
        except (struct.error, OverflowError, IndexError):  # past the end
            at += 8
        self.take(at - self.at)
        return found

    def values(self, kind: int, count: int) -> list[str] | tuple[Any, ...]:
        if count > MAX_ITEMS or kind not in (STRING, *NUMBERS):
            raise ValueError(f"a key has {count} values of type {kind}")
        if kind == STRING:
            return self.strings(count)
        dtype = NUMBERS[kind]
        return tuple(np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist())
