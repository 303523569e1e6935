"""One decoder for Llama, Qwen2, Qwen3 and Baichuan-M1, under the official tensor names.

The tokens of a batch lie in one flat row; which of them see which is the business of the `attend`
object (`attend.py`), so training, chunked prefill and paged decode run this same code. Operations
stay unfused: this file is the reference that faster runners are tested against.

Shapes: T tokens of all sequences, D hidden size, N heads, K key-value heads, H head size, V
vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the field's name for it)

from attending.model.architecture import Architecture, LayerSpec, Rope
from attending.model.rope import inverse_frequencies

Result = TypeVar("Result")


class Attend(Protocol):
    """Who sees whom, and where keys and values live."""

    positions: Tensor
    """[T] int64, each token's position in its own sequence."""

    def previous(self, spec: LayerSpec, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The raw K and V [T, K, H] of the token before each token; zero at a sequence's start."""

    def __call__(self, spec: LayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention: q [T, N, H], k and v [T, K, H] -> [T, N, H]."""


class Features:
    """Asks a pass for the residual stream at the input of some layers, for an EAGLE draft.

    An object and no mapping, since FSDP copies the collections that it is handed.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        """Layers from 0; one more than the last means what the last norm reads."""
        self.layers = tuple(layers)
        self._states: dict[int, Tensor] = {}

    def see(self, layer: int, x: Tensor) -> None:
        """The stream [T, D] that a layer is about to read."""
        if layer in self.layers:
            self._states[layer] = x

    def whole(self) -> Tensor:
        """Side by side in the order asked for, [T, layers * D]."""
        return torch.cat([self._states[layer] for layer in self.layers], dim=-1)


class Linear(nn.Linear):
    """Left uninitialised: weights come from a checkpoint or from `Decoder.init_weights`."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """Left uninitialised, too; torch's own way takes a second even without storage."""

    def reset_parameters(self) -> None:
        pass


class Decoder(nn.Module):
    """Token ids in, logits out. Build under `torch.device("meta")` and load, or `init_weights`."""

    def __init__(self, arch: Architecture) -> None:
        """Create the modules; weights are uninitialised until loaded or `init_weights`."""
        super().__init__()
        self.arch = arch
        self.model = Backbone(arch)
        if not arch.tied:
            head = NormHead if arch.norm_head else Linear
            self.lm_head = head(arch.hidden_size, arch.vocab_size, bias=False)

    def forward(self, ids: Tensor, attend: Attend, features: Features | None = None) -> Tensor:
        """Hidden states after the last norm: ids [T] int64 -> [T, D]."""
        hidden: Tensor = self.model(ids, attend, features)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., D] -> logits [..., V], at least float32."""
        if self.arch.tied:
            return at_least_float32(F.linear(hidden, self.model.embed_tokens.weight))
        return at_least_float32(self.lm_head(hidden))

    def head_weight(self) -> Tensor:
        """[V, D]: hidden states times its transpose are the logits."""
        if self.arch.tied:
            return self.model.embed_tokens.weight
        if not self.arch.norm_head:
            return self.lm_head.weight
        weight = self.lm_head.weight
        return (at_least_float32(weight) / vocabulary_norms(weight)[:, None]).to(weight.dtype)

    def measure(
        self,
        ids: Tensor,
        attend: Attend,
        of: Callable[[Tensor, Tensor], Result],
        features: Features | None = None,
    ) -> Result:
        """What `of` makes of the hidden states [T, D] and the head's weight [V, D].

        A loss goes through here, so that under FSDP one forward holds all it needs.
        """
        return of(self(ids, attend, features), self.head_weight())

    def set_rope_theta(self, theta: float) -> None:
        """Another base from here on, as a stage with a longer context has it."""
        rope = dataclasses.replace(self.arch.rope, theta=theta)
        self.arch = dataclasses.replace(self.arch, rope=rope)
        self.model.set_rope(rope)

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw every weight, see `init_weight`."""
        for name, weight in self.named_parameters():
            init_weight(self.arch, name, weight, generator)


@torch.no_grad()
def init_weight(
    arch: Architecture, name: str, weight: Tensor, generator: torch.Generator | None = None
) -> None:
    """Normal(0, initializer_range) matrices, unit norms, zero biases; convolution as M1 has it.

    M1's taps start as a softmax of normals: positive, summing to one per head.
    """
    if name.endswith(("conv_k", "conv_v")):
        weight.copy_(torch.randn(weight.shape, generator=generator).softmax(-1))
    elif name.endswith("bias"):
        weight.zero_()
    elif weight.dim() == 1:
        weight.fill_(1.0)
    elif name == "lm_head.weight" and arch.is_m1:
        bound = 1 / math.sqrt(arch.hidden_size)  # kaiming_uniform(a=sqrt(5))
        weight.uniform_(-bound, bound, generator=generator)
    else:
        weight.normal_(0.0, arch.initializer_range, generator=generator)


class Backbone(nn.Module):
    """Embedding, blocks, last norm: the `model.` of the official names."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.embed_tokens = Embedding(arch.vocab_size, arch.hidden_size)
        self.layers = nn.ModuleList(Block(arch, spec) for spec in arch.layers)
        self.norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.sizes = {spec.head_dim for spec in arch.layers}
        self.set_rope(arch.rope)

    def set_rope(self, rope: Rope) -> None:
        # Not buffers: casting the model must not round them, and checkpoints do not hold them.
        self.rope = rope
        self.frequencies = {
            size: torch.from_numpy(inverse_frequencies(rope, size)) for size in self.sizes
        }

    def forward(self, ids: Tensor, attend: Attend, features: Features | None = None) -> Tensor:
        rotations = {
            size: rotation(attend.positions, frequencies, self.rope.attention_factor)
            for size, frequencies in self.frequencies.items()
        }
        x = self.embed_tokens(ids)
        features = features or Features(())
        for layer, block in enumerate(self.layers):
            features.see(layer, x)
            x = block(x, rotations, attend)
        features.see(len(self.layers), x)
        hidden: Tensor = self.norm(x)
        return hidden


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, arch: Architecture, spec: LayerSpec) -> None:
        super().__init__()
        self.self_attn = (M1Attention if arch.is_m1 else Attention)(arch, spec)
        self.mlp = MLP(arch)
        self.input_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.post_attention_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps)

    def forward(self, x: Tensor, rotations: dict[int, "Rotation"], attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotations, attend)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Attention(nn.Module):
    """Grouped-query attention; Q/K/V bias (Qwen2), Q/K norm (Qwen3)."""

    def __init__(self, arch: Architecture, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec
        self.rows = spec.num_heads * spec.head_dim
        self.kv_rows = spec.num_kv_heads * spec.head_dim
        self.o_proj = Linear(self.rows, arch.hidden_size, bias=arch.out_bias)
        self.build_projections(arch)

    def build_projections(self, arch: Architecture) -> None:
        self.q_proj = Linear(arch.hidden_size, self.rows, bias=arch.qkv_bias)
        self.k_proj = Linear(arch.hidden_size, self.kv_rows, bias=arch.qkv_bias)
        self.v_proj = Linear(arch.hidden_size, self.kv_rows, bias=arch.qkv_bias)
        if arch.qk_norm:
            self.q_norm = RMSNorm(self.spec.head_dim, arch.norm_eps)
            self.k_norm = RMSNorm(self.spec.head_dim, arch.norm_eps)
        self.qk_norm = arch.qk_norm

    def project(self, x: Tensor, attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] -> q [T, N, H], k and v [T, K, H], before the rotation."""
        q, k, v = self.heads(self.q_proj(x)), self.heads(self.k_proj(x)), self.heads(self.v_proj(x))
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], -1, self.spec.head_dim)

    def forward(self, x: Tensor, rotations: dict[int, "Rotation"], attend: Attend) -> Tensor:
        out: Tensor = self.o_proj(self.mix(x, rotations, attend))
        return out

    def mix(self, x: Tensor, rotations: dict[int, "Rotation"], attend: Attend) -> Tensor:
        """x [T, D] -> what the heads found, [T, N * H]."""
        q, k, v = self.project(x, attend)
        angles = rotations[self.spec.head_dim]
        return attend(self.spec, rotate(q, angles), rotate(k, angles), v).flatten(-2)


