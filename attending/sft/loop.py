"""The fine-tuning loop: packed dialogues, of which the assistant's words are learnt."""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from attending import artifact
from attending.evaluate import forgetting
from attending.sft.recipe import SftConfig
from attending.sft.setup import DATA, counted, export, prepare, told, write_data
from attending.sources import Progress
from attending.train import run
from attending.train.parallel import process_group
from attending.train.rows import deal, where
from attending.train.schedule import Phase, due, learning_rate
from attending.train.start import open_start
from attending.train.step import accumulate, next_token_loss
from attending.train.watch import Show, Watch

# Of the recipe, what cannot change on the way: `state.require_unchanged`.
FINAL = (
    r"(model|root|data|select|template\w*|context|epochs|seed|parents|lora|heldout\.final_tokens)\b"
)
NOTE = (
    "A model tuned on dialogues, for demonstration: what it says about medicine is often wrong. "
    "What that cost stands in forgetting.json."
)


def sft(
    config: SftConfig,
    out: Path,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    show: Show | None = None,
    progress: Progress = lambda *_: None,
    note: Callable[[str], object] = lambda _: None,
) -> Path:
    """A model and dialogues in, a model that answers like them out, with what that cost.

    Order of a step: held-out measures if they are due, read, forward and backward, check, skip or
    update, log, state if it is due, stop if asked. Under torchrun every rank calls this.

    Args:
        config: The recipe.
        out: Folder to write; `OUT.tmp` while training.
        resume: Go on from the newest state there.
        accept_changes: Go on although the recipe has changed.
        show: Told after every step, on rank 0.
        progress: Told of every answer to the suite that compares before and after.
        note: Told what people should know: counts, a dialogue with its mask, what was forgotten.

    Raises:
        ConfigError: Recipe, dialogues and model do not fit each other.
        TrainingError: A loss that is no number, or memory that ends.
        CheckFailed: More is forgotten than `forgetting.max_forgetting`; the model is written.
        Stopped: It was interrupted, and has saved its state.
    """
    with process_group(config.compute.precision) as (place, device):
        forgetting.require_measured(config.forgetting, frozenset())
        start = open_start(config.model)
        known = told(config, start)
        recipe = config.model_dump(mode="json")
        record = artifact.Record("sft", recipe, config.seed, known["parents"])
        draft = run.begin(
            out, known, place, resume=resume, accept_changes=accept_changes, final=FINAL
        )
        for line in write_data(config, start, draft, place):
            note(line)
        setup = prepare(config, start, draft, place, device)
        state, decoder, reader, steps = (
            setup.state,
            setup.state.decoder,
            setup.reader,
            setup.num_steps,
        )
        warmup = -(-config.optimizer.warmup_tokens // config.batch.tokens)
        if newest := run.newest(draft):
            state.restore(newest)
        with run.Signals() as signals, run.memory_and_disk(config.batch.micro_tokens, out):
            watch = Watch(draft, state, setup.watched, config.heldout, steps, show)
            watch.baseline(config.context)
            while state.step < steps:
                if state.owes_measure:
                    watch.measure(config.context)
                began, before = time.monotonic(), state.tokens
                count, each = config.batch.rows(config.context)
                rows = [reader.row(config.context) for _ in range(count)]
                batches = deal(reader, rows, each, place, decoder.arch.vocab_size, device)
                names = reader.groups.names
                found = accumulate(decoder, batches, next_token_loss, place.size, names)
                run.require_finite(found, state.step + 1, partial(where, reader.shards, rows))
                phases = [Phase(steps, config.schedule)]
                rate = learning_rate(state.step, phases, warmup, config.optimizer.rates)
                state.update(found, rate, config.optimizer)
                watch.step(found, rate, began, [n for batch in batches for n in batch.lengths])
                state.owes_measure = due(config.heldout.every_tokens, before, state.tokens)
                kept = state, draft, config.state, before, signals, device, watch.sizes
                run.save_if_due(*kept, is_last=state.step == steps)
            measured = watch.finish(config.context) | counted(draft)
            adapt = partial(export, config, start, draft)
            run.export(state, start.tokenizer, start.generation, draft, adapt)
    if place.rank:
        return out
    shutil.rmtree(draft / DATA)  # texts of others, which no model folder should carry
    lost = forgetting.compare(config.forgetting, config.model, draft, frozenset(), progress, note)
    record = replace(record, began_seconds=watch.began)
    run.settle(draft, out, record, NOTE, measured | lost.figures())
    forgetting.check(lost, config.forgetting.max_forgetting)
    return out
