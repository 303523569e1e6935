"""Low-rank adaptation (LoRA, arXiv 2106.09685): W x + scale * B (A x) with W frozen, no dropout.

Base weights keep their official names; `lora_A` and `lora_B` stand beside them. The folder of an
adapter is what peft writes and reads.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import Field, PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the field's name for it)

from attending.artifact import write_json
from attending.config import Config, suggest
from attending.errors import CheckpointError, ConfigError
from attending.model.architecture import Architecture
from attending.model.checkpoint import require_exact
from attending.model.decoder import Decoder, Linear, at_least_float32
from attending.model.files import read_json

ADDED = (".lora_A.weight", ".lora_B.weight")
TOLD, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OURS, PEFTS = "model.layers.", "base_model.model.model.layers."
# What makes an adapter plain LoRA, and the settings that are free in one. Whatever else is set in
# peft's file changes the mathematics, or may: peft gets new variants with every release.
PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "init_lora_weights": True}
FREE = {"r", "lora_alpha", "use_rslora", "target_modules", "base_model_name_or_path", "revision"}
FREE |= {"inference_mode", "lora_dropout", "auto_mapping", "peft_version"}
FREE |= {"megatron_core", "qalora_group_size"}  # never empty, used by variants only


class LoraConfig(Config):
    """Which layers get an adapter, and how much it may change."""

    rank: PositiveInt
    """Rows of A, columns of B."""
    alpha: int | float = Field(gt=0)
    """B A is multiplied by alpha / rank ..."""
    rank_stabilised: bool = False
    """... or by alpha / sqrt(rank) (arXiv 2312.03732), so that large ranks learn as fast."""
    targets: tuple[str, ...] = ()
    """Last names of layers, such as q_proj; empty: every linear layer of the blocks. Never the
    embedding or the head."""

    @property
    def scale(self) -> float:
        """Of B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class LoraLinear(nn.Module):
    """Stands where a linear layer stood, and has its weight and bias."""

    def __init__(self, base: Linear, config: LoraConfig) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = base.weight, base.bias, config.scale
        self.lora_A = Linear(base.in_features, config.rank, bias=False).to(base.weight)
        self.lora_B = Linear(config.rank, base.out_features, bias=False).to(base.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        update: Tensor = self.lora_B(self.lora_A(x))
        return F.linear(x, self.weight, self.bias) + self.scale * update


def add(decoder: Decoder, config: LoraConfig) -> None:
    """Freeze a decoder and give its targets adapters, uninitialised; on the meta device, too.

    Raises:
        ConfigError: A target is no linear layer of the blocks.
    """
    layers = {
        name: layer
        for name, layer in decoder.named_modules()
        if isinstance(layer, Linear) and name.startswith(OURS)
    }
    known = {name.rpartition(".")[2] for name in layers}
    assert "lora_A" not in known, "there is an adapter already"
    if unknown := sorted({*config.targets} - known):
        told = suggest(unknown[0], known)
        raise ConfigError(f"targets: no linear layer of a block is {', '.join(unknown)}.{told}")
    decoder.requires_grad_(False)
    for name, layer in layers.items():
        if name.rpartition(".")[2] in (config.targets or known):
            decoder.set_submodule(name, LoraLinear(layer, config))


def count(arch: Architecture, config: LoraConfig) -> int:
    """Weights that `add` adds."""
    sizes = [
        sum(shape)
        for name, shape in arch.tensor_shapes().items()
        if name.startswith(OURS) and len(shape) == 2
        if not config.targets or name.split(".")[-2] in config.targets
    ]
    return config.rank * sum(sizes)


@torch.no_grad()
def init_weight(name: str, weight: Tensor, seed: int) -> None:
    """Zero B, so that an adapter begins as nothing; A as the authors' code draws it.

    That is Kaiming uniform (the paper has a normal A), here seeded by name, whoever draws it.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(digest, signed=True))
    bound = 0.0 if name.endswith(ADDED[1]) else 1 / math.sqrt(weight.shape[1])  # a = sqrt(5)
    weight.uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def merged(weights: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The official weights alone: W + scale * B A, summed in at least float32, in W's dtype."""
    plain = {name: weight for name, weight in weights.items() if not name.endswith(ADDED)}
    for stem in _adapted(weights):
        w, a, b = (at_least_float32(weights[stem + end]) for end in (".weight", *ADDED))
        plain[f"{stem}.weight"] = (w + config.scale * (b @ a)).to(plain[f"{stem}.weight"].dtype)
    return plain


def save_adapter(
    folder: Path, weights: Mapping[str, Tensor], config: LoraConfig, base: str
) -> None:
    """Write the adapter among `weights` into an existing folder; `base` is its model's address."""
    added = {
        name.replace(OURS, PEFTS): weight.detach().cpu().contiguous()
        for name, weight in weights.items()
        if name.endswith(ADDED)
    }
    save_file(added, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # the library's own choice is for its user alone
    told = {
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "use_rslora": config.rank_stabilised,
        "target_modules": sorted({stem.rpartition(".")[2] for stem in _adapted(weights)}),
    }
    write_json(folder / TOLD, PLAIN | told)


def load_adapter(folder: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A base's weights merged with an adapter that `save_adapter` or peft wrote.

    Raises:
        CheckpointError: It is damaged, no plain LoRA, or of another model.
    """
    try:
        told, found = read_json(folder / TOLD), load_file(folder / WEIGHTS)
        if odd := {k: v for k, v in told.items() if v and v != PLAIN.get(k) and k not in FREE}:
            raise CheckpointError(
                f"{folder.name}: {', '.join(f'{k} is {v!r}' for k, v in odd.items())}; only plain "
                "LoRA is read. Merge it with peft (merge_and_unload) and use the whole model."
            )
        targets = told.get("target_modules") or []
        if not isinstance(targets, str):  # peft matches names from the end, a pattern whole
            targets = rf"(.*\.)?({'|'.join(map(re.escape, targets))})"
        pattern = re.compile(targets)
        names = {"rank": "r", "alpha": "lora_alpha", "rank_stabilised": "use_rslora"}
        config = LoraConfig.build({k: told[v] for k, v in names.items() if v in told})
    except (OSError, SafetensorError, ConfigError, TypeError, re.error) as error:
        raise CheckpointError(
            f"{folder.name} is no whole adapter ({error}): expected {TOLD} and {WEIGHTS} as peft's "
            "save_pretrained writes them."
        ) from None
    expected: dict[str, tuple[int, ...]] = {}
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        if name.startswith(OURS) and weight.dim() == 2 and pattern.fullmatch(stem):
            at, (rows, columns) = stem.replace(OURS, PEFTS), weight.shape
            expected |= {at + ADDED[0]: (config.rank, columns), at + ADDED[1]: (rows, config.rank)}
    require_exact(
        f"{folder.name}: the adapter does not fit {TOLD} or the model; the one it was trained on "
        f"is {told.get('base_model_name_or_path')}.",
        expected,
        {name: tuple(tensor.shape) for name, tensor in found.items()},
    )
    return merged({**weights, **{n.replace(PEFTS, OURS): w for n, w in found.items()}}, config)


def _adapted(weights: Mapping[str, Tensor]) -> list[str]:
    return [name.removesuffix(ADDED[0]) for name in weights if name.endswith(ADDED[0])]
