"""What tests of the native engine share: its paths here, and weights of small random models."""

from collections.abc import Callable
from typing import Any

import numpy as np

from attending.engine.native import build, compiler, pack
from attending.model.decoder import Decoder
from tests.engine.serving import CONFIG
from tests.model.tiny import build as build_model

PATHS = list(compiler.PATHS)[: list(compiler.PATHS).index(build.best_path()) + 1]


class Trained:
    """A decoder's weights, as `pack.Weights` wants them."""

    def __init__(self, decoder: Decoder) -> None:
        self.arch = decoder.arch
        self._state = decoder.state_dict()
        self.blocks: Callable[[str], pack.Integers | None] = lambda name: None

    def read(self, name: str) -> pack.Floats:
        values: pack.Floats = self._state[name].float().numpy()
        return values


def random_model(family: str, seed: int = 0, **config: Any) -> Decoder:
    return build_model({**CONFIG, "model_type": family, **config}, seed=seed)


def dequantised(packed: pack.Packed, decoder: Decoder, form: str) -> None:
    """Give a decoder the weights that the kernel computes with."""
    import torch

    weights = Trained(decoder)
    for parts in pack._matrices(packed.arch).values():
        for name in parts:
            values = torch.from_numpy(np.ascontiguousarray(pack.dequantise(pack._integers(weights, name, form))))
            decoder.get_parameter(name).data.copy_(values)
