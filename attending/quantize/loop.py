"""Quantising a model: calibration text, block after block, the folder, the gate."""

import hashlib
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attending import artifact
from attending.errors import CheckpointError
from attending.logs import MetricLog
from attending.mesh import World
from attending.model.architecture import KV_CACHE, Architecture
from attending.model.checkpoint import open_checkpoint
from attending.model.decoder import Block
from attending.model.files import read_json
from attending.model.quantized import Quantized, require_float
from attending.model.weights import read_tensor
from attending.quantize import calibration, gate, rounding
from attending.quantize.distill import NORM, Rounded, distill
from attending.quantize.export import pack_layer, save_quantized
from attending.quantize.kv import cache_scales, cache_scheme
from attending.quantize.probe import Probe
from attending.quantize.recipe import QuantizeConfig
from attending.quantize.rotate import folded, rotated
from attending.quantize.stream import EMBEDDING, HEAD, Shapes, Stream, matched
from attending.sources import Progress
from attending.train import run
from attending.train.start import Start, open_start
from attending.train.state import STATES, TOLD
from attending.train.watch import peak_memory

OVERFLOW = "overflow.json"
# Of the recipe, what cannot change on the way: all but what comes later, or changes no result.
FINAL = r"(?!(gate|distill|assumed)\.|(device|batch|kv):)"
NOTE = (
    "Rounded to few bits. What that cost stands in gate.json, on the text that the recipe names; "
    "what the float model says wrongly, this one does too."
)


class Job(NamedTuple):
    """What all blocks share."""

    config: QuantizeConfig
    stream: Stream
    layers: Shapes
    states: Path
    probe: Probe


def quantize(
    config: QuantizeConfig,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress = lambda *_: None,
    note: Callable[[str], object] = lambda _: None,
) -> Path:
    """A float model in, a folder of few bits out, with what that cost.

    The blocks come one after another: the float block's outputs are what the rounded block is to
    give, from the outputs of the rounded blocks before it. A block that is done is kept, so that a
    stopped run goes on with the next one.

    Args:
        config: The recipe.
        out: Folder to write; `OUT.tmp` until it is whole.
        resume: Go on from the blocks that are there.
        progress: Told of replies, blocks, the gate's blocks and answers.
        note: Told what people should know.

    Raises:
        UsageError: OUT exists, a stopped run lies there, no layer matches, or groups do not fit.
        ConfigError: The recipe has changed, or the text is less than one sample.
        CheckpointError: The model is quantised already, holds NaN, or the disk is full.
        CheckFailed: It cost more than the gate allows; the folder is written.
    """
    gate.require_measured(config.gate)
    start = open_start(config.model)
    require_float(start.arch, config.model)
    run.require_vocabulary(start.tokenizer.num_ids - 1, start.arch.vocab_size)
    arch = rotated(start.arch) if config.rotate else start.arch
    layers = matched(arch, config.layers, config.head, config.scheme, config.form)
    parents = [start.parent, *calibration.digests(config.calibration)]
    recipe = config.model_dump(mode="json")
    record = artifact.Record("quantize", recipe, config.seed, parents)
    with artifact.disk_has_room(out):
        known = {**recipe, "parents": parents}
        how = {"resume": resume, "accept_changes": True}
        draft = run.begin(out, known, World(0, 0, 1), **how, final=FINAL, holds=_has_begun)
        states = draft / STATES
        job = Job(config, _stream(config, start, arch, probe := Probe()), layers, states, probe)
        if not [*states.glob("block_*")]:
            _require_whole(start)  # what is damaged or does not fit is better known now
        for name in arch.tensor_shapes():
            if name.removesuffix(".weight") not in layers:
                _as_stored(job, name)
        told = config.calibration
        samples = calibration.prepare(told, start, states, config.seed, progress, note)
        errors = round_blocks(job, torch.cat([*samples.calibration.values()]), draft, progress)
        for line in probe.lines():
            note(line)
        artifact.write_json(draft / OVERFLOW, probe.report())
        write(job, start, draft)
        found = judge(config, start, draft, samples.evaluation, progress, note)
        for line in found.lines():
            note(line)
        metrics = errors | found.figures()
        metrics["run/peak_memory_bytes"] = float(peak_memory(torch.device(config.device)))
        artifact.finish(draft, record, title=out.name, note=NOTE, metrics=metrics)
        artifact.settle(draft, out)
    shutil.rmtree(out / STATES)  # texts of others, too, which no model folder should carry
    gate.check(found, config.gate)
    return out


def _has_begun(draft: Path) -> bool:
    """Replies and blocks are kept from the first on."""
    return (draft / STATES / TOLD).is_file()


