"""One thread: small models are faster so, and products may be cut otherwise on a busy machine."""

from pathlib import Path

import pytest

from tests.engine.folders import write_model
from tests.quantize.making import MODEL
from tests.quantize.text import write_text


@pytest.fixture(autouse=True)
def alone(one_thread: None) -> None:
    """Every test here."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random one, its weights never rounded."""
    return write_model(tmp_path_factory.mktemp("model") / "m", **MODEL)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text to calibrate by."""
    return write_text(tmp_path_factory.mktemp("text") / "t")
