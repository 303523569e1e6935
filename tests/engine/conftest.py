"""A folder for small models, and one of them behind the engine's API."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from attending.engine.server import Service
from tests.engine.folders import write_model
from tests.engine.served import serve


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[str, Service]]:
    with serve(write_model(folder / "tiny")) as both:
        yield both
