"""One thread: small models are faster so, and products may be cut otherwise on a busy machine."""

from tests.pretrain.conftest import one_thread  # noqa: F401  (a fixture)
