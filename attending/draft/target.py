"""The model that a draft is of, as training reads it: through the path that serves it.

Where the native engine answers, its runner gives features and shares, so that a draft learns from
what it will meet, 8 bits and all; else the decoder does, on the device of the training. What was
read of a dialogue can be kept on disk: the target does not change, and every epoch reads it again.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from attending.draft.recipe import DraftConfig
from attending.engine import loading
from attending.engine.loading import ComputeOptions
from attending.engine.runner import Observer, Span
from attending.mesh import World
from attending.model.architecture import PAGE_TOKENS
from attending.model.attend import Packed
from attending.model.decoder import Decoder, Features
from attending.model.eagle_files import feature_layers
from attending.model.files import model_files
from attending.model.scoring import measured
from attending.model.weights import read_tensor
from attending.sources import resolve
from attending.train.parallel import build
from attending.train.reader import Batch
from attending.train.start import Start

ROWS = 512
"""Of a step of the native runner: its logits have four bytes a row and id."""
FEATURES = "features.bin"
RECORD = np.dtype([("key", "V16"), ("offset", "<i8")])


class Look(NamedTuple):
    """What the target made of a batch of T rows, of which A count."""

    features: Tensor  # [T, 3 D]: the residual stream at the input of three layers
    ids: Tensor  # [A, K] int64: its likeliest tokens at the rows that count, the first first
    shares: Tensor  # [A, K]: theirs of its whole distribution


class Target(Protocol):
    """A model that is looked at, and never changed."""

    ends: Decoder
    """Its embedding, last norm and head, at least."""
    count: int
    """K: tokens whose shares are looked at."""

    def look(self, batch: Batch) -> Look:
        """One pass over segments that do not see each other."""


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids [A, K] and shares [A, K] of the K likeliest tokens of logits [A, V]."""
    values, ids = logits.topk(count, dim=-1)
    return ids, (values - logits.logsumexp(-1, keepdim=True)).exp()


class TorchTarget:
    """A decoder on the device of the training."""

    def __init__(self, decoder: Decoder, count: int) -> None:
        """`count`: see `Target`."""
        self.ends, self.count = decoder, min(count, decoder.arch.vocab_size)
        self._layers = feature_layers(len(decoder.arch.layers))

    @torch.no_grad()
    def look(self, batch: Batch) -> Look:
        """See `Target`; logits of rows with a weight only."""
        wanted, features = batch.weights > 0, Features(self._layers)

        def together(logits: Tensor) -> Tensor:
            ids, shares = likeliest(logits, self.count)
            return torch.cat((ids.to(shares.dtype), shares), -1)  # float32 holds every id

        def of(hidden: Tensor, head: Tensor) -> Tensor:
            return measured(hidden[wanted], head, together)

        attend = Packed(batch.lengths, device=batch.ids.device)
        found = self.ends.measure(batch.ids, attend, of, features)
        return Look(features.whole(), found[:, : self.count].long(), found[:, self.count :])


