"""From a request of the API to what the scheduler runs: prompts, sampling, grammar, and limits."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from attending.engine.answer import AnswerParser, AnswerWriter
from attending.engine.api import ChatRequest, CompletionRequest, NamedTool, RequestError
from attending.engine.scheduler import Grammar, Request
from attending.errors import UsageError

if TYPE_CHECKING:
    from attending.engine.grammar import Grammars
    from attending.engine.local import Model

Asked = ChatRequest | CompletionRequest


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request: `n` answers to each of its prompts, in order."""

    asked: Asked
    prompts: list[tuple[int, ...]]
    texts: list[str]
    """Of the prompts, where they are echoed."""
    requests: list[Request]
    new_writer: Callable[[Request], AnswerWriter]

    @property
    def n(self) -> int:
        """Answers to each prompt."""
        return self.asked.n or 1


class Jobs:
    """Makes jobs for one model."""

    def __init__(self, model: "Model", max_answers: int) -> None:
        """`model`: loaded; `max_answers`: most that one request may ask for."""
        self._model, self._max_answers = model, max_answers
        self._tokenizer = model.tokenizer

    def chat(self, asked: ChatRequest) -> Job:
        """A conversation.

        Raises:
            RequestError: The template, the tools or the limits do not allow it.
            TokenizerError: The template refuses the messages.
        """
        if asked.top_logprobs is not None and not asked.logprobs:
            raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
        self._check_stream(asked)
        choice = asked.tool_choice or ("auto" if asked.tools else "none")
        tools = [tool.model_dump(mode="json", exclude_none=True) for tool in asked.tools or ()]
        if choice != "none":
            self._check_tools(asked, choice)
        variables = dict(asked.chat_template_kwargs or {})
        if "messages" in variables or "add_generation_prompt" in variables:
            raise RequestError(
                "chat_template_kwargs must not hold messages or add_generation_prompt.",
                param="chat_template_kwargs",
            )
        if tools and choice != "none":
            variables["tools"] = tools
        self._check_count(asked, 1)
        dumped = (m.model_dump(mode="json", exclude_none=True) for m in asked.messages)
        messages = [_plain(message) for message in dumped]
        self._check_length("".join(_text(message) for message in messages))
        ids = tuple(self._tokenizer.render(messages, **variables))
        opened = self._tokenizer.reasons and self._tokenizer.opens_reasoning(ids)
        num_top = (asked.top_logprobs or 0) if asked.logprobs else None
        requests = self._requests(
            asked, [ids], num_top, lambda: self._grammar(asked, choice, opened=opened)
        )

        def new_writer(request: Request) -> AnswerWriter:
            return AnswerWriter.of_chat(
                self._tokenizer,
                request.ids,
                request.stop_ids,
                request.sampling.stop,
                tools=choice != "none",
            )

        return Job(asked, [ids], [""], requests, new_writer)

    def complete(self, asked: CompletionRequest) -> Job:
        """Plain text.

        Raises:
            RequestError: A limit does not allow it.
        """
        self._check_stream(asked)
        given: Any = asked.prompt
        several = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
        self._check_count(asked, len(several))
        prompts, texts = [], []
        for prompt in several:
            if isinstance(prompt, str):
                self._check_length(prompt)
                prompts.append(tuple(self._tokenizer.encode(prompt)))
            elif max(prompt) >= self._model.arch.vocab_size:
                most = self._model.arch.vocab_size - 1
                raise RequestError(f"token ids must be 0 to {most}.", param="prompt")
            else:
                prompts.append(prompt)
            if asked.echo:
                whole = isinstance(prompt, str)
                texts.append(prompt if whole else self._tokenizer.decode(prompt))
        requests = self._requests(asked, prompts, asked.logprobs, lambda: None)

        def new_writer(request: Request) -> AnswerWriter:
            parser = AnswerParser(stops=request.sampling.stop)
            return AnswerWriter(self._tokenizer, parser, request.stop_ids)

        return Job(asked, prompts, texts or [""] * len(prompts), requests, new_writer)

    @cached_property
    def _grammars(self) -> "Grammars":
        from attending.engine.grammar import Grammars  # most servers never need it

        stop_ids = sorted(self._model.stop_ids)
        return Grammars(self._tokenizer, self._model.arch.vocab_size, stop_ids)

    def _requests(
        self,
        asked: Asked,
        prompts: Iterable[tuple[int, ...]],
        num_top: int | None,
        new_grammar: Callable[[], Grammar | None],
    ) -> list[Request]:
        max_tokens = asked.max_tokens
        if isinstance(asked, ChatRequest) and asked.max_completion_tokens is not None:
            max_tokens = asked.max_completion_tokens
        prompt_top = asked.prompt_logprobs
        if isinstance(asked, CompletionRequest) and asked.echo and num_top is not None:
            prompt_top = max(prompt_top or 0, num_top)
        stop = (asked.stop,) if isinstance(asked.stop, str) else asked.stop
        sampling = self._model.sampling(
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=None if asked.top_k is None else max(asked.top_k, 0),
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            logit_bias=_biases(asked),
            seed=None if asked.seed is None else asked.seed % 2**63,
            stop=stop,
            max_tokens=max_tokens,
        )
        requests: list[Request] = []
        for ids in prompts:
            self._check_room(len(ids), max_tokens)
            for copy in range(asked.n or 1):
                own = sampling.replace(seed=((sampling.seed or 0) + copy) % 2**63)
                about = self._model.stop_ids, num_top, prompt_top, new_grammar()
                requests.append(Request(ids, own, *about, asked.speculate is not False))
        return requests

    def _check_room(self, prompt: int, wanted: int | None) -> None:
        context = self._model.scheduler.context
        if prompt + (wanted or 1) > context:
            answer = f" and asks for {wanted:,} more" if wanted else ""
            raise RequestError(
                f"the request is {prompt:,} tokens{answer}; this model's context here is "
                f"{context:,} tokens. Shorten the messages{' or lower max_tokens' * bool(wanted)}.",
                param="messages",
                code="context_length_exceeded",
            )

    def _check_count(self, asked: Asked, prompts: int) -> None:
        if prompts * (asked.n or 1) > self._max_answers:
            raise RequestError(
                f"{prompts * (asked.n or 1):,} answers are asked for; one request may have "
                f"{self._max_answers:,}. Send several.",
                param="n",
            )

    def _check_length(self, text: str) -> None:
        """Refuse what cannot fit without counting its tokens, which would take long."""
        least = self._tokenizer.least_tokens(text)
        if least >= self._model.scheduler.context:
            self._check_room(least, None)

    def _check_stream(self, asked: Asked) -> None:
        if asked.stream_options is not None and not asked.stream:
            raise RequestError("stream_options needs stream: true.", param="stream_options")

    def _check_tools(self, asked: ChatRequest, choice: str | NamedTool) -> None:
        names = [tool.function.name for tool in asked.tools or ()]
        if not self._tokenizer.takes_tools:
            raise RequestError(
                "this model's chat template has no place for tools; use another model, or "
                "tool_choice none.",
                param="tools",
            )
        if not names:
            raise RequestError("tool_choice needs tools.", param="tool_choice")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise RequestError("tool_choice names none of the tools.", param="tool_choice")

    def _grammar(
        self, asked: ChatRequest, choice: str | NamedTool, *, opened: bool
    ) -> Grammar | None:
        form = asked.response_format
        forced = isinstance(choice, NamedTool) or choice == "required"
        has_form = form is not None and form.type != "text"
        if forced and has_form:
            raise RequestError("a forced tool call leaves no room for response_format.")
        try:
            if forced:
                named = choice.function.name if isinstance(choice, NamedTool) else None
                functions = [
                    (tool.function.name, tool.function.parameters)
                    for tool in asked.tools or ()
                    if named in (None, tool.function.name)
                ]
                return self._grammars.call(functions, opened=opened)
            if form is None or not has_form:
                return None
            if form.type == "json_object":
                return self._grammars.json({"type": "object"}, opened=opened)
            if form.json_schema is None:
                raise RequestError("json_schema is missing.", param="response_format.json_schema")
            return self._grammars.json(form.json_schema.schema_, opened=opened)
        except UsageError as error:
            field = "tools" if forced else "response_format.json_schema.schema"
            raise RequestError(str(error), param=field) from None


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _biases(asked: Asked) -> tuple[tuple[int, float], ...] | None:
    try:
        pairs = [(int(token), bias) for token, bias in (asked.logit_bias or {}).items()]
    except ValueError:
        raise RequestError("logit_bias must name token ids.", param="logit_bias") from None
    return tuple(pairs) or None


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """As templates know it: a developer is the system, a call's arguments are an object."""
    if message["role"] == "developer":
        message["role"] = "system"
    for call in message.get("tool_calls", ()):
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
        except (ValueError, RecursionError):
            raise RequestError(
                "the arguments of an earlier tool call are not JSON.", param="messages"
            ) from None
    return message
