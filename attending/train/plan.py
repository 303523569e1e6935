"""What training takes, by arithmetic: operations, memory of a rank, time."""

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from attending.model.architecture import Architecture
from attending.model.scoring import CHUNK
from attending.train.recipe import AssumedConfig, BatchConfig, ComputeConfig

GIB, DAY = 2**30, 86_400


class Stretch(NamedTuple):
    """Steps of one context."""

    name: str
    steps: int
    context: int


class Beside(NamedTuple):
    """What a stage computes besides the model that it trains."""

    models: int = 0
    """Frozen ones in memory."""
    forwards: float = 0.0
    """Through them, for each token that is trained on."""


class Memory(NamedTuple):
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    """Blocks that are whole for a moment: this one and the next, and the head's unit."""
    activations: int
    head: int
    """Logits of a chunk and their gradients; what is made of the head's weight in the meantime."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def flops(arch: Architecture, lengths: Sequence[int], adapter: int | None = None) -> float:
    """Of forward and backward over segments: six a matrix weight and token, and attention.

    Under an adapter of so many weights the others are frozen: four, as they have no gradient.

    The embedding is looked up, not multiplied. A token of a full layer sees what is before it in
    its segment, of a windowed layer at most its window. Norms, rotations and the like are left out.
    """
    matrices = sum(math.prod(shape) for shape in _matrices(arch))
    seen = {spec.window: _pairs(lengths, spec.window) for spec in arch.layers}
    attention = sum(2 * s.num_heads * s.head_dim * seen[s.window] for s in arch.layers)
    each = 6.0 * matrices if adapter is None else 4.0 * matrices + 6.0 * adapter
    return each * sum(lengths) + 6.0 * attention


def _pairs(lengths: Sequence[int], window: int | None) -> int:
    """Pairs of a token and one that it sees, itself among them."""
    total = 0
    for length in lengths:
        reach = min(window or length, length)
        total += length * reach - reach * (reach - 1) // 2
    return total


def memory(
    arch: Architecture, micro: int, ranks: int, compute: ComputeConfig, adapter: int | None = None
) -> Memory:
    """Of one rank under FSDP2, with passes of `micro` tokens; `adapter` as `flops` has it."""
    weights, size = arch.num_parameters(), 2 if compute.precision == "bfloat16" else 4
    trained = weights if adapter is None else adapter
    block = max(_block_weights(arch, index) for index in range(len(arch.layers)))
    outside = weights - sum(_block_weights(arch, index) for index in range(len(arch.layers)))
    layers = len(arch.layers)
    # Whole for a moment: two blocks and the head's unit as products read them, and their
    # gradients as they are reduced.
    reduced = block + outside if adapter is None else adapter // layers
    gathered = (2 * block + outside) * size + reduced * 4 if ranks > 1 or size == 2 else 0
    per_layer = max(kept_per_token(arch, index) for index in range(len(arch.layers)))
    kept = arch.hidden_size * layers + per_layer if compute.recompute else per_layer * layers
    chunk = min(CHUNK, micro) * arch.vocab_size
    # Copies of the head: for M1's, which is also normalised, seven were measured; for others three
    # are counted: gradient, that times the loss's, what is cast; of a frozen one that alone.
    copies = (7 if arch.is_m1 else 3) if adapter is None else 1 + arch.is_m1
    return Memory(
        weights=4 * (weights + (adapter or 0)) // ranks,
        gradients=4 * trained // ranks,
        optimizer=8 * trained // ranks,
        gathered=gathered,
        activations=(kept + 3 * arch.hidden_size) * size * micro,
        head=3 * 4 * chunk + copies * 4 * arch.vocab_size * arch.hidden_size,
    )


def takes(
    arch: Architecture,
    stretches: Sequence[Stretch],
    batch: BatchConfig,
    compute: ComputeConfig,
    assumed: AssumedConfig,
    beside: Beside = Beside(),  # noqa: B008  (a tuple of numbers)
    adapter: int | None = None,
) -> dict[str, Any]:
    """For `--dry-run`: memory of a rank and time, with the arithmetic; `adapter` as `memory`'s."""
    ranks, micro = assumed.devices, batch.micro_tokens
    need = memory(arch, micro, ranks, compute, adapter)
    weights = arch.num_parameters() + (adapter or 0)
    trained = weights if adapter is None else adapter
    frozen = beside.models * 4 * arch.num_parameters() // ranks
    rate = ranks * assumed.peak_tflops * 1e12 * assumed.share_of_peak
    rows, seconds = [], 0.0
    for name, steps, context in stretches:
        per_token = flops(arch, [context], adapter) / context * (1 + beside.forwards / 3)
        tokens = steps * batch.tokens
        seconds += tokens * per_token / rate
        rows.append(
            {
                "name": name,
                "steps": steps,
                "tokens": tokens,
                "rows_per_step": batch.tokens // context,
                "flops_per_token": per_token,
                "days": round(tokens * per_token / rate / DAY, 4),
            }
        )
    gib = {f"{name}_gib": round(size / GIB, 3) for name, size in need._asdict().items()}
    gib |= {"frozen_gib": round(frozen / GIB, 3)} if beside.models else {}
    kept = "the blocks' inputs and one block's" if compute.recompute else "what blocks keep"
    return {
        "parameters": weights,
        "trained_parameters": trained,
        "stages": rows,
        "steps": sum(stretch.steps for stretch in stretches),
        "passes_per_step_and_rank": batch.tokens / (batch.micro_tokens * ranks),
        "memory_per_rank": {
            **gib,
            "total_gib": round((need.total + frozen) / GIB, 3),
            "fits": (need.total + frozen) / GIB <= assumed.memory_gib,
            "arithmetic": (
                f"weights 4 B x {weights:,}, gradients 4 B and AdamW 8 B x {trained:,} parameters "
                f"/ {ranks} ranks; gathered: two blocks and the head's unit whole, and gradients; "
                f"activations: {kept} of {micro:,} tokens; head: copies of its "
                f"weight, {CHUNK:,} tokens' logits; frozen: 4 B x parameters of each other model"
            ),
        },
        "time": {
            "days": round(seconds / DAY, 4),
            "hours": round(seconds / 3600, 3),
            "arithmetic": (
                f"tokens x FLOP per token / ({ranks} devices x {assumed.peak_tflops} TFLOP/s x "
                f"{assumed.share_of_peak} of it); each row as one document: shorter ones take less "
                "attention"
            ),
            "assumed": assumed.model_dump(),
        },
    }


