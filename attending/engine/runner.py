"""A Runner computes one step of a batch; the scheduler talks to nothing else.

`TorchRunner` is the decoder over a page pool: any architecture, any device, the reference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from attending.model.architecture import Architecture
from attending.model.attend import Paged, PagePool, Rows
from attending.model.decoder import Decoder

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """The new tokens of one sequence in a step; they go to slots `cached`, `cached + 1`, ..."""

    ids: Ids
    """[n] tokens to run."""
    cached: int
    """Tokens of this sequence that are in the cache already."""
    pages: Ids
    """[P] pages that hold slots 0 .. cached + n - 1, in order."""
    num_logits: int = 1
    """How many of the last tokens need logits: 0 before a prompt's end, n to score a prompt."""


class Runner(Protocol):
    """What a step needs; implementations own the weights and the pages."""

    arch: Architecture
    num_pages: int

    def step(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        """Run a step: [all spans' num_logits, V], in their order."""


class TorchRunner:
    """The decoder itself, unfused, on any device torch knows."""

    def __init__(self, decoder: Decoder, num_pages: int) -> None:
        """Allocate a pool of `num_pages` pages beside a loaded decoder."""
        self.arch = decoder.arch
        self.num_pages = num_pages
        self._decoder = decoder
        weight = decoder.model.embed_tokens.weight
        self._device = weight.device
        self._pool = PagePool(decoder.arch, num_pages, weight.dtype, str(weight.device))

    @torch.inference_mode()
    def step(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        """See `Runner.step`."""
        rows = [Rows(s.cached, torch.from_numpy(s.pages), len(s.ids)) for s in spans]
        ids = torch.from_numpy(np.concatenate([span.ids for span in spans]))
        hidden = self._decoder(ids.to(self._device), Paged(self._pool, rows))
        ends = np.cumsum([len(span.ids) for span in spans])
        wanted = [
            row
            for end, span in zip(ends, spans, strict=True)
            for row in range(end - span.num_logits, end)
        ]
        logits = self._decoder.logits(hidden[wanted])
        result: NDArray[np.float32] = logits.to("cpu", torch.float32).numpy()
        return result
