"""Work is done only as long as somebody waits for it."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from attending.engine.wire import ClientGone, unless_gone


class Client:
    """Sends some messages, the last one after a while."""

    def __init__(self, *messages: str, seconds: float = 0.0) -> None:
        self.messages, self.seconds = list(messages), seconds
        self.is_watched = True

    async def receive(self) -> dict[str, Any]:
        try:
            if len(self.messages) <= 1:
                await asyncio.sleep(self.seconds)
            return {"type": self.messages.pop(0)}
        finally:
            self.is_watched = False


async def work(seconds: float, note: Callable[[str], None], fails: bool = False) -> str:
    try:
        await asyncio.sleep(seconds)
        if fails:
            raise ZeroDivisionError
        return "answer"
    except asyncio.CancelledError:
        await asyncio.sleep(0.01)  # tidying up is waited for
        note("cancelled")
        raise


def test_the_answer_comes_when_the_client_stays() -> None:
    client, notes = Client("http.disconnect", seconds=9), list[str]()
    assert asyncio.run(unless_gone(client, work(0.01, notes.append))) == "answer"
    assert not notes
    assert not client.is_watched
    with pytest.raises(ZeroDivisionError):
        asyncio.run(unless_gone(client, work(0.01, notes.append, fails=True)))


def test_the_work_has_ended_by_the_time_that_the_client_is_said_to_be_gone() -> None:
    notes = list[str]()
    client = Client("http.request", "http.disconnect", seconds=0.02)
    with pytest.raises(ClientGone):
        asyncio.run(unless_gone(client, work(9, notes.append)))
    assert notes == ["cancelled"]


def test_who_is_cancelled_cancels_the_work() -> None:
    async def outer(notes: list[str]) -> None:
        client = Client("http.disconnect", seconds=9)
        task = asyncio.create_task(unless_gone(client, work(9, notes.append)))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not client.is_watched

    notes = list[str]()
    asyncio.run(outer(notes))
    assert notes == ["cancelled"]
