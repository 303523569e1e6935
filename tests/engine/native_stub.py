"""Stands in for the native runner where only the choice of it is tested: noise for logits."""

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from attending.config import Config
from attending.engine.native.pack import FORMATS
from attending.engine.runner import Span
from attending.model.architecture import Architecture
from attending.model.checkpoint import Checkpoint

ROOM = "attending.engine.native"


class NativeOptions(Config):
    weights: Literal["stored", "w8", "w4-32", "w4-64", "w4-128", "w4s-128"] = "stored"
    activations: Literal["int8", "float32"] = "int8"
    kv: Literal["float16", "int8"] = "float16"
    threads: int | None = None


class NativeRunner:
    def __init__(
        self,
        packed: Checkpoint,
        num_pages: tuple[int, ...],
        options: NativeOptions,
        features: Sequence[int] = (),
    ) -> None:
        self.arch, self.num_pages, self.options = packed.arch, num_pages, options
        self.path = {"weights": options.weights, "activations": options.activations}

    def step(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        count = sum(span.num_logits for span in spans)
        return np.random.default_rng(0).standard_normal((count, self.arch.vocab_size), np.float32)


def open_packed(checkpoint: Checkpoint, folder: Path, form: str) -> Checkpoint:
    assert folder.name == form
    folder.mkdir(parents=True, exist_ok=True)
    return checkpoint


def modules(reason: str | None = None) -> dict[str, Any]:
    """For `sys.modules`; `reason`: why the native runner cannot serve."""
    names = ("", ".runner", ".pack")
    room, runner, pack = (types.ModuleType(ROOM + name) for name in names)

    def obstacle(arch: Architecture) -> str | None:
        return reason

    vars(runner).update(NativeOptions=NativeOptions, NativeRunner=NativeRunner, obstacle=obstacle)
    vars(pack).update(open_packed=open_packed, FORMATS=FORMATS)
    return {module.__name__: module for module in (room, runner, pack)}


def install() -> None:
    """In a process of its own."""
    sys.modules.update(modules())
