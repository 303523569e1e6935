"""The door, before any routing: who asks, under which name, from which page, and with how much.

Deny by default: four paths answer without a key, and only when they are spelt exactly.
"""

import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from attending.engine.api import RequestError
from attending.engine.wire import GONE, error_response
from attending.gateway.house import House, refusal

OPEN = frozenset({"/", "/login", "/health", "/healthz"})
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
COOKIE = "attending_session"
LOGIN_BYTES = 10_000  # whoever has no key may send no more
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
NO_KEY = refusal(401, "a key is needed: Authorization: Bearer KEY.", "no_key")
WRONG_KEY = refusal(401, "this is no key of this server, or it was revoked.", "wrong_key")
log = logging.getLogger("attending.gateway")


class Door:
    """ASGI middleware around everything else."""

    def __init__(self, app: ASGIApp, house: House, templates: Mapping[Any, str]) -> None:
        """`templates` are the paths of the endpoints, as logs and metrics name them."""
        self._app, self._house, self._templates = app, house, templates
        self._names = LOOPBACK | {*map(host_name, house.hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse, or let in; every answer gets the headers, a log line and its counts."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        began, request_id, status = time.perf_counter(), secrets.token_hex(8), 0
        scope.setdefault("state", {})["request_id"] = request_id

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers["X-Request-Id"] = request_id
                if self._house.status.phase == "draining":
                    headers["Connection"] = "close"
            await send(message)

        self._house.status.in_flight += 1
        try:
            await self._admit(scope, receive, answer)
        except Exception:
            if not status:
                error = refusal(500, f"the server failed; its log says more under {request_id}.")
                await error_response(error)(scope, receive, answer)
            raise
        finally:
            self._house.status.in_flight -= 1
            route = self._templates.get(scope.get("endpoint"), "none")
            seconds, status = time.perf_counter() - began, status or GONE
            self._house.metrics.answered(route, status, seconds)
            told = (scope["method"][:16], route, status, seconds * 1000, request_id)
            level = logging.DEBUG if route.startswith(("/health", "/page")) else logging.INFO
            log.log(level, "%s %s %d %.0f ms %s", *told)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        is_open = path in OPEN and scope.get("raw_path", path.encode()) == path.encode()
        most, read = LOGIN_BYTES if is_open else self._house.max_body_bytes, 0
        too_long = refusal(413, f"the body is too long: at most {most} bytes.")

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > most:
                raise too_long
            return message

        error = self._wrong_host(headers)
        if error is None:
            scope["state"]["is_signed_in"], has_cookie = self._who(headers)
            may_change = scope["method"] in SAFE_METHODS or _is_own_page(headers)
            if not is_open and not scope["state"]["is_signed_in"]:
                error = NO_KEY if not headers.get("authorization") else WRONG_KEY
            elif not may_change and (has_cookie or path == "/login"):
                error = refusal(403, "this request came from another site's page.", "origin")
            elif int(headers.get("content-length") or 0) > most:
                error = too_long
        if error is None:
            await self._app(scope, limited, send)
        else:
            await error_response(error)(scope, receive, send)

    def _wrong_host(self, headers: Headers) -> RequestError | None:
        """A page elsewhere may point its own name at this address (DNS rebinding)."""
        given = headers.getlist("host")
        name = host_name(given[0]) if len(given) == 1 else ""
        if not name:
            return refusal(400, "one Host header is needed: NAME or NAME:PORT.")
        if name in self._names:
            return None
        remedy = f"If it should be, start the server with --allow-host {name}."
        return refusal(421, f"{name} is not a name of this server. {remedy}", "host")

    def _who(self, headers: Headers) -> tuple[bool, bool]:
        """Whether somebody is signed in, and whether by the cookie; a wrong key hides a cookie."""
        keys, sessions = self._house.keys, self._house.sessions
        if offered := headers.getlist("authorization"):
            scheme, _, key = offered[0].partition(" ")
            is_one = len(offered) == 1 and scheme.lower() == "bearer"
            return is_one and keys.holder(key.strip()) is not None, False
        holder = sessions.holder(session_of(headers))
        is_good = holder is not None and (not holder or keys.holds(holder))
        return is_good, is_good


def session_of(headers: Headers) -> str:
    """The session's cookie, "" without one."""
    return cookie_parser("; ".join(headers.getlist("cookie"))).get(COOKIE, "")


def host_name(host: str) -> str:
    """The name or address in a Host header, in one spelling and without the port; else ""."""
    host = f"[{host}]" if host.count(":") > 1 and "[" not in host else host
    match = re.fullmatch(r"(?:\[([\da-f:.]+)\]|([\w.-]+))(?::\d{0,5})?", host.lower(), re.ASCII)
    if match is None:
        return ""
    try:
        return str(ipaddress.ip_address(match[1] or match[2]))
    except ValueError:
        return (match[2] or "").removesuffix(".")


def _is_own_page(headers: Headers) -> bool:
    """Browsers say where a form or a script came from; a page cannot forge these headers."""
    if site := headers.get("sec-fetch-site"):
        return site == "same-origin"
    return headers.get("origin", "").partition("://")[2] == headers["host"]
