"""Checkpoints in and out: safetensors (one file or sharded) and GGUF in, safetensors out.

Loading is strict: a tensor that is missing, left over or of another shape is an error that lists
them all. There is no partial load, and no format that can run code.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from attending.artifact import write_json
from attending.chat import Tokenizer
from attending.errors import CheckpointError
from attending.model.architecture import Architecture, parse_config
from attending.model.decoder import Decoder
from attending.model.files import INDEX, SINGLE, first, gguf_in, read_config, weight_files
from attending.model.gguf_file import open_gguf
from attending.model.gguf_tokenizer import tokenizer_config, tokenizer_json

# Tables that old exports stored although they follow from the configuration.
DERIVED = (".rotary_emb.inv_freq",)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model's architecture and its tensors by official name, each read when asked for."""

    arch: Architecture
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    """Name -> tensor on the CPU, in the dtype stored (GGUF: dequantised to float32)."""
    tokenizer: Callable[[], Tokenizer]
    """Reads the tokenizer; not before it is called, since weights do not need one."""
    stored: str
    """What most weights are stored as: a dtype, or a GGUF type such as Q4_1."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model folder or a GGUF file; reads headers only.

    Raises:
        CheckpointError: No weights, a damaged header, or tensors that do not fit `config.json`.
    """
    gguf = gguf_in(path)
    if gguf is not None:
        checkpoint = _open_gguf(gguf)
    else:
        checkpoint = _open_safetensors(path, read_config(path))
    _require_exact(checkpoint, path.name)
    return checkpoint


def load_decoder(
    checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: str = "cpu"
) -> Decoder:
    """Build the decoder and fill it; peak memory is the model itself and one tensor.

    Args:
        checkpoint: From `open_checkpoint`.
        dtype: None keeps what is stored, except on the CPU: float32, since half-precision products
            are slower there.
        device: Where the weights go.
    """
    kept = getattr(torch, checkpoint.arch.dtype)
    dtype = dtype or (torch.float32 if device == "cpu" else kept)
    with torch.device("meta"):
        decoder = Decoder(checkpoint.arch)
    names = list(checkpoint.arch.tensor_shapes())

    def convert(name: str) -> Tensor:
        return checkpoint.read(name).to(device=device, dtype=dtype)

    # Dequantising releases the lock, so a second thread nearly halves the time of a GGUF.
    with ThreadPoolExecutor(max_workers=2) as threads:
        weights = dict(zip(names, threads.map(convert, names), strict=True))
    decoder.load_state_dict(weights, strict=True, assign=True)
    return decoder.requires_grad_(False).eval()


def save_model(
    folder: Path,
    arch: Architecture,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    generation: Mapping[str, Any],
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write what makes a Hugging Face model folder: configurations, tokenizer, template, weights.

    Args:
        folder: An existing folder.
        arch: Its dtype becomes that of the tensors.
        tensors: Official name -> tensor.
        tokenizer: With its chat template, if it has one.
        generation: What `generation_config.json` holds.
        max_shard_bytes: As in `save_weights`.
    """
    stored = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_json(folder / "config.json", replace(arch, dtype=stored).to_config())
    write_json(folder / "tokenizer.json", tokenizer.definition)
    config = {k: v for k, v in tokenizer.config.items() if k != "chat_template"}
    write_json(folder / "tokenizer_config.json", config)
    if tokenizer.template:
        (folder / "chat_template.jinja").write_text(tokenizer.template, encoding="utf-8")
    write_json(folder / "generation_config.json", generation)
    save_weights(tensors, folder, max_shard_bytes)


def save_weights(
    tensors: Mapping[str, Tensor], folder: Path, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write `model.safetensors`, or shards with their index, in the order given.

    Args:
        tensors: Official name -> tensor.
        folder: An existing folder.
        max_shard_bytes: A shard ends before it would pass this; a larger tensor gets its own.
    """
    shards = list(_shards(tensors, max_shard_bytes))
    total = len(shards)
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = SINGLE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        part = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # the library's own choice is for its user alone
        where |= dict.fromkeys(names, file)
    if total > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _open_gguf(path: Path) -> Checkpoint:
    file = open_gguf(path)

    def read(name: str) -> Tensor:
        return torch.from_numpy(file.read(name))

    def tokenizer() -> Tokenizer:
        return Tokenizer(tokenizer_json(file.metadata), tokenizer_config(file.metadata))

    return Checkpoint(parse_config(file.hf_config()), file.shapes, read, tokenizer, file.stored)


def _open_safetensors(folder: Path, arch: Architecture) -> Checkpoint:
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        try:
            with safetensors.safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118  (a handle, not a mapping)
                    where[name] = file
                    shapes[name] = tuple(handle.get_slice(name).get_shape())
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file.name} is damaged or incomplete ({error}); get it again."
            ) from None

    def read(name: str) -> Tensor:
        with safetensors.safe_open(where[name], framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(name)
            return tensor

    derived = [name for name in shapes if name.endswith(DERIVED)]
    kept = {name: shape for name, shape in shapes.items() if name not in derived}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    # Some exports store a tied head a second time; that is harmless only if it is the same.
    if (
        arch.tied
        and head in kept
        and embedding in kept
        and torch.equal(read(head), read(embedding))
    ):
        del kept[head]
    return Checkpoint(arch, kept, read, lambda: Tokenizer.from_folder(folder), arch.dtype)


def _require_exact(checkpoint: Checkpoint, name: str) -> None:
    expected, found = checkpoint.arch.tensor_shapes(), checkpoint.shapes
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
        raise CheckpointError(
            f"{name}: the tensors do not fit its configuration "
            f"({checkpoint.arch.family}, {len(expected)} tensors). {'; '.join(problems)}."
        )


def _shards(tensors: Mapping[str, Tensor], limit: int) -> Iterable[list[str]]:
    shard: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor.nbytes
    yield shard