class M1Attention(Attention):
    """Baichuan-M1: one packed projection, and a two-tap convolution over raw K and V.

    Tap 0 weighs the previous token, tap 1 this one, per key-value head (KV shifting attention,
    arXiv 2411.19574, eq. 5); then RoPE on Q and K. V is convolved but not rotated.
    """

    def build_projections(self, arch: Architecture) -> None:
        spec = self.spec
        self.W_pack = Linear(arch.hidden_size, self.rows + 2 * self.kv_rows, bias=False)
        self.has_conv = arch.conv_window > 1
        if self.has_conv:
            self.conv_k = nn.Parameter(torch.empty(1, 1, spec.num_kv_heads, 1, 2))
            self.conv_v = nn.Parameter(torch.empty(1, 1, spec.num_kv_heads, 1, 2))

    def project(self, x: Tensor, attend: Attend) -> tuple[Tensor, Tensor, Tensor]:
        packed = self.W_pack(x).split([self.rows, self.kv_rows, self.kv_rows], dim=-1)
        q, k, v = (self.heads(part) for part in packed)
        if not self.has_conv:
            return q, k, v
        k_before, v_before = attend.previous(self.spec, k, v)
        return q, two_taps(k_before, k, self.conv_k), two_taps(v_before, v, self.conv_v)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        hidden, inner, bias = arch.hidden_size, arch.intermediate_size, arch.mlp_bias
        self.gate_proj = Linear(hidden, inner, bias=bias)
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019), rounded before the weight as Llama does."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype in (torch.float32, torch.float64):  # nothing to round
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = at_least_float32(x)
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        out: Tensor = self.weight * scaled.to(x.dtype)
        return out


