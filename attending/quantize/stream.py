"""A model block by block: what quantising and its gate read, one block in memory at a time.

Shapes: S samples of L tokens, D hidden size, V vocabulary.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the field's name for it)

from attending.errors import CheckpointError, UsageError
from attending.model.architecture import Architecture, LayerSpec
from attending.model.decoder import Block, RMSNorm, Rotation, rotation, vocabulary_norms
from attending.model.quantized import LINEAR, Scheme
from attending.model.rope import inverse_frequencies
from attending.quantize import kv
from attending.quantize.export import REMEDY, Form, shape_fault

HEAD = "lm_head"
EMBEDDING = "model.embed_tokens.weight"
STAGES: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj", "W_pack"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)
"""Linear layers of a block that read the same inputs, in the order in which they run."""
Shapes = dict[str, tuple[int, int]]


def stage_of(name: str) -> int:
    """Of a linear layer, its place in `STAGES`; the head comes behind them."""
    last = name.rpartition(".")[2]
    return next((at for at, names in enumerate(STAGES) if last in names), len(STAGES))


def matched(arch: Architecture, pattern: str, head: bool, scheme: Scheme, form: Form) -> Shapes:
    """Name -> [outputs, inputs] of the layers that are to be quantised.

    Args:
        arch: Of the model whose weights are rounded.
        pattern: A regular expression of whole names within the blocks.
        head: The output head, too.
        scheme: Of all of them.
        form: What must hold them.

    Raises:
        UsageError: The pattern matches none or is none, the head is tied, or widths do not fit.
    """
    shapes = {name.removesuffix(".weight"): shape for name, shape in arch.tensor_shapes().items()}
    linears = {n: (s[0], s[1]) for n, s in shapes.items() if LINEAR.fullmatch(n) and n != HEAD}
    try:
        found = {n: s for n, s in linears.items() if re.fullmatch(pattern, n)}
    except re.error as error:
        raise UsageError(f"layers={pattern!r} is no regular expression: {error}.") from None
    if not found:
        raise UsageError(
            f"layers={pattern!r} matches none of the {len(linears)} linear layers, such as "
            f"{next(iter(linears))}: nothing would be quantised. It must match whole names."
        )
    if form == "qqq" and len(found) < len(linears):
        raise UsageError(
            f"layers={pattern!r} matches {len(found)} of {len(linears)} linear layers, and qqq "
            "quantises all: leave layers as it is, or take form=compressed-tensors."
        )
    if head:
        if arch.tied:
            raise UsageError("the head is the embedding (tied), which stays float: head=false.")
        found[HEAD] = (arch.vocab_size, arch.hidden_size)
    faults = [fault for n, s in found.items() if (fault := shape_fault(n, scheme, *s, form))]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UsageError(f"{'; '.join(faults[:3])}{more}. {REMEDY}")
    return found


class Stream:
    """A model whose tensors are read when they are needed, and computed with in float32."""

    def __init__(
        self,
        arch: Architecture,
        read: Callable[[str], Tensor],
        *,
        batch: int = 8,
        device: str = "cpu",
        cache: kv.Cache = "float16",
        rounds_activations: bool = False,
        seen: Callable[[LayerSpec, Tensor, Tensor], object] = lambda *_: None,
    ) -> None:
        """Nothing is read yet.

        Args:
            arch: Of the tensors.
            read: One of them by its official name.
            batch: Samples of a forward pass.
            device: Of products.
            cache: What keys and values are rounded to.
            rounds_activations: Of linear layers in the blocks, to int8 by token, as QQQ does.
            seen: Shown the keys and values of every layer.
        """
        self.arch, self.batch, self.device = arch, batch, device
        self._cache, self._rounds = cache, rounds_activations
        self._read, self._seen = read, seen
        self._places: dict[tuple[int, int], tuple[dict[int, Rotation], kv.Rounded]] = {}
        self._frequencies = {
            spec.head_dim: torch.from_numpy(inverse_frequencies(arch.rope, spec.head_dim))
            for spec in arch.layers
        }

    def tensor(self, name: str) -> Tensor:
        """One tensor in float32, on the device; see `stored`."""
        return self.stored(name).to(self.device, torch.float32)

    def stored(self, name: str) -> Tensor:
        """One tensor as it is stored.

        Raises:
            CheckpointError: It holds NaN or infinity.
        """
        values = self._read(name)
        if not values.isfinite().all():
            raise CheckpointError(
                f"{name} holds values that are no numbers: the model is damaged, or its training "
                "went wrong. Get it again, or go back to a state before."
            )
        return values

    def empty(self, index: int) -> Block:
        """One block without storage, to be lent its weights."""
        with torch.device("meta"):
            return Block(self.arch, self.arch.layers[index])

    def block(self, index: int) -> Block:
        """One block, filled."""
        block = self.empty(index)
        at = f"model.layers.{index}."
        weights = {name: self.tensor(at + name) for name in block.state_dict()}
        block.load_state_dict(weights, assign=True)
        if self._rounds:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_pre_hook(_in_eight_bits)
        return block.requires_grad_(False).eval()

    def forward(self, block: Block) -> Callable[[Tensor], Tensor]:
        """What a block makes of [S, L, D]; each sample is one segment."""

        def run(x: Tensor) -> Tensor:
            rotations, attend = self._place(len(x), x.shape[1])
            out: Tensor = block(x.flatten(0, 1), rotations, attend)
            return out.reshape(x.shape)

        return run

    @torch.no_grad()
    def step(self, block: Block, x: Tensor) -> None:
        """Put a block's outputs in the place of its inputs [S, L, D], some samples at a time."""
        forward = self.forward(block)
        for part in torch.split(x, self.batch):  # views
            part.copy_(forward(part.to(self.device)))

    def embed(self, ids: Tensor, weight: Tensor | None = None) -> Tensor:
        """[S, L] -> [S, L, D], in the CPU's memory; of another embedding, if one is given."""
        return F.embedding(ids, self.stored(EMBEDDING) if weight is None else weight).float()

    @torch.no_grad()
    def last(self, x: Tensor) -> Tensor:
        """What the head reads: the outputs of the last block, normed in place."""
        norm = RMSNorm(self.arch.hidden_size, self.arch.norm_eps)
        norm.load_state_dict({"weight": self.tensor("model.norm.weight")}, assign=True)
        for part in torch.split(x, self.batch):
            part.copy_(norm(part.to(self.device)))
        return x

    def head(self, weight: Tensor | None = None) -> Tensor:
        """[V, D], as `Decoder.head_weight`; of another weight, if one is given."""
        if weight is None:
            weight = self.tensor(EMBEDDING if self.arch.tied else f"{HEAD}.weight")
        weight = weight.to(self.device, torch.float32)
        return weight / vocabulary_norms(weight)[:, None] if self.arch.norm_head else weight

    def hidden(self, ids: Tensor, done: Callable[[int], object] = lambda _: None) -> Tensor:
        """[S, L] -> [S, L, D] through the whole model."""
        x = self.embed(ids)
        for index in range(len(self.arch.layers)):
            self.step(self.block(index), x)
            done(index + 1)
        return self.last(x)

    def _place(self, samples: int, length: int) -> tuple[dict[int, Rotation], kv.Rounded]:
        if (samples, length) not in self._places:
            attend = kv.Rounded([length] * samples, self._cache, self.device, self._seen)
            factor = self.arch.rope.attention_factor
            rotations = {
                size: rotation(attend.positions, frequencies, factor)
                for size, frequencies in self._frequencies.items()
            }
            self._places[samples, length] = rotations, attend
        return self._places[samples, length]


def _in_eight_bits(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
    return (kv.int8(given[0]).dequantise().to(given[0].dtype),)
