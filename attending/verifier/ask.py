"""Asking a model for one JSON object with known keys: the only way that the verifier reads replies.

An endpoint that has JSON schemas is held to ours; one that refuses the parameter is asked without
it and its text is parsed strictly. What is not exactly the object asked for raises ReplyError, so
that `Endpoint.derived` asks again, a bounded number of times. Nothing is guessed.
"""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakSet

from attending.endpoint import Derived, Endpoint, Messages, Reply
from attending.errors import EndpointError, ReplyError

FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
NO_PARAMETER = {400, 404, 415, 422, 501}  # what servers answer to a parameter that they lack
Keys = Mapping[str, type]  # in the order in which they are to be written: reasons first
T = TypeVar("T")
_without_schema: WeakSet[Endpoint] = WeakSet()


def parse_object(text: str, keys: Keys) -> dict[str, Any]:
    """The JSON object that is the whole text, a code fence or closed thoughts aside.

    Raises:
        ReplyError: It is none, lacks a key, has another or one twice, or a value of another type.
    """
    text = text.rpartition("</think>")[2].strip()
    if fenced := FENCE.fullmatch(text):
        text = fenced[1]

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) != len(dict(pairs)):
            raise ValueError("a key comes twice")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=once)
    except ValueError:
        value = None
    if not isinstance(value, dict) or value.keys() != keys.keys():
        raise ReplyError(f"the reply is no JSON object of exactly {', '.join(keys)}.")
    if wrong := [key for key, kind in keys.items() if type(value[key]) is not kind]:
        raise ReplyError(f"the reply's {wrong[0]} is no {keys[wrong[0]].__name__}.")
    return value


async def ask_object(
    endpoint: Endpoint,
    messages: Messages,
    keys: Keys,
    keep: Callable[[dict[str, Any]], Any],
    *,
    kind: str,
    **sampling: Any,
) -> tuple[Derived, dict[str, Any] | None]:
    """What `keep` makes of the object, from the cache or asked for; and the object if it was asked.

    Only what `keep` returns is cached, under `kind`, so it must hold no patient's text.

    Raises:
        EndpointError, ReplyError: As `Endpoint.derived`; the last try was malformed.
    """
    objects: list[dict[str, Any]] = []

    def derive(reply: Reply) -> Any:
        objects.append(parse_object(reply.text, keys))
        return keep(objects[-1])

    async def ask(**more: Any) -> tuple[Derived, dict[str, Any] | None]:
        found = await endpoint.derived(messages, derive, kind=kind, **sampling, **more)
        return found, None if found.cached else objects[-1]

    if endpoint in _without_schema:
        return await ask()
    try:
        return await ask(response_format=_schema(kind, keys))
    except EndpointError as error:
        if error.status not in NO_PARAMETER:
            raise
        found = await ask()  # where it is refused for another reason, this raises as well
        _without_schema.add(endpoint)
        return found


async def together(asking: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order; where one fails, the others are cancelled before it raises."""
    tasks = [asyncio.create_task(one) for one in asking]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _schema(name: str, keys: Keys) -> dict[str, Any]:
    names = {str: "string", bool: "boolean", int: "integer", list: "array"}
    schema = {
        "type": "object",
        "properties": {key: {"type": names[kind]} for key, kind in keys.items()},
        "required": list(keys),
        "additionalProperties": False,
    }
    of = {"name": re.sub(r"\W+", "_", name), "strict": True, "schema": schema}
    return {"type": "json_schema", "json_schema": of}
