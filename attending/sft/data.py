"""Dialogues to token shards with loss masks: read, checked, chosen, rendered, held out.

What is left out has its reason in `dropped.jsonl`, by source and number; texts are not repeated.
Identifiers of persons are not looked for here: run records of patients through the filter first.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attending.artifact import digest, write_json
from attending.chat import Example, Tokenizer
from attending.corpus import read
from attending.corpus.recipe import SourceConfig
from attending.corpus.split import draw, is_held_out
from attending.errors import ConfigError, TokenizerError
from attending.sft.recipe import DialogueConfig, SftConfig
from attending.sft.select import select
from attending.shards import CONTEXT, ShardWriter, write_index

MAX_BYTES = 20_000_000  # of a record
SHARD_TOKENS = 50_000_000
COUNTS = "counts.json"
DOMAIN = "dialogues"


class Dialogue(NamedTuple):
    """A record as messages."""

    source: str
    number: int
    """Of all records of the source."""
    id: str
    key: str
    """What is held out as a whole."""
    is_held_out: bool
    messages: list[dict[str, Any]]
    tools: list[Any]


class Dropped(NamedTuple):
    """A dialogue that is left out."""

    source: str
    number: int
    reason: str


class Prepared(NamedTuple):
    """What the shards hold."""

    counts: dict[str, dict[str, int]]
    """By source: read, dropped, held out, trained on; tokens and those that are learnt."""
    reasons: dict[str, int]
    """Dialogues left out."""
    shown: Example
    """One that is trained on."""


def files(config: SftConfig) -> dict[str, list[Path]]:
    """The files of each source; ConfigError where there are none."""
    return {name: read.glob(config.root, one.path) for name, one in config.data.items()}


def digests(config: SftConfig) -> list[dict[str, str]]:
    """For `run.json`."""
    every = [(name, path) for name, paths in files(config).items() for path in paths]
    return [{"uri": f"{name}/{path.name}", "sha256": digest(path)} for name, path in every]


def dialogues(config: SftConfig, dropped: list[Dropped]) -> Iterator[Dialogue]:
    """All records that are dialogues, source by source; what is not goes to `dropped`."""
    for name, paths in files(config).items():
        told, number = config.data[name], -1
        source = SourceConfig(path=told.path, format=told.format, limit=told.limit)
        for path in paths:
            inner = path.relative_to(config.root).as_posix()
            piece = read.Piece(name, inner, 0, path.stat().st_size, 0)
            for record in read.records(config.root, piece, source, MAX_BYTES):
                number += 1
                if record.fault:
                    dropped.append(Dropped(name, number, record.fault))
                    continue
                if any(str(record.fields.get(k)) not in v for k, v in told.only.items()):
                    continue
                try:
                    yield dialogue(name, number, f"{inner}:{record.line}", told, record.fields)
                except (LookupError, UnicodeError, TypeError, AttributeError):
                    dropped.append(Dropped(name, number, "fields_missing"))


def dialogue(
    name: str, number: int, place: str, told: DialogueConfig, fields: Mapping[str, Any]
) -> Dialogue:
    """A record as a dialogue.

    Raises:
        LookupError: A field that a template names, or `messages`, is absent or null.
    """
    if told.messages:
        messages = [
            {"role": turn.role, "content": read.render(turn.content, fields)}
            for turn in told.messages
        ]
    else:
        messages = [dict(message) for message in fields["messages"]]
    own = read.render(told.id, fields) if told.id else place
    key = read.render(told.holdout_key, fields) if told.holdout_key else own
    held = any(str(fields.get(k)) in v for k, v in told.holdout.items())
    held = held if told.holdout else is_held_out(key)
    return Dialogue(name, number, own, key, held, messages, list(fields.get("tools") or []))


def prepare(config: SftConfig, tokenizer: Tokenizer, folder: Path) -> Prepared:
    """Write `train/` and `heldout/SOURCE/` below a folder.

    Raises:
        ConfigError: No dialogue is left to train on; the message says where they went.
    """
    dropped: list[Dropped] = []
    every = list(dialogues(config, dropped))
    learnt = [one for one in every if not one.is_held_out]
    if config.select:
        chosen = select([one._asdict() for one in learnt], config.select)
        dropped += [Dropped(*learnt[one.at][:2], one.reason) for one in chosen.dropped]
        write_json(folder / "clusters.json", [one._asdict() for one in chosen.clusters])
        learnt = [learnt[index] for index in chosen.kept]
    learnt.sort(key=lambda one: draw("dialogue", config.seed, one.source, one.id))
    parts = {"train": learnt}
    for name in config.data:
        parts[f"heldout/{name}"] = [o for o in every if o.source == name and o.is_held_out]
    counts = {name: Counter[str]() for name in config.data}
    shown: Example | None = None
    for part, own in parts.items():
        first = _write(folder / part, own, config, tokenizer, counts, dropped)
        shown = first if part == "train" else shown
    for one in every:
        counts[one.source]["dialogues"] += 1
    for name, _, _ in dropped:
        counts[name]["left_out"] += 1
    reasons = Counter(reason for _, _, reason in dropped)
    with (folder / "dropped.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(one._asdict()) + "\n" for one in dropped)
    if shown is None:
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise ConfigError(
            f"no dialogue is left to train on, of {len(every)}: {told or 'none was read'}."
        )
    found = Prepared({name: dict(c) for name, c in counts.items()}, dict(reasons), shown)
    write_json(folder / COUNTS, {"counts": found.counts, "reasons": found.reasons})
    return found


def _write(
    folder: Path,
    own: Sequence[Dialogue],
    config: SftConfig,
    tokenizer: Tokenizer,
    counts: Mapping[str, Counter[str]],
    dropped: list[Dropped],
) -> Example | None:
    """The shards of a part; returns its first example."""
    names, shown, first = list(config.data), None, None
    part = "train" if folder.name == "train" else "held_out"
    with ShardWriter(folder, SHARD_TOKENS) as writer:
        for one in own:
            variables = config.template | ({"tools": one.tools} if one.tools else {})
            try:
                examples = tokenizer.examples(one.messages, **variables)
            except TokenizerError as error:
                dropped.append(Dropped(one.source, one.number, fault(error)))
                continue
            if max(len(example.ids) for example in examples) - 1 > config.context:
                dropped.append(Dropped(one.source, one.number, "longer_than_context"))
                continue
            for example in examples:
                shown, first = shown or example, first or example.ids[0]
                ids = np.array(example.ids, "<u4")
                flags = np.where(example.is_learnt, 0, CONTEXT).astype("<u4")
                said = ids[example.is_learnt].tolist()
                size = len(tokenizer.decode(said).encode())
                writer.add(ids | flags, size, names.index(one.source), 0)
                counts[one.source][f"{part}_tokens"] += len(ids)
                counts[one.source][f"{part}_learnt_tokens"] += len(said)
            counts[one.source][part] += 1
    if shown is not None:
        # The first token of a dialogue is only read, like a beginning-of-text.
        facts: dict[str, Any] = {"begin_of_text": first, "end_of_text": first, "has_context": True}
        facts |= {"sources": names, "domains": [DOMAIN], "tokenizer_sha256": tokenizer.sha256}
        write_index(folder, writer.shards, **facts)
    return shown


def fault(error: TokenizerError) -> str:
    """A reason in a word."""
    text = str(error)
    for word, reason in (
        ("no assistant", "no_assistant_turn"),
        ("is not one of", "unknown_role"),
        ("template", "refused_by_template"),
    ):
        if word in text:
            return reason
    return "not_encodable"


def marked(example: Example, tokenizer: Tokenizer) -> list[str]:
    """An example as it is trained on, piece by piece, `read` or `learnt`."""
    found, start = [], 0
    for stop in range(1, len(example.ids) + 1):
        is_end = stop == len(example.ids) or example.is_learnt[stop] != example.is_learnt[start]
        if is_end:
            kind = "learnt" if example.is_learnt[start] else "read"
            found.append(f"{kind}: {tokenizer.spelled(example.ids[start:stop])!r}")
            start = stop
    return found
