"""A checkpoint as torch holds it: decoders filled from one, models written as one."""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from attending.artifact import write_json
from attending.chat import Tokenizer
from attending.model.architecture import Architecture
from attending.model.checkpoint import BFLOAT16, Checkpoint
from attending.model.decoder import Decoder
from attending.model.files import INDEX, SINGLE


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """On the CPU, in the dtype stored, without a copy (GGUF: dequantised to float32)."""
    values = checkpoint.raw(name)
    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if values.dtype == BFLOAT16 else tensor


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
        return read_tensor(checkpoint, name).to(device=device, dtype=dtype)

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
