"""Preferences and questions from JSONL: what is kept, what is left out and why, in which order.

A row is `{"prompt": [messages], ...}` with `chosen` and `rejected` (texts of the assistant), or
`answer` (elo), or `rule` (ppo; see `attending.verifier.rules`). Nothing is cut: a row that does not
fit is left out and counted.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from attending.chat import Tokenizer
from attending.errors import ConfigError
from attending.prefer.recipe import PreferConfig
from attending.train.reader import Batch

TEXTS: dict[str, tuple[str, ...]] = {"elo": ("answer",), "ppo": ()}
PAIR = ("chosen", "rejected")


class Unit(NamedTuple):
    """A row of the data."""

    number: int
    """Of its line, from 1."""
    prompt: tuple[int, ...]
    """Ids up to where the assistant begins."""
    answers: tuple[tuple[int, ...], ...]
    """Ids of each of the row's texts and of the end of its turn."""
    rule: Mapping[str, Any]
    """ppo: what the sampled answers are scored by."""


class Sample(NamedTuple):
    """A segment of a batch."""

    inputs: list[int]
    targets: list[int]
    kinds: list[int]
    """Of each target: 0 is not trained on, others are told apart in the metrics."""


def sample_of(*parts: tuple[Sequence[int], int]) -> Sample:
    """Ids, part by part, each with its kind."""
    ids = [token for part, _ in parts for token in part]
    kinds = [kind for part, kind in parts for _ in part]
    return Sample(ids[:-1], ids[1:], kinds[1:])


def collate(samples: Sequence[Sample], device: torch.device | str) -> Batch:
    """Samples side by side."""
    inputs, targets, kinds = (
        torch.tensor([one for part in parts for one in part], device=device)
        for parts in zip(*samples, strict=True)
    )
    lengths = [len(sample.inputs) for sample in samples]
    return Batch(inputs, targets, (kinds > 0).float(), lengths, (kinds - 1).clamp_min(0))


class Units:
    """All units of a file in an endless shuffled order, resumable at any of them."""

    def __init__(self, config: PreferConfig, tokenizer: Tokenizer) -> None:
        """Read and check everything.

        Raises:
            ConfigError: The file is absent, a line is not such a row, or no unit is left.
        """
        file, self.left_out = Path(config.data), Counter[str]()
        if not file.is_file():
            raise ConfigError(f"{config.data} is no file: name the rows with --set data=...")
        found = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                found.append(_unit(number, json.loads(line), config, tokenizer))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                texts = ", ".join(TEXTS.get(config.method, PAIR) or ["rule"])
                raise ConfigError(
                    f"{file.name}, line {number}: {error}. A row of {config.method} is "
                    f"{{prompt: [messages], {texts}}}."
                ) from None
        self.units = [one for one in found if isinstance(one, Unit)]
        self.left_out.update(one for one in found if isinstance(one, str))
        self.measured: dict[str, float] = {}
        """What the last step found, for the metrics."""
        self._seed, self._drawn = config.seed, 0
        if not self.units:
            raise ConfigError(f"{file.name}: {', '.join(self.lines())}.")

    def draw(self, count: int) -> list[Unit]:
        """The next units."""
        found = []
        for place in range(self._drawn, self._drawn + count):
            epoch, at = divmod(place, len(self.units))
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self.units))
            found.append(self.units[int(order[at])])
        self._drawn += count
        return found

    def lines(self) -> list[str]:
        """What was read, to print."""
        left_out = [f"{count} left out ({reason})" for reason, count in self.left_out.items()]
        return [f"{len(self.units)} rows to learn from", *left_out]

    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""
        return {"drawn": self._drawn}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._drawn = int(state["drawn"])

    def figures(self) -> dict[str, float]:
        """For the metrics."""
        left_out = {f"data/left_out_{reason}": count for reason, count in self.left_out.items()}
        return {"data/epochs": self._drawn / len(self.units), **left_out, **self.measured}


def _unit(number: int, row: dict[str, Any], config: PreferConfig, of: Tokenizer) -> Unit | str:
    """A unit, or why the row is left out."""
    prompt = row["prompt"]
    texts = [row[name].strip() for name in TEXTS.get(config.method, PAIR)]
    rule = row["rule"] if config.reads("ppo") and not config.ppo.reward_model else {}
    opened = of.render(prompt)
    turns = [[*prompt, {"role": "assistant", "content": text}] for text in texts]
    # `examples` puts behind a prompt what `render` gives for it, id for id.
    answers = tuple(tuple(of.examples(turn)[-1].ids[len(opened) :]) for turn in turns)
    if "" in texts:
        return "empty"
    if len({*answers}) < len(answers):
        return "equal"
    length = len(opened) + max(map(len, answers), default=0)
    length += config.sample.max_tokens if config.reads("sample") else 0
    if config.method == "elo":
        length += len(of.encode(config.sample.bridge, is_first=False))
    return "long" if length > config.batch.max_tokens else Unit(number, (*opened,), answers, rule)
