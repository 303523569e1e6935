"""The decoder itself as a Runner: unfused, on any device torch knows; the reference."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from attending.engine.runner import Span
from attending.model.attend import Paged, PagePool, Rows
from attending.model.decoder import Decoder


class TorchRunner:
    """A decoder and its pools of pages."""

    def __init__(self, decoder: Decoder, num_pages: Sequence[int]) -> None:
        """Allocate so many pages for each group of layers beside a loaded decoder."""
        self.arch = decoder.arch
        self.num_pages = tuple(num_pages)
        self._decoder = decoder
        weight = decoder.model.embed_tokens.weight
        self._device = weight.device
        self._pool = PagePool(decoder.arch, num_pages, weight.dtype, str(weight.device))

    @torch.inference_mode()
    def step(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        """See `Runner.step`."""
        rows = [Rows(s.cached, [*map(torch.from_numpy, s.pages)], len(s.ids)) for s in spans]
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
