"""`--dry-run`: what a recipe takes at most, with the arithmetic; the cases are not read."""

from typing import Any

from attending.model.architecture import parse_config
from attending.model.files import read_config
from attending.rl.recipe import RlConfig
from attending.sources import resolve
from attending.train.plan import Stretch, takes
from attending.train.recipe import BatchConfig


def estimate(config: RlConfig) -> dict[str, Any]:
    """Memory of a rank and time of training, were every answer `max_tokens` long."""
    shape = config.assumed.shape
    arch = parse_config(shape) if shape else read_config(resolve(config.model).path)
    group = config.max_prompt + config.group * config.max_tokens
    batch = BatchConfig(tokens=config.prompts * group, micro_tokens=config.micro_tokens)
    stretch = Stretch("rl", config.steps, config.max_prompt + config.max_tokens)
    found = takes(arch, [stretch], batch, config.compute, config.assumed)
    written = config.tokens_of(config.steps)
    return found | {
        "tokens_written": written,
        "arithmetic": (
            "a prompt is read once for its group; writing, judging and the engine's copy of the "
            "weights are not counted: divide tokens_written by the tokens a second of "
            "`attending bench`"
        ),
    }
