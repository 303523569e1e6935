"""Before and after the pretraining loop: corpus, model and optimizer in; a model folder out."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from attending import artifact
from attending.chat import Tokenizer
from attending.errors import CheckpointError, ConfigError
from attending.mesh import World
from attending.model.architecture import Architecture, parse_config
from attending.model.decoder import init_weight
from attending.model.files import read_tokenizer
from attending.pretrain.recipe import PretrainConfig
from attending.shards import Shards
from attending.sources import resolve
from attending.train import run
from attending.train.heldout import Heldout
from attending.train.optimizer import adamw
from attending.train.parallel import build
from attending.train.reader import PackedReader
from attending.train.rows import require_even
from attending.train.state import TrainState
from attending.train.watch import Watched

NOTE = (
    "A base model for demonstration: it goes on with a text, follows no instructions, and what it "
    "says about medicine is often wrong."
)


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run works with."""

    state: TrainState
    reader: PackedReader
    """The state's."""
    watched: Watched


def prepare(config: PretrainConfig, place: World, device: torch.device) -> Setup:
    """Open the corpus, check that everything fits, build model and optimizer."""
    shards, heldout = open_corpus(Path(config.corpus))
    tokenizer = read_tokenizer(resolve(config.tokenizer).path)
    arch = architecture(config, shards.index, tokenizer)
    check_rows(config, place.size)
    reader = PackedReader(shards, config.stages[0].mixture, config.data_seed)
    for stage in config.stages:
        reader.require(stage.mixture)

    def fill(name: str, weight: Tensor) -> None:
        # Seeded by name: the same weights however the model is made or cut among ranks.
        seed = hashlib.sha256(f"{config.seed}/{name}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, signed=True))
        init_weight(arch, name, weight, generator)

    torch.manual_seed(config.seed + place.rank)
    decoder = build(arch, fill, place, device, config.compute)
    optimizer = adamw(decoder.named_parameters(), config.optimizer)
    dtype = getattr(torch, config.compute.precision)
    watched = Watched(tokenizer, heldout, config.batch.micro_tokens, device, dtype)
    return Setup(TrainState(decoder, optimizer, reader, place), reader, watched)


def open_corpus(folder: Path) -> tuple[Shards, dict[str, Heldout]]:
    """The training shards, and the held-out ones by domain."""
    heldout = sorted(path.parent for path in (folder / "heldout").glob("*/index.json"))
    found = {path.name: Shards(path) for path in heldout}
    every = {name: Heldout(own, range(own.num_documents)) for name, own in found.items()}
    return Shards(folder / "train"), every


def architecture(
    config: PretrainConfig, index: Mapping[str, object], tokenizer: Tokenizer
) -> Architecture:
    """What the recipe says, with the tokenizer's ids.

    Raises:
        ConfigError: The corpus was encoded with another tokenizer, or a stage is longer than the
            context that the configuration promises.
        CheckpointError: The configuration is not valid, or its vocabulary too small.
    """
    if tokenizer.sha256 != index["tokenizer_sha256"]:
        raise ConfigError(
            f"the corpus was not encoded with the tokenizer {config.tokenizer}: name the one that "
            "its run.json names, or build the corpus again with --set pack.tokenizer=..."
        )
    ids = {"bos_token_id": index.get("begin_of_text"), "eos_token_id": index["end_of_text"]}
    last = {"rope_theta": config.stages[-1].rope_theta}
    arch = parse_config({**config.model, **last, **{k: v for k, v in ids.items() if v is not None}})
    run.require_vocabulary(tokenizer.num_ids - 1, arch.vocab_size)
    for stage in config.stages:
        if stage.context > arch.context:
            raise ConfigError(
                f"stage {stage.name} has a context of {stage.context} tokens and "
                f"model.max_position_embeddings is {arch.context}: raise it."
            )
    return arch


def check_rows(config: PretrainConfig, ranks: int) -> None:
    """ConfigError if a stage's rows cannot be dealt out evenly."""
    for stage in config.stages:
        require_even(config.batch, stage.context, ranks, f"stage {stage.name}")


def parents(config: PretrainConfig) -> list[dict[str, str]]:
    """The corpus and the tokenizer."""
    index = Path(config.corpus) / "train" / "index.json"
    if not index.is_file():
        raise CheckpointError(
            f"{config.corpus} has no train/index.json: give the folder that `attending corpus` "
            "wrote, with --set corpus=..."
        )
    return [
        {"uri": config.corpus, "sha256": artifact.digest(index)},
        {"uri": config.tokenizer, "sha256": artifact.digest(resolve(config.tokenizer).path)},
    ]
