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
    sizes = [
        sum(len(str(message.get("content") or "")) for message in one.messages) // CHARACTERS
        for one in data.dialogues(config, dropped)
    ]
    budget = config.select.budget if config.select else 0
    chosen = min(budget or len(sizes), len(sizes))
    tokens = sum(min(size, config.context) for size in sizes) * chosen // max(len(sizes), 1)
    steps = -(-int(config.epochs * tokens) // config.batch.tokens)
    found = takes(
        arch,
        [Stretch("sft", steps, config.context)],
        config.batch,
        config.compute,
        config.assumed,
        adapter=lora.count(arch, config.lora) if config.lora else None,
    )
    about = f"about {CHARACTERS} characters a token; {chosen:,} dialogues of the mean size"
    counts = {"dialogues": len(sizes), "unreadable": len(dropped)}
    return found | counts | {"tokens_arithmetic": about}
