"""Serves an ASGI application on a loopback port, in a thread."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp


@contextmanager
def running(app: ASGIApp, uds: str | None = None) -> Iterator[str]:
    """Until the end of the block; yields the base URL, or unix:PATH of the socket `uds`."""
    config = uvicorn.Config(
        app, port=0, uds=uds, log_config=None, lifespan="on", ws="none", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the app did not start"
        time.sleep(0.01)
    try:
        address = server.servers[0].sockets[0].getsockname()
        yield f"unix:{uds}" if uds else f"http://127.0.0.1:{address[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
