"""`--dry-run`: what a recipe takes, with the arithmetic; dialogues are counted, not encoded."""

from collections import defaultdict
from typing import Any

from attending.model import lora
from attending.model.architecture import parse_config
from attending.model.files import read_config
from attending.sft import data
from attending.sft.recipe import SftConfig
from attending.sft.select import SelectConfig
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
    select = config.select or SelectConfig()
    pools, count = defaultdict[str, list[int]](list), 0
    for one in data.dialogues(config, dropped):
        count += 1
        if not one.is_held_out:
            size = sum(len(str(message.get("content") or "")) for message in one.messages)
            pool = pools[one.source if one.source in select.budgets else ""]
            pool.append(min(size // CHARACTERS, config.context))
    chosen, tokens = 0, 0
    for name, sizes in pools.items():
        drawn = min(select.budgets.get(name, select.budget) or len(sizes), len(sizes))
        chosen, tokens = chosen + drawn, tokens + sum(sizes) * drawn // len(sizes)
    steps = -(-int(config.epochs * tokens) // config.batch.tokens)
    found = takes(
        arch,
        [Stretch("sft", steps, config.context)],
        config.batch,
        config.compute,
        config.assumed,
        adapter=lora.count(arch, config.lora) if config.lora else None,
    )
    about = f"about {CHARACTERS} characters a token; {chosen:,} dialogues of a source's mean size"
    counts = {"dialogues": count, "unreadable": len(dropped)}
    return found | counts | {"tokens_arithmetic": about}
