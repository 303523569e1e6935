"""Before the fine-tuning loop: dialogues, model, adapters and optimizer."""

import json
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attending.errors import ConfigError
from attending.mesh import World
from attending.model import lora
from attending.sft import data
from attending.sft.recipe import SftConfig
from attending.shards import Shards
from attending.train import run
from attending.train.heldout import Heldout
from attending.train.optimizer import adamw
from attending.train.parallel import barrier, build
from attending.train.reader import PackedReader
from attending.train.rows import require_even
from attending.train.start import Start
from attending.train.state import TrainState
from attending.train.watch import Watched

DATA = "data"


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run works with."""

    state: TrainState
    reader: PackedReader
    """The state's."""
    num_steps: int
    watched: Watched


def told(config: SftConfig, start: Start) -> dict[str, Any]:
    """What decides a run; a changed template or file is seen on resume."""
    template = sha256((start.tokenizer.template or "").encode()).hexdigest()
    parents = [start.parent, *data.digests(config)]
    return {**config.model_dump(mode="json"), "template_sha256": template, "parents": parents}


def write_data(config: SftConfig, start: Start, draft: Path, place: World) -> list[str]:
    """Write the shards into a run's draft if they are not there; lines to print.

    Rank 0 writes and the others wait.
    """
    folder, lines = draft / DATA, []
    if place.rank == 0 and not (folder / data.COUNTS).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        made = data.prepare(config, start.tokenizer, folder)
        for name, counts in made.counts.items():
            lines.append(f"{name}: " + ", ".join(f"{k} {v:,}" for k, v in counts.items()))
        left = ", ".join(f"{count:,} {reason}" for reason, count in made.reasons.items())
        lines += [f"left out: {left or 'none'}", "one of them, as it is trained on:"]
        lines += data.marked(made.shown, start.tokenizer)
    barrier()
    return lines


def prepare(
    config: SftConfig, start: Start, draft: Path, place: World, device: torch.device
) -> Setup:
    """Open the shards, check that everything fits, build model and optimizer."""
    if config.context > start.arch.context:
        raise ConfigError(
            f"context={config.context} is more than the {start.arch.context} tokens of "
            f"{config.model}: lower it."
        )
    run.require_vocabulary(start.tokenizer.num_ids - 1, start.arch.vocab_size)
    require_even(config.batch, config.context, place.size, "fine-tuning")
    shards = Shards(draft / DATA / "train")
    num_rows = count_rows(open_reader(shards, config), config)
    decoder = build(
        start.arch,
        partial(fill, start, config),
        place,
        device,
        config.compute,
        adapt=partial(lora.add, config=config.lora) if config.lora else None,
    )
    optimizer = adamw(decoder.named_parameters(), config.optimizer)
    reader = open_reader(shards, config)
    names = {name: draft / DATA / "heldout" / name for name in config.data}
    found = {name: Shards(path) for name, path in names.items() if (path / "index.json").is_file()}
    heldout = {name: Heldout(one, range(one.num_documents)) for name, one in found.items()}
    dtype = getattr(torch, config.compute.precision)
    watched = Watched(start.tokenizer, heldout, config.batch.micro_tokens, device, dtype)
    steps = -(-num_rows // (config.batch.tokens // config.context))
    return Setup(TrainState(decoder, optimizer, reader, place), reader, steps, watched)


def open_reader(shards: Shards, config: SftConfig) -> PackedReader:
    """Rows of whole dialogues of all kinds."""
    return PackedReader(shards, {data.DOMAIN: 1.0}, config.seed, cuts=False)


def count_rows(reader: PackedReader, config: SftConfig) -> int:
    """Rows until every dialogue was drawn so many times; by drawing them all."""
    count, left = 0, config.epochs * reader.shards.num_documents
    while left > 0:
        left -= len(reader.row(config.context))
        count += 1
    return count


def fill(start: Start, config: SftConfig, name: str, weight: Tensor) -> None:
    """A weight of the model, or of an adapter."""
    if config.lora and name.endswith(lora.ADDED):
        lora.init_weight(name, weight, config.seed)
    else:
        start.fill(name, weight)


def export(
    config: SftConfig, start: Start, draft: Path, weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The official weights; adapters are merged, and written beside in peft's layout."""
    if not config.lora:
        return weights
    (draft / "adapter").mkdir(exist_ok=True)
    lora.save_adapter(draft / "adapter", weights, config.lora, start.source)
    return lora.merged(weights, config.lora)


def counted(draft: Path) -> dict[str, float]:
    """Of the data, for `run.json`."""
    counts = json.loads((draft / DATA / data.COUNTS).read_text("utf-8"))["counts"]
    return {
        f"data/{name}_{key}": float(value)
        for name, own in counts.items()
        for key, value in own.items()
    }
