"""Rollouts to verdicts while others are still being written: rules at once, judges side by side."""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from attending.chat import Tokenizer
from attending.errors import CheckFailed, EndpointError, ReplyError, UsageError
from attending.rl.fragments import Fragment, judge_reply
from attending.rl.prompts import text_of
from attending.rl.recipe import RewardConfig
from attending.rl.reward import by_rubric, by_rule
from attending.rl.sampler import Asked, Sampler
from attending.rl.types import Case, Rollout, Verdict
from attending.verifier.judge.verdict import Judge
from attending.verifier.rules import check
from attending.verifier.rules.rule import answer_of


class Judged(NamedTuple):
    """An answer with its text and verdict."""

    rollout: Rollout
    text: str
    verdict: Verdict


class Verifier:
    """What judges the answers to some cases."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        cases: Mapping[str, Case],
        judge: Judge | None,
        reward: RewardConfig,
        most_facts: int,
    ) -> None:
        """UsageError where rubrics are to be judged and nobody judges."""
        self._tokenizer, self._cases, self._judge, self._reward = tokenizer, cases, judge, reward
        self.fragments: dict[str, Fragment] = {}
        """By case: the consultations whose next replies are judged."""
        self._most_facts = most_facts
        lacking = [name for name, case in cases.items() if case.criteria and judge is None]
        if lacking:
            raise UsageError(
                f"{len(lacking)} cases have rubrics, {lacking[0]!r} first, and no judge is named: "
                "--set judge=embedded, an address, or a model on this machine."
            )

    async def __call__(self, rollout: Rollout) -> Judged:
        """A judge that gives no word leaves the answer unscored."""
        text = text_of(self._tokenizer, rollout)
        case = self._cases[rollout.case]
        if case.patient:
            fragment = self.fragments[case.id]
            return Judged(rollout, text, await judge_reply(fragment, text, self._most_facts))
        return Judged(rollout, text, await judge_text(case, text, self._judge, self._reward))


async def judge_text(case: Case, text: str, judge: Judge | None, reward: RewardConfig) -> Verdict:
    """Of an answer to a case with a rule or criteria; unscored where the judge gives no word."""
    if case.rule is not None:
        return by_rule(str(case.rule["kind"]), check(case.rule, text))
    answer = answer_of(text)
    if not answer:
        return Verdict(0.0, "no answer")
    assert judge is not None
    try:
        found = await judge(case.rubric, answer)
    except ReplyError as error:
        return Verdict(None, f"the judge failed: {error}")
    except (CheckFailed, EndpointError) as error:  # too many are lacking, or another answers
        words = f"no judge to go on with: {error} The last saved state is whole; --resume goes on."
        raise type(error)(words) from None
    return by_rubric(case, [one.met for one in found], reward.form)


class Collected(NamedTuple):
    """All answers of a step."""

    judged: list[Judged]
    """In the order of what was asked."""
    seconds: dict[str, float]
    """Of sampling; and of judging after the last answer was written, not what went on beside."""


async def collect(
    sampler: Sampler, verifier: Verifier, asked: Sequence[Asked], version: int
) -> Collected:
    """Write all answers, and judge each as soon as it is whole.

    Raises:
        CheckFailed: The judge is gone, or is another; nothing of the step is kept.
    """
    loop, began = asyncio.get_running_loop(), asyncio.get_running_loop().time()
    running: dict[int, asyncio.Task[Judged]] = {}
    left = threading.Event()

    def judge(place: int, rollout: Rollout) -> None:
        running[place] = loop.create_task(verifier(rollout))

    def write() -> None:
        for place, rollout in sampler.sample(asked, version):
            if left.is_set():
                return
            loop.call_soon_threadsafe(judge, place, rollout)

    try:
        await asyncio.to_thread(write)
        written = loop.time()
        found = [await running[place] for place in range(len(asked))]
    finally:
        left.set()
        for task in running.values():
            task.cancel()
    spent = {"time/sampling_seconds": written - began}
    return Collected(found, spent | {"time/judging_seconds": loop.time() - written})
