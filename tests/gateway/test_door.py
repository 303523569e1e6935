"""The door: who may come in, under which name, from which page, with how much; and what it logs."""

import json
import logging
import re
import socket
import tracemalloc
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from attending.gateway.door import HEADERS, host_name
from tests.gateway import fake, serving

CHAT = {"model": fake.MODEL, "messages": [{"role": "user", "content": "my secret illness"}]}


@pytest.fixture(scope="module")
def gate() -> Iterator[serving.Gateway]:
    with serving.gateway(hosts=("ward.example", "2001:DB8::1")) as gate:
        yield gate


def raw(gate: serving.Gateway, text: str) -> tuple[int, str]:
    """Status and all of the answer to bytes as they are."""
    port = urlsplit(gate.url).port
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        line.sendall(text.replace("\n", "\r\n").encode())
        told = b""
        while chunk := line.recv(65536):
            told += chunk
    return int(told.split()[1]), told.decode()


def signed_in(gate: serving.Gateway) -> httpx.Client:
    client = httpx.Client(base_url=gate.url)
    client.get(gate.sign_in_url)
    assert client.cookies
    return client


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost", "localhost"),
        ("LocalHost:8000", "localhost"),
        ("localhost.", "localhost"),
        ("127.0.0.1:80", "127.0.0.1"),
        ("[::1]:8000", "::1"),
        ("[0:0:0:0:0:0:0:1]", "::1"),
        ("::1", "::1"),
        ("[2001:db8:0::1]:9", "2001:db8::1"),
        ("ward.example:", "ward.example"),
        ("a b", ""),
        ("a/b", ""),
        ("user@localhost", ""),
        ("localhost:80:90", ""),
        ("[localhost]", ""),
        ("", ""),
        ("lоcalhost", ""),
    ],
)
def test_a_host_has_one_spelling(host: str, name: str) -> None:
    assert host_name(host) == name


@pytest.mark.parametrize("path", ["/", "/health", "/healthz", "/login", "/v1/models", "/none"])
def test_another_name_is_refused_on_every_path(gate: serving.Gateway, path: str) -> None:
    for host in ("evil.example", "localhost.evil.example", "10.0.0.1", "0.0.0.0", "127.0.0.1.nip"):
        answer = httpx.get(gate.url + path, headers=gate.headers | {"host": host})
        assert answer.status_code == 421
        assert "--allow-host" in answer.json()["error"]["message"]
    for host in ("localhost:1", "[::1]", "ward.example:443", "[2001:db8::1]"):
        answer = httpx.get(gate.url + path, headers=gate.headers | {"host": host})
        assert answer.status_code == {"/none": 404}.get(path, 200)


def test_one_host_header_is_needed(gate: serving.Gateway) -> None:
    assert raw(gate, "GET /health HTTP/1.1\nConnection: close\n\n")[0] == 400
    assert raw(gate, "GET /health HTTP/1.0\n\n")[0] == 400
    two = "GET /health HTTP/1.0\nHost: localhost\nHost: evil.example\n\n"
    assert raw(gate, two)[0] == 400
    assert raw(gate, "GET /health HTTP/1.0\nHost: localhost\n\n")[0] == 200


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models",
        "/v1/../health",
        "/health/",
        "/health/../metrics",
        "/%68ealth",
        "/%2e/",
        "/.",
        "//",
        "/login/",
        "/LOGIN",
        "/health%00",
        "/healthz;x",
        "http://localhost/health",
        "http://localhost/",
        "*",
    ],
)
def test_only_the_exact_spelling_is_open(gate: serving.Gateway, target: str) -> None:
    request = f"GET {target} HTTP/1.1\nHost: localhost\nConnection: close\n\n"
    status, text = raw(gate, request)
    assert status == 401
    assert "www-authenticate: bearer" in text.lower()


def test_every_answer_has_the_headers(gate: serving.Gateway) -> None:
    answers = [httpx.get(gate.url + path) for path in ("/", "/health", "/login?token=x", "/v1/x")]
    answers += [httpx.get(f"{gate.url}/none", headers=gate.headers)]
    answers += [httpx.get(gate.url, headers={"host": "evil.example"}), httpx.options(gate.url)]
    answers += [httpx.post(f"{gate.url}/v1/completions", headers=gate.headers, json={})]
    stream = CHAT | {"stream": True}
    answers += [httpx.post(f"{gate.url}/v1/chat/completions", headers=gate.headers, json=stream)]
    assert [answer.status_code for answer in answers] == [
        *(200, 200, 401, 401, 404, 421, 405, 400, 200)
    ]
    for answer in answers:
        assert {name.lower() for name in HEADERS} <= set(answer.headers)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])
        assert "server" not in answer.headers or answer.headers["server"] == "uvicorn"
        assert not [name for name in answer.headers if name.startswith("access-control")]
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)


