"""Runs an app on a loopback port in a thread, and a whole gateway in front of a fake upstream."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from attending.gateway import app as gateway_app
from attending.gateway.house import House
from attending.gateway.keys import Keys
from attending.gateway.upstream import Upstream
from tests.gateway import fake


@dataclass
class Gateway:
    """A gateway that is being served."""

    url: str
    key: str
    house: House
    fake: fake.Fake

    @property
    def sign_in_url(self) -> str:
        """A new address that signs in once."""
        return f"{self.url}/login?token={self.house.tokens.issue()}"

    @property
    def headers(self) -> dict[str, str]:
        """What a client with a key sends."""
        return {"authorization": f"Bearer {self.key}"}


@contextmanager
def running(app: ASGIApp, **options: Any) -> Iterator[str]:
    """Serve an app until the end of the block; yields its base URL, without a slash at the end."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_config=None,
        access_log=False,
        lifespan="on",
        ws="none",
        timeout_graceful_shutdown=1,
        **options,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        assert server.started, "the app did not start"
        if "uds" in options:
            yield f"unix:{options['uds']}"
        else:
            port = server.servers[0].sockets[0].getsockname()[1]
            yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextmanager
def gateway(
    upstream: fake.Fake | None = None,
    *,
    is_engine: bool = True,
    upstream_key: str | None = None,
    address: str | None = None,
    **options: Any,
) -> Iterator[Gateway]:
    """Serve a gateway with one key before a fake, or what is at `address`; `options`: `House`'s."""
    upstream = upstream or fake.app()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        keys = Keys(folder)
        key = keys.add("test")
        address = address or f"{stack.enter_context(running(upstream))}/v1"
        line = Upstream(address, is_engine=is_engine, key=upstream_key)
        house = House(keys=keys, upstream=line, **options)
        house.status.phase = "ready"
        url = stack.enter_context(running(gateway_app.build(house)))
        yield Gateway(url, key, house, upstream)


def until(is_so: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something that happens in another thread."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
