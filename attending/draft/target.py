"""The model that a draft is of, as training reads it: through the path that serves it.

Where the native engine answers, its runner gives features and shares, so that a draft learns from
what it will meet, 8 bits and all; else the decoder does, on the device of the training. What was
read of a dialogue can be kept on disk: the target does not change, and every epoch reads it again.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from attending.artifact import disk_has_room
from attending.draft.recipe import DraftConfig
from attending.engine import loading
from attending.engine.loading import ComputeOptions
from attending.engine.runner import Observer, Span
from attending.errors import CheckpointError
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
FEATURES, FORMAT, KEY_BYTES = "features.bin", 1, 16
RECORD = np.dtype([("key", f"V{KEY_BYTES}"), ("offset", "<i8")])


class Look(NamedTuple):
    """What the target made of a batch of T rows, of which A count."""

    features: Tensor  # [T, 3 D]: the residual stream at the input of three layers
    ids: Tensor  # [A, K] int64: its likeliest tokens at the rows that count, the first first
    shares: Tensor  # [A, K]: theirs of its whole distribution


class Target(Protocol):
    """A model that is looked at, and never changed."""

    ends: Decoder
    """Its embedding, last norm and head, at least."""
    num_likeliest: int
    """K: tokens whose shares are looked at."""

    @property
    def path(self) -> Mapping[str, str]:
        """What computes a look."""

    def look(self, batch: Batch) -> Look:
        """One pass over segments that do not see each other."""


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids [A, K] and shares [A, K] of the K likeliest tokens of logits [A, V]."""
    values, ids = logits.topk(count, dim=-1)
    return ids, (values - logits.logsumexp(-1, keepdim=True)).exp()


class TorchTarget:
    """A decoder on the device of the training."""

    def __init__(self, decoder: Decoder, count: int) -> None:
        """`count`: `num_likeliest`, if there are so many."""
        self.ends, self.num_likeliest = decoder, min(count, decoder.arch.vocab_size)
        self.path = {"torch": str(decoder.model.norm.weight.dtype)}
        self._layers = feature_layers(len(decoder.arch.layers))

    @torch.no_grad()
    def look(self, batch: Batch) -> Look:
        """See `Target`; logits of rows with a weight only."""
        wanted, features = batch.weights > 0, Features(self._layers)
        size = self.num_likeliest

        def together(logits: Tensor) -> Tensor:
            ids, shares = likeliest(logits, size)
            return torch.cat((ids.to(shares.dtype), shares), -1)  # float32 holds every id

        def of(hidden: Tensor, head: Tensor) -> Tensor:
            return measured(hidden[wanted], head, together)

        attend = Packed(batch.lengths, device=batch.ids.device)
        found = self.ends.measure(batch.ids, attend, of, features)
        return Look(features.whole(), found[:, :size].long(), found[:, size:])


