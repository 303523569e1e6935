"""`attending serve`: the port, the engine beside it, and an orderly end."""

import asyncio
import contextlib
import logging
import os
import re
import resource
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import uvicorn
from pydantic import Field, NonNegativeFloat, PositiveInt
from uvicorn.protocols.http.h11_impl import H11Protocol

from attending.config import Config
from attending.engine.api import ModelCard, RequestError
from attending.errors import AttendingError, EndpointError, UsageError
from attending.gateway.app import build
from attending.gateway.door import LOOPBACK, host_name
from attending.gateway.house import House
from attending.gateway.keys import Keys
from attending.gateway.upstream import Upstream

RESTART_SECONDS, BREAK_OFF_SECONDS = 600.0, 2.0
HEADER_BYTES, HEAD_SECONDS = 65_536, 15.0
log = logging.getLogger("attending.gateway")


class ServeOptions(Config):
    """What `attending serve` may be told."""

    model: str = "default"
    """The source that the engine serves; not used with `upstream`."""
    upstream: str | None = None
    """An OpenAI-compatible server, http(s)://HOST:PORT/v1, in place of the engine."""
    upstream_key_variable: str | None = None
    """Environment variable that holds the upstream's key."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""
    allow_hosts: tuple[str, ...] = ()
    """Names under which the server is reached, beside loopback and `host`."""
    drain_seconds: NonNegativeFloat = 30.0
    """Longest wait for requests under way when the server is told to end."""
    max_body_bytes: PositiveInt = 10_000_000
    """Longest body of a request."""
    tls_certificate: Path | None = None
    """PEM file; with `tls_key`, the server speaks https."""
    tls_key: Path | None = None
    """PEM file."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """The engine's options, as its own record of them names them."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a person must know once the server is ready; `new_key` is shown this once."""

    url: str
    sign_in_url: str
    new_key: str | None
    model: str
    note: str
    warnings: tuple[str, ...]


class Engine(Protocol):
    """A child process that computes."""

    url: str

    async def start(self) -> None:
        """Return when it answers at `url`; AttendingError if it cannot."""

    async def wait(self) -> int:
        """Its exit code, once it has ended."""

    async def stop(self) -> None:
        """End it, if it still runs."""


StartEngine = Callable[[str, Mapping[str, Any]], Engine]
Announce = Callable[[Announcement], None]


async def serve(options: ServeOptions, announce: Announce, engine: StartEngine) -> None:
    """Serve until a signal; `announce` is called once, when requests can be answered.

    Raises:
        UsageError: The port is taken, or an option or `keys.json` is wrong.
        AttendingError: The engine cannot start, or ended twice within ten minutes.
    """
    if options.upstream and not re.fullmatch(r"https?://[^\s@?#]+", options.upstream):
        raise UsageError("the upstream is no address of the form http(s)://HOST:PORT/v1.")
    listener = _listen(options.host, options.port)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is a file
    with contextlib.closing(listener):
        keys = Keys()
        upstream = Upstream(is_engine=options.upstream is None, key=_upstream_key(options))
        hosts = (options.host, *options.allow_hosts)
        house = House(keys, upstream, hosts, options.max_body_bytes)
        server = _Server(_web(options, house), house, options.drain_seconds)

        def ready(card: ModelCard) -> None:
            new_key = None if list(keys) else keys.add("first")  # never made without being shown
            url = _url(options, listener.getsockname()[1])
            sign_in = f"{url}/login?token={house.tokens.issue()}"
            told = (new_key, card.id, card.note, _warnings(options))
            announce(Announcement(url, sign_in, *told))

        web = asyncio.create_task(server.serve(sockets=[listener]))
        work = asyncio.create_task(_compute(options, house, engine, ready))
        try:
            await asyncio.wait((web, work), return_when=asyncio.FIRST_COMPLETED)
        finally:
            server.should_exit = True
            work.cancel()
            ends = await asyncio.gather(work, web, return_exceptions=True)
        for error in ends:
            if isinstance(error, Exception):
                raise error


