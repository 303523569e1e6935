"""The one client for any OpenAI-compatible endpoint: our engine's socket, vLLM, SGLang, hosted.

Verifier, evaluation and data building ask here. No error, log line or cache entry holds a prompt,
a reply or the key. The environment has no say: no proxy, no `OPENAI_*` variable; no redirect.
"""

import asyncio
import hashlib
import json
import logging
import os
import random
import re
import sqlite3
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import httpx
import openai
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from attending import errors
from attending.config import Config
from attending.errors import CheckpointError, EndpointError, ReplyError, UsageError
from attending.mesh import SHORT_SPIN

CHAT = "/chat/completions"
RETRIED = {408, 409, 425, 429, *range(500, 600)}
REMEDIES = {  # by status
    401: "it wants a key: name the environment variable that holds it.",
    403: "the key may not do this: take another, or ask who runs it.",
    404: "is that model served there, and does the address end in its path, as /v1?",
}
OWN_HEADERS = {"accept", "accept-encoding", "connection", "content-length", "content-type", "host"}
UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}
Messages = Sequence[Mapping[str, Any]]
Prompt = Messages | str
Derive = Callable[["Reply"], Any]
Replies = AsyncGenerator["Reply", None]
log = logging.getLogger(__name__)


class EndpointOptions(Config):
    """How an endpoint is asked; nothing here changes what it is asked."""

    max_concurrency: PositiveInt = 32
    """Requests under way at once; a caller that backs off does not count."""
    timeout_seconds: PositiveFloat = 600.0
    """Longest silence of the endpoint: before a plain reply, or between pieces of a stream."""
    connect_timeout_seconds: PositiveFloat = 10.0
    """Longest time to open a connection."""
    max_tries: PositiveInt = 5
    """Tries of a request; also, times that `derived` asks for one well-formed answer."""
    backoff_base_seconds: NonNegativeFloat = 0.5
    """The wait after try n is random, below base * 2**(n-1), or as long as the server asks."""
    backoff_cap_seconds: NonNegativeFloat = 60.0
    """Longest wait before a try, also where the server asks for more."""
    api_key_variable: str | None = None
    """Environment variable that holds the API key. Default: no key is sent."""
    price_per_million: tuple[NonNegativeFloat, NonNegativeFloat] | None = None
    """Price of a million input tokens (cached ones too) and of a million output tokens."""
    cache: Path | None = None
    """SQLite file of derived values. Default: they are kept in memory."""

    def price(self, input_tokens: int, output_tokens: int) -> float | None:
        """Of so many tokens; None where no prices are given."""
        prices = self.price_per_million
        return prices and (input_tokens * prices[0] + output_tokens * prices[1]) / 1e6


