"""The loop that makes a draft: EAGLE-3's unrolled training on what the target wrote."""

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from attending import artifact
from attending.draft import data
from attending.draft.recipe import DraftConfig
from attending.draft.setup import begun_from, export, prepare, require_alone
from attending.draft.watch import DraftWatch
from attending.sources import Progress
from attending.train import run
from attending.train.parallel import process_group
from attending.train.rows import deal, where
from attending.train.schedule import Phase, due, learning_rate
from attending.train.start import open_start
from attending.train.step import accumulate
from attending.train.watch import Show

DATA = "data"
# Of the recipe, what cannot change on the way: `state.require_unchanged`.
FINAL = r"(model|root|prompts|writing|dialogues|head|begin|context|seed|parents)\b"
NOTE = (
    "A draft head for speculative decoding. It proposes tokens, its target decides: what is "
    "written is the target's, and so are its mistakes."
)


def draft(
    config: DraftConfig,
    out: Path,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    show: Show | None = None,
    progress: Progress = lambda *_: None,
    note: Callable[[str], object] = lambda _: None,
) -> Path:
    """A model and prompts in, a draft head for it out.

    The target answers first. Order of a step: held-out measures if they are due, read, forward and
    backward, check, skip or update, log, state if it is due, stop if asked.

    Args:
        config: The recipe.
        out: Folder to write; `OUT.tmp` while training.
        resume: Go on from the newest state there; answers that are there are never asked for again.
        accept_changes: Go on although the recipe has changed.
        show: Told after every step.
        progress: Told of every answer that is written.
        note: Told what people should know of it.

    Raises:
        ConfigError: Recipe, prompts and target do not fit each other.
        TrainingError: A loss that is no number, or memory that ends.
        Stopped: It was interrupted, and has saved its state.
    """
    context = config.context
    with process_group(config.compute.precision) as (place, device), ExitStack() as held:
        start = open_start(config.model)
        require_alone(config, start, place)
        recipe = config.model_dump(mode="json")
        parents = [start.parent, *data.digests(config), *begun_from(config)]
        record = artifact.Record("draft", recipe, config.seed, parents)
        told = {**recipe, "parents": parents}
        folder = run.begin(
            out, told, place, resume=resume, accept_changes=accept_changes, final=FINAL
        )
        answers = Path(config.dialogues or folder / DATA)
        answers.mkdir(parents=True, exist_ok=True)
        held.enter_context(artifact.alone(answers, "name another with --set dialogues=FOLDER"))
        counts = data.prepare(config, start, answers, folder / DATA, progress)
        for name, own in counts.items():
            note(f"{name}: " + ", ".join(f"{count:,} {what}" for what, count in own.items()))
        setup = prepare(config, start, answers, folder / DATA, place, device)
        state, eagle, reader, steps = setup.state, setup.eagle, setup.reader, setup.num_steps
        phases = [Phase(steps, config.schedule)]
        warmup = -(-config.optimizer.warmup_tokens // config.batch.tokens)
        if newest := run.newest(folder):
            state.restore(newest)
        with run.Signals() as signals, run.memory_and_disk(config.batch.micro_tokens, out):
            models = setup.target, eagle
            watch = DraftWatch(
                folder, state, setup.watched, config, steps, show, models, setup.flops_per_token
            )
            watch.baseline(context)
            while state.step < steps:
                if state.owes_measure:
                    watch.measure(context)
                began, before = time.monotonic(), state.tokens
                count, each = config.batch.rows(context)
                rows = [reader.row(context) for _ in range(count)]
                batches = deal(reader, rows, each, place, start.arch.vocab_size, device)
                found = accumulate(eagle, batches, setup.loss, 1, reader.groups.names)
                run.require_finite(found, state.step + 1, partial(where, reader.shards, rows))
                rate = learning_rate(state.step, phases, warmup, config.optimizer.rates)
                state.update(found, rate, config.optimizer)
                watch.step(found, rate, began, [n for batch in batches for n in batch.lengths])
                state.owes_measure = due(config.heldout.every_tokens, before, state.tokens)
                kept = state, folder, config.state, before, signals, device, watch.sizes
                run.save_if_due(*kept, is_last=state.step == steps)
            measured = watch.finish(context)
            export(config, setup, folder)
    if not config.dialogues:
        note(f"the answers go with {DATA}/; --set dialogues=FOLDER keeps them for other runs")
    shutil.rmtree(folder / DATA)  # prompts of others, which no model folder should carry
    sizes = {f"data/{k}_{what}": float(n) for k, own in counts.items() for what, n in own.items()}
    record = replace(record, began_seconds=watch.began)
    run.settle(folder, out, record, NOTE, measured | sizes)
    return out
