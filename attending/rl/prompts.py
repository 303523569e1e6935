"""Cases as prompts in an endless shuffled order, resumable at any of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from attending.chat import THINK_OPEN, Tokenizer
from attending.errors import ConfigError, TokenizerError
from attending.rl.sampler import Asked
from attending.rl.types import Case, Rollout


class Prompt(NamedTuple):
    """A case and its ids."""

    number: int
    case: Case
    ids: tuple[int, ...]


def text_of(tokenizer: Tokenizer, rollout: Rollout) -> str:
    """What was written, with the `<think>` that the prompt opened."""
    opened = tokenizer.opens_reasoning(rollout.prompt)
    return (THINK_OPEN if opened else "") + tokenizer.decode(rollout.ids)


class Prompts:
    """What is asked, in which order, with which seeds."""

    def __init__(
        self,
        cases: Sequence[Case],
        tokenizer: Tokenizer,
        template: Mapping[str, Any],
        max_prompt: int,
        seed: int,
    ) -> None:
        """Render everything.

        Args:
            cases: In the order of their file.
            tokenizer: With its template.
            template: What it is told.
            max_prompt: In tokens; longer ones are left out and counted.
            seed: Of the order and of sampling.

        Raises:
            ConfigError: None is left.
        """
        self.left_out = Counter[str]()
        self.prompts: list[Prompt] = []
        for number, case in enumerate(cases):
            if case.patient:  # what is asked comes of the consultation
                self.prompts.append(Prompt(number, case, ()))
                continue
            try:
                ids = tuple(tokenizer.render(case.messages, **template))
            except TokenizerError:
                self.left_out["refused_by_template"] += 1
                continue
            if len(ids) > max_prompt:
                self.left_out["long"] += 1
            else:
                self.prompts.append(Prompt(number, case, ids))
        self.measured: dict[str, float] = {}
        """What the last step found, for the metrics."""
        self._seed, self._drawn = seed, 0
        if not self.prompts:
            told = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
            raise ConfigError(f"no case is left of {len(cases)}: {told}; see max_prompt.")

    def draw(self, count: int) -> list[Prompt]:
        """The next ones, none of them twice: what is left of an epoch and too few is skipped.

        Raises:
            ConfigError: There are fewer cases than that.
        """
        size = len(self.prompts)
        if count > size:
            raise ConfigError(f"prompts={count} of a step, and there are {size} cases: lower it.")
        epoch, at = divmod(self._drawn, size)
        if at + count > size:
            epoch, at = epoch + 1, 0
        order = np.random.default_rng((self._seed, epoch)).permutation(size)
        self._drawn = epoch * size + at + count
        return [self.prompts[int(number)] for number in order[at : at + count]]

    def asked(self, prompts: Sequence[Prompt], group: int, step: int) -> list[list[Asked]]:
        """A group for each prompt of a step; the seeds hang on step and case."""
        found = []
        for number, case, ids in prompts:
            key = (self._seed, step, number)
            seeds = np.random.SeedSequence(key).generate_state(group).tolist()
            found.append([Asked(case.id, ids, seed) for seed in seeds])
        return found

    def lines(self) -> list[str]:
        """What was read, to print."""
        left_out = [f"{count} left out ({reason})" for reason, count in self.left_out.items()]
        return [f"{len(self.prompts)} cases", *left_out]

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""
        return {"drawn": self._drawn}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._drawn = int(state["drawn"])

    def figures(self) -> dict[str, float]:
        """For the metrics."""
        return {"data/epochs": self._drawn / len(self.prompts), **self.measured}