def test_a_page_elsewhere_cannot_use_the_cookie(gate: serving.Gateway) -> None:
    client = signed_in(gate)
    own = {"origin": gate.url}
    for path, ok in (("/v1/chat/completions", 200), ("/page/render", 400)):
        for headers in (
            {},
            {"origin": "http://evil.example"},
            {"origin": "null"},
            {"origin": gate.url + ".evil.example"},
            {"origin": gate.url, "sec-fetch-site": "cross-site"},
            {"origin": "http://127.0.0.1:1"},
            {"sec-fetch-site": "same-site"},
        ):
            answer = client.post(path, json=CHAT, headers=headers)
            assert answer.status_code == 403, headers
        for headers in (own, {"origin": "null", "sec-fetch-site": "same-origin"}):
            assert client.post(path, json=CHAT, headers=headers).status_code == ok
    assert client.post("/logout", headers={"origin": "http://evil.example"}).status_code == 403
    assert client.get("/v1/models").status_code == 200
    assert client.post("/logout", headers=own).status_code == 303
    assert client.get("/v1/models").status_code == 401


def test_a_key_needs_no_origin_and_a_wrong_key_hides_a_good_cookie(gate: serving.Gateway) -> None:
    url = f"{gate.url}/v1/chat/completions"
    assert httpx.post(url, json=CHAT, headers=gate.headers).status_code == 200
    client = signed_in(gate)
    wrong = client.get("/v1/models", headers={"authorization": "Bearer x"})
    assert wrong.status_code == 401 and wrong.json()["error"]["code"] == "wrong_key"
    assert httpx.get(f"{gate.url}/v1/models").json()["error"]["code"] == "no_key"
    two = [("authorization", f"Bearer {gate.key}"), ("authorization", f"Bearer {gate.key}")]
    assert httpx.get(f"{gate.url}/v1/models", headers=two).status_code == 401


def test_a_long_body_is_refused_at_its_length(gate: serving.Gateway) -> None:
    url = f"{gate.url}/v1/chat/completions"
    content = b'{"model": "' + b"x" * 10_000_000
    headers = gate.headers | {"content-type": "application/json"}
    assert httpx.post(url, content=content, headers=headers).status_code == 413
    long_form = {"key": "x" * 10_001}
    answer = httpx.post(f"{gate.url}/login", data=long_form, headers={"origin": gate.url})
    assert answer.status_code == 413


def test_a_hundred_megabytes_in_chunks_are_never_held(gate: serving.Gateway) -> None:
    piece = b" " * 1_000_000

    def pieces() -> Iterator[bytes]:
        yield from (piece for _ in range(100))

    headers = gate.headers | {"content-type": "application/json"}
    tracemalloc.start()
    try:
        answer = httpx.post(f"{gate.url}/v1/completions", content=pieces(), headers=headers)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert peak < 40_000_000
    assert httpx.get(f"{gate.url}/health").status_code == 200


def test_logs_name_the_route_and_nothing_that_is_secret(
    gate: serving.Gateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    sign_in = gate.sign_in_url
    client = httpx.Client(base_url=gate.url)
    client.get(sign_in)
    stream = CHAT | {"stream": True}
    client.post("/v1/chat/completions", json=CHAT, headers=gate.headers)
    client.post("/v1/chat/completions", json=stream, headers=gate.headers)
    client.get("/v1/models/secret-name", headers=gate.headers)
    client.get("/secret-path", headers=gate.headers)
    body = {"texts": ["my secret illness"]}
    client.post("/page/render", json=body, headers={"origin": gate.url})
    client.post("/login", data={"key": gate.key}, headers={"origin": gate.url})

    def lines() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.name == "attending.gateway"]

    serving.until(lambda: len(lines()) == 7)  # a line is written after its answer
    own = lines()
    assert re.fullmatch(r"GET /login 303 \d+ ms [0-9a-f]{16}", own[0])
    assert re.match("POST /v1/chat/completions 200 ", own[1])
    assert re.match("GET /v1/models/{id:path} 404 ", own[3])
    assert re.match("GET none 404 ", own[4])
    server = [r for r in caplog.records if not r.name.startswith(("httpx", "httpcore", "hpack"))]
    text = "\n".join(record.getMessage() for record in server)
    secrets = (gate.key, sign_in.partition("=")[2], *client.cookies.values(), "secret", "Hel")
    assert not [secret for secret in secrets if secret in text]


def test_a_failure_of_ours_has_openais_form_and_its_headers() -> None:
    with serving.gateway() as gate:

        def fail(name: str) -> None:
            raise ZeroDivisionError("patient text")

        gate.house.upstream.card = fail  # type: ignore[method-assign, assignment]
        url = f"{gate.url}/v1/chat/completions"
        answer = httpx.post(url, json=CHAT, headers=gate.headers)
        assert answer.status_code == 500
        assert json.loads(answer.text)["error"]["type"] == "server_error"
        assert answer.headers["x-request-id"] in answer.text
        assert "patient" not in answer.text
        assert answer.headers["cache-control"] == "no-store"


def test_web_sockets_are_refused(gate: serving.Gateway) -> None:
    upgrade = "Connection: Upgrade\nUpgrade: websocket\nSec-WebSocket-Version: 13\n"
    head = "GET /v1/models HTTP/1.0\nHost: localhost\nSec-WebSocket-Key: eHg=\n"
    assert raw(gate, f"{head}{upgrade}\n")[0] == 401
