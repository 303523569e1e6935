"""`--dry-run`: what a recipe takes, with the arithmetic; dialogues are counted, not encoded."""

from typing import Any

from attending.model import lora
from attending.model.architecture import parse_config
from attending.model.files import read_config
from attending.sft import data
from attending.sft.recipe import SftConfig
from attending.sources import resolve
from attending.train.plan import Stretch, takes
from attending.train.rows import require_even

CHARACTERS = 4  # of a token, about, in English


def estimate(config: SftConfig) -> dict[str, Any]:
    """Memory of a rank and time, on the hardware that the recipe assumes."""
    require_even(config.batch, config.context, config.assumed.devices, "fine-tuning")
    shape = config.assumed.shape
    arch = parse_config(shape) if shape else read_config(resolve(config.model).path)
    dropped: list[data.Dropped] = []
    count = characters = 0
    for one in data.dialogues(config, dropped):
        count += 1
        characters += sum(len(str(message.get("content") or "")) for message in one.messages)
    tokens = min(characters // CHARACTERS, count * config.context)
    steps = -(-int(config.epochs * tokens) // config.batch.tokens)
    found = takes(
        arch,
        [Stretch("sft", steps, config.context)],
        config.batch,
        config.compute,
        config.assumed,
        adapter=lora.count(arch, config.lora) if config.lora else None,
    )
    about = f"about {CHARACTERS} characters a token; what is chosen or too long is not left out"
    return found | {"dialogues": count, "unreadable": len(dropped), "tokens_arithmetic": about}
