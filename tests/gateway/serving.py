"""Runs an app on a loopback port in a thread, and a whole gateway in front of a fake upstream."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from attending.gateway import app as gateway_app
from attending.gateway.house import House
from attending.gateway.keys import Keys
from attending.gateway.upstream import Upstream
from tests.gateway import fake
from tests.running import running


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
