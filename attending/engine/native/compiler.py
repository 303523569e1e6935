"""Compiles the kernel, once for each instruction path; standard library only, for the installer.

A system compiler does it, or the one in the package `ziglang`. No `-march=native`: what is built
on one machine runs on another, which loads the best path that it has.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import util
from pathlib import Path

SOURCE = Path(__file__).with_name("kernel.cpp")
FLAGS = (
    "-std=c++20",
    "-O3",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-pthread",
    "-Wno-psabi",
)
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = tuple(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni"))
# Worst first: `attending_best_path` counts them so.
PATHS: dict[str, tuple[str, ...]] = {"portable": (), "avx2": AVX2, "avx512-vnni": AVX2 + AVX512}
STRIP = () if sys.platform == "darwin" else ("-s",)
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


class NotCompiled(Exception):  # noqa: N818  (for a person: why, and the remedy)
    """There is no compiler, or it failed."""


def file_name(path: str, flags: Sequence[str] = ()) -> str:
    """Of the library; another source, machine or flag gives another."""
    options = (*FLAGS, *STRIP, *PATHS[path], *flags, platform.machine(), sys.platform)
    key = hashlib.sha256(SOURCE.read_bytes() + repr(options).encode()).hexdigest()[:16]
    return f"kernel-{path}-{key}.so"


def compile_path(path: str, folder: Path, flags: Sequence[str] = ()) -> Path:
    """The library for an instruction path in a folder; compiled if it is not there.

    Raises:
        NotCompiled: No compiler, or it failed.
    """
    target = folder / file_name(path, flags)
    if target.exists():
        return target
    command = _compiler()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            draft = Path(place) / target.name
            _run([*command, *FLAGS, *STRIP, *PATHS[path], *flags, str(SOURCE), "-o", str(draft)])
            with draft.open("rb") as written:
                os.fsync(written.fileno())
            draft.replace(target)  # another process may have been faster: the same bytes
    except OSError as error:
        raise NotCompiled(f"it cannot be written to {folder}: {error.strerror}") from None
    return target


def compile_all(folder: Path) -> None:
    """Every path that this kind of processor may have, in place of those of another source.

    Raises:
        NotCompiled: No compiler, or it failed.
    """
    paths = list(PATHS) if IS_X86 else ["portable"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = list(pool.map(lambda path: compile_path(path, folder), reversed(paths)))
    for old in {*folder.glob("kernel-*.so")} - {*built}:
        old.unlink(missing_ok=True)


def _compiler() -> list[str]:
    if named := os.environ.get("CXX"):
        return named.split()
    if found := next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None):
        return [found]
    if util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise NotCompiled("no C++ compiler was found; install g++ or clang, or pip install ziglang")


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotCompiled(f"{command[0]} cannot be started: {error.strerror}; see CXX") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        message = lines[0].replace(str(SOURCE), SOURCE.name).strip()[:200]
        raise NotCompiled(f"{command[0]} failed ({message}); it needs C++20, as g++ 11 has")


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]) if sys.argv[1:] else SOURCE.parent)
