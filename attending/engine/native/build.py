"""The kernel library that suits this processor: built by the installer, or at first use."""

import contextlib
import ctypes
import functools
import logging
from typing import NamedTuple

from attending.engine.native.compiler import (
    IS_X86,
    PATHS,
    SOURCE,
    NotCompiled,
    compile_path,
    file_name,
)
from attending.errors import UsageError
from attending.sources import cache_dir

log = logging.getLogger(__name__)


class Status(NamedTuple):
    """Whether the kernel can be used here."""

    path: str | None
    """The instruction path that it runs on; None: there is no kernel."""
    reason: str


@functools.cache
def library(path: str | None = None, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The kernel for an instruction path, by default this processor's best.

    Raises:
        UsageError: It was not built and cannot be; the message says what is missing.
    """
    chosen = path or best_path()
    name, cache = file_name(chosen, flags), cache_dir() / "kernel"
    for file in (SOURCE.with_name(name), cache / name):  # the installer's, and ours
        with contextlib.suppress(OSError):  # not there, damaged, or of another system
            return declared(ctypes.CDLL(str(file)))
        if file.parent == cache:
            file.unlink(missing_ok=True)
    log.warning("compiling the native engine for %s, once: about half a minute", chosen)
    try:
        return declared(ctypes.CDLL(str(compile_path(chosen, cache, flags))))
    except (NotCompiled, OSError) as error:
        raise UsageError(f"there is no native engine: {error}.") from None


def declared(kernel: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions."""
    kernel.attending_open.restype = ctypes.c_void_p
    kernel.attending_step.argtypes = [ctypes.c_void_p] * 4
    kernel.attending_propose.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int32, ctypes.c_void_p]
    kernel.attending_close.argtypes = [ctypes.c_void_p]
    kernel.attending_ceiling.restype = ctypes.c_double
    return kernel


@functools.cache
def best_path() -> str:
    """The best instruction path that this processor and its system have."""
    return list(PATHS)[library("portable").attending_best_path()] if IS_X86 else "portable"


@functools.cache
def status() -> Status:
    """The path, or why there is none; looked for once."""
    try:
        path = best_path()
        library(path)
    except UsageError as error:
        return Status(None, str(error))
    return Status(path, f"the native engine runs on {path}")


def ceilings(threads: int) -> dict[str, float]:
    """What this processor's arithmetic can do at most, measured; empty without a kernel."""
    if status().path is None:
        return {}
    kernel = library()
    names = ("int8_gop_s", "float32_gflop_s")
    return {n: round(kernel.attending_ceiling(i, threads), 1) for i, n in enumerate(names)}
