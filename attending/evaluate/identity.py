"""What produced a number: the model, its weights, and what they are computed in."""

import re
from typing import Any

from attending import sources
from attending.artifact import digest, without_folders
from attending.endpoint import Endpoint
from attending.errors import EndpointError, ReplyError

FIELDS = ("weights", "activations", "kv", "draft")
NOT_TOLD = "not told"


def is_local(source: str) -> bool:
    """Whether its engine runs on this machine, as `endpoint.open` decides."""
    return not re.match(r"\w+://|unix:", source)


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
    where = without_folders(source) if is_local(source) else endpoint.host
    sha256 = {"sha256": weights_sha256(source)} if is_local(source) else {}
    length = card.get("max_model_len")
    context = {"context": str(length)} if isinstance(length, int) and length else {}
    return {"source": where, "model": endpoint.model, **path, **context, **sha256}
