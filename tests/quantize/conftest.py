"""One thread: small models are faster so, and products may be cut otherwise on a busy machine."""

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def alone(one_thread: None) -> None:
    """Every test here."""
