"""Which runner computes a model here, in what precision, and whether the memory suffices.

On a CPU the native one; torch's where a dtype or another device is asked for, and, after one line
that says why, where the native one cannot. Torch is imported only for torch's.
"""

import hashlib
import logging
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from numpy.typing import NDArray
from pydantic import PositiveInt

from attending import mesh
from attending.artifact import digest
from attending.config import Config
from attending.engine.runner import Shape
from attending.errors import UsageError
from attending.model.architecture import KV_CACHE, Architecture
from attending.model.checkpoint import Checkpoint
from attending.model.eagle_files import EagleConfig, open_eagle
from attending.model.files import read_json
from attending.sources import Resolved, cache_dir, resolve

if TYPE_CHECKING:
    from attending.engine.native.runner import NativeOptions, NativeRunner

log = logging.getLogger(__name__)

TORCH_FACTOR = 12
"""So many times slower is torch's runner: tokens/s of one user in float32, benchmarks/engine.md."""

DTYPES = ("float32", "bfloat16", "float16")
VALUE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
DRAFTS = resources.files("attending.engine") / "drafts"
"""Those that are shipped, a folder each."""
DEPTH, NO_DRAFT = 5, "none"
TORCH_MISSING = "torch, which is not installed: pip install -e '.[train]' in the clone"


class ComputeOptions(Config):
    """How a model is computed: `dtype` and `device` are torch's, the next three the native's."""

    dtype: str | None = None
    """Of weights and cache in torch: float32, bfloat16 or float16. None on a CPU: the native
    runner; elsewhere as stored."""
    device: str = "cpu"
    """As torch names it."""
    weights: str | None = None
    """`stored` (the default: a GGUF's own 4 or 8 bits, else 8), `w8`, `w4-32`, `w4-64`, `w4-128`:
    bits, and how many weights share a scale; with an `s`, as `w4s-64`, symmetric."""
    activations: str | None = None
    """`int8` (the default) or `float32`."""
    kv: str | None = None
    """Of keys and values in the cache: `float16` or `int8`; None: what a quantised folder's
    `attending_kv_cache` says, else float16."""
    threads: PositiveInt | None = None
    """Of the CPU; None takes every core."""
    draft: str | None = None
    """Source of a draft that speeds answers up and changes none; `none` takes none, and None the
    one that is shipped for this very model, if there is one."""
    draft_depth: PositiveInt | None = None
    """Tokens that it proposes one after the other; None: up to 5, by what was measured."""
    draft_width: PositiveInt = 1
    """Continuations of each that torch's runner tries; 1 is a chain."""
    draft_nodes: PositiveInt | None = None
    """Of a tree: the likeliest tokens that are proposed in all; None: width times depth."""

    @property
    def native(self) -> dict[str, Any]:
        """What only the native runner takes, as far as it was given."""
        names = ("weights", "activations", "kv")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def is_torch(self) -> bool:
        """Whether torch's runner was asked for."""
        return self.dtype is not None or self.device != "cpu"

    def check(self) -> None:
        """Raise a UsageError where two do not go together, or this machine lacks what is asked."""
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}.")
        cores = cast(int, mesh.hardware()["available_cores"])
        if self.threads and self.threads > cores:
            raise UsageError(f"{self.threads} threads: this machine has {cores} cores for them.")
        if self.draft_nodes and self.draft_width == 1:
            raise UsageError(f"draft_nodes {self.draft_nodes}: of a tree; give a draft_width, too.")
        if self.draft_width > 1 and not self.is_torch:
            raise UsageError(
                f"draft_width {self.draft_width}: trees are checked by torch's runner; give a "
                "dtype, as --dtype float32, or leave the width."
            )
        if self.native:
            self.native_options()
        if not self.is_torch:
            return
        if self.native:
            raise UsageError(
                f"{', '.join(self.native)} belong to the native runner, on a CPU; dtype and device "
                "to torch: give the ones or the others."
            )
        if find_spec("torch") is None:
            raise UsageError(f"dtype and device need {TORCH_MISSING}")
        import torch

        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0]
            raise UsageError(f"device {self.device!r} cannot be used: {reason}. Try cpu.") from None

    def native_options(self) -> "NativeOptions":
        """For the native runner; a ConfigError where it has no such value."""
        from attending.engine.native.runner import NativeOptions

        given = {**self.native, "threads": self.threads}
        return NativeOptions.build(given, where="what the native engine computes with")


class Draft(NamedTuple):
    """A draft that was trained for the model beside it."""

    name: str
    folder: Path
    config: EagleConfig
    tensors: dict[str, NDArray[Any]]
    shape: Shape
    """What it proposes."""


def find_draft(origin: Resolved, arch: Architecture, options: ComputeOptions) -> Draft | None:
    """The draft that was named, or the one that is shipped for this model.

    Raises:
        CheckpointError: It was trained for another model, or is damaged.
        SourceError: It is not on this machine.
        UsageError: A depth is asked for, and there is no draft.
    """
    found = _shipped(origin, arch) if options.draft is None else None
    if options.draft not in (None, NO_DRAFT):
        own = Path(str(DRAFTS)) / options.draft
        found = resolve(str(own) if (own / "config.json").is_file() else options.draft)
    if found is None:
        if options.draft_depth or options.draft_width > 1:
            raise UsageError("draft_depth or draft_width is given: there is no draft; name one.")
        return None
    config, tensors = open_eagle(found.path, arch)
    config.require_target(origin.name, origin.sha256 or digest(origin.path), arch)
    depth, width = options.draft_depth or DEPTH, options.draft_width
    nodes = 0 if width == 1 else options.draft_nodes or width * depth
    return Draft(found.name, found.path, config, tensors, Shape(depth, width, nodes))


