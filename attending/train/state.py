"""Where a run stands: everything that decides what it does next, saved whole and found again.

Tensors go through torch's distributed checkpoint, so another number of ranks can go on; counts go
to `progress.json` beside it. A state is written under a draft's name and renamed, older ones are
removed after that: there is always a whole one. The checkpoint's own `.metadata` is a pickle of
torch's: resume from folders that you wrote yourself.
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from attending.artifact import disk_has_room, settle, write_json
from attending.errors import CheckpointError, ConfigError
from attending.mesh import World
from attending.model.decoder import Decoder
from attending.train.optimizer import set_learning_rate
from attending.train.parallel import barrier
from attending.train.recipe import OptimizerConfig
from attending.train.schedule import Norms, adaptive_update
from attending.train.step import Gradients, clip

STATES, PROGRESS, TOLD = "state", "progress.json", "told.json"
MODEL = r"model\."  # the shape of what is trained
COUNTS = ("step", "tokens", "skipped", "owes_measure", "files")


class Reader(Protocol):
    """Where the data stands."""

    def state(self) -> dict[str, Any]:
        """As JSON."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""

    def figures(self) -> dict[str, float]:
        """For the metrics."""


@dataclass(slots=True)
class TrainState:
    """Model, optimizer, data position, torch's random numbers, the skip rule's window, counts."""

    decoder: Decoder
    optimizer: torch.optim.Optimizer
    reader: Reader
    place: World
    step: int = 0
    """Steps made, skipped ones among them."""
    tokens: int = 0
    """Targets consumed."""
    norms: Norms = field(default_factory=Norms)
    skipped: int = 0
    """Steps whose update was not made."""
    owes_measure: bool = True
    """The next thing to do is to measure."""
    files: dict[str, int] = field(default_factory=dict)
    """Sizes of the files that grow with the run, when it was saved."""

    def update(self, found: Gradients, rate: float, config: OptimizerConfig) -> None:
        """Make the step whose gradients were found, or skip it; empties them and counts.

        Args:
            found: By `accumulate`.
            rate: Of learning.
            config: Its guards.
        """
        made = False
        if found.norm:  # of 0: nothing was taught, and there is no norm to remember
            made, self.norms = adaptive_update(self.norms, found.norm, config.rule)
            self.skipped += not made
        if made:
            clip(self.decoder.parameters(), config.clip_norm, found.norm)
            set_learning_rate(self.optimizer, rate)
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step, self.tokens = self.step + 1, self.tokens + found.tokens

    def save(self, out: Path, keep: int) -> None:
        """Write `OUT/state/step_N`, then remove all but the `keep` newest; every rank calls it."""
        folder = out / STATES / f"step_{self.step:09d}"
        draft = folder.with_name(folder.name + ".tmp")
        if self.place.rank == 0:
            for old in (draft, folder):
                shutil.rmtree(old, ignore_errors=True)
            draft.mkdir(parents=True)
        barrier()
        with disk_has_room(folder), _alone_is_meant(), _failures_raised():
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
        hyper = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        try:
            progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
            ranks = int(progress["ranks"])
            tensors = self._tensors(of_rank=self.place.rank % ranks)
            with _alone_is_meant(), _failures_raised():
                load(tensors, checkpoint_id=folder, no_dist=not dist.is_initialized())
        except Exception as error:  # noqa: BLE001  (a damaged file may raise anything)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise CheckpointError(
                f"{folder.name} cannot be read ({reason}): remove it, and the one before is used."
            ) from None
        set_state_dict(
            self.decoder,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
        )
        for group, told in zip(self.optimizer.param_groups, hyper, strict=True):
            group.update(told)  # the recipe's, which may have changed
        self.reader.restore(progress["reader"])
        self.norms = Norms(tuple(progress["norms"]["window"]), progress["norms"]["num_skipped"])
        for name in COUNTS:
            setattr(self, name, progress[name])
        (random,) = tensors["random"].values()
        if self.place.rank < ranks:
            torch.set_rng_state(random)
        else:  # a rank that did not exist: its numbers must not be those of another
            torch.manual_seed(torch.initial_seed() + self.step + self.place.rank)

    def _tensors(self, of_rank: int | None = None) -> dict[str, Any]:
        is_new = not self.optimizer.state
        model, optimizer = get_state_dict(self.decoder, self.optimizer)
        if is_new:  # torch makes one by a step of zeros, which no bias correction may count
            for slots in self.optimizer.state.values():
                slots["step"].zero_()
        rank = self.place.rank if of_rank is None else of_rank
        random: dict[str, Tensor] = {f"rank_{rank}": torch.get_rng_state()}
        return {"model": model, "optimizer": optimizer, "random": random}

    def _progress(self) -> Mapping[str, Any]:
        return {
            **{name: getattr(self, name) for name in COUNTS},
            "ranks": self.place.size,
            "norms": self.norms._asdict(),
            "reader": self.reader.state(),
        }


@contextmanager
def _failures_raised() -> Iterator[None]:
    """What failed, not torch's wrapping of it, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


@contextmanager
def _alone_is_meant() -> Iterator[None]:
    """A run of one process is no oversight, as torch's warning has it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def states(out: Path) -> list[Path]:
    """The whole states of a run, oldest first."""
    return sorted(path for path in (out / STATES).glob("step_*") if path.suffix != ".tmp")


def differences(before: object, now: object, at: str = "") -> list[str]:
    """What has changed between two recipes, one line a value."""
    if isinstance(before, list | tuple) and isinstance(now, list | tuple):
        before, now = ({str(i): one for i, one in enumerate(side)} for side in (before, now))
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return [] if before == now else [f"{at}: {json.dumps(before)} -> {json.dumps(now)}"]
    found = []
    for key in dict.fromkeys([*before, *now]):
        found += differences(before.get(key), now.get(key), f"{at}.{key}" if at else key)
    return found


def require_unchanged(
    folder: Path, told: Mapping[str, Any], *, accept: bool, final: str = MODEL
) -> None:
    """Refuse to go on with what a run was not told at its start, unless it is accepted.

    Raises:
        ConfigError: It has changed; the message lists how. What `final` matches is never accepted.
    """
    file = folder / TOLD
    if not file.is_file():
        raise CheckpointError(f"{file.name} is absent: there is no telling what the run was told.")
    changed = differences(json.loads(file.read_text(encoding="utf-8")), told)
    fixed = [line for line in changed if re.match(final, line)]
    if fixed or (changed and not accept):
        remedy = "these cannot change on the way: set them back, or begin anew."
        if not fixed:
            remedy = "set these back, or go on with the new values by --accept-changes."
        lines = "\n  ".join(fixed or changed)
        raise ConfigError(f"the run was begun with another recipe:\n  {lines}\n{remedy}")