class EngineTarget:
    """The runner that serves the model on this machine."""

    def __init__(self, runner: Observer, ends: Decoder, count: int) -> None:
        """`count`: see `TorchTarget`. The runner has pages for the longest dialogue."""
        self.ends, self._runner, self.path = ends, runner, runner.path
        self.num_likeliest = min(count, runner.arch.vocab_size)

    @torch.no_grad()
    def look(self, batch: Batch) -> Look:
        """See `Target`."""
        looks = []
        for spans in self._steps(batch):
            seen = self._runner.observe(spans)
            shares = likeliest(torch.from_numpy(seen.logits), self.num_likeliest)
            looks.append(Look(torch.from_numpy(seen.features), *shares))
        return _side_by_side(looks, self.ends)

    def _steps(self, batch: Batch) -> Iterator[list[Span]]:
        """Segments side by side, of at most `ROWS` rows; a longer one takes several steps."""
        ids, counts = batch.ids.cpu().numpy(), batch.weights.cpu().numpy() > 0
        groups, room = len(self._runner.num_pages), min(self._runner.num_pages)
        spans, rows, used, start = list[Span](), 0, 0, 0
        for length in batch.lengths:
            own, pages = slice(start, start + length), -(-length // PAGE_TOKENS)
            first = length - int(counts[own].sum())
            assert counts[own][first:].all(), "an answer ends its dialogue"
            if spans and (rows + length > ROWS or used + pages > room):
                yield spans
                spans, rows, used = [], 0, 0
            for at in range(0, length, ROWS):
                if at:
                    yield spans
                    spans, rows = [], 0
                end = min(at + ROWS, length)
                table = np.arange(used, used - (-end // PAGE_TOKENS))
                wanted = max(0, end - max(at, first))
                spans.append(Span(ids[own][at:end], at, (table,) * groups, wanted))
                rows += end - at
            used, start = used + pages, start + length
        yield spans


class Kept:
    """A target whose looks are on disk, in 16 bits, a dialogue each: it is asked once.

    A third of a row of features is kept beside its root mean square, so that no giant overflows.
    Records are written before the index tells of them: a killed run loses at most the last ones.
    One process at a time: see `attending.artifact.alone`.
    """

    def __init__(self, target: Target, folder: Path, about: str) -> None:
        """Open what is kept in a folder.

        Args:
            target: Asked for what is missing.
            folder: Made if it is not there.
            about: What decides a look, besides the dialogue, `path` and `num_likeliest`.

        Raises:
            CheckpointError: Its two files do not belong together.
        """
        self._target, self.ends, self.path = target, target.ends, target.path
        self.num_likeliest = target.num_likeliest
        told = [FORMAT, about, dict(sorted(self.path.items())), self.num_likeliest]
        self._about = json.dumps(told).encode()
        folder.mkdir(parents=True, exist_ok=True)
        self._data, self._index = folder / FEATURES, folder / f"{FEATURES}.index"
        self._data.touch()
        self._index.touch()
        size = self._index.stat().st_size
        os.truncate(self._index, size - size % RECORD.itemsize)
        found = np.fromfile(self._index, RECORD)
        self._at = {one["key"].tobytes(): int(one["offset"]) for one in found}
        if max(self._at.values(), default=-1) >= self._data.stat().st_size:
            raise self._torn()

    def look(self, batch: Batch) -> Look:
        """See `Target`.

        Raises:
            CheckpointError: The disk is full, or what is kept is damaged.
        """
        alone = _alone(batch)
        keys = [self._key(one) for one in alone]
        missing = {key: one for key, one in zip(keys, alone, strict=True) if key not in self._at}
        if missing:
            with disk_has_room(self._data):
                self._keep(missing)
        with self._data.open("rb") as data:
            looks = [self._read(data, *told) for told in zip(keys, alone, strict=True)]
        return _side_by_side(looks, self.ends)

    def _key(self, one: Batch) -> bytes:
        told = one.ids.cpu().numpy().tobytes() + (one.weights > 0).cpu().numpy().tobytes()
        return hashlib.blake2b(self._about + told, digest_size=KEY_BYTES).digest()

    def _keep(self, missing: Mapping[bytes, Batch]) -> None:
        several = list(missing.values())
        seen = self._target.look(_together(several))
        rows = [len(one.ids) for one in several]
        counts = [int((one.weights > 0).sum()) for one in several]
        split = (torch.split(x, counts) for x in (seen.ids, seen.shares))
        parts = zip(missing, torch.split(seen.features, rows), *split, strict=True)
        told = np.empty(len(several), RECORD)
        with self._data.open("ab") as to:
            for place, (key, features, ids, shares) in enumerate(parts):
                told[place] = np.void(key), to.tell()
                thirds = features.float().view(len(features), 3, -1)
                scales = thirds.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-30)
                to.write(key)
                for values in ((thirds / scales).half(), scales, ids.int(), shares.half()):
                    to.write(values.cpu().numpy().tobytes())
            to.flush()
            os.fsync(to.fileno())
        with self._index.open("ab") as to:
            to.write(told.tobytes())
        self._at |= {one["key"].tobytes(): int(one["offset"]) for one in told}

    def _read(self, data: BinaryIO, key: bytes, one: Batch) -> Look:
        rows, count, width = len(one.ids), int((one.weights > 0).sum()), self.ends.arch.hidden_size
        shapes: list[tuple[tuple[int, ...], str]]
        shapes = [((rows, 3, width), "<f2"), ((rows, 3, 1), "<f4")]
        shapes += [((count, self.num_likeliest), kind) for kind in ("<i4", "<f2")]
        data.seek(self._at[key])
        if data.read(KEY_BYTES) != key:
            raise self._torn()
        values = []
        for shape, kind in shapes:
            found = np.fromfile(data, kind, math.prod(shape))
            if found.size < math.prod(shape):
                raise self._torn()
            values.append(torch.from_numpy(found).view(shape))
        features = (values[0].float() * values[1]).flatten(1)
        return Look(features, values[2].long(), values[3].float())

    def _torn(self) -> CheckpointError:
        return CheckpointError(
            f"{self._data.name} does not hold what {self._index.name} says: remove both; what they "
            "kept is made anew."
        )


class Scaled:
    """A target whose features are divided by what they are known to be, [3 D].

    Its layers' streams are of very different sizes, and Adam's steps are not: a draft is trained on
    numbers of one size, and `Eagle.fc` takes the division on when it is written.
    """

    def __init__(self, target: Target, scales: Tensor) -> None:
        """`scales`: see `third_sizes`."""
        self._target, self.ends, self.path = target, target.ends, target.path
        self.num_likeliest, self.scales = target.num_likeliest, scales

    def look(self, batch: Batch) -> Look:
        """See `Target`."""
        found = self._target.look(batch)
        return found._replace(features=found.features / self.scales)


def third_sizes(look: Look) -> Tensor:
    """[3 D]: of each third its root mean square in the median of the rows; the first are giants."""
    thirds = look.features.view(len(look.features), 3, -1)
    middle: Tensor = thirds.square().mean(-1).sqrt().median(0).values  # [3]
    return middle.repeat_interleave(thirds.shape[-1])


def open_target(
    config: DraftConfig, start: Start, place: World, device: torch.device, folder: Path
) -> Target:
    """The path that answers for this recipe; `folder` is where looks are kept, if they are.

    Raises:
        ConfigError: `writing.engine` has an option that no engine has.
        UsageError: It asks for what this machine or model has not.
        CheckpointError: What is kept is damaged.
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
        target: Target = EngineTarget(runner, open_ends(start, device, dtype), config.shares)
    else:
        decoder = build(start.arch, start.fill, place, device, config.compute)
        target = TorchTarget(decoder.requires_grad_(False).eval(), config.shares)
    if not config.keep_features:
        return target
    return Kept(target, folder, f"{start.sha256} {layers}")


def open_ends(start: Start, device: torch.device, dtype: torch.dtype) -> Decoder:
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
