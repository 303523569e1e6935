"""The mid-training loop: Baichuan-M2's domain stage over packed documents of several losses."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from attending import artifact
from attending.evaluate import forgetting
from attending.midtrain.loss import weigh
from attending.midtrain.recipe import MidtrainConfig
from attending.midtrain.setup import open_models, parents, prepare
from attending.sources import Progress
from attending.train import run
from attending.train.parallel import interpolate, process_group
from attending.train.rows import deal, where
from attending.train.schedule import due, learning_rate
from attending.train.step import accumulate
from attending.train.watch import Show, Watch

# Of the recipe, what cannot change on the way: `state.require_unchanged`.
FINAL = r"(model|teacher|corpus|context|heldout\.final_tokens|parents)\b"
FINAL += r"|parts\.\w+(\.(domain|sources)\b|:)"
NOTE = (
    "A model gone on with on medical text, for demonstration: what it says about medicine is often "
    "wrong. What that cost stands in forgetting.json."
)


def midtrain(
    config: MidtrainConfig,
    out: Path,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    show: Show | None = None,
    progress: Progress = lambda *_: None,
    note: Callable[[str], object] = lambda _: None,
) -> Path:
    """A model and shards in, a model of the domain out, with what that cost.

    Order of a step: held-out measures if they are due, read, forward and backward, check, skip or
    update, log, state if it is due, stop if asked. Under torchrun every rank calls this.

    Args:
        config: The recipe.
        out: Folder to write; `OUT.tmp` while training.
        resume: Go on from the newest state there.
        accept_changes: Go on although the recipe has changed.
        show: Told after every step, on rank 0.
        progress: Told of every answer to the suite that compares before and after.
        note: Told what people should know of it.

    Raises:
        ConfigError: Recipe, corpus, model and teacher do not fit each other.
        TrainingError: A loss that is no number, or memory that ends.
        CheckFailed: More is forgotten than `forgetting.max_forgetting`; the model is written.
        Stopped: It was interrupted, and has saved its state.
    """
    names = list(config.parts)
    with process_group(config.compute.precision) as (place, device):
        start, teacher = open_models(config)
        recipe = config.model_dump(mode="json")
        record = artifact.Record("midtrain", recipe, config.seed, parents(config, start, teacher))
        told = {**recipe, "parents": record.parents}
        draft = run.begin(
            out, told, place, resume=resume, accept_changes=accept_changes, final=FINAL
        )
        setup = prepare(config, start, teacher, place, device)
        state, decoder, reader = setup.state, setup.state.decoder, setup.reader
        if newest := run.newest(draft):
            state.restore(newest)
            reader.remix({name: part.share for name, part in config.parts.items()})
        with run.Signals() as signals, run.memory_and_disk(config.batch.micro_tokens, out):
            watch = Watch(draft, state, setup.watched, config.heldout, config.num_steps, show)
            watch.baseline(config.context)
            while state.step < config.num_steps:
                if state.owes_measure:
                    watch.measure(config.context)
                began, before = time.monotonic(), state.tokens
                count, each = config.batch.rows(config.context)
                rows = [reader.row(config.context) for _ in range(count)]
                batches = deal(reader, rows, each, place, decoder.arch.vocab_size, device)
                batches = [weigh(batch, list(config.parts.values())) for batch in batches]
                found = accumulate(decoder, batches, setup.loss, place.size, names)
                run.require_finite(found, state.step + 1, partial(where, reader.shards, rows))
                rates, warmup = config.optimizer.rates, config.warmup_steps
                rate = learning_rate(state.step, config.phases, warmup, rates)
                state.update(found, rate, config.optimizer)
                watch.step(found, rate, began, [n for batch in batches for n in batch.lengths])
                state.owes_measure = due(config.heldout.every_tokens, before, state.tokens)
                kept = state, draft, config.state, before, signals, device, watch.sizes
                run.save_if_due(*kept, is_last=state.step == config.num_steps)
            if config.interpolation < 1:
                interpolate(decoder, start.fill, config.interpolation)
            measured = watch.finish(config.context)
            run.export(state, start.tokenizer, start.generation, draft)
    if place.rank:
        return out
    lost = forgetting.compare(config.forgetting, config.model, draft, setup.kept, progress, note)
    record = replace(record, began_seconds=watch.began)
    run.settle(draft, out, record, NOTE, measured | lost.figures())
    forgetting.check(lost, config.forgetting.max_forgetting)
    return out
