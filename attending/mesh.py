"""Where a run stands: its place among torchrun's processes, and the machine under it.

Imports no torch. The facts go into `run.json`; what a system does not tell is None, never a guess.
"""

import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from subprocess import getoutput
from typing import NamedTuple, cast

from attending.errors import UsageError

SIMD = re.compile(r"\b(avx2|avx512f|avx512_vnni|avx512_bf16|amx_\w+|neon)\b")
FILES = ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us", "memory.max", "memory.limit_in_bytes")

# For a process' environment before torch is loaded. OpenMP's threads spin while they wait; where
# two processes that do so share few cores, each starves the other. Alone a short spin costs about
# a tenth of a step (benchmarks/threads.md).
SHORT_SPIN = {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "1"}


class World(NamedTuple):
    """This process among all of them: 0 <= local_rank <= rank < size."""

    rank: int
    local_rank: int
    size: int


def world(environ: Mapping[str, str] = os.environ) -> World:
    """What torchrun set, or a world of one; raises UsageError if partly set or impossible."""
    told = {name: environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if set(told.values()) == {None}:
        return World(rank=0, local_rank=0, size=1)
    place = World(*(int(text) if text and text.isdecimal() else -1 for text in told.values()))
    if not 0 <= place.local_rank <= place.rank < place.size:
        raise UsageError(f"{told}: want LOCAL_RANK <= RANK < WORLD_SIZE; use torchrun or unset all")
    return place


def hardware(root: Path = Path("/")) -> dict[str, object]:
    """The machine as this process may use it; `root` is where Linux's files are read."""
    cpu = _read(root, "proc/cpuinfo") or getoutput("sysctl machdep.cpu hw.optional.neon 2>&-")
    cores = {p.read_text() for p in root.glob("sys/devices/system/cpu/*/topology/thread_siblings")}
    masks = re.findall(r"Cpus_allowed:\s*(\S+)", _read(root, "proc/self/status"))
    allowed = int(masks[0].replace(",", ""), 16).bit_count() if masks else os.cpu_count() or 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cuda = sys.modules.get("torch.cuda")  # asked only where torch is already loaded
    return {
        "platform": platform.platform(terse=True),
        "cpu": (re.findall(r"(?:model name|brand_string)\s*:\s*(.+)", cpu) or [None])[0],
        "physical_cores": len(cores) or (allowed if sys.platform == "darwin" else None),  # no SMT
        "available_cores": max(1, int(min([allowed, *_limits(root, "cpu")]))),
        "memory_bytes": int(min([memory, *_limits(root, "memory")])),
        "simd": sorted(set(SIMD.findall(cpu.replace("asimd", "neon")))),
        "gpus": [cuda.get_device_name(i) for i in range(cuda.device_count())] if cuda else [],
    }


def multiplies_bfloat16(root: Path = Path("/")) -> bool:
    """Whether the CPU has instructions for it: without, torch takes many times float32's time."""
    simd = cast(list[str], hardware(root)["simd"])
    return bool({"amx_bf16", "avx512_bf16"} & {*simd})


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that new work may take without swapping, caches of files included; where told."""
    told = re.search(r"MemAvailable:\s+(\d+) kB", _read(root, "proc/meminfo"))
    return int(min([int(told[1]) * 1024, *_limits(root, "memory")])) if told else None


def _limits(root: Path, controller: str) -> Iterator[float]:
    files = [name for name in FILES if name.startswith(controller)]
    for names, group in re.findall(r"\d+:(.*?):/(.*)", _read(root, "proc/self/cgroup")):
        if not names or controller in names.split(","):  # version 2 names none
            own = root / "sys/fs/cgroup" / (controller if names else "") / group
            for folder in (own, *own.parents):  # the group's limits and those of all above it
                for limit, per in re.findall(r"^(\d+)(?: (\d+))?", _read(folder, *files)):
                    yield int(limit) / int(per or 1)


def _read(folder: Path, *names: str) -> str:
    return " ".join(p.read_text().strip() for p in map(folder.joinpath, names) if p.is_file())
