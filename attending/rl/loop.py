"""The loop of reinforcement learning: Baichuan-M2's improved GRPO, of any stage."""

import asyncio
import shutil
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from attending import artifact
from attending.evaluate import forgetting
from attending.rl import watch as watching
from attending.rl.heldout import answer_heldout
from attending.rl.loss import Objective
from attending.rl.recipe import RlConfig
from attending.rl.setup import every_weight, judges, prepare, told
from attending.rl.step import PolicyStep, draw, policy_gradients
from attending.rl.verify import Verifier
from attending.sources import Progress
from attending.train import run
from attending.train.parallel import process_group
from attending.train.recipe import HeldoutConfig
from attending.train.schedule import Phase, due, learning_rate
from attending.train.start import open_start
from attending.train.watch import Show, Watch

# Of the recipe, what cannot change on the way: `state.require_unchanged`.
FINAL = r"(model|cases|heldout|template|seed|parents)\b"
NOTE = (
    "A model tuned by reinforcement learning, for demonstration: what it says about medicine is "
    "often wrong. What it was rewarded for stands in run.json, what it wrote in rollouts.html."
)


def rl(
    config: RlConfig,
    out: Path,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    show: Show | None = None,
    progress: Progress = lambda *_: None,
    note: Callable[[str], object] = lambda _: None,
) -> Path:
    """A model and cases in, a model that scores better on them out.

    Order of a draw: held-out cases if they are due; pack the weights, write answers and judge them
    beside; rewards, advantages; for each update forward and backward, check, skip or update, log;
    state if it is due, stop if asked. Under torchrun every rank calls this.

    Args:
        config: The recipe.
        out: Folder to write; `OUT.tmp` while training.
        resume: Go on from the newest state there.
        accept_changes: Go on although the recipe has changed.
        show: Told after every step, on rank 0.
        progress: Told of every answer to the suite that compares before and after.
        note: Told what people should know: cases left out, held-out scores, alarms.

    Raises:
        ConfigError: Recipe, cases and model do not fit each other.
        EndpointError: The sampling server is gone; the last state is whole.
        TrainingError: A loss or a reward that is no number, or memory that ends.
        CheckFailed: A limit of `watch` was passed, or the judge is gone; or more is forgotten than
            may be.
        Stopped: It was interrupted, and has saved its state.
    """
    with process_group(config.compute.precision) as (place, device):
        forgetting.require_measured(config.forgetting, frozenset())
        start = open_start(config.model)
        known = told(config, start)
        recipe = config.model_dump(mode="json")
        record = artifact.Record("rl", recipe, config.seed, known["parents"])
        draft = run.begin(
            out, known, place, resume=resume, accept_changes=accept_changes, final=FINAL
        )
        setup = prepare(config, start, draft, place, device)
        state, decoder, prompts = setup.state, setup.state.decoder, setup.prompts
        if newest := run.newest(draft):
            state.restore(newest)
        told_of = config.loss.eps_low, config.loss.eps_high, config.loss.level
        objective = Objective(
            config.num_samples, config.max_tokens, *told_of, config.loss.most_weight
        )
        with (
            run.Signals() as signals,
            run.memory_and_disk(config.micro_tokens, out),
            asyncio.Runner() as runner,
        ):
            stack = AsyncExitStack()
            own, other = runner.run(
                stack.enter_async_context(judges(config, Path(config.model).name))
            )
            told_by = config.reward, config.dialogue.most_facts
            verifier = Verifier(start.tokenizer, setup.cases, own, *told_by)
            reporter = Verifier(start.tokenizer, setup.cases, other, *told_by)
            looked = draft, state, setup.watched, HeldoutConfig(every_tokens=1)
            watch = Watch(*looked, config.steps, show)
            rollouts = watching.Rollouts(draft, state.files.get(watching.ROLLOUTS, 0), place.rank)
            for part, cases in (("to learn from", prompts), ("held out", setup.heldout)):
                note(f"{part}: {', '.join(cases.lines())}")
            is_due = state.owes_measure
            while state.step < config.steps:
                began = time.monotonic()
                setup.sampler.load(decoder, partial(every_weight, decoder))
                packed = time.monotonic() - began
                if is_due:
                    held = runner.run(answer_heldout(config, setup, reporter, place))
                    watch.write(held)
                    watching.look(config.watch, state.step, held, draft, note)
                drawn = draw(config, setup, verifier, runner, place)
                batches = drawn.batches
                seen = {"time/packing_seconds": packed} | drawn.figures
                training = time.monotonic()
                for _ in range(config.updates):
                    policy = PolicyStep(objective, place.size)
                    grads, more, batches = policy_gradients(decoder, batches, policy, setup.kinds)
                    run.require_finite(grads, state.step + 1, drawn.where)
                    watching.require_sound(config.watch, state.step + 1, seen | more)
                    phases, warmup = [Phase(config.steps, "constant")], config.warmup_steps
                    rate = learning_rate(state.step, phases, warmup, config.optimizer.rates)
                    state.update(grads, rate, config.optimizer)
                    prompts.measured = seen | more
                    prompts.measured["time/training_seconds"] = time.monotonic() - training
                    watch.step(grads, rate, began, [n for one in batches for n in one.lengths])
                is_due = due(config.watch.every_steps, state.step - config.updates, state.step)
                state.owes_measure = is_due
                if place.rank == 0:
                    spoken = {name: one.prompt.case for name, one in verifier.fragments.items()}
                    some = drawn.judged[: config.watch.samples]
                    rollouts.add(state.step, some, {**setup.cases, **spoken})
                written = [config.tokens_of(x) for x in (state.step - config.updates, state.step)]
                run.save_if_due(
                    *(state, draft, config.state, state.tokens, signals, device),
                    lambda: watch.sizes() | rollouts.sizes(),
                    is_last=state.step == config.steps,
                    is_end=due(config.state.every_tokens, *written),
                )
            setup.sampler.load(decoder, partial(every_weight, decoder))
            held = runner.run(answer_heldout(config, setup, reporter, place))
            watch.write(held)
            watching.look(config.watch, state.step, held, draft, note)
            watch.finish(0)
            runner.run(stack.aclose())
            run.export(state, start.tokenizer, start.generation, draft)
    if place.rank:
        return out
    shutil.rmtree(draft / "packed", ignore_errors=True)
    watching.write_page(draft, config)
    lost = forgetting.compare(config.forgetting, config.model, draft, frozenset(), progress, note)
    record = replace(record, began_seconds=watch.began)
    run.settle(draft, out, record, NOTE, held | lost.figures())
    forgetting.check(lost, config.forgetting.max_forgetting)
    return out
