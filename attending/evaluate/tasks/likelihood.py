"""How likely texts are that a model did not write, by an endpoint's completions; in nats."""

from collections.abc import Mapping
from math import inf, log
from typing import Any, NamedTuple

from attending.endpoint import Endpoint, Reply
from attending.errors import ConfigError, ContextError, EndpointError, ReplyError, UsageError
from attending.evaluate.asking import answered
from attending.evaluate.recipe import TextConfig
from attending.evaluate.sample import Answer, Example, Grade
from attending.evaluate.tasks.base import Base, Row

NO_API, REFUSED = {404, 405, 501}, {400, 413, 422}
LONG = 99  # characters that any context has room for
REMEDY = (
    "ask multiple choice with --set tasks.NAME.method=generation; bits per byte cannot be had "
    "there."
)


class Scored(NamedTuple):
    """How likely a text is."""

    total: float
    num_tokens: int
    is_greedy: bool
    """Whether each of its tokens is the likeliest."""
    reply: Reply


class Text(Base[TextConfig]):
    """Bits per byte of documents' first `max_bytes`; comparable across tokenizers.

    A text's first token is given, not predicted, unless the server puts one before it: its bytes
    count, its bits do not, which favours large vocabularies a little.
    """

    metric = "bits per byte"
    is_loss = True

    def read(self, row: Row) -> Example:
        """The text, cut where a character ends."""
        whole = row.cell(self.config.text, str).encode()
        if not (text := whole[: self.config.max_bytes].decode(errors="ignore")):
            raise ConfigError(f"{row.where}: {self.config.text!r} holds no text to predict.")
        return row.example(text, bytes=len(text.encode()))

    async def ask(self, endpoint: Endpoint, example: Example, repeat: int) -> Answer:
        found = await score(endpoint, example.messages[0]["content"])
        return answered(example, repeat, found.reply, "", logprobs={"text": found.total})

    def worth(self, example: Example, answer: Answer) -> Grade:
        """Weighed by bytes, so that a mean is that of all bytes."""
        size, nats = example.data["bytes"], -(answer.logprobs or {})["text"]
        return Grade(nats / log(2) / size, f"{nats:.1f} nats, {size} bytes", weight=size)


async def following(endpoint: Endpoint, prompt: str) -> tuple[dict[str, float], Reply]:
    """The likeliest tokens after a prompt, by their text; one request."""
    reply = await _complete(endpoint, prompt, {"logprobs": 20}, {"logprobs": 1}, max_tokens=1)
    return next(iter(_column(endpoint, reply, "top_logprobs")), None) or {}, reply


def bound(likeliest: Mapping[str, float], text: str, is_token: bool) -> float:
    """The greatest log-probability that a continuation can have which is none of these.

    Its first token is its proper beginning, unless it is known to be one token, or less likely.
    """
    if len(likeliest) < 2 or not text.isascii():  # a token may be part of a character
        return inf
    starts = [v for token, v in likeliest.items() if text.startswith(token) and not is_token]
    return max(starts, default=min(likeliest.values()))


async def score(
    endpoint: Endpoint, text: str, prompt: str = "", prompt_tokens: int | None = 0
) -> Scored:
    """A text without the prompt that it begins with.

    Tokens are counted as the server counts them, or else placed by its offsets. The first of a
    text has no log-probability, unless the server puts a token before it.

    Raises:
        ContextError: The text is too long.
        UsageError: The endpoint gives no log-probabilities of a prompt.
    """
    ways = ({"max_tokens": 0}, {"max_tokens": 1})  # some servers want to write
    reply = await _complete(endpoint, text, *ways, echo=True, logprobs=1)
    values = _column(endpoint, reply, "token_logprobs")
    start, end = prompt_tokens, reply.input_tokens
    if start is None or end is None:
        offsets = _column(endpoint, reply, "text_offset")
        start, end = (sum(offset < len(part) for offset in offsets) for part in (prompt, text))
    if len(values) < end:
        raise UsageError(f"{endpoint.host} does not echo its prompt's log-probabilities: {REMEDY}")
    if start >= end:
        raise ReplyError(f"{endpoint.model} joins {text[len(prompt) :]!r} to what precedes it.")
    pairs = [*zip(values, _column(endpoint, reply, "top_logprobs"), strict=False)][start:end]
    is_greedy = all(not best or v is None or v >= max(best.values()) for v, best in pairs)
    return Scored(sum(filter(None, values[start:end])), end - start, is_greedy, reply)


async def _complete(endpoint: Endpoint, text: str, *ways: Mapping[str, Any], **how: Any) -> Reply:
    """By the first way that the server takes."""
    for way in ways:
        try:
            return await endpoint.complete(text, temperature=0.0, **how, **way)
        except EndpointError as error:
            if error.status in NO_API:
                raise UsageError(f"{endpoint.host} has no completions: {REMEDY}") from None
            if error.status not in REFUSED:
                raise
    if len(text) <= LONG:
        raise UsageError(f"{endpoint.host} gives no log-probabilities of a prompt: {REMEDY}")
    await _complete(endpoint, text[:LONG], *ways, **how)
    raise ContextError(
        f"{endpoint.host} refuses a text of {len(text):,} characters, but not its beginning: it "
        "must fit the context. Lower max_bytes, or serve a longer context."
    )


def _column(endpoint: Endpoint, reply: Reply, name: str) -> list[Any]:
    found = reply.logprobs.get(name) if isinstance(reply.logprobs, dict) else None
    if isinstance(found, list):
        return found
    raise UsageError(f"{endpoint.host} gives no {name} with its completions: {REMEDY}")
