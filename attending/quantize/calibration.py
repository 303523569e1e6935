"""Text to round by and text to judge by: disjoint, fixed by the recipe, and partly the model's own.

A part's records come in an order that the seed draws, repeated ones once. What is held out (the
house's one in fifty, by `holdout_key`) is judged by, the rest rounded by. Dialogues go through the
chat template, documents end as an answer does; one after another they fill samples of equal length.

Baichuan-M2 mixes replies of the model that is rounded into its text and finds that better; the
share is not published.
"""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attending import endpoint, logs
from attending.artifact import digest
from attending.chat import Tokenizer
from attending.corpus import read
from attending.corpus.recipe import SourceConfig
from attending.corpus.split import draw, is_held_out
from attending.endpoint import Endpoint
from attending.errors import ConfigError, TokenizerError
from attending.evaluate import asking
from attending.evaluate.recipe import SamplingConfig
from attending.evaluate.sample import Example
from attending.quantize.recipe import CalibrationConfig, PartConfig
from attending.sources import Progress
from attending.train.start import Start
from attending.verifier.ask import together

MAX_BYTES = 20_000_000  # of a record
WAVE = 16  # prompts that are asked at once
SAMPLES, REPLIES = "samples.safetensors", "replies.jsonl"
BEGINNING = '{"key": '  # of a line of replies


class Record(NamedTuple):
    """Of a part."""

    id: str
    prompt: str
    text: str
    """Empty: the model's to write."""
    is_cut: bool = False
    """The model did not come to the end."""


class Samples(NamedTuple):
    """Ids [S, length] int64 by domain."""

    calibration: dict[str, Tensor]
    evaluation: dict[str, Tensor]


def digests(config: CalibrationConfig) -> list[dict[str, str]]:
    """Of the parts' files, for `run.json`."""
    files = [(n, p) for n, one in config.parts.items() for p in read.glob(config.root, one.path)]
    return [{"uri": f"{name}/{path.name}", "sha256": digest(path)} for name, path in files]


def prepare(
    config: CalibrationConfig,
    start: Start,
    folder: Path,
    seed: int,
    progress: Progress,
    note: Callable[[str], object],
) -> Samples:
    """The samples, from a folder where they are kept once they are whole.

    Args:
        config: What they are made of.
        start: The model, which is asked for its replies where a part has none.
        folder: Of the run's state.
        seed: Of the order of records.
        progress: Told of every reply.
        note: Told where there is less text than was asked for.

    Raises:
        ConfigError: A part has less than one sample of text.
        EndpointError: The model could not be asked; the replies so far are kept.
    """
    file = folder / SAMPLES
    if not file.is_file():
        replies = Path(config.replies) if config.replies else folder / REPLIES
        found = asyncio.run(_gather(config, start, replies, seed, progress))
        draft = file.with_suffix(".tmp")
        save_file(found, draft)
        draft.replace(file)
    samples = Samples({}, {})
    wanted = _counts(config)
    for key, ids in sorted(load_file(file).items()):
        side, name = key.split(".")
        getattr(samples, side)[name] = ids
        if len(ids) < wanted[key]:
            note(f"{name}: text for {len(ids)} of {wanted[key]} samples ({side})")
    return samples


class Replies:
    """What a model wrote, a line a reply; those of other models and ways of asking stay beside."""

    def __init__(
        self,
        file: Path,
        start: Start,
        sampling: SamplingConfig,
        stack: AsyncExitStack,
        progress: Progress,
    ) -> None:
        """Read what is there; the engine is opened on `stack`, where a reply is missing."""
        self._file, self._start, self._sampling = file, start, sampling
        self._stack, self._progress = stack, progress
        self._opened: Endpoint | None = None
        self._known = _known(file) if file.exists() else {}
        logs.cut(file)  # of a last line that a crash left half-written

    async def completed(self, wave: Sequence[Record], what: str) -> list[Record]:
        """Records with their replies; without those to which the model said nothing."""
        missing = [one for one in wave if not one.text and self._key(one) not in self._known]
        if missing and self._opened is None:
            self._opened = await self._stack.enter_async_context(endpoint.open(self._start.source))
        await together([self._ask(one, what) for one in missing])
        whole = []
        for one in wave:
            text, is_cut = (one.text, False) if one.text else self._known[self._key(one)]
            whole += [one._replace(text=text, is_cut=is_cut)] if text else []
        return whole

    async def _ask(self, one: Record, what: str) -> None:
        assert self._opened is not None
        example = Example(one.id, ({"role": "user", "content": one.prompt},))
        answer = await asking.chat(self._opened, self._sampling, example, 0)
        row = {"key": self._key(one), "prompt": one.prompt, "reply": answer.text}
        row |= {"finish": answer.finish_reason or ""}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._known[row["key"]] = answer.text, answer.finish_reason == "length"
        self._progress(len(self._known), None, f"replies to {what}")

    def _key(self, one: Record) -> str:
        """Of a prompt, this model and this way of asking."""
        told = [self._start.sha256, one.prompt, self._sampling.model_dump(mode="json")]
        return sha256(json.dumps(told).encode()).hexdigest()


