"""A stage that goes on from a model: opened by its source, filled into a decoder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attending.artifact import digest
from attending.chat import Tokenizer
from attending.errors import ConfigError
from attending.model.architecture import Architecture
from attending.model.checkpoint import Checkpoint, open_checkpoint
from attending.model.files import read_json
from attending.model.weights import read_tensor
from attending.sources import resolve


@dataclass(frozen=True, slots=True)
class Start:
    """A model on this machine, before its weights are read."""

    source: str
    sha256: str
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    generation: Mapping[str, Any]
    """What its `generation_config.json` holds, for the model that comes out."""

    @property
    def arch(self) -> Architecture:
        """What is built."""
        return self.checkpoint.arch

    @property
    def parent(self) -> dict[str, str]:
        """For `run.json`."""
        return {"uri": self.source, "sha256": self.sha256}

    def fill(self, name: str, weight: Tensor) -> None:
        """Read a weight by its official name; quantised ones become float."""
        weight.copy_(read_tensor(self.checkpoint, name))


def open_start(source: str) -> Start:
    """Open a folder, a GGUF file or what was pulled.

    Raises:
        SourceError: It is not on this machine.
        CheckpointError: It cannot be read.
    """
    found = resolve(source)
    checkpoint = open_checkpoint(found.path)
    tokenizer = checkpoint.tokenizer()
    file = found.path / "generation_config.json"
    settings = read_json(file) if found.path.is_dir() and file.is_file() else {}
    stops = sorted(tokenizer.stop_ids | set(checkpoint.arch.eos_ids))
    generation = {**settings, "eos_token_id": stops}
    sha256 = found.sha256 or digest(found.path)
    return Start(source, sha256, checkpoint, tokenizer, generation)


def require_same_vocabulary(one: Start, other: Start, what: str) -> None:
    """ConfigError if two models do not mean the same by an id."""
    if one.tokenizer.sha256 != other.tokenizer.sha256 or one.arch.vocab_size != (
        other.arch.vocab_size
    ):
        raise ConfigError(
            f"the {what} {other.source} has another vocabulary ({other.arch.vocab_size:,} ids) "
            f"than {one.source} ({one.arch.vocab_size:,} ids): their logits cannot be compared. "
            "Name a model with the same tokenizer."
        )
