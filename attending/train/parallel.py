"""One process or many: process group, FSDP2 per block, recomputation, compilation.

A world of one is not wrapped at all. Under torchrun each block is a unit of FSDP2 whose weights,
gradients and optimizer state are cut among the ranks; embedding, last norm and head are one more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.checkpoint import checkpoint

from attending.mesh import World, world
from attending.model.architecture import Architecture, LayerSpec
from attending.model.attend import Packed
from attending.model.decoder import Decoder
from attending.train.recipe import ComputeConfig

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
    if place.size > 1:
        dist.init_process_group(backend)
    elif precision == "bfloat16":
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    else:
        yield place, device
        return
    try:
        yield place, device
    finally:
        dist.destroy_process_group()


def build(
    arch: Architecture,
    fill: Fill,
    place: World,
    device: torch.device,
    compute: ComputeConfig,
) -> Decoder:
    """A decoder ready for training; no rank ever holds more than its share and one block.

    Args:
        arch: What to build.
        fill: Called with each weight's official name and its storage on the CPU.
        place: Among all ranks.
        device: Of this rank.
        compute: Precision (with bfloat16 the weights that are updated stay float32), recomputation,
            compilation.
    """
    with torch.device("meta"):
        decoder = Decoder(arch)
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
                    setattr(module, name, nn.Parameter(weight.to(device, dtype)))
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


def total(values: Tensor) -> Tensor:
    """The sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


class Opaque:
    """An `attend` that the compiler does not look into: its segments differ from batch to batch."""

    def __init__(self, attend: Packed) -> None:
        self.positions = attend.positions
        self.previous = attend.previous
        self._attend = torch.compiler.disable(attend.__call__)  # type: ignore[no-untyped-call]

    def __call__(self, spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `Packed`'s."""
        out: Tensor = self._attend(spec, q, k, v)
        return out


def _recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs: object) -> Tensor:
        out: Tensor = checkpoint(forward, *inputs, use_reentrant=False)
        return out

    return run
