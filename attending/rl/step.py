"""A step's answers to gradients: rewards, advantages, passes, the policy's loss, what to watch."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from attending.chat import THINK_CLOSE, Tokenizer
from attending.mesh import World
from attending.model.decoder import Decoder
from attending.rl.advantage import METHODS, Advantages, advantages
from attending.rl.batch import collate, passes
from attending.rl.fragments import Fragment, play, turns_of
from attending.rl.loss import Objective, differentiated
from attending.rl.recipe import RlConfig
from attending.rl.reward import answer_length, combine
from attending.rl.setup import Setup
from attending.rl.shared import Shared
from attending.rl.types import Batch, Case, Sample
from attending.rl.verify import Judged, Verifier, collect
from attending.rl.watch import figures
from attending.train.parallel import total
from attending.train.step import Gradients, accumulate


def samples_of(
    judged: Sequence[Sequence[Judged]], config: RlConfig, tokenizer: Tokenizer
) -> tuple[list[list[Sample]], Advantages]:
    """Groups of judged answers with rewards and advantages."""
    own = tokenizer.control_id(THINK_CLOSE)
    close = tokenizer.encode(THINK_CLOSE, is_first=False) if own is None else [own]
    told, rewards, cases = config.reward, list[float | None](), list[str]()
    for group in judged:
        lengths = [
            answer_length(one.rollout.ids, close, count_thinking=told.count_thinking)
            for one in group
        ]
        verdicts = [one.verdict for one in group]
        rewards += combine(verdicts, lengths, told.length_threshold, told.length_scale)
        cases += [one.rollout.case for one in group]
    found = advantages(cases, rewards, METHODS[config.loss.advantage])
    worths = zip(rewards, found.values.tolist(), strict=True)
    return [[Sample(one.rollout, *next(worths)) for one in group] for group in judged], found


def batches_of(
    groups: Sequence[Sequence[Sample]],
    cases: Mapping[str, Case],
    kinds: Sequence[str],
    most_rows: int,
    device: torch.device,
    *,
    share: bool = True,
) -> list[Batch]:
    """The groups that teach something, as forward passes, as many on every rank.

    A group whose advantages are all 0 has no gradient and is not computed; it counts in the loss's
    normaliser all the same. A rank with fewer passes than another makes empty ones. Unless they are
    to `share` prompts, all answers are computed, each behind its own.
    """
    numbers = {name: kinds.index(case.kind) for name, case in cases.items()}
    taught = [group for group in groups if any(one.advantage for one in group)]
    taught = taught if share else [[one] for group in groups for one in group]
    found = [collate(part, numbers, device) for part in passes(taught, most_rows)]
    most = torch.tensor(len(found), device=device)
    if dist.is_initialized():
        dist.all_reduce(most, dist.ReduceOp.MAX)
    if len(found) < int(most):
        idle = collate([[replace(groups[0][0], advantage=0.0)]], numbers, device)
        idle = replace(idle, weights=torch.zeros_like(idle.weights))
        found += [idle] * (int(most) - len(found))
    return found


@dataclass(frozen=True, slots=True)
class Drawn:
    """A step's answers on this rank, judged, and what is trained on."""

    judged: list[list[Judged]]
    """By group."""
    batches: list[Batch]
    figures: dict[str, float]
    """For the metrics."""

    def where(self) -> str:
        """The cases, for an error."""
        return ", ".join(f"case {group[0].rollout.case}" for group in self.judged)


def draw(
    config: RlConfig, setup: Setup, verifier: Verifier, runner: asyncio.Runner, place: World
) -> Drawn:
    """Ask a group of answers to each of the next cases, judge them, and make passes of them."""
    step, size = setup.state.step, config.group
    own = setup.prompts.draw(config.prompts)[place.rank :: place.size]
    played: list[Fragment] = []
    if spoken := [one for one in own if one.case.patient]:
        turns = turns_of(spoken, config, step)
        playing = play(
            spoken, setup.patients, setup.sampler, setup.room, turns, seed=config.seed, version=step
        )
        played = runner.run(playing)
        verifier.fragments = {one.prompt.case.id: one for one in played}
        own = [one for one in own if not one.case.patient] + [one.prompt for one in played]
    flat = [one for group in setup.prompts.asked(own, size, step) for one in group]
    found = runner.run(collect(setup.sampler, verifier, flat, step))
    judged = [found.judged[i : i + size] for i in range(0, len(flat), size)]
    groups, worth = samples_of(judged, config, setup.watched.tokenizer)
    device = setup.watched.device
    batches = batches_of(
        groups,
        setup.cases,
        setup.kinds,
        config.micro_tokens,
        device,
        share=config.share_prompts,
    )
    told = figures(judged, groups, setup.cases, worth, played) | found.seconds
    return Drawn(judged, batches, told)


@dataclass(slots=True)
class PolicyStep:
    """The loss as `train.step.accumulate` takes it, and sums of what to watch."""

    objective: Objective
    num_ranks: int
    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    logprobs: list[Tensor] = field(default_factory=list)
    """Of this update's passes, for the next one's ratios."""

    def __call__(self, decoder: Decoder, batch: Batch, scale: float) -> tuple[Tensor, Tensor]:
        """See `step.Loss`; `scale` is not read: each answer weighs 1/N."""

        def of(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
            found, values = differentiated(hidden, head, batch, self.objective)
            self.logprobs.append(values.logprobs)
            self._note(
                batch.weights,
                loss=found.loss / batch.weights.sum().clamp_min(1),
                clip_share=found.is_clipped,
                truncated_share=found.is_truncated,
                mismatch_nats=found.mismatch_k1,
                mismatch_kl_nats=found.mismatch_k3,
                entropy_nats=values.entropies,
            )
            return found.loss * self.num_ranks, -values.logprobs

        return decoder.measure(batch.ids, Shared(batch.groups, batch.ids.device), of)

    def _note(self, weights: Tensor, **found: Tensor) -> None:
        for name, values in found.items():
            self.sums[name] += float((values.detach().double() * weights).sum())
        self.sums["tokens"] += float(weights.sum())


def policy_gradients(
    decoder: Decoder, batches: Sequence[Batch], told: PolicyStep, kinds: Sequence[str]
) -> tuple[Gradients, dict[str, float], list[Batch]]:
    """Leave a step's gradients in `.grad`.

    Returns:
        What was found, its loss that of the policy; what to watch, over all ranks; and the batches
        with what the trainer thought of the ids before this update.
    """
    device = next(decoder.parameters()).device
    loss: Callable[..., tuple[Tensor, Tensor]] = told
    if batches:
        found = accumulate(decoder, batches, loss, told.num_ranks, kinds)
    else:
        found = Gradients(0.0, {}, 0.0, 0)
    names = ["loss", "clip_share", "truncated_share", "mismatch_nats", "mismatch_kl_nats"]
    names += ["entropy_nats", "tokens"]
    sums = total(torch.tensor([told.sums[n] for n in names], dtype=torch.float64, device=device))
    values = dict(zip(names, sums.tolist(), strict=True))
    loss_value, count = values.pop("loss"), values.pop("tokens")
    watched = {f"rl/{name}": value / count for name, value in values.items() if count}
    known = [
        batch if batch.old is not None else replace(batch, old=own.double())
        for batch, own in zip(batches, told.logprobs, strict=True)
    ]
    return replace(found, loss=loss_value, by_kind={}), watched, known
