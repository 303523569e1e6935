"""Randomised Hadamard rotations, folded into a decoder's weights: outliers go to all channels.

QuaRot (Ashkboos 2024, arXiv 2404.00456, sections 4 and 4.1), as far as it costs nothing at run
time: the residual stream x becomes x Q, each head's values v become v R, and every matrix that
writes or reads them is multiplied to match. For that, a norm's weight moves into the matrices that
read it, which unties a tied head. The inputs of `down_proj`, which QuaRot rotates as the model
runs, stay as they are.

Baichuan-M1's NormHead divides by the norms of its rows. A rotation leaves these alone, the last
norm's weight does not: the folded head is an ordinary one, and `config.json` says so
(`norm_head = false`, known to this package only).

Shapes: D hidden size, N heads, K key-value heads, H head size.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from attending.model.architecture import NORMS, Architecture, LayerSpec
from attending.model.decoder import Decoder, vocabulary_norms

HEAD = "lm_head.weight"
ROWS = 1024


class Rotation(NamedTuple):
    """Q = diag(signs) (left x right), a Kronecker product of orthogonal matrices; float64.

    The factors are kept apart: a product with Q then takes a + b steps a value instead of a b.
    """

    signs: Tensor
    """[a b] of -1 and 1."""
    left: Tensor
    """[a, a]."""
    right: Tensor
    """[b, b]."""

    @classmethod
    def random(cls, size: int, seed: int) -> "Rotation":
        """A Hadamard matrix with random signs; without one, a random matrix for its odd part."""
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
        core = _core(size)
        if core is None:
            odd = size // (size & -size)
            drawn = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(drawn)
            right = (q * r.diagonal().sign()).contiguous()  # every rotation is as likely
        else:
            right = core / math.sqrt(len(core))
        rest = size // len(right)
        return cls(signs, _sylvester(rest) / math.sqrt(rest), right)

    def turn(self, x: Tensor) -> Tensor:
        """Each `size` values of the last dimension times Q; float64."""
        a, b = len(self.left), len(self.right)
        signed = x.double().reshape(-1, a * b) * self.signs
        turned: Tensor = self.left.T @ (signed.reshape(-1, a, b) @ self.right)
        return turned.reshape(x.shape)

    def turn_rows(self, x: Tensor) -> Tensor:
        """Q^T x for [rows, columns], every `size` rows."""
        return self.turn(x.T).T

    def matrix(self) -> Tensor:
        """Q itself, to rotate other things by: a draft that reads the hidden states, say."""
        return self.signs[:, None] * torch.kron(self.left, self.right)


def hadamard(size: int) -> Tensor | None:
    """H of -1 and 1 with H H^T = size I, [size, size] float64; None where this finds none.

    Sylvester's doubling of one of Paley's matrices (1933), for prime fields: enough for the sizes
    that models have, 576 = 16 x 36 and 5120 = 256 x 20 among them; not for 92, 116 or 172.
    """
    core = _core(size)
    return None if core is None else torch.kron(_sylvester(size // len(core)), core)


def folded(arch: Architecture, read: Callable[[str], Tensor], seed: int) -> Callable[[str], Tensor]:
    """What reads a tensor of `rotated(arch)` by its official name.

    Computed in float64 and given in the dtype that was read; half precision loses something.

    Args:
        arch: Of the model as it is.
        read: One of its tensors by its official name.
        seed: Of all signs; the residual stream's rotation is `Rotation.random(D, seed)`.
    """
    stream = Rotation.random(arch.hidden_size, seed)
    heads = [Rotation.random(spec.head_dim, seed + 1 + spec.index) for spec in arch.layers]

    def turned(name: str) -> Tensor:
        value = read("model.embed_tokens.weight" if arch.tied and name == HEAD else name)
        if name.startswith("model.layers."):
            layer, part = name.split(".", 3)[2:]
            index = int(layer)
            norm = read(f"model.layers.{layer}.{NORMS[part.startswith('mlp')]}.weight")
            wide = _of_layer(part, value.double(), norm, arch.layers[index], stream, heads[index])
        elif value.dim() == 1:
            wide = torch.ones_like(value)
        else:  # embedding and head, some rows at a time: the temporaries are ten times as large
            scale = read("model.norm.weight") if name == HEAD else torch.ones(1)
            parts = []
            for rows in torch.split(value, ROWS):
                wide = rows.double() * scale
                if arch.norm_head and name == HEAD:
                    wide /= vocabulary_norms(rows.double())[:, None]
                parts.append(stream.turn(wide).to(value.dtype))
            wide = torch.cat(parts)
        return wide.to(value.dtype).contiguous()

    return turned


def rotated(arch: Architecture) -> Architecture:
    """The architecture of the folded weights: the head untied, and no NormHead."""
    source = dict(arch.source) | {"tie_word_embeddings": False}
    if arch.is_m1:
        source["norm_head"] = False
    return replace(arch, tied=False, norm_head=False, source=source)


def rotate(decoder: Decoder, seed: int) -> Decoder:
    """Another decoder of the same logits, its weights `folded`."""
    read = folded(decoder.arch, decoder.state_dict().__getitem__, seed)
    with torch.device("meta"):
        turned = Decoder(rotated(decoder.arch))
    names = turned.arch.tensor_shapes()
    turned.load_state_dict({name: read(name) for name in names}, assign=True)
    return turned.requires_grad_(False).eval()


def _of_layer(
    part: str, wide: Tensor, norm: Tensor, spec: LayerSpec, stream: Rotation, head: Rotation
) -> Tensor:
    """One tensor of a block in float64; `norm` [D] is what multiplies its module's inputs."""
    match part.removeprefix("self_attn.").removeprefix("mlp."):
        case "input_layernorm.weight" | "post_attention_layernorm.weight":
            return torch.ones_like(wide)
        case "q_proj.weight" | "k_proj.weight" | "gate_proj.weight" | "up_proj.weight":
            return stream.turn(wide * norm)
        case "v_proj.weight":
            return head.turn_rows(stream.turn(wide * norm))
        case "v_proj.bias":
            return head.turn(wide)
        case "W_pack.weight":  # the convolution weighs whole heads, so it commutes with R
            query_key, value = stream.turn(wide * norm).tensor_split(
                [len(wide) - spec.num_kv_heads * spec.head_dim]
            )
            return torch.cat([query_key, head.turn_rows(value)])
        case "o_proj.weight":
            return stream.turn_rows(head.turn(wide))
        case "down_proj.weight":
            return stream.turn_rows(wide)
        case "o_proj.bias" | "down_proj.bias":
            return stream.turn(wide)
        case _:  # other biases, norms of q and k, taps: outside what is rotated
            return wide


