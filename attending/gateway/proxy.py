"""OpenAI's routes: a request is checked here, passed on as it came, and followed to its end."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress

import httpx
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from attending.engine.api import Asked, ChatRequest, CompletionRequest, RequestError, parse
from attending.engine.wire import ClientGone, unless_gone
from attending.gateway.house import House, refusal
from attending.gateway.metrics import Meter
from attending.gateway.upstream import SILENCE_SECONDS, json_object

NOT_PASSED_ON = ("user", "metadata", "safety_identifier", "prompt_cache_key")
EVENT_BYTES = 16_000_000
DONE = b"[DONE]"


class Proxy:
    """The handlers of `/v1/...`."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        self._house.status.check()
        cards = await unless_gone(request, self._house.upstream.cards())
        return JSONResponse({"object": "list", "data": [card.model_dump() for card in cards]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}."""
        self._house.status.check()
        card = self._house.upstream.card(request.path_params["id"])
        return JSONResponse((await unless_gone(request, card)).model_dump())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, ChatRequest, "/chat/completions")

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, CompletionRequest, "/completions")

    async def _answer(self, request: Request, kind: type[Asked], path: str) -> Response:
        upstream, meter = self._house.upstream, Meter(self._house.metrics)
        self._house.status.check()
        asked = parse(kind, body := await json_body(request))
        is_stream = bool(asked.stream)
        try:
            await unless_gone(request, upstream.card(asked.model))
            work = upstream.ask(path, self._passed_on(asked, body), is_stream=is_stream)
            response = await unless_gone(request, work)
        except ClientGone:
            self._house.metrics.cancelled.inc()
            raise
        if is_stream:
            return _Stream(response, self._events(response, asked, meter), self._house, meter)
        try:
            whole = json_object(response.content)
            if not isinstance(whole.get("choices"), list):
                raise ValueError("no answer")
        except ValueError:
            raise upstream.failure("its answer cannot be read") from None
        meter.see(whole)
        return Response(response.content, media_type="application/json")

    def _passed_on(self, asked: Asked, body: bytes) -> bytes:
        """The body as it came, but for what must not leave and for the counts of a stream."""
        dropped = () if self._house.upstream.is_engine else NOT_PASSED_ON
        lacks_usage = asked.stream and not _shows_usage(asked)
        if not lacks_usage and not asked.model_fields_set.intersection(dropped):
            return body
        values = {k: v for k, v in json.loads(body).items() if k not in dropped}
        if lacks_usage:
            values["stream_options"] = {"include_usage": True}
        return json.dumps(values, ensure_ascii=False).encode()

    async def _events(
        self, response: httpx.Response, asked: Asked, meter: Meter
    ) -> AsyncGenerator[bytes, None]:
        upstream, shows_usage = self._house.upstream, _shows_usage(asked)
        try:
            async for data in _data(response.aiter_bytes()):
                if data == DONE:
                    meter.has_ended = True
                    yield _event(DONE)
                    return
                event = json_object(data)
                if problem := event.get("error"):
                    said = problem.get("message") if isinstance(problem, dict) else None
                    raise upstream.failure(said if isinstance(said, str) else "it gave no reason")
                meter.see(event)
                if shows_usage or event.get("choices") or not event.get("usage"):
                    yield _event(data)
            failure = upstream.failure("its answer broke off")
        except httpx.HTTPError as error:
            failure = upstream.broken(error)
        except RequestError as error:
            failure = error
        except ValueError:
            failure = upstream.failure("its answer cannot be read")
        meter.has_ended = True
        yield _event(json.dumps(failure.body).encode())


class _Stream(EventSourceResponse):
    """Whatever happens, the request upstream ends with the answer."""

    def __init__(
        self, upstream: httpx.Response, events: AsyncIterator[bytes], house: House, meter: Meter
    ) -> None:
        super().__init__(events, sep="\n", send_timeout=SILENCE_SECONDS)
        self._upstream, self._house, self._meter = upstream, house, meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(SendTimeoutError):  # a client that reads nothing has gone away, too
                await super().__call__(scope, receive, send)
        finally:
            await self._upstream.aclose()
            if not self._meter.has_ended:
                self._house.metrics.cancelled.inc()


async def json_body(request: Request) -> bytes:
    """The body of a request that says it is JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise refusal(415, "the body must be JSON, with Content-Type: application/json.")
    return await request.body()


def _shows_usage(asked: Asked) -> bool:
    return asked.stream_options is not None and asked.stream_options.include_usage


def _event(data: bytes) -> bytes:
    return b"data: %b\n\n" % data


async def _data(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events; only newlines end a line, not all that Python thinks do."""
    rest, lines = b"", list[bytes]()
    async for chunk in chunks:
        *complete, rest = (rest + chunk).split(b"\n")
        if len(rest) > EVENT_BYTES:
            raise ValueError("an event without an end")
        for line in complete:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                lines.append(line[5:].strip())
            elif not line and lines:
                yield b" ".join(lines)
                lines.clear()
