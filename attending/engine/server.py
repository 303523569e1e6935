"""The engine as a child process: one model, OpenAI's API, a Unix socket, nothing else.

`python -m attending.engine.server SOCKET MODEL` is started by `endpoint.EngineProcess`. It writes
one line of JSON to standard output when it can answer or why it cannot, and ends when standard
input does, so that no engine outlives the process that wanted it.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable
from operator import mul
from typing import Annotated, Any, cast

import uvicorn
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    generate_latest,
)
from pydantic import Field, NonNegativeInt, PositiveInt
from sse_starlette import EventSourceResponse, JSONServerSentEvent, ServerSentEvent
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from attending import logs, mesh
from attending.engine.api import ChatRequest, CompletionRequest, ModelCard, RequestError, parse
from attending.engine.jobs import Job, Jobs
from attending.engine.loading import ComputeOptions
from attending.engine.local import Model, load
from attending.engine.pages import pages_for
from attending.engine.replying import Replying
from attending.engine.scheduler import Output
from attending.engine.speculate import Speculation
from attending.engine.wire import GONE, ClientGone, error_response, unless_gone
from attending.engine.worker import Ticket, Worker
from attending.errors import AttendingError, ContextError, TokenizerError, UsageError
from attending.model.architecture import PAGE_TOKENS

log = logging.getLogger(__name__)


class EngineOptions(ComputeOptions):
    """How a server computes, and how much it may take on."""

    context: Annotated[int, Field(ge=64)] | None = None
    """Most tokens of prompt and answer; None is the model's own limit."""
    cache_tokens: Annotated[int, Field(ge=64)] | None = None
    """Room for keys and values of all answers and shared beginnings; None sizes it by memory."""
    max_running: PositiveInt = 32
    """Answers written at the same time."""
    max_waiting: NonNegativeInt = 128
    """Requests that may wait behind them; more are told to come again."""


class Service:
    """One model's routes."""

    def __init__(self, model: Model, options: EngineOptions) -> None:
        """`model`: loaded, with its cache reserved."""
        self._model, self._options = model, options
        max_open = options.max_running + options.max_waiting
        self._jobs = Jobs(model, max_answers=max_open)
        self._created = int(time.time())
        self.worker = Worker(model.scheduler, max_open=max_open)
        """To be run by the thread that loaded the model."""

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._complete, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/metrics", self._metrics),
        ]
        handlers: dict[Any, Any] = {
            RequestError: _refuse,
            AttendingError: _refuse,
            ClientGone: lambda *_: Response(status_code=GONE),
        }
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.post = asyncio.get_running_loop().call_soon_threadsafe
        try:
            yield
        finally:
            self.worker.close()

    async def _chat(self, request: HttpRequest) -> Response:
        asked = parse(ChatRequest, await request.body())
        return await self._answer(request, self._jobs.chat, asked)

    async def _complete(self, request: HttpRequest) -> Response:
        asked = parse(CompletionRequest, await request.body())
        return await self._answer(request, self._jobs.complete, asked)

    async def _answer(
        self, request: HttpRequest, make: Callable[[Any], Job], asked: Any
    ) -> Response:
        if asked.model != self._model.origin.name:
            raise RequestError(
                f"this server has {self._model.origin.name!r} and no other model.",
                status=404,
                param="model",
                code="model_not_found",
            )
        job = await asyncio.to_thread(make, asked)  # long texts take a while to encode
        running = _Running(job, Replying(job, self._model.tokenizer, asked.model), self.worker)
        if asked.stream:
            return _Stream(running)
        try:
            return JSONResponse(await unless_gone(request, running.whole()))
        finally:
            running.cancel()

    async def _models(self, request: HttpRequest) -> Response:
        origin = self._model.origin
        card = ModelCard(
            id=origin.name,
            created=self._created,
            owned_by="attending",
            max_model_len=self._model.scheduler.context,
            source=origin.uri,
            licence=origin.licence,
            note=origin.note,
            reasons=self._model.tokenizer.reasons,
            path=self._model.path,
        )
        return JSONResponse({"object": "list", "data": [card.model_dump()]})

    async def _metrics(self, request: HttpRequest) -> Response:
        """The scheduler's numbers in Prometheus' text form."""
        scheduler = self._model.scheduler
        registry = CollectorRegistry()
        for name, value in dataclasses.asdict(scheduler.counters).items():
            Counter(f"attending_engine_{name}", name.replace("_", " "), registry=registry).inc(
                value
            )
        gauges = {
            "running": scheduler.num_running,
            "waiting": scheduler.num_waiting,
            "pages": scheduler.pages.num_pages,
            "pages_available": scheduler.pages.num_available,
        }
        for name, value in gauges.items():
            Gauge(f"attending_engine_{name}", name.replace("_", " "), registry=registry).set(value)
        if scheduler.speculation:
            _tell_speculation(scheduler.speculation, self._options.max_running, registry)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def _tell_speculation(told: Speculation, most: int, registry: CollectorRegistry) -> None:
    """How far the draft foresees, and up to how many answers at once it pays."""
    name = "attending_engine_draft"
    gauges = {
        "acceptance_length": (
            "tokens of a round, the model's own included",
            told.acceptance_length,
        ),
        "depth": ("tokens proposed at once at last; 0 leaves the draft alone", told.latest),
        "break_even_batch": ("answers at once up to which drafting pays", told.break_even(most)),
    }
    for key, (text, value) in gauges.items():
        Gauge(f"{name}_{key}", text, registry=registry).set(value)
    Counter(f"{name}_rounds", "rounds with something proposed", registry=registry).inc(told.rounds)
    text = "share accepted, where all before it were"
    by_position = Gauge(f"{name}_acceptance", text, ["position"], registry=registry)
    for position, share in enumerate(told.acceptance, start=1):
        by_position.labels(str(position)).set(share)


