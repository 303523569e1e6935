"""`--dry-run`: what a recipe takes at most, with the arithmetic; the data is not read."""

from typing import Any

from attending.model.architecture import parse_config
from attending.model.files import read_config
from attending.prefer.recipe import PreferConfig
from attending.sources import resolve
from attending.train.plan import Beside, Stretch, takes
from attending.train.recipe import BatchConfig


def estimate(config: PreferConfig) -> dict[str, Any]:
    """Memory of a rank and time, were every sample `batch.max_tokens` long."""
    shape, longest = config.assumed.shape, config.batch.max_tokens
    arch = parse_config(shape) if shape else read_config(resolve(config.model).path)
    passes = BatchConfig(
        tokens=config.batch.units * config.width * longest,
        micro_tokens=config.units_per_pass * config.width * longest,
    )
    others = int(config.reads("reference")) + (config.ppo.reward_model is not None)
    stretch = Stretch(config.method, config.steps, longest)
    beside = Beside(others, others / config.updates)
    found = takes(arch, [stretch], passes, config.compute, config.assumed, beside)
    sampled = "what samples the answers is not counted: the engine's time, and its pages"
    return found | ({"sampling": sampled} if config.reads("sample") else {})
