"""From the scheduler's outputs to the API's answers, whole or as events of a stream.

The objects are OpenAI's (prompt log-probabilities and token ids vLLM's); `replies.json` is their
schema, and the tests hold every answer against it.
"""

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from attending.chat import REPLACEMENT, Tokenizer
from attending.engine.answer import AnswerWriter, Call, Part, Piece
from attending.engine.api import ChatRequest
from attending.engine.jobs import Job
from attending.engine.sampler import Scored
from attending.engine.scheduler import Output

Json = dict[str, Any]


@dataclass(slots=True)
class _Choice:
    """One answer as it grows; what has been sent is taken out of `parts` and `scores`."""

    writer: AnswerWriter
    parts: list[Part] = field(default_factory=list)
    scores: list[Scored] = field(default_factory=list)
    prompt: tuple[Scored | None, ...] | None = None
    cached_tokens: int = 0
    num_calls: int = 0
    sent_ids: int = 0
    sent_characters: int = 0
    has_begun: bool = False


class Replying:
    """One job's answers, from the first output to the last."""

    def __init__(self, job: Job, tokenizer: Tokenizer, model: str) -> None:
        """`model`: the id that answers."""
        self._job, self._asked, self._tokenizer = job, job.asked, tokenizer
        self._is_chat = isinstance(job.asked, ChatRequest)
        self._texts: dict[int, str] = {}  # of tokens; the likeliest ones come again and again
        self._choices = [_Choice(job.new_writer(request)) for request in job.requests]
        self._head = {
            "id": ("chatcmpl-" if self._is_chat else "cmpl-") + secrets.token_hex(12),
            "object": "chat.completion" if self._is_chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    @property
    def is_over(self) -> bool:
        """Whether every answer has ended."""
        return all(choice.writer.finish_reason for choice in self._choices)

    def has_ended(self, index: int) -> bool:
        """Whether answer `index` has."""
        return self._choices[index].writer.finish_reason is not None

    def take(self, index: int, output: Output) -> bool:
        """Note an output of request `index`; True once that answer has ended."""
        choice = self._choices[index]
        choice.parts += choice.writer.feed(output.token, output.finish)
        choice.cached_tokens = output.cached_tokens
        if output.scored is not None:
            choice.scores.append(output.scored)
        if output.prompt is not None:
            choice.prompt = output.prompt
        return choice.writer.finish_reason is not None

    def whole(self) -> Json:
        """The answer to a request that does not stream."""
        make = self._message if self._is_chat else self._text
        choices = [make(index, choice) for index, choice in enumerate(self._choices)]
        about = self._about_prompt(self._choices[0], 0) if self._is_chat else {}
        return {**self._head, "choices": choices, "usage": self._usage(), **about}

    def events(self, index: int) -> Iterator[Json]:
        """What is new in answer `index`, if anything can be shown yet."""
        choice = self._choices[index]
        is_last = choice.writer.finish_reason is not None
        if not self._is_chat:
            is_first = not choice.has_begun
            if choice.parts or is_last or (is_first and getattr(self._asked, "echo", None)):
                yield {**self._head, "choices": [self._text(index, choice)]}
            return
        if not choice.has_begun:
            choice.has_begun = True
            about = self._about_prompt(choice, 0) if index == 0 else {}
            yield self._chunk(index, {"role": "assistant", "content": ""}) | about
        parts, choice.parts = choice.parts, []
        for part in parts:
            yield self._chunk(index, self._delta(choice, part), choice)
        if is_last:
            yield self._chunk(index, {}, choice)

    def last_event(self) -> Json | None:
        """The token counts, if the client wants them."""
        options = self._asked.stream_options
        if options is None or not options.include_usage:
            return None
        return {**self._chunk_head, "choices": [], "usage": self._usage()}

    @property
    def _chunk_head(self) -> Json:
        return {**self._head, "object": "chat.completion.chunk"} if self._is_chat else self._head

    def _usage(self) -> Json:
        prompt = sum(len(ids) for ids in self._job.prompts)
        written = sum(len(choice.writer.token_ids) for choice in self._choices)
        cached = sum(choice.cached_tokens for choice in self._choices[:: self._job.n])
        thought = sum(choice.writer.reasoning_tokens for choice in self._choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": thought},
        }

    def _message(self, index: int, choice: _Choice) -> Json:
        text = {"content": "", "reasoning": ""}
        calls: list[Json] = []
        for part in choice.parts:
            if isinstance(part, Piece):
                text[part.kind] += part.text
            else:
                calls.append(_called(len(calls), part))
        message: Json = {"role": "assistant", "content": text["content"]}
        if text["reasoning"]:
            message["reasoning_content"] = text["reasoning"]
        if calls:
            message |= {"content": text["content"] or None, "tool_calls": calls}
        reason = choice.writer.finish_reason
        more = self._logprobs(choice) | self._new_ids(choice)
        return {"index": index, "message": message, "finish_reason": reason, **more}

    def _chunk(self, index: int, delta: Json, choice: _Choice | None = None) -> Json:
        """An event; the choice's new scores and ids go with it, an empty delta ends it."""
        more = self._logprobs(choice) | self._new_ids(choice) if choice else {}
        reason = choice.writer.finish_reason if choice and not delta else None
        told = {"index": index, "delta": delta, "finish_reason": reason, **more}
        return {**self._chunk_head, "choices": [told]}

    def _delta(self, choice: _Choice, part: Part) -> Json:
        if isinstance(part, Call):
            choice.num_calls += 1
            return {"tool_calls": [_called(choice.num_calls - 1, part)]}
        return {"reasoning_content" if part.kind == "reasoning" else "content": part.text}

    def _text(self, index: int, choice: _Choice) -> Json:
        """A continuation, or what is new of it."""
        prompt = index // self._job.n
        is_first, choice.has_begun = not choice.has_begun, True
        text = "".join(part.text for part in choice.parts if isinstance(part, Piece))
        choice.parts = []
        echo = is_first and getattr(self._asked, "echo", None)
        return {
            "index": index,
            "text": self._job.texts[prompt] + text if echo else text,
            "finish_reason": choice.writer.finish_reason,
            **self._logprobs(choice, echoed=index if echo else None),
            **(self._about_prompt(choice, prompt) if is_first else {}),
            **self._new_ids(choice),
        }

    def _logprobs(self, choice: _Choice, echoed: int | None = None) -> Json:
        """Of the tokens since the last event; `echoed`: and of that request's prompt."""
        scores: list[Scored | None]
        scores, choice.scores = [*choice.scores], []
        if isinstance(self._asked, ChatRequest):
            if not self._asked.logprobs:
                return {}
            content = [
                self._token(s.id, s.logprob) | {"top_logprobs": [self._token(*t) for t in s.top]}
                for s in scores
                if s is not None
            ]
            return {"logprobs": {"content": content}}
        if self._asked.logprobs is None:
            return {}
        ids = [item.id for item in scores if item is not None]
        if echoed is not None:
            scores = [*(choice.prompt or ()), *scores]
            ids = [*self._job.prompts[echoed // self._job.n], *ids]
        tokens = [self._text_of(i) for i in ids]
        offsets = []
        for token in tokens:
            offsets.append(choice.sent_characters)
            choice.sent_characters += len(token)
        top = self._asked.logprobs
        likeliest = [s and {self._text_of(i): v for i, v in s.top[:top]} for s in scores]
        values = [s and s.logprob for s in scores]
        lists = {"tokens": tokens, "token_logprobs": values, "top_logprobs": likeliest}
        return {"logprobs": lists | {"text_offset": offsets}}

    def _new_ids(self, choice: _Choice) -> Json:
        if not self._asked.return_token_ids:
            return {}
        new = choice.writer.token_ids[choice.sent_ids :]
        choice.sent_ids += len(new)
        return {"token_ids": new}

    def _about_prompt(self, choice: _Choice, prompt: int) -> Json:
        told: Json = {}
        if self._asked.return_token_ids:
            told["prompt_token_ids"] = list(self._job.prompts[prompt])
        wanted = self._asked.prompt_logprobs
        if wanted is not None and choice.prompt is not None:
            told["prompt_logprobs"] = [s and self._by_id(s, wanted) for s in choice.prompt]
        return told

    def _by_id(self, item: Scored, count: int) -> Json:
        """As vLLM gives them: the likeliest tokens by rank, and the place's own."""
        ranked = [(i, value, rank) for rank, (i, value) in enumerate(item.top[:count], start=1)]
        return {
            str(i): {"logprob": value, "rank": rank, "decoded_token": self._text_of(i)}
            for i, value, rank in [*ranked, (item.id, item.logprob, item.rank)]
        }

    def _text_of(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]

    def _token(self, token: int, logprob: float) -> Json:
        text = self._text_of(token)
        is_part = REPLACEMENT in text  # of a character; alone it has no UTF-8 form
        return {"token": text, "logprob": logprob, "bytes": None if is_part else [*text.encode()]}


def _called(index: int, call: Call) -> Json:
    function = {"name": call.name, "arguments": call.arguments}
    return {
        "index": index,
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": function,
    }
