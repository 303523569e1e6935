"""Before and after the loop: target, draft, answers and optimizer in; a draft folder out."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from attending.artifact import digest
from attending.draft.data import token_counts
from attending.draft.estimate import operations
from attending.draft.loss import UnrolledLoss
from attending.draft.recipe import DraftConfig
from attending.draft.target import Scaled, open_target, third_sizes
from attending.draft.watch import by_source
from attending.errors import ConfigError
from attending.mesh import World
from attending.model.decoder import Decoder
from attending.model.eagle import Eagle, load_eagle, save_eagle
from attending.model.eagle_files import EagleConfig, choose_vocabulary, eagle_config
from attending.shards import Shards
from attending.sources import resolve
from attending.train import run
from attending.train.optimizer import adamw
from attending.train.reader import PackedReader, by_part
from attending.train.rows import deal, require_even
from attending.train.start import Start
from attending.train.state import TrainState
from attending.train.watch import Watched


@dataclass(frozen=True, slots=True)
class Source:
    """A group of the reader: answers to one kind of prompt."""

    sources: tuple[str, ...]
    domain: str | None = None


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run works with."""

    state: TrainState
    target: Scaled
    eagle: Eagle
    reader: PackedReader
    """The state's."""
    num_steps: int
    loss: UnrolledLoss
    watched: Watched
    flops_per_token: float


def require_alone(config: DraftConfig, start: Start, place: World) -> None:
    """ConfigError where the recipe does not fit the target or the machine."""
    if place.size > 1:
        raise ConfigError(f"a draft is trained by one process, not {place.size}: run one.")
    if config.context > start.arch.context:
        raise ConfigError(
            f"context={config.context} is more than the {start.arch.context} tokens of "
            f"{config.model}: lower it."
        )
    require_even(config.batch, config.context, 1, "training a draft")


def head_config(config: DraftConfig, start: Start) -> EagleConfig:
    """The draft's, with its target's name and digest."""
    head = config.head
    return eagle_config(
        start.arch,
        min(head.vocabulary, start.arch.vocab_size),
        name=resolve(config.model).name,
        sha256=start.sha256,
        gated=head.gated,
        intermediate_size=head.intermediate_size,
    )


def prepare(
    config: DraftConfig,
    start: Start,
    answers: Path,
    folder: Path,
    place: World,
    device: torch.device,
) -> Setup:
    """Open the shards, choose the vocabulary, open the target, the draft and the optimizer.

    Args:
        config: The recipe.
        start: The target.
        answers: Folder of its answers, and of what was read of it.
        folder: Of the shards.
        place: Among all ranks.
        device: Of the training.
    """
    run.require_vocabulary(start.tokenizer.num_ids - 1, start.arch.vocab_size)
    shards = Shards(folder / "train")
    num_rows = count_rows(open_reader(shards, config), config)
    told = head_config(config, start)
    some = open_reader(shards, config)
    [batch] = deal(some, [some.row(config.context)], 1, place, start.arch.vocab_size, device)
    seen = open_target(config, start, place, device, answers)
    first = seen.look(batch)
    target = Scaled(seen, third_sizes(first))
    ends = target.ends
    eagle = Eagle(told).to(device, ends.model.norm.weight.dtype)
    counts = token_counts(shards, start.arch.vocab_size)
    if config.begin:
        eagle.load_state_dict(begun(config.begin, told, start))
        eagle.scale_features(target.scales)
    else:
        d2t, t2d = choose_vocabulary(counts, told.draft_vocab, start.generation["eos_token_id"])
        eagle.d2t.copy_(torch.from_numpy(d2t))
        eagle.t2d.copy_(torch.from_numpy(t2d))
        eagle.init_weights(ends.head_weight(), ends.model.norm.weight, config.seed)
        eagle.soften(first.features / target.scales)
    torch.manual_seed(config.seed)
    optimizer = adamw(eagle.named_parameters(), config.optimizer)
    reader = open_reader(shards, config)
    # The state asks a decoder for nothing but its parameters.
    state = TrainState(cast(Decoder, eagle), optimizer, reader, place)
    dtype = getattr(torch, config.compute.precision)
    heldout = by_source(folder, list(config.prompts))
    watched = Watched(start.tokenizer, heldout, config.batch.micro_tokens, device, dtype)
    steps = -(-num_rows // (config.batch.tokens // config.context))
    loss = UnrolledLoss(target, config.unroll, config.decay)
    share = float(counts.sum()) / shards.num_tokens
    look, own = operations(start.arch, told, config, share)
    flops = own if config.keep_features else look + own  # the first epoch's looks are beside it
    return Setup(state, target, eagle, reader, steps, loss, watched, flops)


def begun_from(config: DraftConfig) -> list[dict[str, str]]:
    """For `run.json`: the draft to go on from, if there is one."""
    if not config.begin:
        return []
    found = resolve(config.begin)
    return [{"uri": found.uri, "sha256": found.sha256 or digest(found.path)}]


def begun(source: str, told: EagleConfig, start: Start) -> Mapping[str, Tensor]:
    """The weights of a draft to go on from; a ConfigError where it is no such draft."""
    found = load_eagle(resolve(source).path, start.arch)
    tensors, one = found.state_dict(), found.config
    shapes = {name: tuple(values.shape) for name, values in tensors.items()}
    if shapes != told.tensor_shapes() or one.layers != told.layers:
        raise ConfigError(
            f"begin={source}: that draft has {one.draft_vocab:,} words, reads layers "
            f"{list(one.layers)}, its MLP {one.arch.intermediate_size} wide, gated={one.gated}; "
            f"asked for are {told.draft_vocab:,}, {list(told.layers)}, "
            f"{told.arch.intermediate_size}, gated={told.gated}, and no embedding of its own. "
            "Change `head`, or begin anew."
        )
    return tensors


def open_reader(shards: Shards, config: DraftConfig) -> PackedReader:
    """Rows of whole dialogues of all kinds."""
    groups = by_part(shards.index, {"answers": Source(tuple(config.prompts))})
    return PackedReader(shards, {"answers": 1.0}, config.seed, groups, cuts=False)


def count_rows(reader: PackedReader, config: DraftConfig) -> int:
    """Rows until every answer was drawn so many times; by drawing them all."""
    count, left = 0, config.epochs * reader.shards.num_documents
    while left > 0:
        left -= len(reader.row(config.context))
        count += 1
    return count


def export(config: DraftConfig, setup: Setup, draft: Path) -> None:
    """Write the draft's own files; its maps keep their types."""
    dtype, eagle = getattr(torch, config.head.dtype), setup.eagle
    eagle.scale_features(1 / setup.target.scales)
    weights: Mapping[str, Tensor] = eagle.state_dict()
    stored = {n: w.to(dtype) if w.is_floating_point() else w for n, w in weights.items()}
    save_eagle(draft, eagle.config, stored)
