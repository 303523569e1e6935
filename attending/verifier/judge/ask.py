"""The judge behind an endpoint: one question a criterion, in the order that a prefix cache likes.

Baichuan-M2 sends the prompts that share a dialogue to one serving instance, and has a template for
positive and one for negative criteria, because with a single one judges answered "is this good?"
where "is it there?" was asked (arXiv 2509.02208, 4.3 and appendix A). Here the conversation stands
first, so that all criteria of it share one prefix, then the template of the sign, then the
criterion. The first question of a conversation is answered before the others are sent: they find
its keys and values computed instead of all computing them at once.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from pydantic import BaseModel, NonNegativeFloat, PositiveInt

from attending.config import Config
from attending.endpoint import Endpoint, Reply
from attending.errors import CheckFailed, EndpointError, ReplyError, UsageError
from attending.verifier.ask import Answered, ask, together
from attending.verifier.data import template
from attending.verifier.judge.verdict import Judge, Verdict
from attending.verifier.rubric.schema import Criterion, Message, Rubric

CAUTION = "Judged by a model: its agreement with physicians was not measured here."


class JudgeOptions(Config):
    """How a model is asked for its verdicts."""

    temperature: NonNegativeFloat = 0.0
    """Of the judge."""
    max_tokens: PositiveInt = 1024
    """Most tokens of one verdict with its reason."""
    system: str | None = None
    """A system message before every question."""
    conversations_at_once: PositiveInt = 8
    """Conversations that `judge_all` has under way; each holds a prefix in the cache."""
    max_unscored_share: NonNegativeFloat = 0.02
    """Share of verdicts without a judge's word above which a run stops."""
    min_verdicts: PositiveInt = 50
    """Verdicts before that share is looked at."""


class Positive(Config):
    """The reply to a criterion that says what is acceptable (appendix A)."""

    explanation: str
    """Why."""
    acceptable: bool
    """The answer does it."""


class Negative(Config):
    """The reply to a criterion that says what is unacceptable (appendix A)."""

    explanation: str
    """Why."""
    unacceptable: bool
    """The bad thing is there."""


class Question(NamedTuple):
    """What a model is asked about one criterion."""

    text: str
    form: type[BaseModel]  # of its reply
    key: str  # the field that is the verdict
    kind: str  # in the cache's key
    read: Callable[[str], Any] | None = None  # as `ask` takes it


