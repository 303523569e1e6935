"""The pretraining loop: Baichuan-M1's stages over packed documents."""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from attending import artifact
from attending.pretrain.recipe import PretrainConfig
from attending.pretrain.setup import NOTE, parents, prepare
from attending.train import run
from attending.train.parallel import barrier, process_group
from attending.train.rows import deal, where
from attending.train.schedule import due, learning_rate
from attending.train.step import accumulate, next_token_loss
from attending.train.watch import Show, Watch


def pretrain(
    config: PretrainConfig,
    out: Path,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    show: Show | None = None,
) -> Path:
    """Shards in, base model out.

    Order of a step: held-out measures if they are due, read, forward and backward, check, skip or
    update, log, state if it is due, stop if asked. Under torchrun every rank calls this.

    Args:
        config: The recipe.
        out: Folder to write; `OUT.tmp` while training.
        resume: Go on from the newest state there.
        accept_changes: Go on although the recipe has changed.
        show: Told after every step, on rank 0.

    Raises:
        ConfigError: Recipe, corpus and tokenizer do not fit each other.
        TrainingError: A loss that is no number, or memory that ends.
        Stopped: It was interrupted, and has saved its state.
    """
    with process_group(config.compute.precision) as (place, device):
        recipe = config.model_dump(mode="json")
        record = artifact.Record("pretrain", recipe, config.seed, parents(config))
        told = {**recipe, "parents": record.parents}
        draft = run.begin(out, told, place, resume=resume, accept_changes=accept_changes)
        setup = prepare(config, place, device)
        state, decoder, reader = setup.state, setup.state.decoder, setup.reader
        domains = reader.groups.names
        if newest := run.newest(draft):
            state.restore(newest)
        stage = config.stage_at(state.step - 1)
        decoder.set_rope_theta(stage.rope_theta)
        with run.Signals() as signals, run.memory_and_disk(config.batch.micro_tokens, out):
            watch = Watch(draft, state, setup.watched, config.heldout, config.num_steps, show)
            while state.step < config.num_steps:
                if state.owes_measure:
                    watch.measure(stage.context)
                began, before, stage = time.monotonic(), state.tokens, config.stage_at(state.step)
                decoder.set_rope_theta(stage.rope_theta)
                reader.remix(stage.mixture)
                rows = [reader.row(stage.context) for _ in range(config.rows_at(stage))]
                each = config.batch.micro_tokens // stage.context
                batches = deal(reader, rows, each, place, decoder.arch.vocab_size, device)
                found = accumulate(decoder, batches, next_token_loss, place.size, domains)
                run.require_finite(found, state.step + 1, partial(where, reader.shards, rows))
                rates = config.optimizer.rates
                rate = learning_rate(state.step, config.phases, config.warmup_steps, rates)
                state.update(found, rate, config.optimizer)
                watch.step(found, rate, began, [n for batch in batches for n in batch.lengths])
                state.owes_measure = due(config.heldout.every_tokens, before, state.tokens)
                is_last = state.step == config.num_steps
                is_end = config.stage_at(state.step) != stage
                kept = state, draft, config.state, before, signals, device, watch.sizes
                run.save_if_due(*kept, is_last=is_last, is_end=is_end)
            measured = watch.finish(stage.context)
            record = replace(record, began_seconds=watch.began)
            generation = {"eos_token_id": list(decoder.arch.eos_ids)}
            run.export(state, setup.watched.tokenizer, generation, draft)
            if place.rank == 0:
                run.settle(draft, out, record, NOTE, measured)
            barrier()
            return out
