"""Servers for sources, and nothing of the user's own settings of pip and the Hub."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.hallway.shelf import Shelf, start


@pytest.fixture
def open_shelf() -> Iterator[Callable[[], Shelf]]:
    with ExitStack() as stops:

        def opened() -> Shelf:
            shelf = Shelf()
            stops.callback(start(shelf))
            return shelf

        yield opened


@pytest.fixture(autouse=True)
def no_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