def _shipped(origin: Resolved, arch: Architecture) -> Resolved | None:
    """The draft for these very files, by any name; sizes first, since a digest takes time."""
    for file in sorted(Path(str(DRAFTS)).glob("*/config.json")):
        told = read_json(file)
        if (told.get("hidden_size"), told.get("vocab_size")) == (arch.hidden_size, arch.vocab_size):
            sha256 = origin.sha256 or digest(origin.path)
            if told.get("target_sha256") == sha256:
                return Resolved(file.parent, str(file.parent), file.parent.name)
    return None


def is_native(arch: Architecture, options: ComputeOptions) -> bool:
    """Whether the native runner computes; a line in the log where it should and cannot.

    Raises:
        UsageError: It cannot, although its options were given or torch is not there either.
    """
    if options.is_torch:
        return False
    from attending.engine.native.runner import obstacle

    reason = obstacle(arch)
    if reason is None:
        return True
    if options.native:
        raise UsageError(f"{', '.join(options.native)} cannot be had: {reason}")
    if find_spec("torch") is None:
        raise UsageError(f"{reason} Or use {TORCH_MISSING}")
    log.warning("torch computes in float32, about %d times slower: %s", TORCH_FACTOR, reason)
    return False


def open_native(
    checkpoint: Checkpoint,
    files: Iterable[Path],
    options: ComputeOptions,
    pages: Sequence[int],
    draft: Draft | None = None,
    features: Sequence[int] = (),
) -> "NativeRunner":
    """The native runner; its weights are packed at the first time and mapped after that.

    `features`: layers whose inputs it shows, where there is no draft.
    """
    from attending.engine.native.draft import pack_draft
    from attending.engine.native.pack import open_packed
    from attending.engine.native.runner import NativeRunner

    require_memory(checkpoint, options, native=True)
    own = draft and pack_draft(draft.config, draft.tensors)
    chosen = options.replace(kv=kv_of(checkpoint.arch, options)).native_options()
    if options.kv is None and _cache_scheme(checkpoint.arch).get("type") == "float":
        log.warning("the folder asks for a cache in FP8, which this engine has not: float16 it is")
    folder = packed_folder(files)
    packed = open_packed(checkpoint, folder / chosen.weights, chosen.weights)
    for old in folder.parent.iterdir():  # of the same model, before its files changed
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    if draft is None:
        return NativeRunner(packed, pages, chosen, features=features)
    return NativeRunner(packed, pages, chosen, draft=own, shape=draft.shape)


def packed_folder(files: Iterable[Path]) -> Path:
    """Where packed weights of these files lie; another one as soon as a file has changed."""
    paths = sorted(file.resolve() for file in files)
    stats = [(file.stat().st_size, file.stat().st_mtime_ns) for file in paths]
    place, state = (hashlib.sha256(repr(fact).encode()).hexdigest() for fact in (paths, stats))
    return cache_dir() / "packed" / place[:16] / state[:16]


def weight_bytes(checkpoint: Checkpoint, options: ComputeOptions, *, native: bool) -> int:
    """Memory of the weights as they are computed; of the native runner's about."""
    arch = checkpoint.arch
    if not native:
        return arch.num_parameters() * VALUE_BYTES[torch_dtype(arch, options)]
    from attending.engine.native.pack import FORMATS

    in_four = ("Q4_0", "Q4_1", "GPTQ int4", "compressed-tensors int4")
    stored = "w4-32" if checkpoint.stored in in_four else "w8"
    chosen = options.weights if options.weights in FORMATS else stored
    total = 0.0
    for name, shape in arch.tensor_shapes().items():
        is_inside = name.startswith("model.layers.")
        bits, group, symmetric = FORMATS[chosen if is_inside else "w8"]
        width = bits + (16 if symmetric else 32) / group if len(shape) == 2 else 32
        total += math.prod(shape) * width / 8
    return int(total)


def kv_of(arch: Architecture, options: ComputeOptions) -> str:
    """Of the native runner's cache: as asked; else what a quantised folder was measured with."""
    return options.kv or str(arch.source.get(KV_CACHE, "float16"))


def _cache_scheme(arch: Architecture) -> Mapping[str, Any]:
    """As compressed-tensors says it; empty where nothing is said."""
    return (arch.source.get("quantization_config") or {}).get("kv_cache_scheme") or {}


def torch_dtype(arch: Architecture, options: ComputeOptions) -> str:
    """The name of the dtype that torch computes in."""
    return options.dtype or ("float32" if options.device == "cpu" else arch.dtype)


def require_memory(checkpoint: Checkpoint, options: ComputeOptions, *, native: bool) -> None:
    """Raise a UsageError that says how much memory is missing, as far as the system tells."""
    needed = weight_bytes(checkpoint, options, native=native)
    free = mesh.free_memory()
    if options.device.startswith("cuda"):
        import torch

        free = torch.cuda.mem_get_info(options.device)[0]
    if free is not None and needed > free:
        from attending.engine.plan import gib

        fewer = "weights in w4-128" if native else "the dtype bfloat16"
        raise UsageError(
            f"the weights need about {gib(needed)} of memory and {gib(free)} are free: "
            f"{gib(needed - free)} are missing. Free some, take {fewer} or a smaller model."
        )