class NormHead(Linear):
    """M1's output head: every vocabulary row at unit length, no scale and no bias.

    The stored rows are not normalised. Dividing each logit by its row's norm is the same product,
    without a second copy of a vocabulary-sized matrix.
    """

    _frozen_norms: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        return at_least_float32(F.linear(hidden, self.weight)) / self.row_norms()

    def row_norms(self) -> Tensor:
        """[V]; part of the graph in training, computed once per state of the weight otherwise."""
        if torch.is_grad_enabled():
            return vocabulary_norms(self.weight)
        state = (self.weight.data_ptr(), self.weight._version)
        if self._frozen_norms is None or self._frozen_norms[0] != state:
            self._frozen_norms = (state, vocabulary_norms(self.weight))
        return self._frozen_norms[1]


Rotation = tuple[Tensor, Tensor]


def vocabulary_norms(weight: Tensor) -> Tensor:
    """L2 norm of each row [V, D] -> [V], at least 1e-12."""
    norms: Tensor = torch.linalg.vector_norm(at_least_float32(weight), dim=1)
    return norms.clamp_min(1e-12)


def two_taps(before: Tensor, now: Tensor, taps: Tensor) -> Tensor:
    """before, now [T, K, H]; taps [1, 1, K, 1, 2]."""
    weights = taps[0, 0]
    return weights[..., 0] * before + weights[..., 1] * now


def rotation(positions: Tensor, frequencies: Tensor, factor: float) -> Rotation:
    """Cosine and sine [T, 1, H/2] of every position, float32."""
    angles = positions.to(torch.float32)[:, None, None] * frequencies.to(positions.device)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, angles: Rotation) -> Tensor:
    """Half-split RoPE over the whole head, x [T, heads, H], in at least float32."""
    cos, sin = angles
    first, second = at_least_float32(x).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision; keep float32 and float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
