"""What on this machine would make the engine slow or fail, and the remedy, before anyone waits.

Speeds called measured were measured here, by numpy; everything else is read from the system.
Imports no torch; names no host, user or path.
"""

import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from attending import mesh
from attending.engine.loading import TORCH_FACTOR
from attending.engine.plan import gib, read_bytes, weight_bytes
from attending.model.architecture import Architecture

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
BUFFER_BYTES = 512 * 2**20  # larger than the last cache of nearly every processor
LOW_DISK_BYTES = 10 * 2**30
# Bits of a weight: the layout in `plan`, and how often its bytes.
LAYOUTS = {
    "32 bits": ("16-bit", 2.0),
    "16 bits": ("16-bit", 1.0),
    "8 bits": ("16-bit", 0.5),
    "4 bits": ("GPTQ", 1.0),
}
Level = Literal["ok", "slow", "missing"]
# What is downloaded or computed, the usual one first, and the remedy where only the other fits.
STORED = (("16 bits", "4 bits"), "Take a GGUF file of it in 4 bits, or free some.")
NATIVE = (("8 bits", "4 bits"), "Give --weights w4-64, or free some.")
TORCH = (("32 bits", "16 bits"), "Give --dtype bfloat16, or free some.")


class Finding(NamedTuple):
    """One sentence: good as it is, slower than it could be, or something that will fail."""

    level: Level
    text: str


