"""Answers of the target itself to prompts, as token shards: what a draft is trained on.

They come through the path that will serve the target, its engine, with the ids that it read and
wrote, and are never encoded again. Each is kept as soon as it is whole, so an
interrupted run goes on with what is missing. Texts are what a model wrote; prompts may be private.
"""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attending import endpoint
from attending.artifact import digest, write_json
from attending.corpus import read
from attending.corpus.recipe import SourceConfig
from attending.corpus.split import draw, is_held_out
from attending.draft.recipe import DraftConfig, PromptsConfig
from attending.endpoint import EndpointOptions
from attending.errors import ConfigError, EndpointError, ReplyError
from attending.logs import cut
from attending.shards import CONTEXT, Shards, ShardWriter, write_index
from attending.sources import Progress
from attending.train.start import Start
from attending.train.state import differences

ANSWERS, TOLD = "answers.jsonl", "dialogues.json"
MAX_BYTES, SHARD_TOKENS = 20_000_000, 50_000_000
INDIFFERENT = {"threads", "draft", "draft_depth", "draft_width", "draft_nodes", "cache_tokens"}
INDIFFERENT |= {"max_running", "max_waiting"}  # of an engine's options: they change no answer
REFUSED = {400, 413, 422}  # this prompt, not the endpoint


class Prompt(NamedTuple):
    """What is asked."""

    source: str
    number: int
    """Of all records of the source."""
    is_held_out: bool
    """Its subject is, or that of another prompt with the same words."""
    messages: list[dict[str, Any]]
    sampling: dict[str, Any]
    """How it is answered."""

    @property
    def words(self) -> str:
        """Those of its messages, whatever their case and spaces."""
        turns = [{k: str(v).casefold().split() for k, v in turn.items()} for turn in self.messages]
        return json.dumps(turns)

    @property
    def asked(self) -> str:
        """What an answer is known by: the words and the sampling."""
        told = json.dumps([self.messages, self.sampling], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:24]


def digests(config: DraftConfig) -> list[dict[str, str]]:
    """For `run.json`."""
    paths = [(k, p) for k, one in config.prompts.items() for p in read.glob(config.root, one.path)]
    return [{"uri": f"{name}/{path.name}", "sha256": digest(path)} for name, path in paths]


def prompts(config: DraftConfig) -> Iterator[Prompt]:
    """All that is asked, source by source, once; records without the fields are passed over."""
    found: dict[str, Prompt] = {}
    held = set[str]()
    for name, told in config.prompts.items():
        own: dict[str, Prompt] = {}
        for one in _read(config, name, told):
            own.setdefault(one.words, one)
            if one.is_held_out:
                held.add(one.words)
        order = sorted(own.items(), key=lambda item: draw("prompt", config.seed, *item[1][:2]))
        found = dict(order[: told.limit or None]) | found
    for words, one in found.items():
        yield one._replace(is_held_out=words in held)


def _read(config: DraftConfig, name: str, told: PromptsConfig) -> Iterator[Prompt]:
    how, root = config.writing, config.root
    sampling: dict[str, Any] = {"temperature": how.temperature}
    sampling["max_tokens"] = told.max_tokens or how.max_tokens
    if how.template:
        sampling["chat_template_kwargs"] = how.template
    source, number = SourceConfig(path=told.path, format=told.format), -1
    for path in read.glob(root, told.path):
        inner = path.relative_to(root).as_posix()
        piece = read.Piece(name, inner, 0, path.stat().st_size, 0)
        for record in read.records(root, piece, source, MAX_BYTES):
            number += 1
            fields = record.fields
            if record.fault or any(str(fields.get(k)) not in v for k, v in told.only.items()):
                continue
            try:
                messages = _messages(told, fields)
                key = read.render(told.holdout_key, fields) if told.holdout_key else ""
            except (LookupError, TypeError, AttributeError):
                continue
            if messages:
                seeded = sampling | {"seed": draw("draft", config.seed, name, number) % 2**31}
                key = key or f"{inner}:{record.line}"
                drawn = seeded if how.temperature else sampling
                yield Prompt(name, number, is_held_out(key), messages, drawn)


def _messages(told: PromptsConfig, fields: Any) -> list[dict[str, Any]]:
    if told.prompt:
        return [{"role": "user", "content": read.render(told.prompt, fields)}]
    turns = [dict(turn) for turn in fields["messages"]]
    ends = [place for place, turn in enumerate(turns, 1) if turn["role"] == "user"]
    return turns[: ends[-1]] if ends else []


