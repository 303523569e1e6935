"""Multiple choice, by the likelihood of each option after the prompt or by a written answer."""

import asyncio
from collections.abc import Mapping
from math import inf
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase
from weakref import WeakKeyDictionary

from attending.config import suggest
from attending.endpoint import Endpoint
from attending.errors import ConfigError
from attending.evaluate.asking import answered
from attending.evaluate.recipe import ChoiceConfig
from attending.evaluate.sample import Answer, Example, Grade
from attending.evaluate.tasks.base import WORDS, Base, Row
from attending.evaluate.tasks.likelihood import bound, following, score


class Choice(Base[ChoiceConfig]):
    """Questions with options, as MedQA, MMLU, MedMCQA and PubMedQA.

    By likelihood the decision is lm-evaluation-harness's `acc`: the option whose continuation, " A"
    or " yes", has the greatest sum of token log-probabilities. One request tells it wherever the
    likeliest tokens leave no other decision; else each option is scored. An answer keeps the
    log-probabilities (nats) that were needed.
    """

    def __init__(self, config: ChoiceConfig, folder: Path | None) -> None:
        """Read the data."""
        self._single = WeakKeyDictionary[Endpoint, set[str]]()  # continuations that are one token
        known, name = WORDS["likelihood"], config.prompt
        self._source = known.get(name or ("pubmedqa" if config.fixed else "medqa"), name)
        if "{{" not in self._source:
            raise ConfigError(f"{config.name}: no prompt {name!r}.{suggest(name, known)}")
        if config.method == "generation":
            self._source = WORDS["generation"]["fixed" if config.fixed else "letters"]
        super().__init__(config, folder)
        sizes = [len(one.data["rule"]["options"]) for one in self.examples]
        self.chance = fmean(1 / size for size in sizes)
        self.requests = 1 + max(sizes) if config.method == "likelihood" else 1

    def read(self, row: Row) -> Example:
        """Options by letter, or each by its own text where they are the same for all."""
        columns, fixed = row.columns, self.config.fixed
        options = {text: text for text in fixed} or _options(row, columns.options)
        answer = _letter(row, row.cell(columns.answer), options)
        context = row.cell(columns.context, (str, list)) if columns.context else ""
        context = context if isinstance(context, str) else "\n".join(context)
        group = row.cell(columns.group) if columns.group else ""
        prompt = row.render(self._source, context=context, options=options, group=group)
        rule = {"kind": "choice", "options": options, "answer": answer}
        reference = answer if fixed else f"{answer}. {options[answer]}"
        return row.example(prompt, rule=rule, reference=reference)

    async def ask(self, endpoint: Endpoint, example: Example, repeat: int) -> Answer:
        if self.config.method == "generation":
            return await super().ask(endpoint, example, repeat)
        prompt, single = example.messages[0]["content"], self._single.setdefault(endpoint, set())
        ends = {letter: f" {letter}" for letter in example.data["rule"]["options"]}
        likeliest, reply = await following(endpoint, prompt)
        found = {letter: likeliest[end] for letter, end in ends.items() if end in likeliest}
        best = max(found.values(), default=-inf)
        rest = [one for one in ends if one not in found]
        rest = [one for one in rest if bound(likeliest, ends[one], ends[one] in single) >= best]
        told = (prompt, reply.input_tokens)
        scored = (score(endpoint, prompt + ends[one], *told) for one in rest)
        for letter, one in zip(rest, await asyncio.gather(*scored), strict=True):
            found[letter] = one.total
            single |= {ends[letter]} if one.num_tokens == 1 else set()
        text = max(ends, key=lambda letter: found.get(letter, -inf))
        return answered(example, repeat, reply, text, logprobs=found)

    def worth(self, example: Example, answer: Answer) -> Grade:
        if self.config.method == "generation":
            return super().worth(example, answer)
        is_right = answer.text == example.data["rule"]["answer"]
        return Grade(float(is_right), f"answers {answer.text}")


def _options(row: Row, keys: str | tuple[str, ...]) -> dict[str, str]:
    given = row.cell(keys, (Mapping, list)) if isinstance(keys, str) else [*map(row.cell, keys)]
    if not 1 < len(given) <= len(ascii_uppercase):
        raise ConfigError(f"{row.where} has {len(given)} options: expected 2 to 26.")
    pairs = given.items() if isinstance(given, Mapping) else zip(ascii_uppercase, given)  # noqa: B905
    return {str(letter): str(text) for letter, text in pairs}


def _letter(row: Row, said: object, options: Mapping[str, str]) -> str:
    """Of the right option, given as a letter, as a place or as its text."""
    letters, place = [*options], said - row.columns.first if isinstance(said, int) else -1
    if 0 <= place < len(letters):
        return letters[place]
    for letter, text in options.items():
        if said == letter or (said not in options and said == text):
            return letter
    wanted = f"one of {', '.join(letters)}, an option's text, or a place from columns.first"
    raise ConfigError(f"{row.where}: {row.columns.answer!r} is {said!r:.80}, not {wanted}.")
