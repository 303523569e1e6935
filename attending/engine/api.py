"""What may be asked of the engine and of the gateway: OpenAI's requests, checked field by field.

Field names and meanings are OpenAI's; `top_k`, `min_p`, `repetition_penalty`, `prompt_logprobs`,
`return_token_ids` and `chat_template_kwargs` are vLLM's, `speculate` is ours. What OpenAI has and a
private server has no use for is accepted at harmless values only; anything unknown is refused by
name.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from attending.config import Config, suggest
from attending.errors import AttendingError

Text = Annotated[str, Field(min_length=1)]
FAST = Field(fail_fast=True)  # millions of wrong items are one error, not millions
Ids = Annotated[tuple[NonNegativeInt, ...], Field(min_length=1, fail_fast=True)]
TOP_LOGPROBS = 20
BRANCHES = {"str", "int", "float", "bool", "NamedTool"}
Body = TypeVar("Body", bound=Config)


class RequestError(AttendingError, ValueError):
    """A request cannot be answered as asked; shown to the client in OpenAI's form."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        after: int | None = None,
    ) -> None:
        """`status` is HTTP's, `param` a field, `code` for programs, `after` seconds ask again."""
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.retry_after_seconds = after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that OpenAI's clients turn into their exceptions."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": kinds.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


class TextPart(Config):
    """A part of a message."""

    type: Literal["text"]
    """Only text is read; images and sound are refused."""
    text: str
    """The words."""


class CalledFunction(Config):
    """A function with its arguments."""

    name: Text
    """Of the function."""
    arguments: str
    """As JSON."""


class ToolCall(Config):
    """A call that the assistant made earlier."""

    id: Text
    """Repeated by the tool's answer."""
    type: Literal["function"] = "function"
    """The only kind."""
    function: CalledFunction
    """What was called."""
    index: NonNegativeInt | None = None
    """Left by streaming clients; not used."""


class Message(Config):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who speaks."""
    content: str | Annotated[tuple[TextPart, ...], Field(min_length=1, fail_fast=True)] | None = (
        None
    )
    """The words; an assistant that only called tools has none."""
    name: str | None = None
    """Of the speaker, where the chat template shows it."""
    reasoning_content: str | None = None
    """An assistant's earlier reasoning; most templates leave it out."""
    tool_calls: Annotated[tuple[ToolCall, ...], FAST] | None = None
    """An assistant's earlier calls."""
    tool_call_id: str | None = None
    """In a tool's answer: of the call it answers."""
    refusal: None = None
    """Must be absent or null."""
    annotations: tuple[()] | None = None
    """Must be absent, null or empty."""
    audio: None = None
    """Must be absent or null."""
    function_call: None = None
    """Must be absent or null; use tool_calls."""