def _core(size: int) -> Tensor | None:
    """The smallest of Paley's matrices, or [[1]], whose doubling reaches a size, if any."""
    core = size // (size & -size)
    while core <= size:
        found = torch.ones(1, 1, dtype=torch.float64) if core == 1 else _paley(core)
        if found is not None:
            return found
        core *= 2
    return None


def _paley(size: int) -> Tensor | None:
    """Over the field of a prime p: I + S for p = 3 mod 4, size p + 1; doubled for p = 1 mod 4."""
    if _is_prime(size - 1) and size % 4 == 0:
        return torch.eye(size, dtype=torch.float64) + _conference(size - 1, -1)
    p = size // 2 - 1
    if size % 4 == 0 and p % 4 == 1 and _is_prime(p):
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        eye = torch.eye(p + 1, dtype=torch.float64)
        return torch.kron(_conference(p, 1), plus) + torch.kron(eye, minus)
    return None


def _conference(p: int, sign: int) -> Tensor:
    """[p + 1, p + 1], zeros on the diagonal: a border, and the quadratic character of i - j."""
    character = -torch.ones(p, dtype=torch.float64)
    character[[i * i % p for i in range(p)]] = 1
    character[0] = 0
    at = torch.arange(p)
    inner = character[(at[:, None] - at) % p]
    border = torch.ones(p, 1, dtype=torch.float64)
    top = torch.cat([torch.zeros(1, 1, dtype=torch.float64), border.T], 1)
    return torch.cat([top, torch.cat([sign * border, inner], 1)])


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))


def _sylvester(size: int) -> Tensor:
    """Of a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(pair, matrix)
    return matrix
