"""Before and after the pretraining loop: corpus, model and optimizer in; a model folder out."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
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
from attending.model.weights import save_model
from attending.pretrain.recipe import PretrainConfig
from attending.shards import Shards
from attending.sources import resolve
from attending.train import run
from attending.train.optimizer import adamw
from attending.train.parallel import barrier, build, whole_weights
from attending.train.reader import Batch, PackedReader, Row
from attending.train.state import STATES, TrainState
from attending.train.watch import Watched

NOTE = (
    "A base model for demonstration: it goes on with a text, follows no instructions, and what it "
    "says about medicine is often wrong."
)


@dataclass(frozen=True, slots=True)
class Setup:
    """What a run works with."""

    state: TrainState
    watched: Watched
    shards: Shards

    @property
    def domains(self) -> list[str]:
        """Names of the kinds in batches."""
        found: list[str] = self.shards.index["domains"]
        return found


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
    return Setup(TrainState(decoder, optimizer, reader, place), watched, shards)


def open_corpus(folder: Path) -> tuple[Shards, dict[str, Shards]]:
    """The training shards, and the held-out ones by domain."""
    heldout = sorted(path.parent for path in (folder / "heldout").glob("*/index.json"))
    return Shards(folder / "train"), {path.name: Shards(path) for path in heldout}


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
    """Every rank makes as many forward passes as the others, each of as many rows.

    Raises:
        ConfigError: Rows cannot be dealt out so.
    """
    tokens, micro = config.batch.tokens, config.batch.micro_tokens
    for stage in config.stages:
        rows, each = tokens // stage.context, micro // stage.context
        if tokens % stage.context or rows % ranks or not each or rows // ranks % each:
            raise ConfigError(
                f"stage {stage.name}: a step of batch.tokens={tokens} is to be rows of "
                f"{stage.context}, dealt out evenly to {ranks} ranks, in passes "
                f"of batch.micro_tokens={micro}. Choose tokens = context x ranks x a whole number, "
                "and micro_tokens = context x a divisor of that number."
            )


def micro_batches(config: PretrainConfig, setup: Setup, rows: Sequence[Row]) -> list[Batch]:
    """This rank's share of a step's rows, as forward passes.

    Raises:
        CheckpointError: A token that the model does not have; torch would not say where from.
    """
    state, device = setup.state, setup.watched.device
    mine = rows[state.place.rank :: state.place.size]
    each = config.batch.micro_tokens // (config.batch.tokens // len(rows))
    batches = [state.reader.batch(mine[i : i + each]) for i in range(0, len(mine), each)]
    largest = max(int(batch.targets.max()) for batch in batches)
    if largest >= state.decoder.arch.vocab_size:
        raise CheckpointError(
            f"a shard is damaged: token {largest} in a step with {where(setup, rows)}, and the "
            f"vocabulary is {state.decoder.arch.vocab_size}. Build the corpus again."
        )
    return [batch.to(device) for batch in batches]


def where(setup: Setup, rows: Sequence[Row]) -> str:
    """The sources and numbers of a step's documents, for an error; no text."""
    sources = setup.shards.index["sources"]
    numbers = sorted({piece.document for row in rows for piece in row})
    named = [f"{sources[setup.shards.record(n)['source']]} #{n}" for n in numbers[:8]]
    return ", ".join(named) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


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


def export(
    setup: Setup, draft: Path, out: Path, record: artifact.Record, measured: Mapping[str, float]
) -> Path:
    """Write the model folder; every rank calls it, rank 0 writes."""
    decoder = setup.state.decoder
    weights = whole_weights(decoder)
    if setup.state.place.rank == 0:
        generation = {"eos_token_id": list(decoder.arch.eos_ids)}
        save_model(draft, decoder.arch, weights, setup.watched.tokenizer, generation)
        artifact.finish(draft, record, title=out.name, note=NOTE, metrics=measured)
        artifact.settle(draft, out)
        shutil.rmtree(out / STATES)  # not before all else is safe
    barrier()
    return out
