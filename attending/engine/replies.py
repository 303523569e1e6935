"""What the engine answers: OpenAI's objects, whole or as pieces of a stream.

The classes are the API's document, the tests' oracle and what the server fills in, so that these
three cannot part.
"""

from typing import Any, Literal

from pydantic import NonNegativeInt

from attending.config import Config

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptDetails(Config):
    """Part of `prompt_tokens`."""

    cached_tokens: NonNegativeInt
    """Found in the cache, so not computed again."""


class CompletionDetails(Config):
    """Part of `completion_tokens`."""

    reasoning_tokens: NonNegativeInt
    """Written before the reasoning ended."""


class Usage(Config):
    """Token counts of a request; of all its answers together."""

    prompt_tokens: NonNegativeInt
    """Of the prompt, with its template."""
    completion_tokens: NonNegativeInt
    """Written."""
    total_tokens: NonNegativeInt
    """Both."""
    prompt_tokens_details: PromptDetails
    """Of the prompt."""
    completion_tokens_details: CompletionDetails
    """Of the answer."""


class TopLogprob(Config):
    """One of the likeliest tokens at a place."""

    token: str
    """As text; half a character shows as a replacement character."""
    logprob: float
    """Natural logarithm of its probability under the model, before temperature and filters."""
    bytes: tuple[int, ...] | None
    """Its UTF-8 bytes."""


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: tuple[TopLogprob, ...]
    """The likeliest ones at its place, likeliest first."""


class ChatLogprobs(Config):
    """Of a chat answer."""

    content: tuple[TokenLogprob, ...]
    """Every token written, those of the reasoning too."""


class CompletionLogprobs(Config):
    """Of a completion; lists of equal length."""

    tokens: tuple[str, ...]
    """As text."""
    token_logprobs: tuple[float | None, ...]
    """None for a prompt's first token, which nothing precedes."""
    top_logprobs: tuple[dict[str, float] | None, ...]
    """The likeliest tokens at each place."""
    text_offset: tuple[NonNegativeInt, ...]
    """Characters of text before each token."""


class Called(Config):
    """A function with the arguments that the model wrote."""

    name: str
    """Of the function."""
    arguments: str
    """As JSON."""


class CalledTool(Config):
    """A call that the model wants."""

    index: NonNegativeInt
    """Which of the answer's calls."""
    id: str
    """To be repeated by the tool's answer."""
    type: Literal["function"] = "function"
    """The only kind."""
    function: Called
    """What is called."""


class AnswerMessage(Config):
    """What the model wrote."""

    role: Literal["assistant"] = "assistant"
    """Always the assistant."""
    content: str | None
    """The answer; null where there are only tool calls."""
    reasoning_content: str | None = None
    """What it wrote before, for models that reason."""
    tool_calls: tuple[CalledTool, ...] | None = None
    """What it wants to be called."""


class ChatChoice(Config):
    """One of `n` answers."""

    index: NonNegativeInt
    """Which."""
    message: AnswerMessage
    """What was written."""
    finish_reason: FinishReason
    """`length`: cut at `max_tokens` or at the end of the context."""
    logprobs: ChatLogprobs | None = None
    """If asked for."""
    token_ids: tuple[int, ...] | None = None
    """If asked for: every id sampled, the one that ended the answer too."""


class ChatCompletion(Config):
    """Answer to /v1/chat/completions."""

    id: str
    """Of the request; log lines name it."""
    object: Literal["chat.completion"] = "chat.completion"
    """Kind of this object."""
    created: int
    """Unix time in seconds."""
    model: str
    """Who answered."""
    choices: tuple[ChatChoice, ...]
    """In order of index."""
    usage: Usage
    """Token counts."""
    prompt_logprobs: tuple[dict[str, Any] | None, ...] | None = None
    """If asked for: a place's tokens by id, each with logprob, rank and decoded_token."""
    prompt_token_ids: tuple[int, ...] | None = None
    """If asked for."""


class Delta(Config):
    """What an event adds to an answer."""

    role: Literal["assistant"] | None = None
    """In an answer's first event."""
    content: str | None = None
    """More of the answer."""
    reasoning_content: str | None = None
    """More of the reasoning."""
    tool_calls: tuple[CalledTool, ...] | None = None
    """A whole call at a time."""


class ChunkChoice(Config):
    """One of `n` answers in an event."""

    index: NonNegativeInt
    """Which."""
    delta: Delta
    """What is new."""
    finish_reason: FinishReason | None = None
    """In an answer's last event."""
    logprobs: ChatLogprobs | None = None
    """Of the tokens since the last event."""
    token_ids: tuple[int, ...] | None = None
    """Of the tokens since the last event."""


class ChatChunk(Config):
    """An event of a streamed chat answer."""

    id: str
    """Of the request."""
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    """Kind of this object."""
    created: int
    """Unix time in seconds."""
    model: str
    """Who answers."""
    choices: tuple[ChunkChoice, ...]
    """Empty in the event that carries the usage."""
    usage: Usage | None = None
    """In the last event, if asked for."""
    prompt_logprobs: tuple[dict[str, Any] | None, ...] | None = None
    """In the first event, if asked for."""
    prompt_token_ids: tuple[int, ...] | None = None
    """In the first event, if asked for."""


class TextChoice(Config):
    """One of the continuations: `n` for each prompt, in the prompts' order."""

    index: NonNegativeInt
    """Which."""
    text: str
    """What was written, or in a stream what is new."""
    finish_reason: FinishReason | None
    """Null in a stream until the last event."""
    logprobs: CompletionLogprobs | None = None
    """If asked for."""
    prompt_logprobs: tuple[dict[str, Any] | None, ...] | None = None
    """If asked for, once for each prompt: its tokens by id with logprob, rank, decoded_token."""
    prompt_token_ids: tuple[int, ...] | None = None
    """If asked for."""
    token_ids: tuple[int, ...] | None = None
    """If asked for."""


class Completion(Config):
    """Answer to /v1/completions, or an event of it."""

    id: str
    """Of the request."""
    object: Literal["text_completion"] = "text_completion"
    """Kind of this object."""
    created: int
    """Unix time in seconds."""
    model: str
    """Who answered."""
    choices: tuple[TextChoice, ...]
    """In order of index; empty in the event that carries the usage."""
    usage: Usage | None = None
    """Token counts."""


class ModelCard(Config):
    """A model that is served."""

    id: str
    """To be given as `model`."""
    object: Literal["model"] = "model"
    """Kind of this object."""
    created: int
    """Unix time at which it was loaded."""
    owned_by: str
    """Who serves it."""
    max_model_len: int
    """Most tokens of prompt and answer together."""
    source: str
    """Where it came from."""
    licence: str
    """Of the weights, where known."""
    note: str
    """What its users must know."""
    reasons: bool
    """Whether its answers may begin with reasoning."""


class ModelList(Config):
    """Answer to /v1/models."""

    object: Literal["list"] = "list"
    """Kind of this object."""
    data: tuple[ModelCard, ...]
    """One model."""
