"""What engine and gateway share of HTTP: a client that goes away, and an error's answer."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any, Protocol, TypeVar

from starlette.responses import JSONResponse

from attending.engine.api import RequestError

T = TypeVar("T")
GONE = 499  # what nginx logs for a client that went away; nobody is there to read it


class ClientGone(Exception):  # noqa: N818  (nothing failed)
    """The client closed the connection: nobody waits for the answer, and its work was cancelled."""


class Connected(Protocol):
    """What is needed of a request; Starlette's is one."""

    @property
    def receive(self) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
        """ASGI's messages from the client."""


async def unless_gone(request: Connected, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled when the client goes away.

    The request's body must have been read before: what is left of it would be thrown away.

    Raises:
        ClientGone: The client went away first; by then the work has ended.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            watch.result()  # a broken connection may raise instead of saying so
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(request: Connected) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def error_response(error: RequestError) -> JSONResponse:
    """An error in OpenAI's form, with the headers that belong to it."""
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    return JSONResponse(error.body, error.status, headers)
