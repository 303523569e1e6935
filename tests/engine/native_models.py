"""What tests of the native engine share: its paths here, and weights of small random models."""

import ctypes
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from attending.engine.native import build, compiler, pack
from attending.model.decoder import Decoder
from attending.model.gguf_file import Blocks
from tests.engine.serving import CONFIG
from tests.model.tiny import build as build_model

FLAGS = tuple(os.environ.get("KERNEL_TEST_FLAGS", "").split())  # sanitizers, see test_sanitized
PATHS = list(compiler.PATHS)[: list(compiler.PATHS).index(build.best_path()) + 1]


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


def round_activations(decoder: Decoder) -> None:
    """Every product of a decoder on activations that are rounded as the kernel does it."""
    import torch

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(round_rows(x.numpy()))

    for module in decoder.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    if decoder.arch.tied:
        plain = decoder.logits
        decoder.logits = lambda hidden: plain(rounded(hidden))  # type: ignore[method-assign]


def round_rows(x: pack.Floats) -> pack.Floats:
    """[rows, K] in int8 with a scale for each 32."""
    cut = np.pad(x, ((0, 0), (0, -x.shape[1] % 32))).reshape(len(x), -1, 32)
    peak = np.abs(cut).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), peak, out=np.zeros_like(peak), where=peak > 0)
    values: pack.Floats = np.rint(cut * inverse) * (peak / np.float32(127))
    return values.reshape(len(x), -1)[:, : x.shape[1]]
