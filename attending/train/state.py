"""Where a run stands: everything that decides what it does next, saved whole and found again.

Tensors go through torch's distributed checkpoint, so another number of ranks can go on; counts go
to `progress.json` beside it. A state is written under a draft's name and renamed, older ones are
removed after that: there is always a whole one. The checkpoint's own `.metadata` is a pickle of
torch's: resume from folders that you wrote yourself.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from attending.artifact import disk_has_room, settle, write_json
from attending.errors import CheckpointError, ConfigError
from attending.mesh import World
from attending.train.parallel import barrier
from attending.train.reader import PackedReader
from attending.train.schedule import Norms

STATES, PROGRESS = "state", "progress.json"


@dataclass(slots=True)
class TrainState:
    """Model, optimizer, data position, random numbers, the skip rule's window, counts."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    reader: PackedReader
    place: World
    step: int = 0
    """Steps made, skipped ones among them."""
    tokens: int = 0
    """Targets consumed."""
    norms: Norms = field(default_factory=Norms)
    skipped: int = 0
    """Steps whose update was not made."""

    def save(self, out: Path, keep: int) -> None:
        """Write `OUT/state/step_N`, then remove all but the `keep` newest; every rank calls it."""
        folder = out / STATES / f"step_{self.step:09d}"
        draft = folder.with_name(folder.name + ".tmp")
        if self.place.rank == 0:
            for old in (draft, folder):
                shutil.rmtree(old, ignore_errors=True)
            draft.mkdir(parents=True)
        barrier()
        with disk_has_room(folder), _alone_is_meant():
            save(self._tensors(), checkpoint_id=draft, no_dist=not dist.is_initialized())
        if self.place.rank == 0:
            write_json(draft / PROGRESS, self._progress())
            settle(draft, folder)
            for old in states(out)[:-keep]:
                shutil.rmtree(old)
        barrier()

    def restore(self, folder: Path) -> None:
        """Become what `save` wrote, on this number of ranks.

        Raises:
            CheckpointError: The state is not whole.
        """
        try:
            progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
            ranks = int(progress["ranks"])
            tensors = self._tensors(of_rank=self.place.rank % ranks)
            with _alone_is_meant():
                load(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())
        except (OSError, ValueError, KeyError, CheckpointException) as error:
            raise CheckpointError(
                f"{folder.name} is not whole ({error}): remove it, and the state before it is used."
            ) from None
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
        )
        self.reader.restore(progress["reader"])
        self.step, self.tokens = progress["step"], progress["tokens"]
        self.norms = Norms(tuple(progress["norms"]["window"]), progress["norms"]["num_skipped"])
        self.skipped = progress["skipped"]
        (random,) = tensors["random"].values()
        if self.place.rank < ranks:
            torch.set_rng_state(random)
        else:  # a rank that did not exist: its numbers must not be those of another
            torch.manual_seed(torch.initial_seed() + self.step + self.place.rank)

    def _tensors(self, of_rank: int | None = None) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        rank = self.place.rank if of_rank is None else of_rank
        random: dict[str, Tensor] = {f"rank_{rank}": torch.get_rng_state()}
        return {"model": model, "optimizer": optimizer, "random": random}

    def _progress(self) -> Mapping[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "ranks": self.place.size,
            "norms": self.norms._asdict(),
            "skipped": self.skipped,
            "reader": self.reader.state(),
        }


@contextmanager
def _alone_is_meant() -> Iterator[None]:
    """A run of one process is no oversight, as torch's warning has it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def states(out: Path) -> list[Path]:
    """The whole states of a run, oldest first."""
    return sorted(path for path in (out / STATES).glob("step_*") if path.suffix != ".tmp")


def differences(before: Mapping[str, Any], now: Mapping[str, Any], at: str = "") -> list[str]:
    """What has changed between two recipes, one line a value."""
    found = []
    for key in sorted({*before, *now}):
        old, new, name = before.get(key), now.get(key), f"{at}{key}"
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{name}.")
        elif old != new:
            found.append(f"{name}: {json.dumps(old)} -> {json.dumps(new)}")
    return found


def require_unchanged(folder: Path, told: Mapping[str, Any], *, accept: bool) -> None:
    """Remember what a run was told at its start; later, refuse all else unless it is accepted.

    Raises:
        ConfigError: It has changed; the message lists how.
    """
    file = folder / "told.json"
    if file.is_file() and not accept:
        changed = differences(json.loads(file.read_text(encoding="utf-8")), told)
        if changed:
            raise ConfigError(
                "the run was begun with another recipe:\n  "
                + "\n  ".join(changed)
                + "\nSet these back, or go on with the new values by --accept-changes."
            )
    write_json(file, told)
