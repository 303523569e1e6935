"""A step's rows, dealt out to ranks and forward passes."""

from collections.abc import Sequence

import torch

from attending.errors import CheckpointError, ConfigError
from attending.mesh import World
from attending.shards import Shards
from attending.train.reader import Batch, PackedReader, Row
from attending.train.recipe import BatchConfig


def require_even(batch: BatchConfig, context: int, ranks: int, name: str) -> None:
    """Every rank makes as many forward passes as the others, each of as many rows.

    Args:
        batch: Tokens of a step and of a pass.
        context: Tokens of a row.
        ranks: How many.
        name: Of the stage, for the error.

    Raises:
        ConfigError: Rows cannot be dealt out so.
    """
    rows, each = batch.tokens // context, batch.micro_tokens // context
    if batch.tokens % context or rows % ranks or not each or rows // ranks % each:
        raise ConfigError(
            f"{name}: a step of batch.tokens={batch.tokens} is to be rows of "
            f"{context}, dealt out evenly to {ranks} ranks, in passes "
            f"of batch.micro_tokens={batch.micro_tokens}. Choose tokens = context x ranks x a "
            "whole number, and micro_tokens = context x a divisor of that number."
        )


def deal(
    reader: PackedReader,
    rows: Sequence[Row],
    each: int,
    place: World,
    vocab_size: int,
    device: torch.device,
) -> list[Batch]:
    """This rank's share of a step's rows, as forward passes of `each` rows.

    Raises:
        CheckpointError: A token that the model does not have; torch would not say where from.
    """
    mine = rows[place.rank :: place.size]
    batches = [reader.batch(mine[i : i + each]) for i in range(0, len(mine), each)]
    largest = max(int(torch.maximum(b.ids, b.targets).max()) for b in batches)
    if largest >= vocab_size:
        raise CheckpointError(
            f"a shard is damaged: token {largest} in a step with {where(reader.shards, rows)}, "
            f"and the vocabulary is {vocab_size}. Build the corpus again."
        )
    return [batch.to(device) for batch in batches]


def where(shards: Shards, rows: Sequence[Row]) -> str:
    """The sources and numbers of a step's documents, for an error; no text."""
    sources = shards.index["sources"]
    numbers = sorted({piece.document for row in rows for piece in row})
    named = [f"{sources[shards.record(n)['source']]} #{n}" for n in numbers[:8]]
    return ", ".join(named) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
