"""One process or many: process group, FSDP2 per block, recomputation, compilation.

A world of one is not wrapped at all. Under torchrun each block is a unit of FSDP2 whose weights,
gradients and optimizer state are cut among the ranks; embedding, last norm and head are one more.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from attending.mesh import World, world
from attending.model.architecture import Architecture, LayerSpec
from attending.model.attend import Packed
from attending.model.decoder import Attend, Decoder
from attending.train.recipe import ComputeConfig

PATIENCE = timedelta(hours=12)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc
TRIM_THRESHOLD, MMAP_MAX = 2**17, 2**16  # its defaults
Fill = Callable[[str, Tensor], object]


@contextmanager
def process_group(precision: str) -> Iterator[tuple[World, torch.device]]:
    """This process's place and device; joins torchrun's others for as long as it lasts.

    A single process forms a group of its own only where FSDP must cast its weights to bfloat16.
    """
    place = world()
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", place.local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if on_cuda else "gloo"
    is_group = place.size > 1 or precision == "bfloat16"
    if place.size > 1:
        # Rank 0 may prepare data, or wait for answers, for long while the others wait.
        dist.init_process_group(backend, timeout=PATIENCE)
    elif is_group:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        with nullcontext() if on_cuda else _freed_memory_is_kept():
            yield place, device
    finally:
        if is_group:
            dist.destroy_process_group()


@contextmanager
def _freed_memory_is_kept() -> Iterator[None]:
    """Have glibc hand freed activations out again instead of giving them back to the system.

    Else every large tensor begins with the system's zeroing of its pages: a sixth of a step. At the
    end all is given back: what follows may be an engine, or another training beside this one.
    """
    libc = ctypes.CDLL(None)
    if sys.platform != "linux" or not hasattr(libc, "mallopt"):  # musl has none
        yield
        return
    libc.mallopt(M_TRIM_THRESHOLD, -1)
    libc.mallopt(M_MMAP_MAX, 0)
    try:
        yield
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
        libc.mallopt(M_MMAP_MAX, MMAP_MAX)
        libc.malloc_trim(ctypes.c_size_t(0))


def build(
    arch: Architecture,
    fill: Fill,
    place: World,
    device: torch.device,
    compute: ComputeConfig,
    adapt: Callable[[Decoder], object] | None = None,
) -> Decoder:
    """A decoder ready for training; no rank ever holds more than its share and one block.

    Args:
        arch: What to build.
        fill: Called with each weight's official name and its storage on the CPU.
        place: Among all ranks.
        device: Of this rank.
        compute: Precision (with bfloat16 the weights that are updated stay float32), recomputation,
            compilation.
        adapt: Changes the decoder while it is empty, as `lora.add` does.
    """
    if compute.compile:
        from torch._dynamo import config as dynamo  # seconds that only this choice should pay

        # Else a block that meets too many shapes is run uncompiled, and nothing says so.
        dynamo.fail_on_recompile_limit_hit = True
    with torch.device("meta"):
        decoder = Decoder(arch)
    if adapt:
        adapt(decoder)
    is_sharded = dist.is_initialized()
    mesh = init_device_mesh(device.type, (place.size,)) if is_sharded else None
    half = torch.bfloat16 if compute.precision == "bfloat16" else None
    policy = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
    )
    dtype = torch.float64 if compute.precision == "float64" else torch.float32
    names = {module: name for name, module in decoder.named_modules()}
    blocks = list(decoder.model.layers)
    for unit in [*blocks, decoder]:
        for module in unit.modules():
            for name, empty in list(module.named_parameters(recurse=False)):
                if empty.is_meta:
                    weight = torch.empty(empty.shape)
                    fill(f"{names[module]}.{name}", weight)
                    weight = weight.to(device, dtype)
                    setattr(module, name, nn.Parameter(weight, requires_grad=empty.requires_grad))
        if unit is not decoder:
            if compute.recompute:
                unit.forward = _recomputed(unit.forward)
            if compute.compile:
                unit.compile(dynamic=False)
        if is_sharded:
            fully_shard(unit, mesh=mesh, mp_policy=policy)
    if is_sharded:
        register_fsdp_forward_method(decoder, "measure")
    return decoder


@torch.no_grad()
def interpolate(decoder: Decoder, fill: Fill, share: float) -> None:
    """Bring weights back to `share` of the way from where `fill` has them; every rank calls it.

    start + share x (trained - start), the weight-space ensemble of WiSE-FT (arXiv 2109.01903).
    """
    for name, weight in decoder.named_parameters():
        start = torch.empty(weight.shape)
        fill(name, start)
        start = start.to(weight.device, weight.dtype)
        if isinstance(weight, DTensor):
            start = distribute_tensor(start, weight.device_mesh, weight.placements)
        weight.lerp_(start, 1 - share)


def total(values: Tensor) -> Tensor:
    """The sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gathered(value: Any) -> list[Any]:
    """What every rank has, by rank; of plain values."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def attend_to(lengths: Sequence[int], device: torch.device, is_compiled: bool) -> Attend:
    """Segments side by side; behind a wall that the compiler does not look through, if it looks."""
    packed = Packed(lengths, device=device)
    return Opaque(packed) if is_compiled else packed


class Opaque:
    """An `attend` for compiled blocks: its segments differ from batch to batch."""

    def __init__(self, attend: Packed) -> None:
        self.positions = attend.positions
        self.previous = attend.previous
        self._attend = torch.compiler.disable(attend.__call__)  # type: ignore[no-untyped-call]

    def __call__(self, spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `Packed`'s."""
        out: Tensor = self._attend(spec, q, k, v)
        return out


def is_compiled(decoder: Decoder) -> bool:
    """Whether `build` was told to compile its blocks."""
    return any(block._compiled_call_impl is not None for block in decoder.model.layers)


@contextmanager
def uncompiled(decoder: Decoder) -> Iterator[None]:
    """For batches of any length: as each would be compiled anew, nothing is."""
    if not is_compiled(decoder):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def whole_weights(decoder: Decoder) -> dict[str, Tensor]:
    """Official name -> tensor on the CPU; complete on rank 0, empty elsewhere."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    found = get_model_state_dict(decoder, options=options)
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs: object) -> Tensor:
        out: Tensor = checkpoint(forward, *inputs, use_reentrant=False)
        return out

    return run