class FunctionDefinition(Config):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    """Letters, digits, `_`, `-` and `.`."""
    description: str | None = None
    """Tells the model what it is for."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """JSON schema of the arguments."""
    strict: bool | None = None
    """Calls that `tool_choice` forces always follow the schema; others are not held to it."""


class Tool(Config):
    """Something the model may call."""

    type: Literal["function"]
    """The only kind."""
    function: FunctionDefinition
    """The function."""


class FunctionName(Config):
    """Names a function."""

    name: Text
    """One of `tools`."""


class NamedTool(Config):
    """Forces a call of one function."""

    type: Literal["function"]
    """The only kind."""
    function: FunctionName
    """Which."""


class JsonSchema(Config):
    """A JSON schema for the answer."""

    name: str = "answer"
    """For people."""
    description: str | None = None
    """For people."""
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    """The schema."""
    strict: bool | None = None
    """Always strict here."""


class ResponseFormat(Config):
    """The form of the answer, enforced token by token once the reasoning has ended."""

    type: Literal["text", "json_object", "json_schema"]
    """Free text, any JSON object, or JSON of a schema."""
    json_schema: JsonSchema | None = None
    """Needed for `json_schema`."""


class StreamOptions(Config):
    """What a stream ends with."""

    include_usage: bool = False
    """A last event without choices carries the token counts."""
    include_obfuscation: Literal[False] | None = None
    """Must be absent or false."""


class Asked(Config):
    """What both kinds of request share."""

    model: Text
    """The id that /v1/models lists."""
    max_tokens: NonNegativeInt | None = None
    """Most tokens of the answer; by default as many as the context has room for."""
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    """0 takes the likeliest token; by default the model's own setting."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample from the likeliest tokens with this much probability."""
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """Sample from this many tokens; 0 and -1 mean all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Drop tokens less likely than this share of the likeliest."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """Subtracted from the logit of every token of the answer so far."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    """The same, as often as the token was written."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Above 1, tokens of prompt and answer become less likely."""
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    """Added to the logits of these token ids."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    """The same seed and request give the same answer, whatever else is being served."""
    stop: Text | Annotated[tuple[Text, ...], Field(max_length=16, fail_fast=True)] | None = None
    """Texts that end the answer; they are not part of it."""
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    """How many answers."""
    stream: bool | None = None
    """Send the answer as it is written, as server-sent events."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    """Log-probabilities of the prompt's tokens, each beside this many likelier ones."""
    return_token_ids: bool | None = None
    """Also give the ids of the prompt and of the answer."""
    speculate: bool | None = None
    """False: without the draft, where there is one. The answer is the same."""
    user: str | None = None
    """Not used, kept or passed on."""


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1, fail_fast=True)]
    """The conversation, oldest first."""
    max_completion_tokens: PositiveInt | None = None
    """The new name of `max_tokens`."""
    logprobs: bool | None = None
    """Give the log-probability of every token of the answer."""
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    """And of this many likelier ones."""
    response_format: ResponseFormat | None = None
    """Free text or JSON."""
    tools: Annotated[tuple[Tool, ...], FAST] | None = None
    """What the model may call, where its template has a place for tools."""
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    """`auto` where there are tools; `required` and a name force a call."""
    parallel_tool_calls: bool | None = None
    """Whether one answer may hold several calls; a forced call is always one."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template, such as Baichuan-M2's `thinking_mode`."""
    store: Literal[False] | None = None
    """Nothing is ever stored."""
    metadata: dict[str, str] | None = None
    """Not used, kept or passed on."""
    service_tier: Literal["auto", "default"] | None = None
    """There is one."""
    modalities: tuple[Literal["text"], ...] | None = None
    """Text is the only one."""
    safety_identifier: str | None = None
    """Not used, kept or passed on."""
    prompt_cache_key: str | None = None
    """Not needed: shared beginnings are found by themselves."""
    prompt_cache_retention: Literal["in_memory"] | None = None
    """The cache is never written to a disk."""
    reasoning_effort: None = None
    """Must be absent or null: a template's own variables go in `chat_template_kwargs`."""
    verbosity: Literal["medium"] | None = None
    """Cannot be changed."""
    audio: None = None
    """Must be absent or null."""
    prediction: None = None
    """Must be absent or null."""
    web_search_options: None = None
    """Must be absent or null: nothing leaves this machine."""
    functions: None = None
    """Must be absent or null; use `tools`."""
    function_call: None = None
    """Must be absent or null; use `tool_choice`."""


class CompletionRequest(Asked):
    """POST /v1/completions."""

    prompt: (
        Text
        | Annotated[tuple[Text, ...], Field(min_length=1, fail_fast=True)]
        | Ids
        | Annotated[tuple[Ids, ...], Field(min_length=1, fail_fast=True)]
    )
    """Plain text or token ids, one or several; no chat template is applied."""
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    """Give log-probabilities, each beside this many likelier tokens."""
    echo: bool | None = None
    """Give the prompt back before the answer, with its log-probabilities if asked for."""
    suffix: None = None
    """Must be absent or null."""
    best_of: Literal[1] | None = None
    """Must be absent, null or 1."""


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
    path: dict[str, str] = Field(default_factory=dict)
    """What computes its answers: `weights`, `activations`, `kv`, `draft`; empty where unknown."""


def parse(kind: type[Body], body: bytes) -> Body:
    """The request in a body.

    Raises:
        RequestError: What is wrong, by field; nothing that the client sent is repeated, since it
            may be about a patient.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        raise RequestError(f"the body cannot be read as JSON in UTF-8: {found[0]['msg']}")

    # A union reports each of its branches; the deepest complaint is about the branch meant.
    def weight(item: Any) -> tuple[bool, bool, int]:
        of_kind = item["type"] == "literal_error" and item["loc"][-1] == "type"
        return of_kind, item["type"] == "extra_forbidden", len(item["loc"])

    first = max(found, key=weight)
    path = [str(part) for part in first["loc"]]
    # A union names its branches too, which no client knows.
    known = [part for part in path if part.replace("_", "").isalnum() and part not in BRANCHES]
    param = ".".join(known)
    if first["type"] == "extra_forbidden" and len(path) == 1:
        name = repr(path[0]) if path[0].isidentifier() else "a field"
        raise RequestError(
            f"{name} is not a field of this request.{suggest(path[0], kind.model_fields)}",
            param=param or None,
            code="unknown_field",
        )
    what = "not a known field" if first["type"] == "extra_forbidden" else first["msg"]
    raise RequestError(f"{param or 'the body'}: {what}.", param=param or None)