@dataclass(slots=True)
class Totals:
    """What was asked so far. Cost is None without prices or once a reply lacks its token counts."""

    cost: float | None
    requests: int = 0
    tries: int = 0
    failures: int = 0
    cancelled: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0  # of all tries; concurrent ones add up


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, or the next piece of one; a stream ends with a piece that has the counts."""

    text: str = field(repr=False)
    reasoning: str = field(repr=False)
    logprobs: Any = field(repr=False)  # as the endpoint gives them
    finish_reason: str | None
    input_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    reasoning_tokens: int | None
    model: str
    tries: int
    latency_seconds: float  # since the last try began
    prompt_ids: Sequence[int] | None = field(default=None, repr=False)  # by `return_token_ids`
    ids: Sequence[int] | None = field(default=None, repr=False)  # the same of the answer


class Derived(NamedTuple):
    """A JSON value derived from a reply; one from the cache comes without it."""

    value: Any
    cached: bool
    reply: Reply | None


@asynccontextmanager
async def open(
    model: str, *, model_id: str = "", engine: Mapping[str, Any] | None = None, **how: Any
) -> AsyncIterator["Endpoint"]:
    """The endpoint at an address, of the one model served there or the one named, or of a source.

    Args:
        model: http(s)://HOST[:PORT][/v1], unix:/PATH.sock, or a model on this machine: then its
            engine runs as a child process until the block ends.
        model_id: One of several models at an address.
        engine: Of a model on this machine: what `attending.engine.server` takes.
        how: As `Endpoint` takes it.
    """
    async with AsyncExitStack() as stack:
        url = model
        if not is_address(model):
            child = EngineProcess(model, engine)
            stack.push_async_callback(child.stop)
            await child.start()
            url = child.url
        endpoint = await stack.enter_async_context(Endpoint(url, model_id, **how))
        served = [model_id] if model_id else await endpoint.models()
        if len(served) != 1:
            raise UsageError(f"{endpoint.host} serves {served}: name one of them as the model id.")
        endpoint.model = served[0]
        yield endpoint


def is_address(model: str) -> bool:
    """Whether it names an endpoint; else it is a source, whose engine runs on this machine."""
    return bool(re.match(r"\w+://|unix:", model))


class EngineProcess:
    """A local model's engine: a child process that speaks the API on a socket of our own.

    It ends with this process, however this one ends: the child reads its standard input, a pipe.
    """

    def __init__(self, model: str, options: Mapping[str, Any] | None = None) -> None:
        """`options`: the fields of `attending.engine.server.EngineOptions`."""
        self._model, self._options = model, json.dumps(dict(options or {}))
        self._folder: TemporaryDirectory[str] | None = None
        self._child: asyncio.subprocess.Process | None = None
        self.url = ""
        """Where it answers, once `start` has returned."""

    async def start(self) -> None:
        """Load the model and begin to answer; after the child has ended, once more.

        Raises:
            AttendingError: Of the class that loading it here would raise.
        """
        self._folder = self._folder or TemporaryDirectory(prefix="attending-")  # of this user only
        socket = Path(self._folder.name) / "engine.sock"
        socket.unlink(missing_ok=True)
        self._child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "attending.engine.server"),
            *(str(socket), self._model, self._options),
            env=SHORT_SPIN | dict(os.environ),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is this process' to handle
        )
        assert self._child.stdout is not None
        try:
            told = json.loads(await self._child.stdout.readline() or "{}")
        except asyncio.CancelledError:
            await self.stop()
            raise
        if not told.get("ready"):
            code = await self._child.wait()
            kind = getattr(errors, told.get("kind", ""), EndpointError)
            raise kind(told.get("error") or f"the engine ended with code {code} while it started.")
        self.url = f"unix:{socket}"

    async def wait(self) -> int:
        """The exit code, once the child has ended."""
        assert self._child is not None
        return await self._child.wait()

    async def stop(self) -> None:
        """End the child and remove its socket."""
        if self._child is not None and self._child.returncode is None:
            self._child.terminate()
            try:
                await asyncio.wait_for(self._child.wait(), 10)
            except TimeoutError:
                self._child.kill()
                await self._child.wait()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class Endpoint(AbstractAsyncContextManager["Endpoint"]):
    """One model behind one address, for one event loop; enter it with `async with`.

    Asking raises EndpointError where no try brings an answer, ReplyError where it is malformed.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        options: EndpointOptions | None = None,
        api_key: str | None = None,
        wire: Callable[[httpx.AsyncBaseTransport], httpx.AsyncBaseTransport] | None = None,
    ) -> None:
        """At http(s)://HOST[:PORT][/v1] or unix:/PATH.sock; `wire` may wrap the transport."""
        if not re.fullmatch(r"https?://([\w.-]+|\[[\da-f:]+\])(:\d+)?(/[^\s@?#]*)?|unix:/.+", url):
            raise UsageError(  # what precedes an @ may be a password
                f"{url.rpartition('@')[2]!r} is no http(s)://HOST[:PORT][/v1] or unix:/PATH.sock. "
                "A model on this machine is opened with endpoint.open."
            )
        self._options = options = options or EndpointOptions()
        socket = url.removeprefix("unix:") if url.startswith("unix:") else None
        address = httpx.URL("http://localhost" if socket else url)
        self.model = model
        self.host = f"unix:{Path(socket).name}" if socket else address.netloc.decode()
        if api_key is None and options.api_key_variable:
            api_key = os.environ.get(options.api_key_variable, "")
        if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
            name = options.api_key_variable or "api_key"
            why = "holds no ASCII key" if api_key else "is not set"
            raise UsageError(f"{name} {why}: put the key there that {self.host} wants.")
        is_near = re.fullmatch(r"localhost|127\.[\d.]+|::1", address.host)
        if api_key and address.scheme == "http" and not is_near:
            log.warning("the API key travels to %s in clear: use https", self.host)

        async def keep_own_headers(request: httpx.Request) -> None:
            # The openai package adds OPENAI_CUSTOM_HEADERS, OPENAI_ORG_ID and this machine's kind.
            own = {name: text for name, text in request.headers.items() if name in OWN_HEADERS}
            key = {"authorization": f"Bearer {api_key}"} if api_key else {}
            request.headers = httpx.Headers(own | key)

        line = httpx.AsyncHTTPTransport(uds=socket, trust_env=False, limits=httpx.Limits())
        web: Any = httpx.AsyncClient(  # Any: openai 3 takes it, but types only its fork of httpx
            transport=wire(line) if wire else line,
            trust_env=False,
            timeout=httpx.Timeout(options.timeout_seconds, connect=options.connect_timeout_seconds),
            event_hooks={"request": [keep_own_headers], "response": [self._heed]},
        )
        url = str(address.copy_with(path="/v1") if address.path == "/" else address)
        self._client = openai.AsyncOpenAI(api_key="-", base_url=url, max_retries=0, http_client=web)
        self.versions: set[str] = set()
        """The ids that replies named: one behind an alias may change while it is asked."""
        self.totals = Totals(cost=0.0 if options.price_per_million else None)
        self._cache = _open_cache(options.cache)
        self._asking: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._slots = asyncio.Semaphore(options.max_concurrency)
        self._gate = 0.0  # monotonic time before which nothing is sent

    async def __aexit__(self, *_: object) -> None:
        """Close all connections: what is under way ends in an EndpointError."""
        await self._client.close()
        self._cache.close()

    async def chat(self, messages: Messages, **sampling: Any) -> Reply:
        """Answer a conversation."""
        return [r async for r in self._ask(CHAT, False, messages=messages, **sampling)][-1]

    async def complete(self, prompt: str | Sequence[int], **sampling: Any) -> Reply:
        """Continue a text or token ids; `echo` and `logprobs` score the prompt itself."""
        return [r async for r in self._ask("/completions", False, prompt=prompt, **sampling)][-1]

    def stream(self, messages: Messages, **sampling: Any) -> Replies:
        """Answer piece by piece; nothing is tried again after the first. `aclose` cancels it."""
        counts = {"include_usage": True}
        return self._ask(CHAT, True, messages=messages, stream_options=counts, **sampling)

    async def cards(self) -> list[dict[str, Any]]:
        """What is told about each model served; its `id` at least."""
        served: Any = self._ask("/models", None)
        return [card async for cards in served for card in cards]

    async def models(self) -> list[str]:
        """The ids of the models served."""
        return [card["id"] for card in await self.cards()]

    async def derived(
        self, prompt: Prompt, derive: Derive, *, kind: str = "", sample: int = 0, **sampling: Any
    ) -> Derived:
        """The JSON value of `derive(reply)`, asked for once; again where it raises ReplyError.

        Kept by a hash of prompt, sampling, `kind` (name of what `derive` makes) and `sample`.
        """
        asked = json.dumps([self.model, prompt, sampling, kind, sample], sort_keys=True)
        key = hashlib.sha256(asked.encode()).hexdigest()
        ask: Any = self.complete if isinstance(prompt, str) else self.chat
        async with self._asking.setdefault(key, asyncio.Lock()):
            find = "SELECT value FROM derived WHERE key = ?"
            row = None if self._client.is_closed() else self._cache.execute(find, [key]).fetchone()
            if row:
                return Derived(json.loads(row[0]), True, None)
            for tries in range(1, self._options.max_tries + 1):
                try:
                    reply = await ask(prompt, **sampling)
                    text = json.dumps(derive(reply), allow_nan=False)
                    break
                except ReplyError:
                    if tries == self._options.max_tries:
                        raise
            try:
                self._cache.execute("INSERT OR IGNORE INTO derived VALUES (?, ?)", [key, text])
            except sqlite3.Error as error:
                where = self._options.cache.name if self._options.cache else "memory"
                raise CheckpointError(
                    f"the cache {where} cannot be written ({error}): make room for it."
                ) from None
        return Derived(json.loads(text), False, reply)

    async def _ask(self, path: str, stream: bool | None, /, **own: Any) -> Replies:
        """Try until something comes, then never again; `stream` None is a GET, of "/models"."""
        options, totals, where = (
            self._options,
            self.totals,
            f"{self.model or 'the endpoint'} at {self.host}",
        )
        body = dict(**own, model=self.model, stream=stream)  # a second `stream` is a TypeError
        json.dumps(body, allow_nan=False)  # what is no JSON raises here, as the caller's fault
        totals.requests += 1
        try:
            for tries in range(1, options.max_tries + 1):
                item: Any = None
                status: int | None = None
                async with self._slots:
                    while (wait := self._gate - time.monotonic()) > 0:
                        await asyncio.sleep(wait)  # in a slot: while the gate is shut, nobody asks
                    if self._client.is_closed():
                        kind = "use after its `async with`"
                        break
                    try:
                        async with aclosing(self._try(path, body, tries)) as items:
                            async for item in items:
                                yield item
                        return
                    except openai.APIStatusError as refusal:
                        status = refusal.status_code
                        kind, again = f"status {status}", status in RETRIED
                    except (openai.APIError, httpx.HTTPError) as fault:
                        kind = type(fault.__cause__ or fault).__name__
                        again = type(fault) is not openai.APIError  # an error event in a stream
                if item or not again or tries == options.max_tries:
                    break
                most = options.backoff_base_seconds * 2 ** (tries - 1)
                await asyncio.sleep(random.uniform(0, min(most, options.backoff_cap_seconds)))
            totals.failures += 1
            what = f"{where} failed with {kind} in try {tries} of {options.max_tries}"
            remedy = REMEDIES.get(status or 0, "check the address, the server's limits, its log.")
            error = EndpointError(f"{what}: {remedy}")
            error.status = status
            raise error
        except (asyncio.CancelledError, GeneratorExit):
            totals.cancelled += 1
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            totals.failures += 1
            what = f"{where} gave an answer that is not of the OpenAI form ({type(error).__name__})"
            raise ReplyError(f"{what}: check that the address ends in its path, as /v1.") from None

    async def _try(self, path: str, body: dict[str, Any], tries: int) -> AsyncGenerator[Any, None]:
        client, totals, start, finish = self._client, self.totals, time.monotonic(), None
        totals.tries += 1
        try:
            if body["stream"] is None:
                served: Any = await client.get(path, cast_to=object)
                yield [dict(card, id=card["id"]) for card in served["data"]]
                return
            if not body["stream"]:
                reply = _read(await client.post(path, body=body, cast_to=object), tries, start)
                yield reply
            else:
                async with await client.post(
                    path, body=body, cast_to=object, stream=True, stream_cls=openai.AsyncStream[Any]
                ) as values:
                    async for value in values:
                        [choice] = value["choices"] = value["choices"] or [{"delta": {}}]
                        choice["finish_reason"] = finish = choice.get("finish_reason") or finish
                        reply = _read(value, tries, start)
                        yield reply
                if finish is None:
                    raise httpx.RemoteProtocolError("the stream ended early")
            self.versions.add(reply.model)
            totals.input_tokens += reply.input_tokens or 0
            totals.output_tokens += reply.output_tokens or 0
            totals.cached_tokens += reply.cached_tokens or 0
            if reply.input_tokens is None or reply.output_tokens is None:
                totals.cost = None
            elif totals.cost is not None:
                spent = self._options.price(reply.input_tokens, reply.output_tokens)
                totals.cost += spent or 0.0
        finally:
            totals.seconds += time.monotonic() - start

    async def _heed(self, response: httpx.Response) -> None:
        """Hold every caller back while a limit is used up, or for as long as the server asks."""
        named = response.headers
        asked = [named.get("retry-after-ms", "") + "ms", named.get("retry-after", "")]
        for name, left in named.items():
            if name.startswith("x-ratelimit-remaining") and left == "0":
                asked.append(named.get(name.replace("remaining", "reset"), ""))
        wait = min(max(map(parse_seconds, asked)), self._options.backoff_cap_seconds)
        self._gate = max(self._gate, time.monotonic() + wait)


