"""What a run tells while it trains: metrics.jsonl, samples.jsonl, a drawer of progress."""

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attending.chat import Tokenizer
from attending.logs import MetricLog, read_metrics
from attending.model.decoder import Decoder
from attending.model.scoring import bits_per_byte
from attending.shards import Shards
from attending.train.heldout import sample, score_documents
from attending.train.plan import flops_per_token, matrix_ceiling
from attending.train.recipe import HeldoutConfig
from attending.train.state import TrainState
from attending.train.step import Gradients

RECENT = 20  # steps that the speed is a mean of


class Progress(NamedTuple):
    """How far a run is, for whoever draws it."""

    step: int
    num_steps: int
    loss: float
    tokens_per_second: float
    ceiling_share: float
    """Of the operations a second of this machine's largest products."""
    seconds_left: float
    notes: Sequence[str] = ()
    """Lines to print: held-out measures, samples."""


Show = Callable[[Progress], object]


@dataclass(frozen=True, slots=True)
class Watched:
    """What is looked at beside the state."""

    decoder: Decoder
    tokenizer: Tokenizer
    heldout: Mapping[str, Shards]
    """By domain."""
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
        self._recent: list[tuple[int, float]] = []
        self.measured: dict[str, float] = {}
        """The newest held-out measures."""
        if self._is_first:
            self._log = MetricLog(draft / "metrics.jsonl", resume_step=state.step)
            for row in read_metrics(draft / "metrics.jsonl"):
                self.measured |= {k: v for k, v in row.items() if k.startswith("heldout/")}
            for file in (draft / "samples.jsonl", *draft.glob("heldout_*.jsonl")):
                _drop_rows_after(file, state.step)

    def step(self, found: Gradients, rate: float, began: float, context: int) -> None:
        """Log a step that was just made and began at `time.monotonic() == began`."""
        state = self._state
        self._recent = [*self._recent[1 - RECENT :], (found.tokens, time.monotonic() - began)]
        speed = sum(n for n, _ in self._recent) / sum(seconds for _, seconds in self._recent)
        share = speed * flops_per_token(self._watched.decoder.arch, context) / self._ceiling
        epochs = state.reader.epochs
        self._write(
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
                **{f"data/{name}_epochs": epoch for name, epoch in epochs.items()},
                "data/cut_documents": state.reader.num_cut,
            }
        )
        left = (self._num_steps - state.step) * found.tokens / speed
        self._tell(found.loss, speed, share, left)

    def measure(self, context: int, is_last: bool = False) -> None:
        """Bits per byte by domain, in the end of all documents; samples. Every rank calls it."""
        watched, notes = self._watched, []
        for domain, shards in watched.heldout.items():
            scores = score_documents(
                watched.decoder,
                shards,
                context=context,
                micro_tokens=watched.micro_tokens,
                max_tokens=None if is_last else self._config.max_tokens,
                place=self._state.place,
                device=watched.device,
            )
            if not scores:
                continue
            score = bits_per_byte([one.nats for one in scores], [one.num_bytes for one in scores])
            self.measured[f"heldout/{domain}_bits_per_byte"] = score.bits_per_byte
            if is_last:
                self.measured[f"heldout/{domain}_bits_per_byte_low"] = score.low
                self.measured[f"heldout/{domain}_bits_per_byte_high"] = score.high
                self.measured[f"heldout/{domain}_documents"] = score.documents
                self._append(f"heldout_{domain}.jsonl", [one._asdict() for one in scores])
            notes.append(f"{domain} {score.bits_per_byte:.3f} bits per byte")
        self._write(self.measured)
        texts = sample(
            watched.decoder,
            watched.tokenizer,
            self._config.prompts,
            self._config.sample_tokens,
            watched.device,
        )
        pairs = list(zip(self._config.prompts, texts, strict=True))
        self._append("samples.jsonl", [{"prompt": a, "text": b} for a, b in pairs])
        notes += [f"{prompt} [...] {' '.join(text.split())}" for prompt, text in pairs]
        self._tell(0.0, 0.0, 0.0, 0.0, notes)

    def close(self) -> None:
        """Close the files."""
        if self._is_first:
            self._log.close()

    def _write(self, values: Mapping[str, float]) -> None:
        if self._is_first:
            self._log.write(self._state.step, values)

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if self._is_first:
            with (self._draft / name).open("a", encoding="utf-8") as file:
                for row in rows:
                    line = json.dumps({"step": self._state.step, **row}, ensure_ascii=False)
                    file.write(line + "\n")

    def _tell(
        self, loss: float, speed: float, share: float, left: float, notes: Sequence[str] = ()
    ) -> None:
        if self._show:
            step = self._state.step
            self._show(Progress(step, self._num_steps, loss, speed, share, left, notes))


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator on CUDA, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _drop_rows_after(file: Path, step: int) -> None:
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= step]
        file.write_text("".join(kept), encoding="utf-8")