def round_blocks(job: Job, ids: Tensor, draft: Path, progress: Progress) -> dict[str, float]:
    """All that is rounded or learnt, into files of the state; the last error for `run.json`.

    A block's error is that of its outputs, as a share of their squares: with it come the errors of
    all blocks before.
    """
    config, stream = job.config, job.stream
    count = len(stream.arch.layers)
    units = config.signed.steps if config.by_signs else 1
    exact = stream.embed(ids)
    rough = stream.embed(ids, _as_stored(job, EMBEDDING))
    log, error = MetricLog(draft / "metrics.jsonl"), 0.0
    for index in range(count):
        began, file = time.monotonic(), job.states / f"block_{index:05d}.safetensors"
        block = stream.block(index)
        with job.probe.watching(block, index):
            stream.step(block, exact)
        _require_finite(exact, f"model.layers.{index}")
        is_new = not file.is_file()
        if is_new:
            tell = partial(_tell, progress, index * units, count * units)
            _save(file, _round(job, block, index, rough, exact, tell))
        _put(block, load_file(file), job, index)
        stream.step(block, rough)
        error = _share(rough, exact)
        if is_new:
            seconds = time.monotonic() - began
            values = {"quantize/block_error_share": error, "quantize/block_seconds": seconds}
            log.write(index + 1, values)
        progress((index + 1) * units, count * units, "blocks")
    if config.head and not (file := job.states / "head.safetensors").is_file():
        found = rounding.of_head(config, stream.tensor(f"{HEAD}.weight"), stream.last(rough))
        _save(file, rounding.pack(config, HEAD, found))
    del rough, block
    if config.distill.epochs and not (file := _learnt(job)).is_file():
        _save(file, _distilled(job, ids, stream.last(exact), log, progress))
    log.close()
    return {"quantize/last_block_error_share": error}


def _distilled(
    job: Job, ids: Tensor, teacher: Tensor, log: MetricLog, progress: Progress
) -> dict[str, Tensor]:
    """Scales and norms that were learnt through the whole model, as they are stored."""
    config, stream = job.config, job.stream
    kept = {f"model.{NORM}": _as_stored(job, f"model.{NORM}")}
    for file in sorted(job.states.glob("block_*.safetensors")):
        kept |= load_file(file)
    names = [name for name in job.layers if name != HEAD]
    floats = {name: x for name, x in kept.items() if name in stream.arch.tensor_shapes()}
    heads = [stream.head()] * 2
    if config.head:
        parts = load_file(job.states / "head.safetensors")
        heads[1] = stream.head(rounding.read(config, HEAD, job.layers[HEAD], parts))
    elif config.floats != "stored":
        own = _as_stored(job, EMBEDDING if stream.arch.tied else f"{HEAD}.weight")
        heads[1] = stream.head(own)
    count, last = len(stream.arch.layers), time.monotonic()

    def read(name: str) -> Quantized:
        return rounding.unpack(config, name, job.layers[name], kept)

    def told(step: int, divergence: float) -> None:
        nonlocal last
        now = time.monotonic()
        values = {"distill/divergence_nats": divergence, "distill/step_seconds": now - last}
        log.write(count + step, values)
        progress(step, total, "distillation")
        last = now

    total, how = config.distill.steps(len(ids)), (config.distill, _learnt(job, "state"))
    rounded = Rounded(names, read, floats, config.grid.stored)
    inputs = stream.embed(ids, _as_stored(job, EMBEDDING))
    found = distill(stream, rounded, inputs, teacher, heads, *how, seed=config.seed, told=told)
    values = {"distill/watched_before_nats": found.before, "distill/watched_nats": found.after}
    log.write(count + total + 1, values | {"distill/step_seconds": time.monotonic() - last})
    tensors = dict(found.norms)
    for name, scales in found.scales.items():
        layer = replace(read(name), scales=scales.numpy().astype(np.float16))
        parts = pack_layer(name, layer, config.form)
        tensors |= {part: x for part, x in parts.items() if x.is_floating_point()}
    return tensors


def _learnt(job: Job, what: str = "done") -> Path:
    """The file of a distillation; of other settings another one, unless they change no result."""
    told = job.config.distill.model_dump_json(exclude={"recompute"})
    return job.states / f"distilled-{hashlib.sha256(told.encode()).hexdigest()[:8]}-{what}"


def write(job: Job, start: Start, draft: Path) -> None:
    """The model folder; what is not quantised comes from the stream, in the recipe's dtype."""
    config, arch = job.config, job.stream.arch
    if config.kv == "int8":  # known to this package only
        arch = replace(arch, source={**arch.source, KV_CACHE: config.kv})
    tensors: dict[str, Tensor] = {}
    blocks: dict[str, Tensor] = {}
    for file in sorted(job.states.glob("block_*.safetensors")):
        blocks |= load_file(file)  # mapped, not read
    for name in arch.tensor_shapes():
        if not name.startswith("model.layers.") and name.removesuffix(".weight") not in job.layers:
            tensors[name] = _as_stored(job, name)
    tensors |= blocks
    if config.distill.epochs:
        tensors |= load_file(_learnt(job))
    if config.form == "compressed-tensors":
        tensors |= cache_scales(config.kv, len(arch.layers))
    if config.head:
        tensors |= load_file(job.states / "head.safetensors")
    facts: dict[str, object] = {"kv_cache_scheme": cache_scheme(config.kv)}
    if config.form == "gptq":
        facts["damp_percent"] = config.damping
    save_quantized(
        draft,
        arch,
        tensors,
        config.form,
        dict.fromkeys(job.layers, config.scheme),
        start.tokenizer,
        start.generation,
        facts,
    )