def prepare(
    config: DraftConfig, start: Start, folder: Path, shards: Path, progress: Progress
) -> dict[str, dict[str, int]]:
    """Have the answers written that are missing, then the shards; counts by source.

    All kinds of prompts are asked in one shuffled order, so that what is there is a sample. An
    answer is known by its words and sampling: a recipe that asks for more finds what is there.

    Args:
        config: The recipe.
        start: The target.
        folder: Of the answers, which may outlive the run.
        shards: Where `train/` and `heldout/SOURCE/` are written.
        progress: Told of every answer.

    Raises:
        ConfigError: The folder holds another target's answers, or of another engine; or there is
            nothing to train on.
        EndpointError: The endpoint is gone. What was answered is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    engine = {k: v for k, v in config.writing.engine.items() if k not in INDIFFERENT}
    told = {"target_sha256": start.sha256, "engine": engine}
    if (folder / TOLD).is_file():
        before = json.loads((folder / TOLD).read_text("utf-8"))
        if changed := differences(before, told):
            raise ConfigError(
                f"{folder.name} holds answers of another model or engine:\n  "
                + "\n  ".join(changed)
                + "\n"
                "set these back, or name another folder with --set dialogues=FOLDER."
            )
    else:
        write_json(folder / TOLD, told)
    file = folder / ANSWERS
    cut(file)
    every = sorted(prompts(config), key=lambda one: draw("order", config.seed, *one[:2]))
    known = _answered(file)
    if left := [one for one in every if one.asked not in known]:
        asyncio.run(_write(config, left, file, len(every), progress))
        known = _answered(file)
    own = [
        known[one.asked]
        | {"source": one.source, "number": one.number, "is_held_out": one.is_held_out}
        for one in every
    ]
    return _shard(config, start, shards, own)


def _answered(file: Path) -> dict[str, dict[str, Any]]:
    """By what was asked; an answer that is there stays."""
    found: dict[str, dict[str, Any]] = {}
    if file.exists():
        with file.open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                found.setdefault(row["asked"], row)
    return found


async def _write(
    config: DraftConfig, asked: list[Prompt], file: Path, total: int, progress: Progress
) -> None:
    """A line for each answer, in the order in which they end."""
    told, done = config.writing, total - len(asked)
    options = EndpointOptions(max_concurrency=told.concurrency)
    waiting = iter(asked)
    engine = told.engine or None
    async with endpoint.open(config.model, engine=engine, options=options) as target:
        with file.open("a", encoding="utf-8") as out:

            async def ask() -> None:
                nonlocal done
                for one in waiting:
                    row: dict[str, Any] = {"asked": one.asked}
                    try:
                        reply = await target.chat(
                            one.messages, **one.sampling, return_token_ids=True
                        )
                    except EndpointError as error:
                        if error.status not in REFUSED:
                            raise
                        row["fault"] = f"status_{error.status}"
                    else:
                        if not reply.prompt_ids or reply.ids is None:
                            raise ReplyError(
                                f"{target.model} gives no token ids: a draft needs those that it "
                                "wrote. Our engine and vLLM (0.10.2 and later) give them."
                            )
                        row |= {"prompt": [*reply.prompt_ids], "answer": [*reply.ids]}
                        row["finish"] = reply.finish_reason
                    out.write(json.dumps(row) + "\n")
                    out.flush()
                    done += 1
                    progress(done, total, "answers written")

            tasks = [asyncio.create_task(ask()) for _ in range(told.concurrency)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


def _shard(
    config: DraftConfig, start: Start, folder: Path, rows: list[dict[str, Any]]
) -> dict[str, dict[str, int]]:
    """Write `train/` and `heldout/SOURCE/`; a prompt is flagged as context."""
    names = list(config.prompts)
    counts = {name: Counter[str]() for name in names}
    whole = []
    for row in rows:
        long = len(row.get("prompt", ())) + len(row.get("answer", ())) - 1 > config.context
        short = len(row.get("answer", ())) < 2  # nothing to foresee
        fault = row.get("fault") or ("longer_than_context" if long else "empty" if short else "")
        counts[row["source"]][fault or "answers"] += 1
        if not fault:
            whole.append(row)
    whole.sort(key=lambda row: draw("dialogue", config.seed, row["source"], row["number"]))
    parts = {"train": [row for row in whole if not row["is_held_out"]]}
    for name in names:
        parts[f"heldout/{name}"] = [
            row for row in whole if row["source"] == name and row["is_held_out"]
        ]
    if not parts["train"]:
        told = {name: dict(own) for name, own in counts.items()}
        raise ConfigError(f"no answer is left to train on: {told}. See context and max_tokens.")
    first = parts["train"][0]["prompt"][0]
    # The first token of a dialogue is only read, like a beginning-of-text.
    facts: dict[str, Any] = {"begin_of_text": first, "end_of_text": first, "has_context": True}
    facts |= {"sources": names, "domains": ["dialogue"], "target_sha256": start.sha256}
    for part, own in parts.items():
        with ShardWriter(folder / part, SHARD_TOKENS) as writer:
            for row in own:
                asked = np.array(row["prompt"], "<u4") | CONTEXT
                ids = np.concatenate((asked, np.array(row["answer"], "<u4")))
                writer.add(ids, 0, names.index(row["source"]), 0)
                kind = "tokens" if part == "train" else "heldout_tokens"
                counts[row["source"]][kind] += len(row["answer"])
        if own:
            write_index(folder / part, writer.shards, **facts)
    return {name: dict(own) for name, own in counts.items()}


def token_counts(shards: Shards, vocab_size: int) -> NDArray[np.int64]:
    """[V]: how often each token was written by the target."""
    found = np.zeros(vocab_size, np.int64)
    for number in range(shards.num_documents):
        ids = shards.document(number)[shards.trained(number)]
        found += np.bincount(ids, minlength=vocab_size)
    return found
