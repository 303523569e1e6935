"""The EAGLE-3 draft head (arXiv 2503.01840): one layer that reads its target's mind.

The feature of position t (three of the target's residual streams, side by side) meets the token of
t + 1, and the head proposes the token of t + 2. What it gives out, before its norm, stands for the
feature of t + 1 when it goes on by itself.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the field's name for it)

from attending.artifact import write_json
from attending.model.architecture import Architecture, LayerSpec
from attending.model.attend import Paged
from attending.model.checkpoint import BFLOAT16
from attending.model.decoder import (
    MLP,
    Attend,
    Attention,
    Embedding,
    Linear,
    RMSNorm,
    Rotation,
    at_least_float32,
    rotate,
    rotation,
)
from attending.model.eagle_files import EMBEDDING, EagleConfig, open_eagle
from attending.model.rope import inverse_frequencies
from attending.model.weights import save_weights

START_RMS = 0.4  # see `Eagle.soften`
FEATURE_SHARE = 0.25  # of what is drawn, in the features' half of queries and keys at first


class Eagle(nn.Module):
    """Features and tokens in, states and logits out. Build on the meta device and load, or draw."""

    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: EagleConfig, *, has_embedding: bool = False) -> None:
        """Create the modules, uninitialised; `has_embedding`: not the target's, but its own."""
        super().__init__()
        arch = config.arch
        [spec] = arch.layers
        self.config, self.arch = config, arch
        if has_embedding:
            self.embed_tokens = Embedding(arch.vocab_size, arch.hidden_size)
        self.fc = Linear(len(config.layers) * arch.hidden_size, arch.hidden_size, bias=False)
        self.midlayer = Midlayer(arch, spec, gated=config.gated)
        self.norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.lm_head = Linear(arch.hidden_size, config.draft_vocab, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(arch.vocab_size, dtype=torch.bool))
        # Not a buffer: casting the model must not round it, and checkpoints do not hold it.
        self.frequencies = torch.from_numpy(inverse_frequencies(arch.rope, spec.head_dim))

    def forward(self, embedded: Tensor, hidden: Tensor, attend: Attend) -> Tensor:
        """States before the norm [T, D]: of tokens' embeddings and of what precedes each, [T, D].

        `hidden` is `fc` of the target's features [T, 3 D], or this head's own state.
        """
        angles = rotation(attend.positions, self.frequencies, self.arch.rope.attention_factor)
        sizes = {self.midlayer.self_attn.spec.head_dim: angles}
        out: Tensor = self.midlayer(embedded, hidden, sizes, attend)
        return out

    def set_window(self, window: int | None) -> None:
        """See so many tokens at most, where the target's pages hold no more."""
        spec = dataclasses.replace(self.arch.layers[0], window=window)
        self.arch = dataclasses.replace(self.arch, layers=(spec,))
        self.midlayer.self_attn.spec = spec

    def remember(self, embedded: Tensor, hidden: Tensor, attend: Paged) -> None:
        """Only write keys and values: of tokens that the target has already."""
        attention = self.midlayer.self_attn
        angles = rotation(attend.positions, self.frequencies, self.arch.rope.attention_factor)
        _, k, v = attention.project(self.midlayer.beside(embedded, hidden), attend)
        attend.write(attention.spec, rotate(k, angles), v)

    def logits(self, states: Tensor) -> Tensor:
        """[..., D] -> [..., draft vocabulary], at least float32."""
        return at_least_float32(self.lm_head(self.norm(states)))

    def target_ids(self, draft_ids: Tensor) -> Tensor:
        """Ids of the draft's vocabulary as ids of the target's."""
        return draft_ids + self.d2t[draft_ids]

    @property
    def used(self) -> Tensor:
        """[draft vocabulary]: the target's id of each row of the head, ascending."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    @torch.no_grad()
    def init_weights(self, head: Tensor, norm: Tensor, seed: int) -> None:
        """Begin with the target's own: the rows of its head that are proposed, norm, last feature.

        All else is drawn as a model's is, each tensor by its name and `seed`; but queries and keys
        read tokens alike, so that a row looks at itself, which alone has the token written last.
        """
        for name, weight in self.named_parameters():
            drawn = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
            generator = torch.Generator().manual_seed(int.from_bytes(drawn, signed=True))
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, self.arch.initializer_range, generator=generator)
        size, spec = self.arch.hidden_size, self.midlayer.self_attn.spec
        queries, keys = (getattr(self.midlayer.self_attn, f"{n}_proj").weight for n in "qk")
        keys[:, :size].mul_(size**-0.5 / self.arch.initializer_range)
        heads = keys[:, :size].unflatten(0, (spec.num_kv_heads, -1))
        queries[:, :size] = heads.repeat_interleave(spec.num_heads // len(heads), 0).flatten(0, 1)
        queries[:, size:] *= FEATURE_SHARE
        keys[:, size:] *= FEATURE_SHARE
        self.fc.weight.zero_()
        self.fc.weight[:, -size:].fill_diagonal_(1.0)
        self.lm_head.weight.copy_(head[self.used])
        self.norm.weight.copy_(norm)

    @torch.no_grad()
    def soften(self, features: Tensor) -> None:
        """Scale what was drawn to a target's features [T, 3 D], before it is trained.

        The last feature foretells the token that is given, not the next one, and a target's stream
        is far larger than what a drawn layer adds to it. So the stream is brought to `START_RMS`
        and the norm to logits that deviate by 1, in the median of the tokens, of which the first
        are giants. Then the first guess is nearly none, and the layer is heard.
        """
        states = self.fc(features)
        share = START_RMS / states.square().mean(-1).sqrt().median()
        self.fc.weight.mul_(share)
        self.norm.weight.div_(self.logits(share * states).std(-1).median())

    @torch.no_grad()
    def scale_features(self, scales: Tensor) -> None:
        """Make `fc` give of features / scales, [3 D] both, what it gave of the features."""
        self.fc.weight.mul_(scales)


class Midlayer(nn.Module):
    """The layer: normed token beside normed feature in, the feature's residual stream out."""

    def __init__(self, arch: Architecture, spec: LayerSpec, *, gated: bool) -> None:
        super().__init__()
        self.self_attn = (GatedAttention if gated else DraftAttention)(arch, spec)
        self.mlp = MLP(arch)
        self.input_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.hidden_norm = RMSNorm(arch.hidden_size, arch.norm_eps)
        self.post_attention_layernorm = RMSNorm(arch.hidden_size, arch.norm_eps)

    def forward(
        self, embedded: Tensor, hidden: Tensor, rotations: dict[int, Rotation], attend: Attend
    ) -> Tensor:
        """Rows [T, D] each; the sizes of heads are `rotations`' keys."""
        y = hidden + self.self_attn(self.beside(embedded, hidden), rotations, attend)
        out: Tensor = y + self.mlp(self.post_attention_layernorm(y))
        return out

    def beside(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Both normed, [T, 2 D]."""
        return torch.cat((self.input_layernorm(embedded), self.hidden_norm(hidden)), dim=-1)


class DraftAttention(Attention):
    """A Llama's, over rows twice as wide."""

    def build_projections(self, arch: Architecture) -> None:
        """Three, without biases."""
        wide, self.qk_norm = 2 * arch.hidden_size, False
        self.q_proj = Linear(wide, self.rows, bias=False)
        self.k_proj = Linear(wide, self.kv_rows, bias=False)
        self.v_proj = Linear(wide, self.kv_rows, bias=False)


class GatedAttention(DraftAttention):
    """Attention output times sigmoid(W_g x) before o_proj, a gate for each value.

    This is how we read Baichuan-M3's "Gated EAGLE-3" (arXiv 2602.06570), which gives no formula;
    gates of this place and kind are those of arXiv 2505.06708. No stock engine loads it.
    """

    def build_projections(self, arch: Architecture) -> None:
        """And the gate."""
        super().build_projections(arch)
        self.g_proj = Linear(2 * arch.hidden_size, self.rows, bias=False)

    def mix(self, x: Tensor, rotations: dict[int, Rotation], attend: Attend) -> Tensor:
        """x [T, 2 D] -> what the heads found, as far as the gates let it through."""
        return super().mix(x, rotations, attend) * F.sigmoid(self.g_proj(x))


def load_eagle(
    folder: Path, target: Architecture | None = None, dtype: torch.dtype = torch.float32
) -> Eagle:
    """A draft from its folder, see `open_eagle`; whose it is, is `config.require_target`'s."""
    config, found = open_eagle(folder, target)
    with torch.device("meta"):
        eagle = Eagle(config, has_embedding=EMBEDDING in found)
    weights: dict[str, Tensor] = {}
    for name, values in found.items():
        tensor = torch.from_numpy(np.array(values))
        tensor = tensor.view(torch.bfloat16) if values.dtype == BFLOAT16 else tensor
        weights[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    eagle.load_state_dict(weights, strict=True, assign=True)
    return eagle.requires_grad_(False).eval()


def save_eagle(folder: Path, config: EagleConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write `config.json` and the weights into an existing folder, in the table's order."""
    shapes = config.tensor_shapes(has_embedding=EMBEDDING in tensors)
    stored = str(tensors["fc.weight"].dtype).removeprefix("torch.")
    write_json(folder / "config.json", config.to_config() | {"torch_dtype": stored})
    save_weights({name: tensors[name] for name in shapes}, folder)


def fold_rotation(weights: Mapping[str, Tensor], rotation: Tensor) -> dict[str, Tensor]:
    """A draft's weights for its target after QuaRot's rotation of the residual stream, x -> x Q.

    Features arrive rotated, so each third of `fc` becomes W Q. The shared embedding is rotated,
    too: as the RMS norm commutes with a rotation but for its weight, that weight moves into the
    token's half of the projections, which become W diag(w) Q. A draft's own embedding stays.

    Args:
        weights: By stock name.
        rotation: Q [D, D], orthogonal.
    """
    found, size = dict(weights), len(rotation)
    wide = rotation.to(torch.float64)
    fc = weights["fc.weight"]
    thirds = [part.double() @ wide for part in torch.split(fc, size, dim=1)]
    found["fc.weight"] = torch.cat(thirds, dim=1).to(fc.dtype)
    if EMBEDDING in weights:
        return found
    norm = "midlayer.input_layernorm.weight"
    for name, weight in weights.items():
        if name.startswith("midlayer.self_attn.") and weight.shape[1] == 2 * size:
            token, hidden = torch.split(weight.double(), size, dim=1)
            folded = (token * weights[norm].double()) @ wide
            found[name] = torch.cat((folded, hidden), dim=1).to(weight.dtype)
    found[norm] = torch.ones_like(weights[norm])
    return found
