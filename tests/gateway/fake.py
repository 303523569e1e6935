"""A server that speaks OpenAI's API from a script and counts what happens to it."""

import asyncio
import dataclasses
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

MODEL = "attending-fake"
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 2,
    "total_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 0},
}
CARD = {
    "id": MODEL,
    "object": "model",
    "created": 1_700_000_000,
    "owned_by": "attending",
    "max_model_len": 4096,
    "source": "a test",
    "licence": "Apache-2.0",
    "note": "A script, not a model.",
    "reasons": False,
}


@dataclass(frozen=True)
class Script:
    """What is answered; `app.script` may be replaced between requests."""

    pieces: tuple[str, ...] = ("Hel", "lo.")
    reasoning: tuple[str, ...] = ()
    seconds_before: float = 0.0
    seconds_between: float = 0.0
    status: int = 200
    body: bytes | None = None  # instead of an answer, with `status`
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    breaks_after: int | None = None  # events of a stream, then the connection is cut
    raw_event: str | None = None  # an event put in after the first
    gate: threading.Event | None = None  # a stream waits for it behind its first piece
    metrics: str = "# TYPE attending_engine_steps counter\nattending_engine_steps_total 3.0\n"


class Fake(Starlette):
    """The server; `requests` are bodies, `headers` what came with them."""

    def __init__(self, script: Script, models: tuple[str, ...]) -> None:
        self.script = script
        self.models = models
        self.requests: list[dict[str, Any]] = []
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.started = self.finished = self.cancelled = 0
        super().__init__(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/v1/completions", self._text, methods=["POST"]),
                Route("/metrics", self._metrics),
            ]
        )

    async def _models(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        cards = [{**CARD, "id": name} for name in self.models]
        return JSONResponse({"object": "list", "data": cards})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.script.metrics, media_type="text/plain")

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, is_chat=True)

    async def _text(self, request: Request) -> Response:
        return await self._answer(request, is_chat=False)

    async def _answer(self, request: Request, *, is_chat: bool) -> Response:
        self.bodies.append(await request.body())
        self.headers.append(dict(request.headers))
        asked = json.loads(self.bodies[-1])
        self.requests.append(asked)
        self.started += 1
        script = self.script
        if script.body is not None:
            self.finished += 1
            return Response(script.body, script.status, script.headers, "application/json")
        if asked.get("stream"):
            events = self._events(asked, script, is_chat=is_chat)
            return StreamingResponse(events, media_type="text/event-stream")
        waiting = asyncio.ensure_future(self._seconds(script))
        while not waiting.done():
            if await request.is_disconnected():
                self.cancelled += 1
                waiting.cancel()
                break
            await asyncio.sleep(0.01)
        else:
            self.finished += 1
        return JSONResponse(self._whole(script, is_chat=is_chat), headers=script.headers)

    async def _seconds(self, script: Script) -> None:
        await asyncio.sleep(script.seconds_before + script.seconds_between * len(script.pieces))

    def _head(self, *, is_chat: bool, is_chunk: bool) -> dict[str, Any]:
        kind = "chat.completion" + ".chunk" * is_chunk if is_chat else "text_completion"
        return {"id": "r-1", "object": kind, "created": 1_700_000_000, "model": self.models[0]}

    def _whole(self, script: Script, *, is_chat: bool) -> dict[str, Any]:
        text = "".join(script.pieces)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if script.reasoning:
            message["reasoning_content"] = "".join(script.reasoning)
        words = {"message": message} if is_chat else {"text": text}
        choice = {"index": 0, **words, "finish_reason": "stop"}
        head = self._head(is_chat=is_chat, is_chunk=False)
        return {**head, "choices": [choice], "usage": USAGE}

    async def _events(
        self, asked: dict[str, Any], script: Script, *, is_chat: bool
    ) -> AsyncIterator[bytes]:
        head = self._head(is_chat=is_chat, is_chunk=True)

        def event(delta: dict[str, Any], text: str, finish: str | None) -> bytes:
            words = {"delta": delta} if is_chat else {"text": text}
            choice = {"index": 0, **words, "finish_reason": finish}
            return self._data({**head, "choices": [choice]})

        events = [event({"role": "assistant", "content": ""}, "", None)] if is_chat else []
        if script.raw_event is not None:
            events.append(f"data: {script.raw_event}\n\n".encode())
        events += [event({"reasoning_content": piece}, piece, None) for piece in script.reasoning]
        events += [event({"content": piece}, piece, None) for piece in script.pieces]
        events.append(event({}, "", "stop"))
        if (asked.get("stream_options") or {}).get("include_usage"):
            events.append(self._data({**head, "choices": [], "usage": USAGE}))
        events.append(b"data: [DONE]\n\n")
        is_whole = False
        try:
            await asyncio.sleep(script.seconds_before)
            for index, one in enumerate(events):
                if index == script.breaks_after:
                    raise ConnectionError("cut by the script")
                yield one
                while script.gate and index == 1 and not script.gate.is_set():
                    await asyncio.sleep(0.01)
                await asyncio.sleep(script.seconds_between)
            is_whole = True
        finally:
            self.finished += is_whole
            self.cancelled += not is_whole

    @staticmethod
    def _data(values: dict[str, Any]) -> bytes:
        return f"data: {json.dumps(values, ensure_ascii=False)}\n\n".encode()


def app(*, script: Script | None = None, models: tuple[str, ...] = (MODEL,)) -> Fake:
    """The server, to be run by `serving.running`."""
    return Fake(script or Script(), models)
