"""Rewriting by a model, kept only where it is faithful; else the document stays as it is.

Answers, with the verdicts on them, are kept in a file of each task in `work/` that only its owner
may read, holds no text from before the identifier filter, and goes when the corpus is whole. So a
resumed run asks nothing twice and gives the same bytes.
"""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import jinja2
from datatrove.data import Document

from attending import endpoint
from attending.corpus.clean import normalise
from attending.corpus.fidelity import PROMPTS, unfaithful
from attending.corpus.ledger import Ledger
from attending.corpus.recipe import RewriteConfig
from attending.corpus.split import is_held_out
from attending.corpus.steps import Part
from attending.endpoint import Endpoint, EndpointOptions, Reply
from attending.errors import ConfigError, EndpointError, ReplyError


class Answer(NamedTuple):
    """What became of a document, and what that took."""

    text: str  # empty: it stays as it is
    fault: str  # why
    input_tokens: int = 0
    output_tokens: int = 0


class Rewrite(Part):
    """Training documents rewritten; what is not has its reason among the funnel's notes."""

    name = "rewrite"

    def run(
        self, data: Iterator[Document], rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Batch by batch, so that what a budget is spent on does not depend on timing."""
        told = self.config.rewrite
        assert told is not None
        file = self.work / "rewrite" / f"{rank:05d}.sqlite"
        file.parent.mkdir(parents=True, exist_ok=True)
        options = EndpointOptions(
            max_concurrency=told.concurrency, api_key_variable=told.api_key_variable, cache=file
        )
        stack, spent = AsyncExitStack(), [0, 0]
        with Ledger(self.draft, self.name, rank) as ledger, asyncio.Runner() as runner:
            try:
                opening = endpoint.open(told.url, model_id=told.model, options=options)
                asked = runner.run(stack.enter_async_context(opening))
                while batch := list(islice(data, told.concurrency)):
                    share = [count * world_size for count in spent]
                    with ledger.clock():
                        answers = runner.run(_answers(asked, batch, told, share))
                    for document, (text, fault, *counts) in zip(batch, answers, strict=True):
                        spent = [a + b for a, b in zip(spent, counts, strict=True)]
                        ledger.note(f"rewrite_{fault or 'done'}")
                        document.text = text or document.text
                        document.metadata["rewritten"] = bool(text)
                        ledger.keep(document)
                        yield document
            except EndpointError as error:
                raise EndpointError(
                    f"rewriting stopped: {error} Then run the command again with --resume: what "
                    "was answered is not asked again."
                ) from None
            finally:
                runner.run(stack.aclose())
            ledger.note("rewrite_input_tokens", spent[0])
            ledger.note("rewrite_output_tokens", spent[1])


async def rewritten(asked: Endpoint, source: str, told: RewriteConfig) -> Answer:
    """Ask until a rewriting is faithful, at most `tries` times; EndpointError if nobody answers."""
    messages = [{"role": "user", "content": template(told.prompt).render(text=source)}]

    def judged(reply: Reply) -> Answer:
        text = normalise(reply.text).text
        fault = "cut" if reply.finish_reason == "length" else ""
        fault = fault or unfaithful(source, text, told.length_ratio)
        # Where a server does not count tokens, characters are.
        counts = reply.input_tokens or len(source), reply.output_tokens or len(reply.text)
        return Answer("" if fault else text, fault, *counts)

    answer, spent = Answer("", "malformed"), [0, 0]
    sampling = {"max_tokens": told.max_tokens, "temperature": told.temperature}
    kind = f"rewriting {told.length_ratio}"
    for number in range(told.tries):
        try:
            derived = await asked.derived(messages, judged, kind=kind, sample=number, **sampling)
        except ReplyError:
            continue
        answer = Answer(*derived.value)
        spent = [spent[0] + answer.input_tokens, spent[1] + answer.output_tokens]
        if answer.text:
            break
    return Answer(answer.text, answer.fault, *spent)


@cache
def template(name: str) -> jinja2.Template:
    """A shipped prompt, or a file's; ConfigError if there is none."""
    path = Path(name) if name.endswith(".jinja") else Path(str(PROMPTS)) / f"{name}.jinja"
    if not path.is_file():
        raise ConfigError(f"rewrite.prompt: no prompt {name!r}; give `rephrase` or a .jinja file.")
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(path.read_text("utf-8"))


async def _answers(
    asked: Endpoint, batch: list[Document], told: RewriteConfig, spent: list[int]
) -> list[Answer]:
    """One a document, by asking or without; `spent` is of all tasks, input and output tokens."""
    cost = sum(count * price for count, price in zip(spent, told.price_per_million, strict=True))
    is_spent = 0 < told.budget_tokens <= sum(spent) or 0 < told.budget_cost <= cost / 1e6

    async def answer(document: Document) -> Answer:
        own = document.metadata
        assert not own["raw"], "a document comes here before the identifier filter"
        if told.sources and own["source"] not in told.sources:
            return Answer("", "other_source")
        if told.domains and own["domain"] not in told.domains:
            return Answer("", "other_domain")
        if is_held_out(own["key"]):
            return Answer("", "held_out")  # evaluation is on what people wrote
        if len(document.text) > told.max_characters:
            return Answer("", "too_long")
        return Answer("", "budget") if is_spent else await rewritten(asked, document.text, told)

    return list(await asyncio.gather(*map(answer, batch)))
