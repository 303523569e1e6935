"""A model in this process: `attending.load()` and `attending chat`.

Built for trying, testing and scripting; many users at once are the server's business.
"""

import secrets
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from attending.chat import Message, Tokenizer
from attending.engine import loading
from attending.engine.answer import AnswerParser, AnswerWriter, FinishReason, Piece
from attending.engine.loading import ComputeOptions
from attending.engine.pages import pages_for
from attending.engine.runner import Drafter, Runner
from attending.engine.sampler import Sampling
from attending.engine.scheduler import Output, Request, Scheduler
from attending.engine.speculate import Speculation
from attending.errors import UsageError
from attending.model.architecture import page_bytes
from attending.model.checkpoint import open_checkpoint
from attending.model.files import model_files, read_json
from attending.sources import Resolved, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from attending.model.decoder import Decoder

SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, and how it came to be."""

    text: str
    reasoning: str
    finish_reason: FinishReason
    """`stop`: the model or a stop text ended it; `length`: cut at the limit; `cancelled`."""
    prompt_tokens: int
    output_tokens: int
    messages_left_out: int
    """Oldest messages that did not fit the context."""
    seed: int


def load(source: str, **options: Any) -> "Model":
    """Load a model from a folder, a GGUF file, or a source that has been pulled.

    On a CPU the native runner answers; a `dtype` or another `device` asks for torch's, which is
    also what computes `logits`.

    Args:
        source: A path, `hf:org/name`, `pypi:...` or a catalogue name such as `default`.
        options: The fields of `ComputeOptions`.

    Raises:
        SourceError: Not found, or not pulled yet (this never downloads).
        CheckpointError: The files are incomplete, damaged or of an unknown kind.
        UsageError: The options do not go together, or need what is not here.
    """
    chosen = ComputeOptions.build(options, where="the options of load")
    chosen.check()
    return Model(resolve(source), chosen)


class Model:
    """Weights and a tokenizer, read on first use."""

    def __init__(self, origin: Resolved, options: ComputeOptions) -> None:
        """See `load`."""
        self.origin = origin
        self._options = options
        self._checkpoint = open_checkpoint(origin.path)
        self.arch = self._checkpoint.arch
        self._context_tokens = self.arch.context
        self._cache_tokens, self._max_running, self._step_tokens = 0, 32, 512
        self._inbox: dict[int, deque[Output]] = {}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer and chat template."""
        return self._checkpoint.tokenizer()

    @cached_property
    def decoder(self) -> "Decoder":
        """Torch's weights, for logits, saving and torch's runner.

        Raises:
            UsageError: Torch is not installed, or the memory does not suffice.
        """
        if find_spec("torch") is None:
            raise UsageError(f"this needs {loading.TORCH_MISSING}")
        import torch

        from attending.model.weights import load_decoder

        loading.require_memory(self._checkpoint, self._options, native=False)
        if self._options.threads:
            torch.set_num_threads(self._options.threads)
        dtype = getattr(torch, loading.torch_dtype(self.arch, self._options))
        return load_decoder(self._checkpoint, dtype, self._options.device)

    @cached_property
    def is_native(self) -> bool:
        """Whether the native runner answers; if not, torch's does."""
        return loading.is_native(self.arch, self._options)

    @cached_property
    def _runner(self) -> Runner:
        """Room for one whole context, or for `make_room`."""
        tokens = self._cache_tokens or self._context_tokens
        pages = pages_for(self.arch, tokens, self._max_running, self._step_tokens)
        if self.is_native:
            files = model_files(self.origin.path)
            return loading.open_native(self._checkpoint, files, self._options, pages, self.draft)
        from attending.engine.torch_runner import TorchRunner

        if self.draft is None:
            return TorchRunner(self.decoder, pages)
        from attending.model.eagle import load_eagle

        weight = self.decoder.model.norm.weight
        eagle = load_eagle(self.draft.folder, self.arch, weight.dtype).to(weight.device)
        return TorchRunner(self.decoder, pages, eagle, self.draft.shape)

    @cached_property
    def draft(self) -> loading.Draft | None:
        """What proposes tokens, see `loading.find_draft`."""
        return loading.find_draft(self.origin, self.arch, self._options)

    @property
    def path(self) -> dict[str, str]:
        """What computes an answer, for whoever quotes a number: weights, activations, cache."""
        draft = self.draft.name if self.draft else loading.NO_DRAFT
        if self.is_native:
            return {**self._runner.path, "draft": draft}  # type: ignore[attr-defined]
        computed = loading.torch_dtype(self.arch, self._options)
        weights = " computed as ".join(dict.fromkeys((self._checkpoint.stored, computed)))
        return {"weights": weights, "activations": computed, "kv": computed, "draft": draft}

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights that answer, see `loading.weight_bytes`."""
        return loading.weight_bytes(self._checkpoint, self._options, native=self.is_native)

    @property
    def page_bytes(self) -> tuple[int, ...]:
        """Memory of a page of the cache of each group, about."""
        find = loading.kv_of if self.is_native else loading.torch_dtype
        size, draft = loading.VALUE_BYTES[find(self.arch, self._options)], self.draft
        if draft is None:
            return page_bytes(self.arch, size)
        sizes = [*page_bytes(self.arch, size, draft.shape.rows)]
        group = 0 if None in self.arch.windows else -1
        sizes[group] += sum(page_bytes(draft.config.arch, size))
        sizes[group] += draft.shape.rows * self.arch.hidden_size * 4
        return tuple(sizes)

    @cached_property
    def scheduler(self) -> Scheduler:
        """What runs the answers."""
        speculation = None
        if self.draft:
            adapts = self._options.draft_depth is None
            speculation = Speculation(cast(Drafter, self._runner), adapts=adapts)
        return Scheduler(
            self._runner,
            context=self._context_tokens,
            max_running=self._max_running,
            step_tokens=self._step_tokens,
            speculation=speculation,
        )

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer, by configuration, generation settings and template."""
        more = self._settings.get("eos_token_id")
        listed = more if isinstance(more, list) else [] if more is None else [more]
        return self.tokenizer.stop_ids | {*self.arch.eos_ids, *listed}

    def sampling(self, **given: Any) -> Sampling:
        """The model's own generation settings, overridden by what is given, with a seed."""
        own = {name: v for name, v in self._settings.items() if name in SETTINGS and v is not None}
        if self._settings.get("do_sample") is False:
            own["temperature"] = 0.0
        given = {name: value for name, value in given.items() if value is not None}
        options = Sampling.build({**own, **given})
        return options if options.seed is not None else options.replace(seed=secrets.randbits(31))

    @cached_property
    def _settings(self) -> dict[str, Any]:
        file = self.origin.path / "generation_config.json"
        return read_json(file) if file.is_file() else {}

    def limit_context(self, tokens: int) -> None:
        """Keep room for fewer tokens than the model allows; before the first answer.

        Raises:
            UsageError: More than the model's own context.
        """
        if not 0 < tokens <= self.arch.context:
            raise UsageError(f"context {tokens:,}: this model takes 1 to {self.arch.context:,}.")
        self._context_tokens = tokens

    def make_room(self, cache_tokens: int, max_running: int, step_tokens: int = 256) -> None:
        """Say how much may be under way together; before the first answer.

        Args:
            cache_tokens: Of all answers; less than a whole context is the longest there can be.
            max_running: Answers in a batch.
            step_tokens: Most tokens in a step, for one user alone 512: fewer keep the others'
                answers coming while a long prompt is read.
        """
        self._cache_tokens, self._max_running = cache_tokens, max_running
        self._step_tokens = step_tokens

    def outputs(self, ids: Sequence[int], sampling: Sampling) -> Generator[Output]:
        """What the scheduler writes for one prompt; other answers under way advance as well.

        Raises:
            ContextError: The prompt is empty or leaves no room for an answer.
        """
        handle = self.scheduler.submit(Request(tuple(ids), sampling, self.stop_ids))
        mine = self._inbox[handle] = deque()
        try:
            while True:
                while not mine:
                    for output in self.scheduler.step():
                        self._inbox[output.handle].append(output)
                output = mine.popleft()
                if output.error:
                    raise output.error
                yield output
                if output.finish:
                    return
        finally:
            self.scheduler.cancel(handle)
            del self._inbox[handle]

    def logits(self, ids: "Tensor | np.ndarray | Sequence[Sequence[int]]") -> "Tensor":
        """Token ids [batch, tokens] -> float32 logits [batch, tokens, vocab], by torch."""
        decoder = self.decoder
        import torch

        from attending.model.attend import Packed

        try:
            batch = torch.as_tensor(ids, dtype=torch.int64)
        except (ValueError, TypeError):
            raise UsageError("ids must be [batch, tokens] of equal lengths, integers.") from None
        batch = batch.to(decoder.model.norm.weight.device)
        if batch.dim() != 2 or not batch.numel() > 0 or batch.shape[1] > self.arch.context:
            raise UsageError(
                f"ids must be [batch, tokens] of at most {self.arch.context} tokens; "
                f"got shape {list(batch.shape)}."
            )
        if int(batch.min()) < 0 or int(batch.max()) >= self.arch.vocab_size:
            raise UsageError(f"ids must be 0 to {self.arch.vocab_size - 1}; got others.")
        count, length = batch.shape
        with torch.inference_mode():
            hidden = decoder(batch.flatten(), Packed([length] * count, batch.device))
            return decoder.logits(hidden).float().reshape(count, length, -1)

    def chat(
        self,
        messages: Sequence[Message],
        template: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> Answer:
        """Answer a conversation.

        Args:
            messages: As in the OpenAI API.
            template: Variables of the chat template, e.g. `{"thinking_mode": "off"}`.
            sampling: The fields of `Sampling`; None is as if not given.
        """
        stream = self.stream(messages, template, **sampling)
        for _ in stream:
            pass
        return stream.answer

    def stream(
        self,
        messages: Sequence[Message],
        template: Mapping[str, Any] | None = None,
        **sampling: Any,
    ) -> "Stream":
        """The same, piece by piece as it is written."""
        options = self.sampling(**sampling)
        context = self.scheduler.context
        # The answer gets what it may need, but never more than half of the context.
        reserve = min(options.max_tokens or context // 4, context // 2)
        ids, left_out = self.tokenizer.fit(messages, context - reserve, **(template or {}))
        return Stream(self, ids, options, left_out, is_chat=True)

    def complete(self, text: str, **sampling: Any) -> "Stream":
        """Continue plain text, without a template."""
        ids = self.tokenizer.encode(text)
        return Stream(self, ids, self.sampling(**sampling), 0, is_chat=False)

    def save(self, folder: Path | str, max_shard_bytes: int = 5_000_000_000) -> Path:
        """Write a Hugging Face model folder with its `run.json`; refuses to overwrite."""
        weights = self.decoder.state_dict()
        from attending import artifact
        from attending.model.weights import save_model

        target = Path(folder)
        parent = {"uri": self.origin.uri, "sha256": artifact.digest(self.origin.path)}
        record = artifact.Record("save", recipe={}, seed=None, parents=[parent])
        with artifact.publish(target) as draft:
            generation = {**self._settings, "eos_token_id": sorted(self.stop_ids)}
            save_model(draft, self.arch, weights, self.tokenizer, generation, max_shard_bytes)
            artifact.finish(draft, record, title=target.name, note=self.origin.note)
        return target


class Stream:
    """Iterate for the pieces of an answer; `answer` is the whole once it has ended.

    Leaving the loop early cancels the answer; what was written so far remains.
    """

    def __init__(
        self, model: Model, ids: list[int], sampling: Sampling, left_out: int, *, is_chat: bool
    ) -> None:
        self._model, self._ids, self._sampling, self._is_chat = model, ids, sampling, is_chat
        self._pieces: list[Piece] = []
        self._writer = self._new_writer()
        self.messages_left_out = left_out

    def __iter__(self) -> Iterator[Piece]:
        """Write the answer; iterated again, it is written again."""
        self._pieces, self._writer = [], self._new_writer()
        with closing(self._model.outputs(self._ids, self._sampling)) as outputs:
            for output in outputs:
                for piece in self._writer.feed(output.token, output.finish):
                    if isinstance(piece, Piece):  # always: no tools were offered
                        self._pieces.append(piece)
                        yield piece
                if self._writer.finish_reason:  # a stop text, which the scheduler cannot see
                    return

    def _new_writer(self) -> AnswerWriter:
        model, stops = self._model, self._sampling.stop
        if self._is_chat:
            return AnswerWriter.of_chat(model.tokenizer, self._ids, model.stop_ids, stops)
        return AnswerWriter(model.tokenizer, AnswerParser(stops=stops), model.stop_ids)

    @property
    def answer(self) -> Answer:
        """What has been written."""
        kinds = {
            kind: "".join(piece.text for piece in self._pieces if piece.kind == kind)
            for kind in ("reasoning", "content")
        }
        return Answer(
            text=kinds["content"],
            reasoning=kinds["reasoning"],
            finish_reason=self._writer.finish_reason or "cancelled",
            prompt_tokens=len(self._ids),
            output_tokens=len(self._writer.token_ids),
            messages_left_out=self.messages_left_out,
            seed=self._sampling.seed or 0,
        )
