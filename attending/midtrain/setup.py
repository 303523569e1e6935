"""Before the mid-training loop: model, teacher, corpus and optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from attending import artifact
from attending.errors import CheckpointError, ConfigError
from attending.evaluate.forgetting import require_measured
from attending.mesh import World
from attending.midtrain.loss import DIVERGENCES, MixedLoss
from attending.midtrain.recipe import MidtrainConfig
from attending.model.decoder import Decoder
from attending.shards import Shards
from attending.train import run
from attending.train.heldout import Heldout
from attending.train.optimizer import adamw
from attending.train.parallel import build
from attending.train.reader import Groups, PackedReader, by_part
from attending.train.recipe import ComputeConfig
from attending.train.rows import require_even
from attending.train.start import Start, open_start, require_same_vocabulary
from attending.train.state import TrainState
from attending.train.watch import Watched

LOOKED_AT = 100  # documents of a masked part, for a note


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run works with."""

    state: TrainState
    reader: PackedReader
    """The state's."""
    loss: MixedLoss
    watched: Watched
    kept: frozenset[str]
    """Sets of held-out documents that training must not cost."""


def parents(config: MidtrainConfig, start: Start, teacher: Start) -> list[dict[str, str]]:
    """The model, the teacher if it is another, the corpus."""
    index = Path(config.corpus) / "train" / "index.json"
    if not index.is_file():
        raise CheckpointError(
            f"{config.corpus} has no train/index.json: give the folder that `attending corpus` "
            "wrote, with --set corpus=..."
        )
    others = [teacher.parent] if teacher is not start else []
    return [start.parent, *others, {"uri": config.corpus, "sha256": artifact.digest(index)}]


def open_models(config: MidtrainConfig) -> tuple[Start, Start]:
    """The model to go on from, and its teacher.

    Raises:
        ConfigError: They do not mean the same by an id, or a row is longer than the context.
    """
    start = open_start(config.model)
    teacher = open_start(config.teacher) if config.teacher else start
    require_same_vocabulary(start, teacher, "teacher")
    for one in (start, teacher):
        if config.context > one.arch.context:
            raise ConfigError(
                f"context={config.context} is more than the {one.arch.context} tokens of "
                f"{one.source}: lower it, or `attending pretrain` a stage with a longer context."
            )
    return start, teacher


def prepare(
    config: MidtrainConfig, start: Start, teacher: Start, place: World, device: torch.device
) -> Setup:
    """Open the corpus, check that everything fits, build models and optimizer."""
    shards = Shards(Path(config.corpus) / "train")
    if start.tokenizer.sha256 != shards.index["tokenizer_sha256"]:
        raise ConfigError(
            f"the corpus was not encoded with the tokenizer of {config.model}: build it again with "
            f"--set pack.tokenizer={config.model}"
        )
    run.require_vocabulary(start.tokenizer.num_ids - 1, start.arch.vocab_size)
    require_even(config.batch, config.context, place.size, "mid-training")
    groups = by_part(shards.index, config.parts)
    mixture = {name: part.share for name, part in config.parts.items()}
    reader = PackedReader(shards, mixture, config.seed, groups)
    require_notes(config, shards, groups)
    torch.manual_seed(config.seed + place.rank)
    decoder = build(start.arch, start.fill, place, device, config.compute)
    optimizer = adamw(decoder.named_parameters(), config.optimizer)
    constrained = [part.loss == "self_constraint" for part in config.parts.values()]
    loss = MixedLoss(
        torch.tensor(constrained),
        frozen(teacher, place, device, config.compute) if config.needs_teacher else None,
        DIVERGENCES[config.divergence],
    )
    heldout, kept = heldout_by_part(Path(config.corpus), config)
    require_measured(config.forgetting, kept)
    dtype = getattr(torch, config.compute.precision)
    micro = config.batch.micro_tokens
    watched = Watched(start.tokenizer, heldout, micro, device, dtype)
    return Setup(TrainState(decoder, optimizer, reader, place), reader, loss, watched, kept)


def frozen(start: Start, place: World, device: torch.device, compute: ComputeConfig) -> Decoder:
    """A model that is only asked, cut among the ranks like the one that is trained."""
    plain = compute.replace(recompute=False, compile=False)
    return build(start.arch, start.fill, place, device, plain).requires_grad_(False).eval()


def require_notes(config: MidtrainConfig, shards: Shards, groups: Groups) -> None:
    """ConfigError if a part whose notes are to be learnt has none."""
    for number, (name, part) in enumerate(config.parts.items()):
        if part.loss != "masked_cross_entropy":
            continue
        own: list[int] = []
        for first, rows in map(shards.shard, range(len(shards.shards))):
            own += (first + np.flatnonzero(groups.of(rows) == number)).tolist()
            if len(own) >= LOOKED_AT:
                break
        own = own[:LOOKED_AT]
        marked = [not shards.trained(one).all() for one in own]
        if shards.index.get("has_context") is None or not any(marked):
            raise ConfigError(
                f"part {name}: none of {len(own)} documents looked at has a note between its "
                "text's tokens. Build the corpus with `notes` given for the source, or use the "
                "loss cross_entropy."
            )


def heldout_by_part(
    folder: Path, config: MidtrainConfig
) -> tuple[Mapping[str, Heldout], frozenset[str]]:
    """The held-out documents of each part, and which of these sets must be kept.

    A part without any is not watched; one of two domains has two sets.
    """
    found: dict[str, Heldout] = {}
    kept: set[str] = set()
    for path in sorted((folder / "heldout").glob("*/index.json")):
        shards = Shards(path.parent)
        groups = by_part(shards.index, config.parts)
        parts = [groups.of(shards.shard(i)[1]) for i in range(len(shards.shards))]
        kinds = np.concatenate([np.empty(0, np.int64), *parts])
        for number, (part, told) in enumerate(config.parts.items()):
            if own := np.flatnonzero(kinds == number).tolist():
                name = part if part not in found else f"{part}_{path.parent.name}"
                found[name] = Heldout(shards, own)
                kept |= {name} if told.is_kept else set()
    return found, frozenset(kept)
