"""`--dry-run`: what a recipe takes, with the arithmetic; the model's configuration is read."""

from typing import Any

from attending.midtrain.recipe import MidtrainConfig
from attending.model.architecture import parse_config
from attending.model.files import read_config
from attending.sources import resolve
from attending.train.plan import Beside, Stretch, takes
from attending.train.rows import require_even


def estimate(config: MidtrainConfig) -> dict[str, Any]:
    """Memory of a rank and time, on the hardware that the recipe assumes."""
    require_even(config.batch, config.context, config.assumed.devices, "mid-training")
    shape = config.assumed.shape
    arch = parse_config(shape) if shape else read_config(resolve(config.model).path)
    beside = Beside(1, config.constrained_share) if config.needs_teacher else Beside()
    stretch = Stretch("midtrain", config.num_steps, config.context)
    found = takes(arch, [stretch], config.batch, config.compute, config.assumed, beside)
    shares = sum(part.share for part in config.parts.values())
    tokens = config.num_steps * config.batch.tokens
    parts = {name: round(tokens * one.share / shares) for name, one in config.parts.items()}
    return found | {"warmup_steps": config.warmup_steps, "tokens_by_part": parts}