class EngineTarget:
    """The runner that serves the model on this machine."""

    def __init__(self, runner: Observer, ends: Decoder, count: int) -> None:
        """See `TorchTarget`; pages for `ROWS` tokens, or for the longest dialogue."""
        self.ends, self._runner = ends, runner
        self.count = min(count, runner.arch.vocab_size)

    @torch.no_grad()
    def look(self, batch: Batch) -> Look:
        """See `Target`."""
        looks = []
        for spans in self._steps(batch):
            seen = self._runner.observe(spans)
            shares = likeliest(torch.from_numpy(seen.logits), self.count)
            looks.append(Look(torch.from_numpy(seen.features), *shares))
        return _side_by_side(looks, self.ends)

    def _steps(self, batch: Batch) -> Iterator[list[Span]]:
        """Segments for whose tokens there are pages at once."""
        ids, counts = batch.ids.cpu().numpy(), batch.weights.cpu().numpy() > 0
        groups, start = len(self._runner.num_pages), 0
        spans, used, room = list[Span](), 0, min(self._runner.num_pages)
        for length in batch.lengths:
            own, pages = slice(start, start + length), -(-length // PAGE_TOKENS)
            wanted = int(counts[own].sum())
            assert counts[own][length - wanted :].all(), "an answer ends its dialogue"
            if used + pages > room:
                yield spans
                spans, used = [], 0
            table = np.arange(used, used + pages)
            spans.append(Span(ids[own], 0, (table,) * groups, wanted))
            used, start = used + pages, start + length
        yield spans


class Kept:
    """A target whose looks are on disk, in 16 bits, a dialogue each: it is asked once.

    A third of a row of features is kept beside its root mean square, so that no giant overflows.
    Records are written before the index tells of them: a killed run loses at most the last ones.
    """

    def __init__(self, target: Target, folder: Path, about: str) -> None:
        """`about`: what decides a look besides the dialogue and the count."""
        self._target, self.ends, self.count = target, target.ends, target.count
        self._about = f"{about} {self.count} ".encode()
        folder.mkdir(parents=True, exist_ok=True)
        self._data, self._index = folder / FEATURES, folder / f"{FEATURES}.index"
        self._data.touch()
        self._index.touch()
        size = self._index.stat().st_size
        os.truncate(self._index, size - size % RECORD.itemsize)
        told = np.fromfile(self._index, RECORD)
        self._at = {one["key"].tobytes(): int(one["offset"]) for one in told}

    def look(self, batch: Batch) -> Look:
        """See `Target`."""
        alone = _alone(batch)
        missing = [one for one in alone if self._key(one) not in self._at]
        if missing:
            self._keep(missing)
        return _side_by_side([self._read(one) for one in alone], self.ends)

    def _key(self, one: Batch) -> bytes:
        told = one.ids.cpu().numpy().tobytes() + (one.weights > 0).cpu().numpy().tobytes()
        return hashlib.blake2b(self._about + told, digest_size=16).digest()

    def _keep(self, several: Sequence[Batch]) -> None:
        seen = self._target.look(_together(several))
        rows = [len(one.ids) for one in several]
        counts = [int((one.weights > 0).sum()) for one in several]
        told = np.empty(len(several), RECORD)
        split = (torch.split(x, counts) for x in (seen.ids, seen.shares))
        parts = zip(several, torch.split(seen.features, rows), *split, strict=True)
        with self._data.open("ab") as to:
            for place, (one, features, ids, shares) in enumerate(parts):
                told[place] = np.void(self._key(one)), to.tell()
                thirds = features.float().view(len(features), 3, -1)
                scales = thirds.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
                for values in ((thirds / scales).half(), scales, ids.int(), shares.half()):
                    to.write(values.cpu().numpy().tobytes())
            to.flush()
            os.fsync(to.fileno())
        with self._index.open("ab") as to:
            to.write(told.tobytes())
        self._at |= {one["key"].tobytes(): int(one["offset"]) for one in told}

    def _read(self, one: Batch) -> Look:
        rows, count, width = len(one.ids), int((one.weights > 0).sum()), self.ends.arch.hidden_size
        shapes: list[tuple[tuple[int, ...], str]]
        shapes = [((rows, 3, width), "<f2"), ((rows, 3, 1), "<f4")]
        shapes += [((count, self.count), kind) for kind in ("<i4", "<f2")]
        with self._data.open("rb") as data:
            data.seek(self._at[self._key(one)])
            found = [np.fromfile(data, kind, math.prod(shape)) for shape, kind in shapes]
        values = [
            torch.from_numpy(x).view(shape) for x, (shape, _) in zip(found, shapes, strict=True)
        ]
        features = (values[0].float() * values[1]).flatten(1)
        return Look(features, values[2].long(), values[3].float())


class Scaled:
    """A target whose features are divided by what they are known to be, [3 D].

    Its layers' streams are of very different sizes, and Adam's steps are not: a draft is trained on
    numbers of one size, and `Eagle.fc` takes the division on when it is written.
    """

    def __init__(self, target: Target, scales: Tensor) -> None:
        """`scales`: see `sizes`."""
        self._target, self.ends, self.count = target, target.ends, target.count
        self.scales = scales

    def look(self, batch: Batch) -> Look:
        """See `Target`."""
        found = self._target.look(batch)
        return found._replace(features=found.features / self.scales)


def sizes(look: Look) -> Tensor:
    """[3 D]: of each third its root mean square in the median of the rows; the first are giants."""
    thirds = look.features.view(len(look.features), 3, -1)
    middle: Tensor = thirds.square().mean(-1).sqrt().median(0).values  # [3]
    return middle.repeat_interleave(thirds.shape[-1])


def open_target(
    config: DraftConfig, start: Start, place: World, device: torch.device, folder: Path
) -> Target:
    """The path that answers for this recipe; `folder` is where looks are kept, if they are.

    Raises:
        UsageError: Options of the native runner were given, and it cannot run this model.
    """
    told = {k: v for k, v in config.writing.engine.items() if k in ComputeOptions.model_fields}
    options = ComputeOptions.build(told, where="writing.engine")
    options.check()
    layers = feature_layers(len(start.arch.layers))
    if loading.is_native(start.arch, options):
        dtype = torch.float64 if config.compute.precision == "float64" else torch.float32
        pages = [-(-max(ROWS, config.context) // PAGE_TOKENS)] * len(start.arch.windows)
        files = model_files(resolve(config.model).path)
        runner = loading.open_native(start.checkpoint, files, options, pages, features=layers)
        target: Target = EngineTarget(runner, ends(start, device, dtype), config.shares)
    else:
        decoder = build(start.arch, start.fill, place, device, config.compute)
        target = TorchTarget(decoder.requires_grad_(False).eval(), config.shares)
    if not config.keep_features:
        return target
    about = {"target": start.sha256, "layers": layers, "engine": told}
    return Kept(target, folder, json.dumps(about, sort_keys=True))


def ends(start: Start, device: torch.device, dtype: torch.dtype) -> Decoder:
    """A decoder without its blocks."""
    with torch.device("meta"):
        decoder = Decoder(start.arch)
    decoder.model.layers = nn.ModuleList()
    names = [n for n in start.arch.tensor_shapes() if not n.startswith("model.layers.")]
    found = {name: read_tensor(start.checkpoint, name).to(device, dtype) for name in names}
    decoder.load_state_dict(found, strict=True, assign=True)
    return decoder.requires_grad_(False).eval()


def _alone(batch: Batch) -> list[Batch]:
    """Its segments."""
    told = batch.ids, batch.targets, batch.weights, batch.kinds
    parts = (torch.split(one, batch.lengths) for one in told)
    return [
        Batch(ids, targets, weights, [len(ids)], kinds)
        for ids, targets, weights, kinds in zip(*parts, strict=True)
    ]


def _together(several: Sequence[Batch]) -> Batch:
    ids, targets, weights, kinds = (
        torch.cat([getattr(one, name) for one in several])
        for name in ("ids", "targets", "weights", "kinds")
    )
    return Batch(ids, targets, weights, [len(one.ids) for one in several], kinds)


def _side_by_side(looks: Sequence[Look], ends: Decoder) -> Look:
    """Of segments one after another, where the training is and in its precision."""
    features, ids, shares = (torch.cat(one) for one in zip(*looks, strict=True))
    weight = ends.model.norm.weight
    return Look(features.to(weight), ids.to(weight.device), shares.to(weight))
