"""What a run tells while it trains: metrics.jsonl, samples.jsonl, a drawer of progress."""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from attending.chat import Tokenizer
from attending.logs import MetricLog, cut
from attending.model.lora import ADDED
from attending.model.scoring import bits_interval, bits_per_byte
from attending.train.heldout import DocumentScore, Heldout, sample, score_documents
from attending.train.plan import flops, matrix_ceiling
from attending.train.recipe import HeldoutConfig
from attending.train.state import TrainState
from attending.train.step import Gradients

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
RECENT = 20  # steps that the speed is a mean of


class Progress(NamedTuple):
    """A step that was made, for whoever draws it."""

    step: int
    num_steps: int
    loss: float
    tokens_per_second: float
    ceiling_share: float
    """Of the operations a second of this machine's largest products."""
    seconds_left: float


class Notes(NamedTuple):
    """Lines to print: held-out measures, samples."""

    step: int
    lines: Sequence[str]


Show = Callable[[Progress | Notes], object]


@dataclass(frozen=True, slots=True)
class Watched:
    """What is looked at beside the state."""

    tokenizer: Tokenizer
    heldout: Mapping[str, Heldout]
    """By domain, or by part."""
    micro_tokens: int
    device: torch.device
    dtype: torch.dtype
    """Of the products, whose ceiling the speed is compared with."""