class _Impatient(H11Protocol):
    """Closes a connection on which no request has begun in time: they are not endless."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(HEAD_SECONDS, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """A first signal drains while the port still answers; a second one ends at once."""

    def __init__(self, config: uvicorn.Config, house: House, drain_seconds: float) -> None:
        super().__init__(config)
        self._house, self._drain_seconds = house, drain_seconds
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        for one in signals:
            loop.add_signal_handler(one, self.end)
        try:
            yield
        finally:
            for one in signals:
                loop.remove_signal_handler(one)

    def end(self) -> None:
        """What a signal does."""
        if self._draining is not None:
            self.force_exit = self.should_exit = True
            return
        self._house.status.phase = "draining"
        self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        log.info("draining: %d requests under way", self._house.status.in_flight)
        end = time.monotonic() + self._drain_seconds
        while self._house.status.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.05)
        # What still runs is broken off here, so that it ends in an error that says so.
        self._house.upstream.is_ending = True
        await self._house.upstream.close()
        end = time.monotonic() + BREAK_OFF_SECONDS
        while self._house.status.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self.should_exit = True


async def _compute(
    options: ServeOptions, house: House, engine: StartEngine, ready: Callable[[ModelCard], None]
) -> None:
    """Keep an engine running, or look whether the upstream answers; until cancelled."""
    if options.upstream is not None:
        url = options.upstream.rstrip("/")
        await house.upstream.connect(url if url.count("/") > 2 else f"{url}/v1")
        await _open(house, ready)
        await asyncio.Event().wait()
    last = -RESTART_SECONDS
    while True:
        child = engine(options.model, options.engine)
        try:
            await child.start()
            await house.upstream.connect(child.url)
            await _open(house, ready if last < 0 else lambda _: None)
            code = await child.wait()
        finally:
            await child.stop()
        if house.status.phase == "draining":
            await asyncio.Event().wait()
        house.status.phase = "engine down"
        if time.monotonic() - last < RESTART_SECONDS:
            raise AttendingError(
                f"the engine ended with code {code}, the second time within ten minutes. "
                "Its own messages say why; attending doctor looks at this machine's memory."
            )
        last = time.monotonic()
        house.metrics.restarts.inc()
        log.warning("the engine ended with code %d; restarted", code)


async def _open(house: House, ready: Callable[[ModelCard], None]) -> None:
    try:
        cards = await house.upstream.cards()
    except RequestError as error:
        told = str(error).removesuffix(" Ask again.")
        raise EndpointError(f"{told} Check the address and the key.") from None
    if not cards:
        raise EndpointError("the upstream serves no model: load one there first.")
    if house.status.phase != "draining":
        house.status.phase = "ready"
        ready(cards[0])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise UsageError(
            f"port {port} of {host} cannot be opened ({error.strerror}); "
            "choose another with --port, or another address with --host."
        ) from None
    return listener


def _web(options: ServeOptions, house: House) -> uvicorn.Config:
    if (options.tls_certificate is None) != (options.tls_key is None):
        raise UsageError("TLS needs both a certificate and its key; one of them is missing.")
    config = uvicorn.Config(
        build(house),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        http=_Impatient,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
        ssl_certfile=options.tls_certificate,
        ssl_keyfile=options.tls_key,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"the TLS certificate or key cannot be used: {error.strerror}.") from None
    return config


def _upstream_key(options: ServeOptions) -> str | None:
    if options.upstream_key_variable is None:
        return None
    key = os.environ.get(options.upstream_key_variable, "")
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"{options.upstream_key_variable} must hold the upstream's key.")
    return key


def _url(options: ServeOptions, port: int) -> str:
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
    shown = f"[{shown}]" if ":" in shown else shown
    return f"{'https' if options.tls_certificate else 'http'}://{shown}:{port}"


def _warnings(options: ServeOptions) -> tuple[str, ...]:
    if options.tls_certificate or host_name(options.host) in LOOPBACK:
        return ()
    return (
        f"{options.host} is reached over the network without encryption: keys and conversations "
        "can be read on the way. Give --tls-certificate and --tls-key, or put a TLS proxy before.",
    )
