"""Asking a model for one JSON object of a known form: how the verifier reads every verdict.

An endpoint that has JSON schemas is held to the form's; one that refuses the parameter is asked
without it, and the text is parsed strictly in any case. What is not exactly the form raises
ReplyError and is asked for again, a bounded number of times and warmer. Nothing is guessed.
"""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from pydantic import BaseModel

from attending.endpoint import Endpoint, Messages, Reply
from attending.errors import EndpointError, ReplyError

FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
# What ends before the object; an object that quotes the tag begins with none.
THOUGHTS = re.compile(r"\A(?!\{|```).*?</think>\s*(?=\{|```)", re.DOTALL)
LONGEST = 20_000  # characters of a reply that is read
TRIES = 4  # for one well-formed reply
WARM = 0.3  # temperature of a further try, at least: at 0 it would bring the same
NO_PARAMETER = {400, 404, 415, 422, 501}  # what servers answer to a parameter that they lack
Form = TypeVar("Form", bound=BaseModel)
T = TypeVar("T")
_without_schema: WeakSet[Endpoint] = WeakSet()


class _AgainError(Exception):
    """A malformed reply; no ReplyError, for which `Endpoint.derived` would ask the same again."""


@dataclass(frozen=True, slots=True)
class Answered(Generic[Form]):
    """What was asked for."""

    form: Form | None  # None where `kept` came from the cache
    kept: Any = None


def parse(text: str, form: type[Form]) -> Form:
    """The object that is the whole text, a code fence or thoughts before it aside.

    Raises:
        ReplyError: It is none, has a key twice, or is not of the form; nothing of it is quoted.
    """
    text = THOUGHTS.sub("", text.strip()) if len(text) <= LONGEST else ""
    if fenced := FENCE.fullmatch(text):
        text = fenced[1]

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(pairs) != len(dict(pairs)):
            raise ValueError("a key comes twice")
        return dict(pairs)

    try:
        json.loads(text, object_pairs_hook=once)
        return form.model_validate_json(text)
    except (ValueError, RecursionError):  # pydantic's quotes the reply
        fields = ", ".join(form.model_fields)
        raise ReplyError(f"the reply is no JSON object of the form asked for: {fields}.") from None


async def ask(
    endpoint: Endpoint,
    messages: Messages,
    form: type[Form],
    kind: str,
    *,
    keep: Callable[[Form], Any] | None = None,
    is_whole: Callable[[Form], bool] = lambda form: True,
    schema: Mapping[str, Any] | None = None,
    read: Callable[[str], Form] | None = None,
    heed: Callable[[Reply], object] = lambda reply: None,
    **sampling: Any,
) -> Answered[Form]:
    """An object of this form, asked for again while it is malformed: warmer, with the next seed.

    Args:
        endpoint: Who is asked.
        messages: What.
        form: Its fields in the order in which they are to be written: reasons first.
        kind: Names the form, in the schema and in the cache's key.
        keep: What the endpoint's cache keeps of it; it must hold no patient's text. By default
            nothing is cached.
        is_whole: What more it must fulfil.
        schema: A narrower one than the form's.
        read: A reader of replies instead of `parse`; then no schema is sent.
        heed: Sees every reply before it is read or kept; what it raises ends the asking.
        sampling: As the endpoint takes it.

    Raises:
        EndpointError, ReplyError: No try brought an answer, or a well-formed one.
    """
    told: list[Form] = []
    faults: list[str] = []

    def derive(reply: Reply) -> Any:
        heed(reply)
        if reply.finish_reason == "length":
            raise _AgainError(f"the {kind} reply is cut: allow more max_tokens.")
        try:
            found = read(reply.text) if read else parse(reply.text, form)
        except ReplyError as error:
            raise _AgainError(str(error)) from None
        if not is_whole(found):
            raise _AgainError(f"the {kind} reply names something twice, not at all, or too much.")
        told.append(found)
        return keep(found) if keep else None

    async def attempt(**how: Any) -> Answered[Form]:
        for tries in range(TRIES):
            if tries:
                how["temperature"] = max(WARM, sampling.get("temperature", 1.0))
                how["seed"] = sampling.get("seed", 0) + tries
            try:
                if keep:
                    kept = await endpoint.derived(messages, derive, kind=kind, **how)
                    return Answered(None if kept.cached else told[-1], kept.value)
                derive(await endpoint.chat(messages, **how))
                return Answered(told[-1])
            except _AgainError as error:
                faults.append(str(error))
        raise ReplyError(faults[-1])

    if read or endpoint in _without_schema:
        return await attempt(**sampling)
    held = {
        "name": re.sub(r"\W+", "_", kind)[:64],
        "strict": True,
        "schema": schema or _schema(form),
    }
    try:
        asked = {"type": "json_schema", "json_schema": held}
        return await attempt(response_format=asked, **sampling)
    except EndpointError as error:
        if faults or error.status not in NO_PARAMETER:
            raise
        found = await attempt(**sampling)  # refused for another reason, this raises as well
        _without_schema.add(endpoint)
        return found


@cache
def _schema(form: type[BaseModel]) -> dict[str, Any]:
    return form.model_json_schema()


async def together(asking: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results in order; where one fails, the others are cancelled before it raises."""
    tasks = [asyncio.create_task(one) for one in asking]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