def judge(
    config: QuantizeConfig,
    start: Start,
    draft: Path,
    evaluation: Mapping[str, Tensor],
    progress: Progress,
    note: Callable[[str], object],
) -> gate.Gate:
    """The gate's measures of the folder as it was written."""
    made = open_checkpoint(draft)
    before = Stream(
        start.arch,
        partial(read_tensor, start.checkpoint),
        batch=config.batch,
        device=config.device,
    )
    after = Stream(
        made.arch,
        partial(read_tensor, made),
        cache=config.kv,
        rounds_activations=config.form == "qqq",
        batch=config.batch,
        device=config.device,
    )
    total = len(start.arch.layers) + len(made.arch.layers)
    done = lambda number: progress(number, total, "gate: blocks")  # noqa: E731
    domains, divergences = gate.compare(before, after, evaluation, done)
    # A suite or a model that has changed on the way is asked anew; the store takes no other one.
    (draft / gate.REPORT).unlink(missing_ok=True)  # of a run that stopped behind it: no part of it
    asked, known = draft / STATES / "suite.json", config.gate.model_dump(mode="json")
    own = {key: known[key] for key in ("suite", "data", "limit")} | {
        "model": artifact.digest(draft)
    }
    if asked.is_file() and read_json(asked) != own:
        shutil.rmtree(draft / "forgetting", ignore_errors=True)
    artifact.write_json(asked, own)
    changes, flips = gate.ask(config.gate, config.model, draft, progress, note)
    found = gate.Gate(domains, changes, flips)
    gate.write(draft, found, divergences)
    return found


def _require_whole(start: Start) -> None:
    """Every tensor as it is stored: see `Stream.stored`."""
    given = Stream(start.arch, partial(read_tensor, start.checkpoint))
    for name in start.arch.tensor_shapes():
        given.stored(name)


def _stream(config: QuantizeConfig, start: Start, arch: Architecture, probe: Probe) -> Stream:
    read: Callable[[str], Tensor] = partial(read_tensor, start.checkpoint)
    read = folded(start.arch, read, config.seed) if config.rotate else read
    return Stream(arch, read, batch=config.batch, device=config.device, seen=probe.seen)


def _round(
    job: Job,
    block: Block,
    index: int,
    inputs: Tensor,
    targets: Tensor,
    tell: rounding.Told,
) -> dict[str, Tensor]:
    """What is kept of a block."""
    at, config = f"model.layers.{index}.", job.config
    names = [n.removeprefix(at) for n in job.layers if n.startswith(at)]
    kept = {
        at + name: _as_stored(job, at + name)
        for name in block.state_dict()
        if name.removesuffix(".weight") not in names
    }
    if names:
        found = rounding.of_block(config, job.stream, block, names, inputs, targets, tell)
        for name, one in found.items():
            kept |= rounding.pack(config, at + name, one)
    return kept


def _put(block: Block, kept: Mapping[str, Tensor], job: Job, index: int) -> None:
    """Make a block what a reader of the folder will make of it."""
    at, device = f"model.layers.{index}.", job.stream.device
    weights = {}
    for name in block.state_dict():
        layer = (at + name).removesuffix(".weight")
        found = kept.get(at + name)
        if found is None:
            found = rounding.read(job.config, layer, job.layers[layer], kept)
        weights[name] = found.to(device, torch.float32)
    block.load_state_dict(weights, assign=True)


def _as_stored(job: Job, name: str) -> Tensor:
    """What stays float, in the recipe's dtype.

    Raises:
        CheckpointError: It holds NaN or infinity, or the dtype does not hold it.
    """
    values = job.stream.stored(name)
    if job.config.floats != "stored":
        values = values.to(getattr(torch, job.config.floats))
    if not values.isfinite().all():
        raise CheckpointError(
            f"{name} does not fit into {values.dtype}: take floats = bfloat16 or float32."
        )
    return values.contiguous()


def _share(rough: Tensor, exact: Tensor) -> float:
    """Of the squares of [S, T, D], those of the difference; sample by sample, to copy neither."""
    pairs = zip(rough, exact, strict=True)
    sums = torch.stack([torch.stack([(r - e).square().sum(), e.square().sum()]) for r, e in pairs])
    lost, whole = sums.double().sum(0).tolist()
    return float(lost / whole)


def _save(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Whole or not at all."""
    draft = file.with_suffix(".tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft)
    draft.replace(file)


def _require_finite(x: Tensor, name: str) -> None:
    if not x.isfinite().all():
        raise CheckpointError(
            f"{name} gives values that are no numbers on the calibration text: the model is "
            "damaged, or its training went wrong. Try it with `attending chat` first."
        )


def _tell(progress: Progress, before: int, total: int, step: int) -> None:
    progress(before + step, total, "blocks")
