import pytest
import torch

from attending.model.architecture import parse_config
from attending.model.decoder import Decoder
from attending.train.optimizer import adamw, parameter_groups, set_learning_rate
from attending.train.recipe import OptimizerConfig
from tests.train.making import LLAMA, M1

CONFIG = OptimizerConfig(peak=1e-3, final=1e-4, warmup_tokens=0)


@pytest.mark.parametrize("values", [M1, LLAMA, {**LLAMA, "model_type": "qwen2"}])
def test_matrices_decay_and_scales_do_not(values: dict[str, object]) -> None:
    decoder = Decoder(parse_config(values))
    decays, keeps = parameter_groups(decoder.named_parameters(), 0.1)
    names = {weight: name for name, weight in decoder.named_parameters()}
    decayed = {names[weight] for weight in decays["params"]}
    kept = {names[weight] for weight in keeps["params"]}
    assert (decays["weight_decay"], keeps["weight_decay"]) == (0.1, 0.0)
    assert decayed | kept == set(names.values()) and not decayed & kept
    assert "model.embed_tokens.weight" in decayed
    assert all(name.endswith(("proj.weight", "W_pack.weight", "tokens.weight", "head.weight"))
               for name in decayed)  # fmt: skip
    assert all("norm" in name or name.endswith(("bias", "conv_k", "conv_v")) for name in kept)


def test_frozen_weights_are_in_no_group() -> None:
    decoder = Decoder(parse_config(M1)).requires_grad_(False)
    decoder.model.norm.weight.requires_grad_(True)
    (group,) = parameter_groups(decoder.named_parameters(), 0.1)
    assert len(group["params"]) == 1 and group["weight_decay"] == 0.0


def test_a_step_by_hand() -> None:
    # AdamW's first step moves each weight by lr, after decay: w (1 - lr * decay) - lr * sign(g).
    matrix = torch.nn.Parameter(torch.full((2, 2), 1.0, dtype=torch.float64))
    scale = torch.nn.Parameter(torch.full((2,), 1.0, dtype=torch.float64))
    optimizer = adamw([("a", matrix), ("b", scale)], CONFIG)
    set_learning_rate(optimizer, 0.01)
    matrix.grad, scale.grad = torch.full_like(matrix, 5.0), torch.full_like(scale, -5.0)
    optimizer.step()
    assert torch.allclose(matrix, torch.full_like(matrix, 1 - 0.01 * 0.1 - 0.01))
    assert torch.allclose(scale, torch.full_like(scale, 1.01))
    assert optimizer.defaults["betas"] == (0.9, 0.95)
