"""AdamW (Loshchilov and Hutter 2019), and which tensors decay."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from attending.train.recipe import OptimizerConfig

Named = Iterable[tuple[str, nn.Parameter]]


def parameter_groups(named: Named, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: what decays and what does not.

    Matrices decay, the embedding and the head among them. Norms, biases and Baichuan-M1's
    convolution taps do not: they are scales, and decay would pull a norm towards silence and a tap
    from its sum of one. The paper gives 0.1 and does not say for which tensors.
    """
    named = [(name, weight) for name, weight in named if weight.requires_grad]
    decayed = [weight for _, weight in named if weight.dim() == 2]
    kept = [weight for _, weight in named if weight.dim() != 2]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(named: Named, config: OptimizerConfig) -> torch.optim.AdamW:
    """The optimizer; its learning rate is set before every step."""
    groups = parameter_groups(named, config.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Of the next step, in every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate
