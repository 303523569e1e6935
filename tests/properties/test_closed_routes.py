"""Whatever is asked for, and however it is spelt: without a key, only four paths answer."""

import base64
from collections.abc import Iterator
from typing import Any

import anyio
import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attending.gateway import app as gateway_app
from attending.gateway.door import OPEN
from attending.gateway.house import House
from attending.gateway.keys import Keys, Tickets
from attending.gateway.upstream import Upstream

KNOWN = [
    *(
        "/",
        "/login",
        "/health",
        "/healthz",
        "/logout",
        "/metrics",
        "/openapi.json",
        "/page/chat.js",
    ),
    *("/page/render", "/v1", "/v1/models", "/v1/models/x", "/v1/chat/completions", "/docs"),
]
TRICKS = ["/", "//", "/.", "/..", "%2e", "%2f", ";", "%00", " ", "\t", "é", "\\", "#", "?", "A"]
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "LOGIN"]
KEYS = Tickets(10, 10)

paths = st.one_of(
    st.sampled_from(KNOWN),
    st.lists(st.sampled_from(KNOWN + TRICKS), min_size=1, max_size=4).map("".join),
    st.text(max_size=20),
)
secrets = st.one_of(
    st.just(""), st.text(st.characters(codec="latin-1"), max_size=60), st.just(f"atd-{'A' * 43}")
)
schemes = st.sampled_from(["Bearer ", "bearer", "Basic ", "Bearer  ", "", "Token ", "Bearer\t"])
cookies = st.one_of(
    secrets, st.just("attending_session"), st.builds("attending_session={}".format, secrets)
)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    keys = Keys(tmp_path_factory.mktemp("keys"))
    keys.add("ward")
    yield House(keys, Upstream("http://127.0.0.1:9/v1", is_engine=True))


def ask(house: House, method: str, path: str, raw: bytes, headers: Any) -> tuple[int, Any]:
    """Status and headers of the app's answer to a scope as uvicorn would make it."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": raw,
        "root_path": "",
        "query_string": b"token=x",
        "headers": [(b"host", b"localhost"), *headers],
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
    }
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    anyio.run(gateway_app.build(house), scope, receive, send)
    return sent[0]["status"], httpx.Headers(sent[0]["headers"])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(METHODS), paths, st.booleans(), schemes, secrets, cookies)
@example("GET", "/health/../metrics", True, "", "", "")
@example("POST", "/v1/chat/completions", False, "Bearer ", "", "attending_session=")
def test_every_other_route_is_closed(
    house: House, method: str, path: str, is_quoted: bool, scheme: str, secret: str, cookie: str
) -> None:
    raw = path.encode("utf-8", "replace")
    quoted = b"".join(b"%%%02x" % byte for byte in raw) if is_quoted else raw
    headers = [(b"cookie", cookie.encode("latin-1"))] if cookie else []
    if scheme or secret:
        headers.append((b"authorization", (scheme + secret).encode("latin-1")))
    status, told = ask(house, method, path, quoted, headers)
    if path in OPEN and quoted == raw:
        assert status in (200, 401, 403, 405, 503)
        assert "/page/chat.js" not in told.get("link", "")
    else:
        assert status == 401
        assert told["www-authenticate"] == "Bearer"
        assert told["content-type"] == "application/json"


def test_a_key_of_another_house_or_a_session_of_another_opens_nothing(
    house: House, tmp_path_factory: pytest.TempPathFactory
) -> None:
    key = Keys(tmp_path_factory.mktemp("other")).add("ward")
    ticket = KEYS.issue()
    basic = base64.b64encode(f"x:{key}".encode()).decode()
    for header in (f"Bearer {key}", f"Basic {basic}", f"Bearer {ticket}"):
        value = [(b"authorization", header.encode())]
        assert ask(house, "GET", "/v1/models", b"/v1/models", value)[0] == 401
    for cookie in (ticket, key, house.tokens.issue()):
        value = [(b"cookie", f"attending_session={cookie}".encode())]
        assert ask(house, "GET", "/metrics", b"/metrics", value)[0] == 401


def test_the_right_key_opens(house: House) -> None:
    good = [(b"authorization", f"bearer {house.keys.add('lab')}".encode())]
    assert ask(house, "GET", "/metrics", b"/metrics", good)[0] == 200
    cookie = [(b"cookie", f"a=b; attending_session={house.sessions.issue()}".encode())]
    assert ask(house, "GET", "/metrics", b"/metrics", cookie)[0] == 200