def _known(file: Path) -> dict[str, tuple[str, bool]]:
    """Key -> reply, and whether it was cut off.

    Raises:
        ConfigError: The file is something else, which nothing is written to.
    """
    *lines, rest = file.read_text("utf-8").split("\n")
    known: dict[str, tuple[str, bool]] = {}
    try:
        for line in lines:
            one = json.loads(line)
            known[one["key"]] = one["reply"], one.get("finish") == "length"
        is_ours = rest[: len(BEGINNING)] == BEGINNING[: len(rest)]
    except (ValueError, LookupError, TypeError, AttributeError):
        is_ours = False
    if not is_ours:
        raise ConfigError(
            f"calibration.replies={file.name} holds something else than a model's replies, line "
            f"{len(known) + 1}: name a file that such a run wrote, or one that is not there yet."
        )
    return known


def records(config: CalibrationConfig, name: str, seed: int) -> tuple[list[Record], list[Record]]:
    """Of a part: what it is rounded by, and what is held out."""
    part = config.parts[name]
    source = SourceConfig(path=part.path, format=part.format)
    sides: tuple[list[Record], list[Record]] = ([], [])
    seen = set[tuple[str, str]]()
    for path in read.glob(config.root, part.path):
        inner = path.relative_to(config.root).as_posix()
        piece = read.Piece(name, inner, 0, path.stat().st_size, 0)
        for found in read.records(config.root, piece, source, MAX_BYTES):
            place = f"{inner}:{found.line}"
            try:
                one, key = _record(part, place, {} if found.fault else found.fields)
            except (LookupError, UnicodeError, TypeError, AttributeError):
                continue  # a record without these fields
            if one[1:3] not in seen and (one.prompt or one.text):
                seen.add(one[1:3])
                sides[is_held_out(key)].append(one)
    for side in sides:
        side.sort(key=lambda one: draw("quantize", seed, name, one.id))
    return sides


def _record(part: PartConfig, place: str, fields: Mapping[str, object]) -> tuple[Record, str]:
    own = read.render(part.id, fields) if part.id else place
    key = read.render(part.holdout_key, fields) if part.holdout_key else own
    prompt, text = (read.render(one, fields).strip() for one in (part.prompt, part.text))
    return Record(own, prompt, text), key


def _counts(config: CalibrationConfig) -> dict[str, int]:
    """Samples by side and part: at least one each, and otherwise by largest remainders."""
    total = sum(part.share for part in config.parts.values())
    found: dict[str, int] = {}
    for side, count in (("calibration", config.samples), ("evaluation", config.evaluation)):
        exact = {name: count * part.share / total for name, part in config.parts.items()}
        whole = {name: max(1, int(share)) for name, share in exact.items()}
        left = max(count - sum(whole.values()), 0)
        for name in sorted(exact, key=lambda name: whole[name] - exact[name])[:left]:
            whole[name] += 1
        found |= {f"{side}.{name}": own for name, own in whole.items()}
    return found


async def _gather(
    config: CalibrationConfig, start: Start, file: Path, seed: int, progress: Progress
) -> dict[str, Tensor]:
    """Ids by side and part."""
    found = {}
    async with AsyncExitStack() as stack:
        replies = Replies(file, start, config.sampling, stack, progress)
        for key, count in _counts(config).items():
            side, name = key.split(".")
            own = iter(records(config, name, seed)[side == "evaluation"])
            ids, num_records = list[int](), 0
            while len(ids) < count * config.length and (wave := list(islice(own, WAVE))):
                num_records += len(wave)
                for one in await replies.completed(wave, f"{name} ({side})"):
                    # No document fills more than a sample: few long ones would be all there is.
                    ids += islice(_encode(start.tokenizer, one), config.length)
            rows = min(count, len(ids) // config.length)
            if not rows:
                raise ConfigError(
                    f"the {side} text of {name} is {len(ids):,} tokens of {num_records:,} "
                    f"records, less than one sample of {config.length:,}: give it more text, or "
                    "lower calibration.length. One record in fifty is held out for evaluation."
                )
            found[key] = torch.tensor(ids[: rows * config.length]).reshape(rows, config.length)
    return found


def _encode(tokenizer: Tokenizer, one: Record) -> Iterator[int]:
    """A dialogue by the template; a document with the end of an answer behind it."""
    if not one.prompt:
        yield from [*tokenizer.encode(one.text), *sorted(tokenizer.stop_ids)[:1]]
        return
    turns = [{"role": "user", "content": one.prompt}, {"role": "assistant", "content": one.text}]
    try:
        ids = tokenizer.examples(turns)[0].ids
        if one.is_cut:  # what ends an answer does not stand behind half a sentence
            ends = [at for at, token in enumerate(ids) if token in tokenizer.stop_ids]
            ids = ids[: ends[-1]] if ends else ids
        yield from ids
    except TokenizerError as error:
        raise TokenizerError(f"record {one.id}: {error}") from None