@dataclass(frozen=True, slots=True)
class Report:
    """The facts; `findings` says what follows from them."""

    versions: dict[str, str | None]
    """None: not installed."""
    hardware: dict[str, object]
    native_path: str | None
    """The native kernel's instructions: avx512-vnni, avx2 or portable; None: there is none."""
    native_reason: str
    """Why there is none."""
    thread_variables: dict[str, str]
    free_memory_bytes: int | None
    free_disk_bytes: int
    """Where models are kept."""
    measured_read_gb_s: dict[int, float]
    """By threads."""
    weight_bytes: dict[str, int]
    """Of the model asked for, by bits of a weight; empty without one."""
    read_bytes: dict[str, int]
    """The part of them that is read for each token."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return asdict(self) | {"findings": [item._asdict() for item in self.findings]}

    @property
    def findings(self) -> Iterator[Finding]:
        """Plain sentences, from the fields alone."""
        for name in (name for name, version in self.versions.items() if version is None):
            wanted = (
                "-e '.[train]' in the clone, to train, score or use a GPU"
                if name == "torch"
                else name
            )
            level: Level = "ok" if name == "torch" and self.native_path else "missing"
            yield Finding(level, f"{name} is not installed. Remedy: pip install {wanted}.")
        simd, cores = cast(list[str], self.hardware["simd"]), max(self.measured_read_gb_s)
        if "avx2" not in simd and "neon" not in simd:
            yield Finding("slow", "No AVX2 or NEON: expect slow arithmetic (not measured).")
        if self.native_path:
            level = "slow" if self.native_path == "portable" else "ok"
            yield Finding(level, f"Native kernel: {self.native_path}.")
        elif self.versions["torch"] is None:
            text = f"No native kernel and no torch: nothing computes here. {self.native_reason}"
            yield Finding("missing", text)
        else:
            slow = f"torch computes, about {TORCH_FACTOR} times slower"
            yield Finding("slow", f"No native kernel, so {slow}: {self.native_reason}")
            if not {"neon", "amx_bf16", "avx512_bf16"} & {*simd}:
                text = "No AMX or AVX512-BF16: expect slow bfloat16 (not measured); use float32."
                yield Finding("slow", text)
        # A thread a core is as good, where a core counts as two.
        physical = min(cores, cast(int | None, self.hardware["physical_cores"]) or cores)
        for name, value in self.thread_variables.items():
            if value not in (str(cores), str(physical)):
                yield Finding("slow", f"{name}={value}, but {cores} cores are available: unset it.")
        speeds = " and ".join(f"{gb_s} GB/s on {n}" for n, gb_s in self.measured_read_gb_s.items())
        yield Finding("ok", f"Memory reads, measured: {speeds} of {cores} cores.")
        if not self.weight_bytes:
            text = f"Free disk where models are kept: {gib(self.free_disk_bytes)}."
            yield Finding("ok" if self.free_disk_bytes >= LOW_DISK_BYTES else "slow", text)
            return
        computed = NATIVE if self.native_path else TORCH
        uses = [("disk, to download", self.free_disk_bytes, STORED)]
        if self.free_memory_bytes is not None:
            uses.append(("memory", self.free_memory_bytes, computed))
        for use, free, (layouts, remedy) in uses:
            sizes = {bits: self.weight_bytes[bits] for bits in layouts}
            fits = sum(size < free for size in sizes.values())
            level, text = (
                ("missing", "Free some, or take a smaller model."),
                ("slow", remedy),
                ("ok", ""),
            )[fits]
            told = ", ".join(f"{gib(size)} in {bits}" for bits, size in sizes.items())
            yield Finding(level, f"Free {use}: {gib(free)}; weights: {told}. {text}".strip())
        best = max(self.measured_read_gb_s.values()) * 1e9
        most = ", ".join(f"{best / self.read_bytes[n]:,.1f} in {n}" for n in computed[0])
        yield Finding("ok", f"Tokens/s at most, by measured reads: {most}. A cache may do better.")


def examine(model: Architecture | None, cache_dir: Path) -> Report:
    """Look at this machine, for a model if given; `cache_dir` holds models and may not exist."""
    from attending.engine.native.build import status

    hardware, native = mesh.hardware(), status()
    memory, cores = cast(int, hardware["memory_bytes"]), cast(int, hardware["available_cores"])
    available = mesh.free_memory()
    buffer = np.ones(min(BUFFER_BYTES, (available or memory) // 4) // 8, dtype=np.uint64)
    folder = next(path for path in (cache_dir, *cache_dir.absolute().parents) if path.exists())
    return Report(
        versions=_versions(),
        hardware=hardware,
        native_path=native.path,
        native_reason=native.reason,
        thread_variables={k: v for k, v in os.environ.items() if k in THREAD_VARIABLES},
        free_memory_bytes=available,
        free_disk_bytes=shutil.disk_usage(folder).free,
        measured_read_gb_s={count: measure_read(buffer, count) for count in sorted({1, cores})},
        weight_bytes={
            bits: int(times * weight_bytes(model, layout).total())
            for bits, (layout, times) in LAYOUTS.items()
            if model
        },
        read_bytes={
            bits: int(times * read_bytes(model, layout))
            for bits, (layout, times) in LAYOUTS.items()
            if model
        },
    )


def table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Headers, and the facts as text."""
    facts: dict[str, Any] = report.versions | report.hardware | report.thread_variables
    facts |= {
        n: getattr(report, n) for n in ("native_path", "free_memory_bytes", "free_disk_bytes")
    }
    rows = []
    for name, value in ((n, v) for n, v in facts.items() if v):
        text = ", ".join(value) if isinstance(value, list) else str(value)
        rows.append([name, gib(value) if name.endswith("_bytes") else text])
    return ["fact", "value"], rows


def measure_read(buffer: np.ndarray[Any, np.dtype[np.uint64]], threads: int) -> float:
    """Measured GB/s of reading a touched buffer once; the best of three passes."""
    parts, seconds = np.array_split(buffer, threads), []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):
            start = time.perf_counter()
            list(pool.map(np.add.reduce, parts))
            seconds.append(time.perf_counter() - start)
    return round(buffer.nbytes / min(seconds) / 1e9, 1)


def _versions() -> dict[str, str | None]:
    found = {item.name.lower().replace("_", "-"): item for item in metadata.distributions()}
    needs = found["attending"].requires or [] if "attending" in found else []
    names = [re.split(r"[^\w.-]", need)[0] for need in needs if "extra ==" not in need]
    wanted = ["attending", *(name.lower().replace("_", "-") for name in names), "torch"]
    versions = {name: found[name].version if name in found else None for name in wanted}
    return {"python": platform.python_version(), **versions}
