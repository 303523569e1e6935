"""One thread, as small models are faster so; asynchronous tests run on asyncio."""

import pytest

from tests.pretrain.conftest import one_thread  # noqa: F401  (a fixture)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