class EndpointJudge:
    """Of one model, at one address or at several replicas of it."""

    def __init__(
        self,
        endpoints: Endpoint | Sequence[Endpoint],
        options: JudgeOptions | None = None,
        *,
        policy: Endpoint | None = None,
        allow_self_grading: bool = False,
    ) -> None:
        """Of an endpoint or replicas.

        Args:
            endpoints: All of one model.
            options: How it is asked.
            policy: What is judged; a judge that is the same model is refused.
            allow_self_grading: Take it nevertheless.
        """
        self.endpoints = (endpoints,) if isinstance(endpoints, Endpoint) else (*endpoints,)
        """The replicas; their totals are what the judge has cost."""
        names = {endpoint.model for endpoint in self.endpoints}
        if len(names) != 1:
            raise UsageError(f"replicas of one judge serve one model, not {sorted(names)}.")
        if policy is not None and policy.model in names and not allow_self_grading:
            raise UsageError(
                f"the judge is {policy.model}, the model that is judged: it would grade itself. "
                "Name another judge, or allow self-grading (--allow-self)."
            )
        self.options = options or JudgeOptions()
        self.name, self.caution = self.endpoints[0].model, CAUTION
        self.check: Callable[[], object] = lambda: None
        """Called at every reply; what it raises, such as a limit of cost, ends the judging."""
        self.version = self._answered_by = ""
        """Which model answers under the name, once `identify` has asked."""
        self.verdicts = self.unscored = 0
        """What was asked for so far, and how much of it had no judge's word in the end."""

    async def identify(self, weights: str = "") -> None:
        """Ask once who answers; from then on verdicts are cached under that, and a change stops.

        Args:
            weights: The sha256 of a model on this machine, whose name tells little.

        """
        asked = [{"role": "user", "content": "Say yes."}]
        replies = await together([one.chat(asked, max_tokens=16) for one in self.endpoints])
        names = {reply.model for reply in replies} - {""} or {self.name}
        if len(names) > 1:
            raise CheckFailed(f"replicas of {self.name} answer as {sorted(names)}: take one model.")
        self._answered_by = names.pop()
        self.version = self._answered_by + (f"@{weights[:12]}" if weights else "")

    async def __call__(self, rubric: Rubric, answer: str) -> list[Verdict]:
        """A verdict for each criterion, in the rubric's order.

        Raises:
            CheckFailed: Too many verdicts of the run are unscored, or another model answers.
        """
        shared = hashlib.sha256(_conversation(rubric.conversation).encode())  # with other answers
        endpoint = self.endpoints[int.from_bytes(shared.digest()[:4]) % len(self.endpoints)]
        criteria = rubric.criteria
        order = sorted(range(len(criteria)), key=lambda at: criteria[at].points < 0)
        found: dict[int, Verdict] = {}
        for part in (order[:1], order[1:]):
            asked = [self._verdict(endpoint, rubric, answer, criteria[at]) for at in part]
            found.update(zip(part, await together(asked), strict=True))
        return [found[at] for at in range(len(criteria))]

    def question(self, rubric: Rubric, answer: str, criterion: Criterion) -> Question:
        """By the template of the criterion's sign, after the conversation."""
        form: type[Positive | Negative] = Positive if criterion.points > 0 else Negative
        key = "acceptable" if form is Positive else "unacceptable"
        sign = form.__name__.lower()
        prefix = _conversation(rubric.conversation, answer)
        asking = template(f"judge/prompts/{sign}").render().lstrip() + "\n"
        text = f"{prefix}{asking}[{criterion.points}] {criterion.text}\n"
        return Question(text, form, key, f"verdict {sign}")

    async def _verdict(
        self, endpoint: Endpoint, rubric: Rubric, answer: str, criterion: Criterion
    ) -> Verdict:
        text, form, key, kind, read = self.question(rubric, answer, criterion)
        system = [{"role": "system", "content": self.options.system}] if self.options.system else []
        how: dict[str, Any] = {
            "temperature": self.options.temperature,
            "max_tokens": self.options.max_tokens,
        }
        try:
            found: Answered[Any] = await ask(
                endpoint,
                [*system, {"role": "user", "content": text}],
                form,
                f"{kind} {self.version}".strip(),
                keep=lambda told: getattr(told, key),
                read=read,
                heed=self._heed,
                **how,
            )
        except (EndpointError, ReplyError) as error:
            self._count(unscored=True)
            return Verdict(None, str(error))
        self._count(unscored=False)
        if found.form is None:
            return Verdict(found.kept, "", cached=True)
        return Verdict(found.kept, found.form.explanation)

    def _heed(self, reply: Reply) -> None:
        """CheckFailed where another model answers than `identify` saw: nothing of it is kept."""
        self.check()
        if self.version and reply.model not in ("", self._answered_by):
            raise CheckFailed(
                f"the judge {self.name} was {self._answered_by} and is {reply.model} now: verdicts "
                "of both are no score. What was judged is kept; name one version and run again."
            )

    def _count(self, *, unscored: bool) -> None:
        self.verdicts += 1
        self.unscored += unscored
        share = self.unscored / self.verdicts
        if self.verdicts >= self.options.min_verdicts and share > self.options.max_unscored_share:
            raise CheckFailed(
                f"{self.unscored} of {self.verdicts} verdicts of {self.name} are unscored, more "
                f"than {self.options.max_unscored_share:.0%}: see why, and run again; what was "
                "judged is in the endpoint's cache, if it has a file."
            )


class Judged(NamedTuple):
    """One answer's verdicts."""

    at: int  # the answer's place in what was given
    verdicts: list[Verdict]


async def judge_all(
    judge: Judge, answers: Iterable[tuple[Rubric, str]], at_once: int | None = None
) -> AsyncIterator[Judged]:
    """Judge many answers, those to one conversation one after another; in order of completion.

    Args:
        judge: Any judge.
        answers: What is judged, with its rubric.
        at_once: Conversations under way at the same time; by default as the judge's options say.
    """
    given, places = list(answers), dict[str, list[int]]()
    for at, (rubric, _) in enumerate(given):
        places.setdefault(_conversation(rubric.conversation), []).append(at)
    options = judge.options if isinstance(judge, EndpointJudge) else JudgeOptions()
    at_once = at_once or options.conversations_at_once
    waiting = (iter(own) for _, own in sorted(places.items()))
    running: dict[asyncio.Task[Judged], Iterator[int]] = {}  # with what follows in a conversation

    async def one(at: int) -> Judged:
        return Judged(at, await judge(*given[at]))

    try:
        while True:
            for own in islice(waiting, at_once - len(running)):
                running[asyncio.create_task(one(next(own)))] = own
            if not running:
                return
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                own, judged = running.pop(task), task.result()
                if (after := next(own, None)) is not None:
                    running[asyncio.create_task(one(after))] = own
                yield judged
    finally:
        for task in running:  # one failed, or the caller has left: nobody waits for the others
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _conversation(turns: Sequence[Message], answer: str | None = None) -> str:
    """What all criteria of an answer share; no text inside can end it: every line is quoted."""
    said = [*turns, *([] if answer is None else [{"role": "assistant", "content": answer}])]
    lines = ["# Conversation\n"]
    for turn in said:
        quoted = "> ".join(turn["content"].splitlines(keepends=True))
        lines.append(f"**{turn['role']}**\n> {quoted}\n")
    return "\n".join(lines) + "\n"
