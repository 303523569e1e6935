"""What tests of the native engine share: its paths here, and weights of small random models."""

import ctypes
import os
from collections.abc import Callable
from typing import Any

from attending.engine.native import build, compiler, pack
from attending.model.decoder import Decoder
from attending.model.gguf_file import Blocks
from tests.engine.serving import CONFIG
from tests.model.tiny import build as build_model

FLAGS = tuple(os.environ.get("KERNEL_TEST_FLAGS", "").split())  # sanitizers, see test_sanitized
PATHS = list(compiler.PATHS)[: list(compiler.PATHS).index(build.best_path()) + 1]
PATHS = PATHS[-1:] if FLAGS else PATHS


def examples(count: int) -> int:
    """How many a property takes; under the sanitizers, which are slow, a sixth."""
    return count // 6 if FLAGS else count


def kernel(path: str | None = None) -> ctypes.CDLL:
    """The library for a path, by default the best one."""
    return build.library(path or build.best_path(), FLAGS)


class Trained:
    """A decoder's weights, as `pack.Weights` wants them."""

    def __init__(self, decoder: Decoder) -> None:
        self.arch = decoder.arch
        self._state = decoder.state_dict()
        self.blocks: Callable[[str], Blocks | None] = lambda name: None

    def read(self, name: str) -> pack.Floats:
        values: pack.Floats = self._state[name].float().numpy()
        return values


def random_model(family: str, seed: int = 0, **config: Any) -> Decoder:
    return build_model({**CONFIG, "model_type": family, **config}, seed=seed)


def dequantised(decoder: Decoder, form: str) -> None:
    """Give a decoder the weights that the kernel computes with."""
    import torch

    weights = Trained(decoder)
    for parts in pack._matrices(decoder.arch).values():
        for name in parts:
            values = pack.dequantise(pack._stored_or_rounded(weights, name, form))
            decoder.get_parameter(name).data.copy_(torch.from_numpy(values))
