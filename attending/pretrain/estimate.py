"""`--dry-run`: what a recipe takes, with the arithmetic; nothing is read but the recipe."""

from typing import Any

from attending.model.architecture import parse_config
from attending.pretrain.recipe import PretrainConfig
from attending.pretrain.setup import check_rows
from attending.train.plan import Stretch, takes


def estimate(config: PretrainConfig) -> dict[str, Any]:
    """Memory of a rank and time, on the hardware that the recipe assumes."""
    check_rows(config, config.assumed.devices)
    stretches = [
        Stretch(stage.name, phase.steps, stage.context)
        for stage, phase in zip(config.stages, config.phases, strict=True)
    ]
    arch = parse_config(config.model)
    found = takes(arch, stretches, config.batch, config.compute, config.assumed)
    return found | {"warmup_steps": config.warmup_steps}
