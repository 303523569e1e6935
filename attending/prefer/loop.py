"""The loop of preference training: ELO, TDPO, DPO, a reward model, PPO."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from attending import artifact
from attending.evaluate import forgetting
from attending.prefer.recipe import PreferConfig
from attending.prefer.setup import open_models, prepare, without_score
from attending.sources import Progress
from attending.train import run
from attending.train.parallel import process_group
from attending.train.schedule import due
from attending.train.watch import Show, Watch, Watched

NOTE = (
    "A model tuned on preferences, for demonstration: what it says about medicine is often wrong, "
    "and what a reward model likes was not checked."
)


def prefer(
    config: PreferConfig,
    out: Path,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    show: Show | None = None,
    progress: Progress = lambda *_: None,
    note: Callable[[str], object] = lambda _: None,
) -> Path:
    """A model and preferences in, a model out.

    Order of a step: samples to look at if they are due, draw units, sample answers if the method
    does, forward and backward, check, skip or update, log, state if it is due, stop if asked.

    Args:
        config: The recipe.
        out: Folder to write; `OUT.tmp` while training.
        resume: Go on from the newest state there.
        accept_changes: Go on although the recipe has changed.
        show: Told after every step, on rank 0.
        progress: Told of every answer to the suite that compares before and after.
        note: Told what people should know of it.

    Raises:
        ConfigError: Recipe, data and models do not fit each other.
        TrainingError: A loss that is no number, or memory that ends.
        CheckFailed: More is forgotten than `forgetting.max_forgetting`; the model is written.
        Stopped: It was interrupted, and has saved its state.
    """
    context, most = config.batch.max_tokens, config.batch.micro_tokens
    with process_group(config.compute.precision) as (place, device):
        forgetting.require_measured(config.forgetting, frozenset())
        models = open_models(config)
        parents = [{"uri": config.data, "sha256": artifact.digest(Path(config.data))}]
        parents = [*(one.parent for one in {id(m): m for m in models.values()}.values()), *parents]
        record = artifact.Record("prefer", config.model_dump(mode="json"), config.seed, parents)
        told = {**record.recipe, "parents": parents}
        draft = run.begin(out, told, place, resume=resume, accept_changes=accept_changes)
        state, units, objective = prepare(config, models, place, device)
        start, decoder = models["model"], state.decoder
        if newest := run.newest(draft):
            state.restore(newest)
        with run.Signals() as signals, run.memory_and_disk(most, out):
            watched = Watched(start.tokenizer, {}, most, device, decoder.model.norm.weight.dtype)
            watch = Watch(draft, state, watched, config.heldout, config.steps, show)
            for line in units.lines():
                note(line)
            while state.step < config.steps:
                if state.owes_measure:
                    watch.measure(context)
                began, before = time.monotonic(), state.tokens
                drawn = units.draw(config.batch.units)
                batches = objective.passes(decoder, drawn[place.rank :: place.size], state.step)
                for _ in range(config.updates):
                    found, units.measured = objective.gradients(decoder, batches)
                    rows = [f"row {unit.number}" for unit in drawn]
                    run.require_finite(found, state.step + 1, partial(", ".join, rows))
                    rate = config.rate(state.step)
                    state.update(found, rate, config.optimizer)
                    watch.step(found, rate, began, [n for one in batches for n in one.lengths])
                    began = time.monotonic()
                state.owes_measure = due(config.heldout.every_tokens, before, state.tokens)
                kept = state, draft, config.state, before, signals, device, watch.sizes
                run.save_if_due(*kept, is_last=state.step == config.steps)
            measured = watch.finish(context) | units.figures()
            adapt = partial(without_score, config, draft)
            run.export(state, start.tokenizer, start.generation, draft, adapt)
    if place.rank:
        return out
    record = replace(record, began_seconds=watch.began)
    if config.forgetting.data is None:
        run.settle(draft, out, record, NOTE, measured)
        return out
    lost = forgetting.compare(config.forgetting, config.model, draft, frozenset(), progress, note)
    run.settle(draft, out, record, NOTE, measured | lost.figures())
    forgetting.check(lost, config.forgetting.max_forgetting)
    return out
