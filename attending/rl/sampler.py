"""Answers by this machine's engine, on the weights as they are after the last update.

The native runner gets them packed into 8 bits; what that changes is told by the mismatch between
its log-probabilities and the trainer's, and corrected by the loss' weights. The same seed, case and
version give the same answer, whatever is sampled beside it.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from attending.engine.native import pack
from attending.engine.pages import pages_for
from attending.engine.runner import Runner
from attending.engine.sampler import Sampling
from attending.engine.scheduler import Request, Scheduler
from attending.errors import UsageError
from attending.model.architecture import PAGE_TOKENS, Architecture
from attending.model.decoder import Decoder
from attending.model.gguf_file import Blocks
from attending.rl.recipe import SamplerConfig
from attending.rl.types import Rollout


class Asked(NamedTuple):
    """A prompt, and how its answer is drawn."""

    case: str
    """Its id."""
    prompt: tuple[int, ...]
    """Ids."""
    seed: int
    """Of this answer."""
    temperature: float = 1.0
    """1: the loss knows no other; 0 takes the likeliest, for watching."""


class Sampler(Protocol):
    """Writes answers."""

    def load(self, decoder: Decoder, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Take the weights after an update; every rank calls it."""

    def sample(self, asked: Sequence[Asked], version: int) -> Iterator[tuple[int, Rollout]]:
        """Places and answers, in the order in which they end; an error where one fails."""


@dataclass(frozen=True, slots=True)
class TrainedWeights:
    """Weights in training, as the engine's packing reads a quantised checkpoint.

    A model that was rounded before lies on a grid to the point, and its updates would be rounded
    off on the same one, also in 4 bits: every grid `is_spread`.
    """

    arch: Architecture
    tensors: Mapping[str, Tensor]
    form: str

    def blocks(self, name: str, /) -> Blocks:
        """One tensor, rounded; embedding and head to 8 bits."""
        form = "w8" if name in pack.OUTSIDE else self.form
        bits, group, symmetric = pack.FORMATS[form]
        weight = self.read(name)
        return pack.quantise(weight, bits, group, symmetric=symmetric, is_spread=True)

    def read(self, name: str, /) -> NDArray[np.float32]:
        """One tensor in float32."""
        found: NDArray[np.float32] = self.tensors[name].detach().cpu().float().numpy()
        return found


class LocalSampler:
    """The engine in this process; one a rank, each with all weights."""

    def __init__(
        self,
        config: SamplerConfig,
        folder: Path,
        stop_ids: frozenset[int],
        max_tokens: int,
        max_prompt: int,
    ) -> None:
        """Nothing is read yet.

        Args:
            config: Who writes.
            folder: For the packed weights, one set at a time.
            stop_ids: Tokens that end an answer.
            max_tokens: Of an answer.
            max_prompt: Of a prompt.
        """
        self._config, self._folder, self._stops = config, folder, stop_ids
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed: other weights
        self._max_tokens, self._longest = max_tokens, max_prompt + max_tokens + PAGE_TOKENS
        self._turn = 0
        self._runner: Runner | None = None

    def load(self, decoder: Decoder, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """See `Sampler`; `weights` are asked for only where they must be packed."""
        running = self._config.running
        pages = pages_for(decoder.arch, running * self._longest, running)
        self._runner = None  # gives its memory back before the next is made
        if self._config.weights == "float":
            if dist.is_initialized():
                raise UsageError(
                    "sampler.weights=float computes with the weights in training, and these are "
                    "cut among the ranks here: take w8."
                )
            from attending.engine.torch_runner import TorchRunner

            self._runner = TorchRunner(decoder, pages)
            return
        from attending.engine.native.runner import NativeOptions, NativeRunner, obstacle

        if reason := obstacle(decoder.arch):
            raise UsageError(f"{reason} Sample with --set sampler.weights=float.")
        before, self._turn = self._folder / f"turn_{self._turn}", self._turn + 1
        source = TrainedWeights(decoder.arch, weights(), self._config.weights)
        now = self._folder / f"turn_{self._turn}"
        packed = pack.open_packed(source, now, "stored")
        options: dict[str, Any] = {"weights": self._config.weights, "threads": self._config.threads}
        self._runner = NativeRunner(packed, pages, NativeOptions(**options))
        shutil.rmtree(before, ignore_errors=True)

    def sample(self, asked: Sequence[Asked], version: int) -> Iterator[tuple[int, Rollout]]:
        """See `Sampler`; every token is kept with its log-probability at temperature 1."""
        assert self._runner is not None
        scheduler = Scheduler(self._runner, max_running=self._config.running)
        known: dict[int, tuple[int, list[int], list[float]]] = {}
        for place, one in enumerate(asked):
            sampling = Sampling(
                temperature=one.temperature, max_tokens=self._max_tokens, seed=one.seed
            )
            request = Request(one.prompt, sampling, self._stops, num_top=0)
            known[scheduler.submit(request)] = place, [], []
        while scheduler.num_running or scheduler.num_waiting:
            for output in scheduler.step():
                if output.error:
                    raise output.error
                place, ids, logprobs = known[output.handle]
                if output.token is not None:
                    assert output.scored is not None
                    ids.append(output.token)
                    logprobs.append(output.scored.logprob)
                if output.finish:
                    one, told = asked[place], ((*ids,), (*logprobs,), output.finish)
                    yield place, Rollout(one.case, one.prompt, *told, one.seed, version)
