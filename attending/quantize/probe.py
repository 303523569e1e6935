"""The overflow probe: the largest activations of each layer and block, and which formats hold them.

Where activations pass float16's range, a model that is served in it answers nonsense; Qwen2.5-32B's
`layers.5.mlp.down_proj` is known as such a trap. Measured on the float model in float32.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from attending.model.architecture import LayerSpec
from attending.model.decoder import Block
from attending.quantize import kv

HALF_MAX = 65504.0
"""The largest finite float16."""


class Peak(NamedTuple):
    """Largest magnitudes."""

    inputs: float
    outputs: float

    @property
    def holds(self) -> bool:
        """Whether float16 does."""
        return max(self) <= HALF_MAX


class Probe:
    """Watches blocks while they run; the same block may run many times."""

    def __init__(self) -> None:
        """Nothing is seen yet."""
        self.layers: dict[str, Peak] = {}
        """Of linear layers."""
        self.blocks: dict[str, Peak] = {}
        """Of what goes from block to block, and from a block's attention to its MLP."""
        self.caches: dict[str, float] = {}
        """By layer, the largest static scale that one of its heads' keys or values needs in FP8; up
        to 1, Baichuan-M2's static scale of 1.0 cuts nothing off."""
        self._is_watching = False

    @contextmanager
    def watching(self, block: Block, index: int) -> Iterator[None]:
        """A block and every linear layer of it, until the end of the `with`."""
        at = f"model.layers.{index}."
        note, own = self._note, at.removesuffix(".")
        modules = [(at + n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear)]
        hooks = [one.register_forward_hook(note(self.layers, name)) for name, one in modules]
        for one in (block, block.post_attention_layernorm):  # sums that no layer gives by itself
            hooks.append(one.register_forward_hook(note(self.blocks, own)))
        self._is_watching = True
        try:
            yield
        finally:
            self._is_watching = False
            for hook in hooks:
                hook.remove()

    def seen(self, spec: LayerSpec, k: Tensor, v: Tensor) -> None:
        """Keys and values [T, K, H] as they are cached."""
        if self._is_watching:
            name = f"model.layers.{spec.index}"
            need = max(float(kv.head_scales(x, kv.E4M3_MAX).max()) for x in (k, v))
            self.caches[name] = max(need, self.caches.get(name, 0.0))

    def lines(self, most: int = 3) -> list[str]:
        """The largest layers and block, and the verdict."""
        found, over = [], list[str]()
        for peaks, shown in ((self.layers, most), (self.blocks, 1)):
            largest = sorted(peaks.items(), key=lambda item: -max(item[1]))
            found += [
                f"{name}: largest input {peak.inputs:,.1f}, output {peak.outputs:,.1f}"
                for name, peak in largest[:shown]
            ]
            over += [name for name, peak in largest if not peak.holds]
        told = f"float16 (up to {HALF_MAX:,.0f}) "
        if over:
            told += (
                f"does not hold {len(over)} layers or blocks, {over[0]} first: serve it in bfloat16"
            )
        else:
            told += "holds every layer's and block's inputs and outputs"
        need = max(self.caches.values(), default=0.0)
        held = "cuts nothing off" if need <= 1 else f"is too small: {need:.2f} is needed"
        return [*found, told, f"keys and values in FP8: a static scale of 1.0 {held}"]

    def report(self) -> Mapping[str, object]:
        """For `overflow.json`."""
        layers, blocks = (
            {name: peak._asdict() | {"holds": peak.holds} for name, peak in peaks.items()}
            for peaks in (self.layers, self.blocks)
        )
        scales = {"fp8_scales": self.caches}
        return {"float16_max": HALF_MAX, "layers": layers, "blocks": blocks} | scales

    @staticmethod
    def _note(
        peaks: dict[str, Peak], name: str
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            before = peaks.get(name, Peak(0.0, 0.0))
            found = (float(x.abs().max()) for x in (given[0], output))
            peaks[name] = Peak(*map(max, zip(before, found, strict=True)))

        return hook