class _Running:
    """A job in the worker's hands."""

    def __init__(self, job: Job, replying: Replying, worker: Worker) -> None:
        self._replying, self._worker = replying, worker
        self._queue: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()
        receivers = [
            lambda output, index=index: self._queue.put_nowait((index, output))
            for index in range(len(job.requests))
        ]
        self._tickets: list[Ticket] = worker.submit(job.requests, receivers)

    def cancel(self) -> None:
        """Stop what is still being written."""
        for ticket in self._tickets:
            self._worker.cancel(ticket)

    async def whole(self) -> dict[str, Any]:
        async for _ in self._outputs():
            pass
        return await asyncio.to_thread(self._replying.whole)

    async def events(self) -> AsyncIterator[ServerSentEvent]:
        try:
            async for index in self._outputs():
                for event in self._replying.events(index):
                    yield JSONServerSentEvent(event)
            last = self._replying.last_event()
            if last is not None:
                yield JSONServerSentEvent(last)
            yield ServerSentEvent("[DONE]")
        except AttendingError as error:
            yield JSONServerSentEvent(_as_request_error(error).body)

    async def _outputs(self) -> AsyncIterator[int]:
        """Which answer has something new, until all have ended."""
        while not self._replying.is_over:
            index, output = await self._queue.get()
            if self._replying.has_ended(index):
                continue  # written after a stop text, before the worker heard of it
            if output.error:
                raise output.error
            if self._replying.take(index, output):
                self._worker.cancel(self._tickets[index])
            yield index


class _Stream(EventSourceResponse):
    """Cancels its job however it ends, also where it never began."""

    def __init__(self, running: _Running) -> None:
        super().__init__(running.events(), ping=15)
        self._running = running

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()


def _as_request_error(error: AttendingError) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, (ContextError, TokenizerError, UsageError)):
        return RequestError(str(error), param="messages")
    return RequestError(str(error), status=500)


async def _refuse(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, AttendingError)
    return error_response(_as_request_error(error))


def prepare(source: str, options: EngineOptions) -> Model:
    """A model with room for its answers."""
    model = load(source, **options.model_dump(include=set(ComputeOptions.model_fields)))
    if options.context:
        model.limit_context(options.context)
    cache_tokens = options.cache_tokens or _fitting_tokens(model, options)
    model.make_room(cache_tokens, options.max_running)
    if cache_tokens < (options.context or model.arch.context):
        log.warning("the cache holds %d tokens: no conversation can be longer", cache_tokens)
    return model


def _fitting_tokens(model: Model, options: EngineOptions) -> int:
    """Every answer whole, or what a quarter of the memory beside the weights holds."""
    if options.device.startswith("cuda"):
        import torch

        device = model.decoder.model.norm.weight.device  # loaded: what it takes is gone
        room = torch.cuda.mem_get_info(device)[0] * 4 // 5
    else:  # pages cost memory only once they are written
        memory = cast(int, mesh.hardware()["memory_bytes"])
        room = (memory - model.weight_bytes) // 4
    sizes = model.page_bytes

    def size(pages: int) -> int:
        counts = pages_for(model.arch, pages * PAGE_TOKENS, options.max_running)
        return sum(map(mul, counts, sizes))

    most = options.max_running * (options.context or model.arch.context)
    pages = bisect_right(range(1, -(-most // PAGE_TOKENS) + 1), room, key=size)
    return max(PAGE_TOKENS, min(pages * PAGE_TOKENS, most))


async def _serve(socket: str, service: Service) -> None:
    """Answer until standard input ends."""
    config = uvicorn.Config(
        service.app(), uds=socket, log_config=None, access_log=False, lifespan="on", ws="none"
    )
    server = uvicorn.Server(config)
    served = asyncio.create_task(server.serve())
    while not (server.started or served.done()):
        await asyncio.sleep(0.01)
    _tell({"ready": server.started})
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    # A daemon: unlike a pool's thread, nothing waits for it when the process ends otherwise.
    threading.Thread(target=_read_to_end, args=(loop, ended), daemon=True).start()
    await ended.wait()
    server.should_exit = server.force_exit = True
    await served


def _read_to_end(loop: asyncio.AbstractEventLoop, ended: asyncio.Event) -> None:
    sys.stdin.buffer.read()
    loop.call_soon_threadsafe(ended.set)


def _tell(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main(socket: str, source: str, options: str) -> int:
    """Load, serve, end with standard input; the exit code."""
    logs.setup()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which drains first
    try:
        chosen = EngineOptions.build(json.loads(options), where="the engine's options")
        service = Service(prepare(source, chosen), chosen)
    except AttendingError as error:
        _tell({"error": str(error), "kind": type(error).__name__})
        return error.exit_code
    threading.Thread(target=lambda: asyncio.run(_serve(socket, service)), daemon=True).start()
    service.worker.run()
    return 0


if __name__ == "__main__":
    code = 1
    try:
        code = main(*sys.argv[1:])
    except BaseException as error:
        # Where, and of what kind; what it says might hold a patient's words.
        log.critical("the engine failed: %s", type(error).__name__)
        traceback.print_tb(error.__traceback__)
        raise
    finally:
        sys.stdout.flush()
        os._exit(code)  # not waiting for the threads
