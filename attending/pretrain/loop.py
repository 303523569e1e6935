"""The pretraining loop: Baichuan-M1's stages over packed documents."""

import time
from pathlib import Path

from attending import artifact
from attending.pretrain.recipe import PretrainConfig
from attending.pretrain.setup import export, micro_batches, parents, prepare, where
from attending.train import run
from attending.train.optimizer import set_learning_rate
from attending.train.parallel import process_group
from attending.train.schedule import adaptive_update, learning_rate
from attending.train.step import accumulate, clip, next_token_loss
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

    Order of a step: stage, read, forward and backward, check, skip or update, log; then, where they
    are due, held-out measures, state, stop. Under torchrun every rank calls this.

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
        state, decoder, reader = setup.state, setup.decoder, setup.state.reader
        if newest := run.newest(draft):
            state.restore(newest)
        watch = Watch(draft, state, setup.watched, config.heldout, config.num_steps, show)
        with run.Signals() as signals, run.out_of_memory_advice(config.batch.micro_tokens):
            while state.step < config.num_steps:
                stage = config.stage_at(state.step)
                decoder.set_rope_theta(stage.rope_theta)
                reader.remix(stage.mixture)
                if state.step == 0:
                    watch.measure(stage.context)
                began, before = time.monotonic(), state.tokens
                rows = [reader.row(stage.context) for _ in range(config.rows_at(stage))]
                batches = micro_batches(config, setup, rows)
                found = accumulate(decoder, batches, next_token_loss, place.size, setup.domains)
                run.require_finite(found, state.step, where(setup, rows))
                rate = learning_rate(state.step, config.phases, config.warmup_steps, config.rates)
                made, state.norms = adaptive_update(state.norms, found.norm, config.rule)
                if made:
                    clip(decoder.parameters(), config.optimizer.clip_norm, found.norm)
                    set_learning_rate(state.optimizer, rate)
                    state.optimizer.step()
                state.optimizer.zero_grad()
                state.step, state.tokens = state.step + 1, state.tokens + found.tokens
                state.skipped += not made
                watch.step(found, rate, began, stage.context)
                is_last, is_stopping = state.step == config.num_steps, signals.stop_asked(device)
                if is_last or run.due(config.heldout.every_tokens, before, state.tokens):
                    watch.measure(stage.context, is_last)
                is_end = is_last or config.stage_at(state.step) != stage
                is_due = run.due(config.state.every_tokens, before, state.tokens)
                if is_end or is_stopping or is_due:
                    state.save(draft, config.state.keep)
                if is_stopping and not is_last:
                    raise run.Stopped(f"stopped after step {state.step}; --resume goes on.")
        watch.close()
        return export(setup, draft, out, record, watch.measured)
