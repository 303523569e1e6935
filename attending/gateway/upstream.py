"""The way to whoever computes: the engine on its socket, or another server with OpenAI's API."""

import json
import time
from typing import Any

import httpx

from attending.engine.api import ModelCard, RequestError

CONNECT_SECONDS, SILENCE_SECONDS = 10.0, 600.0
FRESH_SECONDS = 5.0
FOREIGN_NOTE = "Served by another server; no more is known of this model than that server tells."


class Upstream:
    """A server; errors are RequestErrors, worded for the client."""

    def __init__(self, url: str = "", *, is_engine: bool, key: str | None = None) -> None:
        """At unix:/PATH.sock or http(s)://HOST:PORT/v1; without an address until `connect`."""
        self.is_engine, self.is_ending = is_engine, False
        self._headers = {"accept-encoding": "identity", "user-agent": "attending"}
        self._headers |= {"authorization": f"Bearer {key}"} if key else {}
        self._url, self._client = url, self._open(url)
        self._cards: dict[str, ModelCard] = {}
        self._asked = -FRESH_SECONDS

    async def connect(self, url: str) -> None:
        """Go to another address from now on."""
        self._url, self._asked = url, -FRESH_SECONDS
        await self.close()

    async def close(self) -> None:
        """Let go of every connection; the next request makes new ones."""
        old, self._client = self._client, self._open(self._url)
        await old.aclose()

    async def cards(self) -> list[ModelCard]:
        """The models served."""
        found = json_object((await self._send("GET", "/models")).content).get("data")
        try:
            cards = [self._card(entry) for entry in found]  # type: ignore[union-attr]
        except (TypeError, ValueError, KeyError):
            raise self.failure("its list of models cannot be read") from None
        self._cards, self._asked = {card.id: card for card in cards}, time.monotonic()
        return cards

    async def card(self, name: str) -> ModelCard:
        """One of them; RequestError 404 for any other name."""
        if name not in self._cards and time.monotonic() - self._asked >= FRESH_SECONDS:
            await self.cards()
        if name not in self._cards:
            served = ", ".join(self._cards) or "none"
            message = f"no such model is served here. Served: {served}."
            raise RequestError(message, status=404, param="model", code="model_not_found")
        return self._cards[name]

    async def ask(self, path: str, body: bytes, *, is_stream: bool) -> httpx.Response:
        """A good answer: read, or its headers and the beginning of a stream to be closed."""
        return await self._send("POST", path, content=body, is_stream=is_stream)

    async def metrics(self) -> str:
        """The engine's own, in Prometheus' text form; nothing while it cannot tell."""
        if not self.is_engine:
            return ""
        try:
            answer = await self._client.get(self._client.base_url.join("/metrics"), timeout=5)
        except httpx.HTTPError:
            return ""
        return answer.text if answer.is_success else ""

    def failure(self, why: str) -> RequestError:
        """That no answer came of a request."""
        if self.is_ending:
            return RequestError("the server is ending. Ask again later.", status=503)
        who = "the engine failed" if self.is_engine else "the upstream server failed"
        then = " If it ended, it is being restarted." if self.is_engine else ""
        message = f"{who}: {why}.{then} Ask again."
        return RequestError(message, status=502, code="upstream", after=5)

    def broken(self, error: httpx.HTTPError) -> RequestError:
        """The failure behind an error of the connection."""
        if isinstance(error, httpx.TimeoutException):
            return self.failure(f"it was silent for {SILENCE_SECONDS:.0f} seconds")
        is_absent = isinstance(error, httpx.ConnectError)
        return self.failure("it cannot be reached" if is_absent else "the connection broke")

    async def _send(
        self, method: str, path: str, *, content: bytes | None = None, is_stream: bool = False
    ) -> httpx.Response:
        kind = {"content-type": "application/json"} if content is not None else {}
        request = self._client.build_request(method, path, content=content, headers=kind)
        try:
            response = await self._client.send(request, stream=is_stream)
            if not response.is_success:
                await response.aread()
        except httpx.HTTPError as error:
            raise self.broken(error) from None
        if response.is_success:
            return response
        raise self._refusal(response)

    def _refusal(self, response: httpx.Response) -> RequestError:
        status, after = response.status_code, response.headers.get("retry-after", "")
        if status in (401, 403, 407):
            return self.failure("it refuses this server's own key")  # the client's was good
        try:
            told = json_object(response.content)
        except ValueError:
            told = {}
        said = told["error"] if isinstance(told.get("error"), dict) else told
        if not 400 <= status < 500 or not isinstance(said.get("message"), str):
            return self.failure(f"it answered with HTTP status {status}")
        param, code = (
            value if isinstance(value := said.get(name), str) else None
            for name in ("param", "code")
        )
        wait = int(after) if after.isdecimal() else None
        return RequestError(said["message"], status=status, param=param, code=code, after=wait)

    def _card(self, entry: dict[str, Any]) -> ModelCard:
        if self.is_engine:
            return ModelCard.model_validate(entry)
        length = entry.get("max_model_len")
        return ModelCard(
            id=str(entry["id"]),
            created=int(entry.get("created") or 0),
            owned_by=str(entry.get("owned_by") or "upstream"),
            max_model_len=length if isinstance(length, int) else 0,
            source="upstream",
            licence="",
            note=FOREIGN_NOTE,
            reasons=False,
        )

    def _open(self, url: str) -> httpx.AsyncClient:
        is_socket = url.startswith("unix:")
        # A kept connection may be closed by the other side just as a request is sent on it.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        return httpx.AsyncClient(
            base_url="http://localhost/v1" if is_socket else url,
            transport=httpx.AsyncHTTPTransport(
                uds=url.removeprefix("unix:") if is_socket else None,
                limits=limits,
                trust_env=False,
            ),
            headers=self._headers,
            timeout=httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS),
            trust_env=False,
        )


def json_object(text: bytes) -> dict[str, Any]:
    """A JSON object, or ValueError."""
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not an object")
    return found