class Watch:
    """Writes on rank 0; measures on all ranks."""

    def __init__(
        self,
        draft: Path,
        state: TrainState,
        watched: Watched,
        config: HeldoutConfig,
        num_steps: int,
        show: Show | None,
    ) -> None:
        """Opens the files and cuts off what was written after the state that is gone on from."""
        self._draft, self._state, self._watched, self._config = draft, state, watched, config
        self._num_steps = num_steps
        self._is_first = state.place.rank == 0
        self._show = show if self._is_first else None
        self._ceiling = matrix_ceiling(watched.device, watched.dtype) * state.place.size
        self._recent: list[tuple[int, float, float]] = []
        added = [p.numel() for n, p in state.decoder.named_parameters() if n.endswith(ADDED)]
        self._adapter = sum(added) or None
        if self._is_first:
            cut(draft / SAMPLES, state.files.get(SAMPLES, 0))
            self._log = MetricLog(draft / METRICS, state.files.get(METRICS, 0))

    @property
    def began(self) -> float:
        """When the run would have begun, by `time.monotonic()`, had it never been stopped."""
        return time.monotonic() - (self._log.seconds if self._is_first else 0.0)

    def sizes(self) -> dict[str, int]:
        """What a state must know to cut the files back to what they hold now."""
        files = [self._draft / name for name in (METRICS, SAMPLES)]
        return {file.name: file.stat().st_size for file in files if file.exists()}

    def step(self, found: Gradients, rate: float, began: float, lengths: Sequence[int]) -> None:
        """Log a step that was just made and began at `time.monotonic() == began`.

        `lengths`: of this rank's segments; the others' are much the same.
        """
        state = self._state
        operations = self.operations(lengths) * state.place.size
        now = found.tokens, operations, time.monotonic() - began
        self._recent = [*self._recent[1 - RECENT :], now]
        tokens, operations, seconds = (sum(column) for column in zip(*self._recent, strict=True))
        speed, share = tokens / seconds, operations / seconds / self._ceiling
        self.write(
            {
                "train/loss_nats": found.loss,
                **{f"train/{name}_loss_nats": loss for name, loss in found.by_kind.items()},
                "train/gradient_norm": found.norm,
                "train/learning_rate": rate,
                "train/consumed_tokens": state.tokens,
                "train/skipped_steps": state.skipped,
                "train/tokens_per_second": speed,
                "train/ceiling_share": share,
                "train/peak_memory_bytes": peak_memory(self._watched.device),
                **state.reader.figures(),
            }
        )
        if self._show:
            left = (self._num_steps - state.step) * seconds / len(self._recent)
            self._show(Progress(state.step, self._num_steps, found.loss, speed, share, left))

    def operations(self, lengths: Sequence[int]) -> float:
        """Of a step over segments."""
        return flops(self._state.decoder.arch, lengths, self._adapter)

    def measure(self, context: int) -> None:
        """Bits per byte by domain, of the first documents, and samples; every rank calls it."""
        found, lines = {}, []
        for domain, scores in self._scores(context, self._config.max_tokens).items():
            nats, sizes, _ = zip(*scores, strict=True)
            value = bits_per_byte(nats, sizes)
            found[f"heldout/{domain}_bits_per_byte"] = value
            lines.append(f"{domain} {value:.3f} bits per byte")
        self.write(found)
        self.tell([*lines, *self._samples()])

    def baseline(self, context: int) -> None:
        """Before the first step, what `finish` is to be compared with; every rank calls it."""
        if self._state.step == 0:
            found, lines = self._measure_all(context, "_before")
            self.write(found)
            self.tell([*lines, *self._samples()])
            self._state.owes_measure = False

    def finish(self, context: int) -> dict[str, float]:
        """The last measure, of `final_tokens` of a domain, with intervals; every rank calls it."""
        found, lines = self._measure_all(context, "")
        if found:
            self.write(found)
        self.tell([*lines, *self._samples()])
        if self._is_first:
            self._log.close()
        return found

    def _measure_all(self, context: int, suffix: str) -> tuple[dict[str, float], list[str]]:
        """Figures and lines; `heldout_DOMAIN{suffix}.jsonl` gets a row a document."""
        found: dict[str, float] = {}
        lines = []
        for domain, scores in self._scores(context, self._config.final_tokens).items():
            nats, sizes, _ = zip(*scores, strict=True)
            value, (low, high) = bits_per_byte(nats, sizes), bits_interval(nats, sizes)
            name = f"heldout/{domain}_bits_per_byte"
            found |= {name: value, f"{name}_low": low, f"{name}_high": high}
            found[f"heldout/{domain}_documents"] = len(scores)
            lines.append(f"{domain} {value:.3f} ({low:.3f} to {high:.3f}) bits per byte")
            if self._is_first:
                rows = [json.dumps(one._asdict()) + "\n" for one in scores]
                file = self._draft / f"heldout_{domain}{suffix}.jsonl"
                file.write_text("".join(rows), encoding="utf-8")
        return found, lines

    def _scores(self, context: int, max_tokens: int) -> dict[str, list[DocumentScore]]:
        found = {
            domain: score_documents(
                self._state.decoder,
                documents,
                context=context,
                micro_tokens=self._watched.micro_tokens,
                max_tokens=max_tokens,
                place=self._state.place,
                device=self._watched.device,
            )
            for domain, documents in self._watched.heldout.items()
        }
        return {domain: scores for domain, scores in found.items() if scores}

    def _samples(self) -> list[str]:
        prompts, state = self._config.prompts, self._state
        texts = sample(
            state.decoder,
            self._watched.tokenizer,
            prompts,
            self._config.sample_tokens,
            self._watched.device,
        )
        pairs = list(zip(prompts, texts, strict=True))
        if self._is_first and pairs:
            with (self._draft / SAMPLES).open("a", encoding="utf-8") as file:
                for prompt, text in pairs:
                    row = {"step": state.step, "prompt": prompt, "text": text}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return [f"{prompt} [...] {' '.join(text.split())}" for prompt, text in pairs]

    def write(self, values: Mapping[str, float]) -> None:
        """A row of the present step; rank 0 writes."""
        if self._is_first:
            self._log.write(self._state.step, values)

    def tell(self, lines: Sequence[str]) -> None:
        """Lines to print."""
        if self._show:
            self._show(Notes(self._state.step, lines))


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator on CUDA, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
