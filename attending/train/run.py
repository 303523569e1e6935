"""What surrounds a stage's loop: its draft folder, signals, errors that name a setting."""

import logging
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from attending import artifact
from attending.artifact import Record, disk_has_room, write_json
from attending.chat import Tokenizer
from attending.errors import CheckpointError, TrainingError, UsageError
from attending.mesh import World
from attending.model.weights import save_model
from attending.train.parallel import barrier, total, whole_weights
from attending.train.recipe import StateConfig
from attending.train.schedule import due
from attending.train.state import MODEL, STATES, TOLD, TrainState, require_unchanged, states
from attending.train.step import Gradients

log = logging.getLogger(__name__)


class Stopped(UsageError):  # noqa: N818  (asked for, not a fault)
    """The run was asked to stop, and has saved its state."""


def begin(
    out: Path,
    told: Mapping[str, Any],
    place: World,
    *,
    resume: bool,
    accept_changes: bool,
    final: str = MODEL,
    holds: Callable[[Path], object] = states,
) -> Path:
    """The draft folder `OUT.tmp` of a run that begins or goes on; every rank calls it.

    Args:
        out: Where it will be when it is whole.
        told: What decides the run: its recipe, and the hashes of what it reads.
        place: Among all ranks.
        resume: It is to go on.
        accept_changes: Although `told` has changed.
        final: A pattern of what must not have.
        holds: Whether a draft folder has anything to go on from.

    Raises:
        UsageError: OUT exists, or a stopped run lies there and `resume` was not asked for.
        ConfigError: The recipe has changed and `accept_changes` was not asked for.
    """
    draft = out.with_name(out.name + ".tmp")
    if out.exists():
        raise UsageError(f"{out.name} exists; choose another name or remove it first.")
    has_state = bool(holds(draft))
    if has_state and not resume:
        raise UsageError(
            f"{draft.name} holds a stopped run: --resume goes on with it; to begin anew, remove it."
        )
    barrier()  # all have looked before one writes
    if has_state:
        require_unchanged(draft / STATES, told, accept=accept_changes, final=final)
    elif resume:
        log.info("%s holds no state to go on from: the run begins", draft.name)
    barrier()
    if place.rank == 0:
        (draft / STATES).mkdir(parents=True, exist_ok=True)
        write_json(draft / STATES / TOLD, told)
    barrier()
    return draft


def newest(draft: Path) -> Path | None:
    """The state to go on from, if any."""
    return next(iter(reversed(states(draft))), None)


class Signals:
    """Interrupts and terminations become a question that is asked after every step."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        """Take over both signals; a second one of either acts at once."""
        is_main = threading.current_thread() is threading.main_thread()  # else nothing can be taken
        for number in (signal.SIGINT, signal.SIGTERM) if is_main else ():
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop_asked(self, device: torch.device) -> bool:
        """Whether any rank was asked, so that all stop after the same step."""
        asked = torch.tensor(float(self._asked), device=device)
        return bool(total(asked))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        self.__exit__()


@contextmanager
def memory_and_disk(micro_tokens: int, out: Path) -> Iterator[None]:
    """Around a loop: when memory or the disk ends, say what to do."""
    try:
        with disk_has_room(out):
            yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_full and "allocate memory" not in str(error):
            raise
        raise TrainingError(
            f"out of memory with micro_tokens={micro_tokens}. Halve it (the result does not "
            "change) or set compute.recompute=true, then go on with --resume --accept-changes."
        ) from None


def export(
    state: TrainState,
    tokenizer: Tokenizer,
    generation: Mapping[str, Any],
    draft: Path,
    adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> None:
    """Write the model's own files into a run's draft; every rank calls it, rank 0 writes.

    Args:
        state: Its decoder is what is written.
        tokenizer: With its template.
        generation: What `generation_config.json` is to hold.
        draft: The folder.
        adapt: Makes the official weights of what was trained, such as a merge of adapters.
    """
    weights = whole_weights(state.decoder)
    if state.place.rank == 0:
        save_model(draft, state.decoder.arch, adapt(weights), tokenizer, generation)
    barrier()


def settle(draft: Path, out: Path, record: Record, note: str, metrics: Mapping[str, float]) -> None:
    """The last files of a run, and its name; rank 0 calls it."""
    artifact.finish(draft, record, title=out.name, note=note, metrics=metrics)
    artifact.settle(draft, out)
    shutil.rmtree(out / STATES)  # not before all else is safe


def save_if_due(
    state: TrainState,
    draft: Path,
    told: StateConfig,
    before: int,
    signals: Signals,
    device: torch.device,
    files: Callable[[], dict[str, int]],
    *,
    is_last: bool,
    is_end: bool = False,
) -> None:
    """The end of a step; every rank calls it.

    Args:
        state: Saved at the end, where a multiple of `told.every_tokens` was passed, and if asked to
            stop.
        draft: The run's folder.
        told: How often, and how many are kept.
        before: Tokens before the step.
        signals: Whether to stop.
        device: Of this rank.
        files: Sizes of what grows with the run.
        is_last: There is no further step.
        is_end: Of a stage: save in any case.

    Raises:
        Stopped: A signal asked for it, and the state is saved.
    """
    is_stopping = signals.stop_asked(device)
    if is_last or is_end or is_stopping or due(told.every_tokens, before, state.tokens):
        state.files = files()
        state.save(draft, told.keep)
    if is_stopping and not is_last:
        raise Stopped(f"stopped after step {state.step}; --resume goes on.")


def require_finite(found: Gradients, step: int, data: Callable[[], str]) -> None:
    """Before an update that would spoil every weight.

    Raises:
        TrainingError: The loss or the norm is no finite number; names the step and its data.
    """
    if not (torch.tensor(found.loss).isfinite() and torch.tensor(found.norm).isfinite()):
        raise TrainingError(
            f"step {step}: the loss is {found.loss} and the gradient's norm {found.norm}; the step "
            f"was not made and the last saved state is whole. Its data: {data()}. Look at these "
            "documents, or lower optimizer.peak, and go on with --resume --accept-changes."
        )


def require_vocabulary(largest: int, vocab_size: int) -> None:
    """An id that the embedding does not have would be read from beyond its end.

    Raises:
        CheckpointError: The tokenizer knows more ids than the model.
    """
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer's ids go up to {largest} and the model's vocabulary is {vocab_size}: "
            f"they do not belong together. Where the model is still to be made, set "
            f"model.vocab_size to at least {largest + 1}, best a multiple of 128."
        )
