"""What a step learns from: its units as forward passes, answers sampled by the model as it is now.

Sampling goes through the engine's scheduler over the weights in training, at temperature 1 from the
whole distribution, so what is sampled has the probabilities that the loss takes it to have.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from attending.chat import Tokenizer
from attending.engine.pages import pages_for
from attending.engine.sampler import Sampling
from attending.engine.scheduler import Request, Scheduler
from attending.engine.torch_runner import TorchRunner
from attending.model.architecture import PAGE_TOKENS
from attending.model.attend import Packed
from attending.model.decoder import Decoder
from attending.prefer import losses
from attending.prefer.data import Sample, Unit, collate, sample_of
from attending.prefer.recipe import PreferConfig
from attending.prefer.tokens import Beside, Values, chained, compared, summed, trained
from attending.train.parallel import total
from attending.train.reader import Batch
from attending.train.step import Gradients, accumulate
from attending.verifier.rules import check

Result = TypeVar("Result")
Written = tuple[Unit, list[int]]  # a sampled answer or chain of thought; its last id may end it
SCORE = "score.weight"  # [1, D], the scalar head of a reward model or critic
KINDS = {"elo": ("thought", "answer"), "ppo": ("answer",)}
RUNNING = 16  # answers sampled side by side


@dataclass(frozen=True, slots=True)
class SampledBatch(Batch):
    """Sampled answers, for several updates."""

    sampled: losses.Sampled
    """Of the targets that count."""


@dataclass(slots=True)
class Objective:
    """A method and the frozen models that it looks at."""

    config: PreferConfig
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    reference: Decoder | None
    judge: Decoder | None
    """ppo: the reward model, if it has one."""
    num_ranks: int
    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """What this step's passes found."""

    def passes(self, decoder: Decoder, units: Sequence[Unit], step: int) -> list[Batch]:
        """This rank's units as forward passes; none is split."""
        each, device = self.config.units_per_pass, decoder.model.norm.weight.device
        parts = [units[at : at + each] for at in range(0, len(units), each)]
        if self.config.method == "ppo":
            return [self._judged(decoder, self._write(decoder, part, step)) for part in parts]
        if self.config.method == "elo":
            written = [self._write(decoder, part, step) for part in parts]
            return [collate([*map(self._chain, part)], device) for part in written]
        rest = [([0], 0)] if self.config.method == "reward" else []  # so that the last id is read
        pairs = [[(one.prompt, answer) for one in part for answer in one.answers] for part in parts]
        return [
            collate(
                [sample_of((q, 0), (a, 1 + i % 2), *rest) for i, (q, a) in enumerate(p)], device
            )
            for p in pairs
        ]

    def gradients(
        self, decoder: Decoder, batches: Sequence[Batch]
    ) -> tuple[Gradients, dict[str, float]]:
        """Leave a step's gradients in `.grad`; the method's loss, and its other measures."""
        kinds = KINDS.get(self.config.method, ("chosen", "rejected"))
        found = accumulate(decoder, batches, self._loss, self.num_ranks, kinds)
        names, device = sorted(self.sums), batches[0].ids.device
        sums = torch.tensor([self.sums[name] for name in names], dtype=torch.float64, device=device)
        measured = dict(zip(names, total(sums).tolist(), strict=True))
        self.sums.clear()
        return replace(found, loss=measured.pop("prefer/loss")), measured

    def _loss(self, decoder: Decoder, batch: Batch, per_token: float) -> tuple[Tensor, Tensor]:
        """See `step.Loss`; each unit weighs the same, in ppo each token."""
        (at, segments), logs = trained(batch), torch.zeros_like(batch.weights)
        share = 1 / self.config.batch.units

        def of(hidden: Tensor, head: Tensor, beside: Beside | None) -> tuple[Tensor, Values]:
            def loss(values: Values) -> tuple[Tensor, Tensor]:
                if isinstance(batch, SampledBatch):
                    worths = hidden @ decoder.get_parameter(SCORE)[0]
                    return self._ppo(values, worths, batch.sampled, per_token)
                if self.config.method == "elo":
                    own = self._elo(values, segments, batch.kinds[at], share)
                else:
                    own = self._pairs(values, segments, share)
                return own * self.num_ranks, own.new_zeros(())

            line, values, beyond = chained(hidden, head, batch.targets[at], loss, beside)
            return line + beyond, values

        if self.config.method == "reward":
            found = losses.bradley_terry(*scored(decoder, batch).view(-1, 2).unbind(1))
            return self._noted(found, share), logs
        line, values = self._through(decoder, batch, of)
        logs[at] = -values.logprobs.to(logs.dtype)
        return line, logs

    def _pairs(self, values: Values, segments: Tensor, share: float) -> Tensor:
        name, told = self.config.method, self.config.pairs
        each = values.logprobs - values.reference, values.divergences
        sums = (summed(one, segments, int(segments[-1]) + 1).view(-1, 2) for one in each)
        chosen, rejected = map(losses.Sums, *(one.unbind(1) for one in sums))
        if name == "tdpo2":
            found = losses.tdpo2(chosen, rejected, told.beta, told.alpha)
        else:
            found = (losses.dpo if name == "dpo" else losses.tdpo1)(chosen, rejected, told.beta)
        self._note(share, chosen_divergence_nats=chosen.divergences)
        self._note(share, rejected_divergence_nats=rejected.divergences)
        return self._noted(found, share)

    def _noted(self, found: losses.PairLoss, share: float) -> Tensor:
        self._note(share, loss=found.losses, margin_nats=found.margins)
        self._note(share, right_share=found.margins > 0)
        return found.losses.sum() * share

    def _elo(self, values: Values, segments: Tensor, kinds: Tensor, share: float) -> Tensor:
        group, count = self.config.sample.group, int(segments[-1]) + 1
        each = (values.logprobs * (kinds == kind) for kind in range(2))
        thoughts, answers = (summed(one, segments, count).view(-1, group) for one in each)
        found = losses.elo(answers, thoughts, direct_term=self.config.sample.direct_term)
        self._note(share / group, loss=found.bounds, advantage_size_nats=found.advantages.abs())
        self._note(share / group, thought_tokens=kinds == 0)
        return found.losses.sum() * (share / group)

    def _ppo(
        self, values: Values, worths: Tensor, sampled: losses.Sampled, scale: float
    ) -> tuple[Tensor, Tensor]:
        told, logs = self.config.ppo, values.logprobs
        found = losses.ppo(logs, worths, sampled, clip=told.clip, value_clip=told.clip)
        self._note(scale, loss=found.policy, critic_error=found.value)
        self._note(scale, clipped_share=found.is_clipped)
        return found.policy.sum() * scale, found.value.sum() * (scale * told.value_weight)

    def _note(self, share: float, **found: Tensor) -> None:
        for name, values in found.items():
            self.sums[f"prefer/{name}"] += float(values.detach().sum()) * share

    def _through(
        self, decoder: Decoder, batch: Batch, of: Callable[[Tensor, Tensor, Beside | None], Result]
    ) -> Result:
        """What `of` makes of the states before the targets that count, the reference's beside."""
        (at, _), reference = trained(batch), self.reference
        attend = Packed(batch.lengths, device=batch.ids.device)

        def own(hidden: Tensor, head: Tensor) -> Result:
            def both(theirs: Tensor, their_head: Tensor) -> Result:
                return of(hidden[at], head, Beside(theirs[at], their_head))

            if reference is None:
                return of(hidden[at], head, None)
            return reference.measure(batch.ids, attend, both)  # frozen: it keeps no graph

        return decoder.measure(batch.ids, attend, own)

    def _write(self, decoder: Decoder, units: Sequence[Unit], step: int) -> list[Written]:
        """A group for each question; the same for the same seed, step and question."""
        group, most = self.config.sample.group, self.config.sample.max_tokens
        running = min(len(units) * group, RUNNING)
        longest = max(len(unit.prompt) for unit in units) + most + PAGE_TOKENS
        runner = TorchRunner(decoder, pages_for(decoder.arch, running * longest, running))
        scheduler = Scheduler(runner, max_running=running)
        found: dict[int, Written] = {}
        for unit in units:
            key = (self.config.seed, step, unit.number)
            for seed in np.random.SeedSequence(key).generate_state(group).tolist():
                sampling = Sampling(temperature=1.0, max_tokens=most, seed=seed)
                request = Request(unit.prompt, sampling, self.stop_ids)
                found[scheduler.submit(request)] = unit, []
        while scheduler.num_running or scheduler.num_waiting:
            for output in scheduler.step():
                if output.error:
                    raise output.error
                found[output.handle][1].extend([] if output.token is None else [output.token])
        return list(found.values())

    def _chain(self, written: Written) -> Sample:
        """A chain of thought (kind 1), the bridge, the true answer (kind 2)."""
        unit, ids = written
        thought = ids[:-1] if ids[-1] in self.stop_ids else ids
        bridge = self.tokenizer.encode(self.config.sample.bridge, is_first=False)
        found = sample_of((unit.prompt, 0), (thought, 1), (bridge, 0), (unit.answers[0], 2))
        if len(thought) < len(ids):  # to end was sampled, too; the bridge is read in its place
            at = len(unit.prompt) + len(thought) - 1
            found.targets[at], found.kinds[at] = ids[-1], 1
        return found

    def _judged(self, decoder: Decoder, written: Sequence[Written]) -> SampledBatch:
        """Answers with their advantages, by the policy and critic that sampled them."""
        told, device = self.config.ppo, decoder.model.norm.weight.device
        batch = collate([sample_of((unit.prompt, 0), (ids, 1)) for unit, ids in written], device)
        at, _ = trained(batch)

        def of(hidden: Tensor, head: Tensor, beside: Beside | None) -> tuple[Tensor, ...]:
            values = compared(hidden, head, batch.targets[at], beside)
            return values.logprobs, values.reference, hidden @ decoder.get_parameter(SCORE)[0]

        with torch.no_grad():
            known = logs, reference, worths = self._through(decoder, batch, of)
            scores = self._scores(written, device)
        sizes = [len(ids) for _, ids in written]
        parts = zip(*(torch.split(one, sizes) for one in known), strict=True)
        found = []
        for score, (own, theirs, worth) in zip(scores, parts, strict=True):
            rewards = losses.token_rewards(score, own, theirs, told.penalty)
            found.append(losses.gae(rewards, worth, gamma=1.0, lam=told.lam))
        advantages, returns = map(torch.cat, zip(*found, strict=True))
        share = 1 / (self.config.batch.units * self.config.sample.group)
        self._note(share, reward=torch.tensor(scores), divergence_nats=logs - reference)
        fields = batch.ids, batch.targets, batch.weights, batch.lengths, batch.kinds
        return SampledBatch(*fields, losses.Sampled(logs, worths, advantages, returns))

    def _scores(self, written: Sequence[Written], device: torch.device) -> list[float]:
        if self.judge is None:
            return [check(one.rule, self.tokenizer.decode(ids)).score for one, ids in written]
        samples = [sample_of((unit.prompt, 0), (ids, 1), ([0], 0)) for unit, ids in written]
        found: list[float] = scored(self.judge, collate(samples, device)).tolist()
        return found


def scored(decoder: Decoder, batch: Batch) -> Tensor:
    """A scalar for each segment, read at its end."""
    ends = torch.tensor(batch.lengths, device=batch.ids.device).cumsum(0) - 1

    def of(hidden: Tensor, head: Tensor) -> Tensor:
        return hidden[ends] @ decoder.get_parameter(SCORE)[0]

    return decoder.measure(batch.ids, Packed(batch.lengths, device=batch.ids.device), of)