def matrix_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations a second of the best of several large products on this device."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        began = time.monotonic()
        (a @ b)[0, 0].item()  # waits for a GPU, too
        best = max(best, 2 * size**3 / (time.monotonic() - began))
    return best


def _matrices(arch: Architecture) -> list[tuple[int, ...]]:
    """What every token is multiplied with."""
    shapes = arch.tensor_shapes()
    embedding = shapes.pop("model.embed_tokens.weight")
    return [s for s in shapes.values() if len(s) == 2] + ([embedding] if arch.tied else [])


def _block_weights(arch: Architecture, index: int) -> int:
    at = f"model.layers.{index}."
    shapes = [shape for name, shape in arch.tensor_shapes().items() if name.startswith(at)]
    return sum(math.prod(shape) for shape in shapes)


def kept_per_token(arch: Architecture, index: int) -> int:
    """Values that the backward pass of one block needs of each token.

    Around the attention: input, normed, its scale's product; q, k, v before and after the rotation
    (M1: and the convolution), the output. Around the MLP: input, normed, gate, its activation, up,
    their product.
    """
    spec = arch.layers[index]
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention = 3 * q + 4 * kv + (4 * kv if arch.is_m1 else 0)
    return 6 * arch.hidden_size + attention + 4 * arch.intermediate_size
