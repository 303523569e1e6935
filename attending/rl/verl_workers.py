"""What verl's workers call in a folder that `export_verl` wrote: verdicts, and consultations."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from attending.chat import THINK_OPEN
from attending.model.decoder import Decoder
from attending.rl.cases import parse_case
from attending.rl.fragments import Fragment, Room, judge_reply, play, turns_of
from attending.rl.prompts import Prompt
from attending.rl.recipe import RlConfig
from attending.rl.sampler import Asked
from attending.rl.setup import judges
from attending.rl.types import Rollout, Verdict
from attending.rl.verify import judge_text
from attending.train.start import open_start
from attending.verifier.judge.verdict import Judge
from attending.verifier.patient.find import find_case

UNSCORED = -1.0  # verl knows no missing reward; scores are 0 to 1
Write = Callable[[Sequence[int]], Awaitable[Sequence[int]]]


def read_recipe(path: Path) -> RlConfig:
    """The recipe that was exported; ConfigError if it was changed to what is none."""
    return RlConfig.build(json.loads(path.read_text("utf-8")), path.name)


def score_of(verdict: Verdict) -> float:
    """As verl takes it."""
    return UNSCORED if verdict.score is None else verdict.score


class Scorer:
    """The reward of an answer's text, in one of verl's reward workers."""

    def __init__(self, recipe: Path) -> None:
        """Judges are opened with the first rubric."""
        self._config, self._stack = read_recipe(recipe), AsyncExitStack()
        self._judges: asyncio.Task[tuple[Judge | None, Judge | None]] | None = None

    async def __call__(
        self, text: str, case_line: str, extra: Mapping[str, Any]
    ) -> dict[str, float]:
        """Of a case's line in `train.parquet`; `extra` says how it was shown.

        Raises:
            EndpointError: The judge is gone.
        """
        case, judge = parse_case(json.loads(case_line)), None
        if case.criteria:
            if self._judges is None:  # one opening for all answers of a worker
                opened = judges(self._config, Path(self._config.model).name)
                self._judges = asyncio.create_task(self._stack.enter_async_context(opened))
            judge = (await self._judges)[extra.get("split") == "heldout"]
        whole = (THINK_OPEN if extra.get("opened") else "") + text
        score = score_of(await judge_text(case, whole, judge, self._config.reward))
        return {"score": score, "unscored": float(score == UNSCORED)}


@dataclass(frozen=True, slots=True)
class Written:
    """A `sampler.Sampler` of verl's server, for a consultation in a thread of its own."""

    write: Write
    loop: asyncio.AbstractEventLoop
    """Where `write` runs."""

    def load(self, decoder: Decoder, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """verl moves its weights itself."""

    def sample(self, asked: Sequence[Asked], version: int) -> Iterator[tuple[int, Rollout]]:
        """One after another; log-probabilities are not asked for, as nothing is trained on."""
        for place, one in enumerate(asked):
            waiting = asyncio.run_coroutine_threadsafe(_awaited(self.write(one.prompt)), self.loop)
            ids = tuple(waiting.result())
            none = (0.0,) * len(ids)
            yield place, Rollout(one.case, one.prompt, ids, none, "stop", one.seed, version)


async def _awaited(one: Awaitable[Sequence[int]]) -> Sequence[int]:
    return await one


class Consultations:
    """Slices of consultations and what their next replies are worth, in one of verl's workers."""

    def __init__(self, recipe: Path) -> None:
        """Reads the recipe and the model's tokenizer."""
        self._config = read_recipe(recipe)
        self._tokenizer = open_start(self._config.model).tokenizer
        self._room = Room(self._tokenizer, self._config.template, self._config.max_prompt)

    async def hold(
        self, case_line: str, number: int, write: Write, step: int, *, is_heldout: bool
    ) -> Fragment:
        """A consultation up to the reply that is reinforced; held-out ones take all turns."""
        case = parse_case(json.loads(case_line))
        drawn, config = [Prompt(number, case, ())], self._config
        turns = [config.dialogue.turns] if is_heldout else turns_of(drawn, config, step)
        patients = {case.patient: find_case(case.patient, config.seed)}
        sampler = Written(write, asyncio.get_running_loop())

        def talk() -> list[Fragment]:
            told = {"seed": config.seed, "version": step}
            return asyncio.run(play(drawn, patients, sampler, self._room, turns, **told))

        (fragment,) = await asyncio.to_thread(talk)
        return fragment

    async def judge(self, fragment: Fragment, ids: Sequence[int]) -> float:
        """What a reply makes the patient tell."""
        opened = self._tokenizer.opens_reasoning(fragment.prompt.ids)
        text = (THINK_OPEN if opened else "") + self._tokenizer.decode(ids)
        return score_of(await judge_reply(fragment, text, self._config.dialogue.most_facts))
