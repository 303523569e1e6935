"""What produced a number: the model, its weights, and what they are computed in."""

from typing import Any

from attending import sources
from attending.artifact import digest, without_folders
from attending.endpoint import Endpoint, is_address
from attending.errors import EndpointError, ReplyError

FIELDS = ("weights", "activations", "kv", "draft")
NOT_TOLD = "not told"


def weights_sha256(source: str) -> str:
    """Of a model on this machine: its file's, or of its folder's files."""
    found = sources.resolve(source)
    return found.sha256 or digest(found.path)


async def path_of(source: str, endpoint: Endpoint) -> dict[str, str]:
    """The path of its answers, as far as the endpoint tells: our engine does, others do not."""
    try:
        cards: list[dict[str, Any]] = await endpoint.cards()
    except (EndpointError, ReplyError):
        cards = []  # not every endpoint lists its models
    card = next((one for one in cards if one["id"] == endpoint.model), {})
    told: Any = card.get("path")
    known = told if isinstance(told, dict) else {}
    path = {name: str(known.get(name) or NOT_TOLD) for name in FIELDS}
    where = endpoint.host if is_address(source) else without_folders(source)
    sha256 = {} if is_address(source) else {"sha256": weights_sha256(source)}
    length = card.get("max_model_len")
    context = {"context": str(length)} if isinstance(length, int) and length else {}
    return {"source": where, "model": endpoint.model, **path, **context, **sha256}