def _open_cache(path: Path | None) -> sqlite3.Connection:
    """Of several that open a new file at once SQLite lets one prepare it: the others try again."""
    if path:
        path.touch(mode=0o600)
    cache = sqlite3.connect(path or ":memory:", timeout=60, isolation_level=None)
    for left in reversed(range(100)):
        try:
            cache.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL")
            cache.execute("CREATE TABLE IF NOT EXISTS derived (key TEXT PRIMARY KEY, value TEXT)")
            break
        except sqlite3.DatabaseError as error:
            if not left or not isinstance(error, sqlite3.OperationalError):
                raise UsageError(f"{path and path.name} cannot be a cache ({error}).") from None
            time.sleep(0.05)
    return cache


def parse_seconds(text: str) -> float:
    """The seconds in `1.5`, `1s`, `6m0s` or `250ms`, or left until an HTTP date; else 0."""
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|[dhms]?)", text)
    if parts and "".join(map("".join, parts)) == text:
        return sum(float(number) * UNITS[unit] for number, unit in parts)
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except (OverflowError, ValueError):
        return 0.0


def _read(value: Any, tries: int, start: float) -> Reply:
    [choice] = value["choices"]
    said = choice.get("delta", choice.get("message"))
    said = {"content": choice["text"]} if said is None else said
    usage = value.get("usage") or {}
    return Reply(
        text="" + (said.get("content") or ""),
        reasoning="" + (said.get("reasoning_content") or said.get("reasoning") or ""),
        logprobs=choice.get("logprobs"),
        finish_reason=choice.get("finish_reason"),
        input_tokens=usage.get("prompt_tokens"),
        output_tokens=usage.get("completion_tokens"),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        reasoning_tokens=(usage.get("completion_tokens_details") or {}).get("reasoning_tokens"),
        model=value.get("model", ""),
        tries=tries,
        latency_seconds=time.monotonic() - start,
        prompt_ids=choice.get("prompt_token_ids", value.get("prompt_token_ids")),
        ids=choice.get("token_ids"),
    )
