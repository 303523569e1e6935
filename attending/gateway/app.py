"""The gateway's routes: signing in, the chat page, health, metrics, and OpenAI's API."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html import escape
from importlib import resources
from string import Template
from urllib.parse import parse_qs

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from attending.engine.api import RequestError, parse
from attending.engine.wire import GONE, ClientGone, error_response
from attending.gateway.door import COOKIE, Door, session_of
from attending.gateway.house import House, refusal
from attending.gateway.keys import SESSION_SECONDS
from attending.gateway.openapi import document
from attending.gateway.proxy import Proxy, json_body
from attending.gateway.render import CHARACTERS, RenderRequest, render

FILES = resources.files("attending.gateway")
SCRIPTS = ("chat", "markdown", "store", "stream", "theme", "turn", "view")
ASSETS = {"chat.css": "text/css"} | {f"{name}.js": "text/javascript" for name in SCRIPTS}
TALKATIVE = ("sse_starlette", "uvicorn.access", "markdown_it")  # would log texts and addresses
WAITING_SIGN_INS, WRONG_KEY_SECONDS = 16, 0.5


def build(house: House) -> Starlette:
    """The app; it closes the way upstream when it ends."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    site, proxy = _Site(house), Proxy(house)
    routes = [
        Route("/", site.page),
        Route("/login", site.sign_in, methods=["GET", "POST"]),
        Route("/logout", site.sign_out, methods=["POST"]),
        Route("/page/render", site.render, methods=["POST"]),
        Route("/page/{name}", site.asset),
        Route("/health", site.health),
        Route("/healthz", site.alive),
        Route("/metrics", site.metrics),
        Route("/openapi.json", site.openapi),
        Route("/v1/models", proxy.models),
        Route("/v1/models/{id:path}", proxy.model),
        Route("/v1/chat/completions", proxy.chat, methods=["POST"]),
        Route("/v1/completions", proxy.completions, methods=["POST"]),
    ]

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await house.upstream.close()

    templates = {route.endpoint: route.path for route in routes}
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Door, house=house, templates=templates)],
        exception_handlers={
            RequestError: lambda _, error: error_response(error),
            HTTPException: _not_here,
            ClientGone: lambda *_: Response(status_code=GONE),
            ClientDisconnect: lambda *_: Response(status_code=GONE),
        },
    )


class _Site:
    """Everything but OpenAI's API."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._waiting = 0

    async def page(self, request: Request) -> Response:
        if request.state.is_signed_in:
            return HTMLResponse((FILES / "page/index.html").read_bytes())
        return _sign_in_page()

    async def sign_in(self, request: Request) -> Response:
        if request.method == "POST":
            return await self._sign_in_by_key(request)
        token = request.query_params.get("token")
        if token is None or request.method == "HEAD":  # a HEAD must not use a token up
            return _sign_in_page()
        if self._house.tokens.end(token):
            return self._begin(request, "")
        if request.state.is_signed_in:  # the address again, by the browser's history
            return RedirectResponse("/", 303)
        return _sign_in_page("This address was used already or is too old. Sign in with a key.")

    async def _sign_in_by_key(self, request: Request) -> Response:
        form = parse_qs((await request.body()).decode("utf-8", "replace"))
        holder = self._house.keys.holder(form.get("key", [""])[0].strip())
        if holder is not None:
            return self._begin(request, holder)
        if self._waiting >= WAITING_SIGN_INS:
            raise refusal(429, "too many wrong keys are being tried; wait.", after=5)
        self._waiting += 1
        try:
            await asyncio.sleep(WRONG_KEY_SECONDS)
        finally:
            self._waiting -= 1
        return _sign_in_page("This is no key of this server.")

    def _begin(self, request: Request, holder: str) -> Response:
        response = RedirectResponse("/", 303)
        response.set_cookie(
            COOKIE,
            self._house.sessions.issue(holder),
            max_age=SESSION_SECONDS,
            secure=request.url.scheme == "https",
            httponly=True,
            samesite="strict",
        )
        return response

    async def sign_out(self, request: Request) -> Response:
        self._house.sessions.end(session_of(request.headers))
        response = RedirectResponse("/", 303)
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response

    async def asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in ASSETS:
            raise HTTPException(404)
        return Response((FILES / "page" / name).read_bytes(), media_type=ASSETS[name])

    async def render(self, request: Request) -> Response:
        texts = parse(RenderRequest, await json_body(request)).texts
        if sum(map(len, texts)) > CHARACTERS:
            raise refusal(413, f"the texts are too long: at most {CHARACTERS} characters in all.")
        return JSONResponse({"html": await run_in_threadpool(render, texts)})

    async def health(self, _: Request) -> Response:
        phase = self._house.status.phase
        if phase == "ready":
            return JSONResponse({"status": phase})
        return JSONResponse({"status": phase}, 503, {"Retry-After": "5"})

    async def alive(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def metrics(self, _: Request) -> Response:
        own = self._house.metrics.text(self._house.status.in_flight)
        return Response(own + await self._house.upstream.metrics(), media_type="text/plain")

    async def openapi(self, _: Request) -> Response:
        return JSONResponse(document())


def _sign_in_page(problem: str = "") -> Response:
    nonce = secrets.token_urlsafe(16)
    text = Template((FILES / "sign_in.html").read_text(encoding="utf-8")).substitute(
        nonce=nonce, problem=escape(problem), hidden="" if problem else " hidden"
    )
    headers = {
        "Content-Security-Policy": f"default-src 'none'; style-src 'nonce-{nonce}'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
        # Under no-referrer, browsers would send the form with `Origin: null`.
        "Referrer-Policy": "same-origin",
    }
    return HTMLResponse(text, 401 if problem else 200, headers)


async def _not_here(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {404: "there is nothing at this path.", 405: "this path has another method."}
    answer = error_response(refusal(error.status_code, messages.get(error.status_code, "refused.")))
    answer.headers.update(error.headers or {})
    return answer
