"""Signing in and out, what the page gets, and what is not there."""

import re
import time
from collections.abc import Iterator

import httpx
import pytest

from attending.gateway import app as gateway_app
from tests.gateway import serving


@pytest.fixture(scope="module")
def gate() -> Iterator[serving.Gateway]:
    with serving.gateway() as gate:
        yield gate


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_app, "WRONG_KEY_SECONDS", 0.1)


def test_the_sign_in_page_stands_alone(gate: serving.Gateway) -> None:
    page = httpx.get(gate.url)
    assert page.status_code == 200
    assert 'type="password"' in page.text
    assert "Not a medical device" in page.text
    assert "<script" not in page.text
    assert not re.search(r"(src|href)=", page.text)
    (nonce,) = re.findall(r'<style nonce="([^"]+)">', page.text)
    assert f"style-src 'nonce-{nonce}'" in page.headers["content-security-policy"]
    assert nonce not in httpx.get(gate.url).text
    assert gate.key not in page.text


def test_an_address_signs_in_once(gate: serving.Gateway) -> None:
    address = gate.sign_in_url
    assert httpx.head(address).status_code == 200  # uses nothing up
    answer = httpx.get(address)
    assert answer.status_code == 303
    assert answer.headers["location"] == "/"
    cookie = answer.headers["set-cookie"]
    for part in ("attending_session=", "HttpOnly", "Path=/", "SameSite=strict", "Max-Age=43200"):
        assert part in cookie
    assert "Secure" not in cookie  # only under TLS
    again = httpx.get(address)
    assert again.status_code == 401
    assert "used already or is too old" in again.text
    assert "set-cookie" not in again.headers
    here = {"cookie": cookie.partition(";")[0]}  # from this browser's history: it is signed in
    assert httpx.get(address, headers=here).headers["location"] == "/"
    assert httpx.get(f"{gate.url}/login?token=").status_code == 401
    assert httpx.get(f"{gate.url}/login").status_code == 200


def test_a_key_signs_in_and_ends_the_session_when_it_is_revoked(gate: serving.Gateway) -> None:
    key = gate.house.keys.add("ward")
    client = httpx.Client(base_url=gate.url, headers={"origin": gate.url})
    assert client.post("/login", data={"key": f" {key}\n"}).status_code == 303
    assert client.get("/v1/models").status_code == 200
    gate.house.keys.revoke("ward")
    assert client.get("/v1/models").status_code == 401


def test_wrong_keys_take_time_and_too_many_at_once_are_refused(
    gate: serving.Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = httpx.Client(base_url=gate.url, headers={"origin": gate.url})
    for form in ({"key": "atd-wrong"}, {"key": ""}, {}, {"other": "x"}):
        began = time.monotonic()
        answer = client.post("/login", data=form)
        assert answer.status_code == 401
        assert "no key of this server" in answer.text
        assert time.monotonic() - began >= 0.1
    assert client.post("/login", content=b"key=\xff%ff%00").status_code == 401
    monkeypatch.setattr(gateway_app, "WAITING_SIGN_INS", 0)
    assert client.post("/login", data={"key": "atd-wrong"}).status_code == 429
    assert client.post("/login", data={"key": gate.key}).status_code == 303
    elsewhere = {"origin": "http://evil.example"}
    assert client.post("/login", data={"key": gate.key}, headers=elsewhere).status_code == 403


def test_the_page_is_for_who_is_signed_in(gate: serving.Gateway) -> None:
    client = httpx.Client(base_url=gate.url)
    client.get(gate.sign_in_url)
    page = client.get("/")
    assert page.status_code == 200
    assert 'type="password"' not in page.text
    assert "/page/chat.js" in page.text
    script, style = client.get("/page/chat.js"), client.get("/page/chat.css")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    assert style.headers["content-type"] == "text/css; charset=utf-8"
    for path in ("/page/index.html", "/page/chat.py", "/page/..%2fapp.py", "/page/%2e%2e/keys.py"):
        assert client.get(path).status_code == 404


def test_what_is_not_there_and_what_has_another_method_say_so_in_openais_form(
    gate: serving.Gateway,
) -> None:
    missing = httpx.get(f"{gate.url}/v1/embeddings", headers=gate.headers)
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "invalid_request_error"
    other = httpx.get(f"{gate.url}/v1/completions", headers=gate.headers)
    assert other.status_code == 405
    assert other.headers["allow"] == "POST"
    assert set(other.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(f"{gate.url}/v1/models/", headers=gate.headers).status_code in (404, 307)


def test_texts_are_rendered_for_the_page(gate: serving.Gateway) -> None:
    def post(body: object) -> httpx.Response:
        return httpx.post(f"{gate.url}/page/render", json=body, headers=gate.headers)

    answer = post({"texts": ["**a**", "<b>"]})
    assert answer.json() == {"html": ["<p><strong>a</strong></p>\n", "<p>&lt;b&gt;</p>\n"]}
    assert post({"texts": []}).json() == {"html": []}
    assert post({"texts": ["x" * 400_001]}).status_code == 400
    assert post({"texts": ["x" * 300_000] * 2}).status_code == 413
    assert post({"texts": ["x"] * 257}).status_code == 400
    assert post({"text": "x"}).json()["error"]["param"] == "text"
