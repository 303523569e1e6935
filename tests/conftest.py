"""Every test: a home of its own, no network but loopback, reproducible examples in CI."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from attending import sources
from attending.engine.native import compiler
from attending.mesh import SHORT_SPIN

with contextlib.suppress(compiler.NotCompiled, OSError):  # once, and not in every test's own cache
    compiler.compile_all(compiler.SOURCE.parent)

os.environ.update(SHORT_SPIN | dict(os.environ))

settings.register_profile("ci", derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")

USER_CACHE = sources.cache_dir()
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's home or cache."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("ATTENDING_CACHE", str(home / "cache"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


@pytest.fixture(autouse=True)
def unlogged(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `logs.setup` does to the package's logger in one test ends with it."""
    package = logging.getLogger("attending")
    for name, value in (("propagate", True), ("level", logging.NOTSET), ("handlers", [])):
        monkeypatch.setattr(package, name, value)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection to anything but this machine is an error."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        is_local = isinstance(address, str) or address[0] in ("127.0.0.1", "::1", "localhost")
        assert is_local, f"a test tried to reach {address!r}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def default_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The default model's file, where `attending pull default` has put it."""
    monkeypatch.setenv("ATTENDING_CACHE", str(USER_CACHE))
    try:
        yield sources.resolve("default").path
    except sources.SourceError:
        pytest.skip("the default model is not in the cache: run attending pull default")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads only wait for each other where models are this small and the machine is busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
