"""Requests arrive unchanged, answers come back whole, and nobody works for no one."""

import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.gateway import fake, serving
from tests.gateway.fake import MODEL, Script
from tests.running import running

HELLO = [{"role": "user", "content": "Hello"}]
CHAT = {"model": MODEL, "messages": HELLO}


def client(gate: serving.Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gate.url}/v1", api_key=gate.key, max_retries=0)


def post(gate: serving.Gateway, body: Any, path: str = "chat/completions") -> httpx.Response:
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    headers = gate.headers | {"content-type": "application/json"}
    return httpx.post(f"{gate.url}/v1/{path}", headers=headers, **sent)


def counted(gate: serving.Gateway, name: str) -> float:
    text = httpx.get(f"{gate.url}/metrics", headers=gate.headers).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))


def test_openais_client_chats_completes_streams_and_lists() -> None:
    with serving.gateway() as gate:
        ask = client(gate)
        whole = ask.chat.completions.create(**CHAT)
        assert whole.choices[0].message.content == "Hello."
        assert whole.usage is not None
        assert whole.usage.prompt_tokens == 7
        assert ask.completions.create(model=MODEL, prompt="x").choices[0].text == "Hello."
        assert [model.id for model in ask.models.list()] == [MODEL]
        assert ask.models.retrieve(MODEL).owned_by == "attending"
        shown = {"include_usage": True}
        events = list(ask.chat.completions.create(**CHAT, stream=True, stream_options=shown))
        text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
        assert text == "Hello."
        assert events[-1].usage is not None
        assert events[-1].usage.total_tokens == 9


def test_usage_is_counted_but_shown_only_to_who_asked() -> None:
    with serving.gateway() as gate:
        events = list(client(gate).chat.completions.create(**CHAT, stream=True))
        assert all(event.choices and event.usage is None for event in events)
        assert gate.fake.requests[-1]["stream_options"] == {"include_usage": True}
        assert counted(gate, "attending_prompt_tokens_total") == 7
        assert counted(gate, "attending_output_tokens_total") == 2
        assert counted(gate, "attending_cached_tokens_total") == 4
        assert counted(gate, "attending_time_to_first_token_seconds_count") == 1
        assert counted(gate, "attending_time_per_output_token_seconds_count") == 1
        assert counted(gate, "attending_engine_steps_total") == 3
        served = 'attending_requests_total{route="/v1/chat/completions",'
        serving.until(lambda: counted(gate, served) == 1)  # counted after the answer's end


def test_reasoning_and_line_separators_come_through_unbroken() -> None:
    script = Script(pieces=("a\u2028b", "\x85c\u2029"), reasoning=("because",))
    with serving.gateway(fake.app(script=script)) as gate:
        events = list(client(gate).chat.completions.create(**CHAT, stream=True))
        deltas = [event.choices[0].delta for event in events]
        assert "".join(d.content or "" for d in deltas) == "a\u2028b\x85c\u2029"
        assert [d.reasoning_content for d in deltas if d.model_extra] == ["because"]  # type: ignore[attr-defined]


def test_errors_become_openais_exceptions() -> None:
    with serving.gateway() as gate:
        ask = client(gate)
        with pytest.raises(openai.NotFoundError, match=f"Served: {MODEL}") as unknown:
            ask.chat.completions.create(model="gpt-4", messages=HELLO)  # type: ignore[arg-type]
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="temperature") as wrong:
            ask.chat.completions.create(**CHAT, temperature=11)
        assert wrong.value.param == "temperature"
        with pytest.raises(openai.AuthenticationError):
            ask.with_options(api_key="atd-wrong").models.list()
        body = json.dumps({"error": {"message": "too many", "type": "x", "code": 429}}).encode()
        gate.fake.script = Script(status=429, body=body, headers={"retry-after": "7"})
        with pytest.raises(openai.RateLimitError, match="too many") as busy:
            ask.chat.completions.create(**CHAT)
        assert busy.value.response.headers["retry-after"] == "7"
        assert busy.value.type == "rate_limit_error"
        assert busy.value.code is None
        for status, text in (
            (500, b"{}"),
            (404, b"Not Found"),
            (401, body),
            (302, b""),
            (200, b"[]"),
        ):
            gate.fake.script = Script(status=status, body=text)
            with pytest.raises(openai.InternalServerError) as failed:
                ask.chat.completions.create(**CHAT)
            assert failed.value.status_code == 502
            assert failed.value.type == "server_error"


def test_the_engine_gets_the_very_bytes_and_no_key() -> None:
    body = json.dumps(CHAT | {"user": "Jane", "seed": 2**62}, indent=3).encode()
    with serving.gateway() as gate:
        assert post(gate, body).status_code == 200
        assert gate.fake.bodies == [body]
        assert not any("authorization" in headers for headers in gate.fake.headers)


def test_another_server_gets_its_own_key_and_nothing_about_the_user() -> None:
    about = {"user": "Jane", "metadata": {"ward": "7"}, "safety_identifier": "x"}
    with serving.gateway(is_engine=False, upstream_key="sk-up") as gate:
        assert post(gate, CHAT | about | {"prompt_cache_key": "y", "seed": 1}).status_code == 200
        assert gate.fake.requests == [CHAT | {"seed": 1}]
        assert {headers["authorization"] for headers in gate.fake.headers} == {"Bearer sk-up"}
        card = httpx.get(f"{gate.url}/v1/models/{MODEL}", headers=gate.headers).json()
        assert card["max_model_len"] == 4096
        assert "Served by another server" in card["note"]
        assert counted(gate, "attending_engine_steps") == 0


def test_the_engines_socket(tmp_path: Path) -> None:
    upstream = fake.app()
    with (
        running(upstream, uds=str(tmp_path / "e.sock")) as address,
        serving.gateway(upstream, address=address) as gate,
    ):
        assert client(gate).chat.completions.create(**CHAT).choices[0].message.content
        assert counted(gate, "attending_engine_steps_total") == 3


@pytest.mark.parametrize(
    "body", [b"", b"\xff{}", b"[]", b'"x"', b"[" * 100_000, b'{"a":' * 100_000, b"{" + b" " * 999]
)
def test_what_is_no_request_is_refused_without_being_passed_on(body: bytes) -> None:
    with serving.gateway() as gate:
        answer = post(gate, body)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert not gate.fake.requests


def test_an_unknown_field_is_named_and_a_body_must_say_that_it_is_json() -> None:
    with serving.gateway() as gate:
        answer = post(gate, CHAT | {"temprature": 1})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "temprature"
        assert "temperature" in answer.json()["error"]["message"]
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            headers = gate.headers | {"content-type": kind}
            url = f"{gate.url}/v1/chat/completions"
            answer = httpx.post(url, headers=headers, content=json.dumps(CHAT))
            assert answer.status_code == 415


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_ends_the_work_upstream(is_stream: bool) -> None:
    script = Script(pieces=("word ",) * 100, seconds_between=0.1)
    with serving.gateway(fake.app(script=script)) as gate:
        url, body = f"{gate.url}/v1/chat/completions", CHAT | {"stream": is_stream}
        sent: Any = {"headers": gate.headers, "json": body, "timeout": 0.5}
        with suppress(httpx.ReadTimeout), httpx.stream("POST", url, **sent) as answer:
            assert is_stream, "an answer came without a stream"
            next(answer.iter_bytes())
        serving.until(lambda: gate.fake.cancelled == 1)
        assert gate.fake.finished == 0
        serving.until(lambda: counted(gate, "attending_cancelled_total") == 1)
        serving.until(lambda: gate.house.status.in_flight == 0)


@pytest.mark.parametrize(
    "script",
    [
        Script(breaks_after=2),
        Script(raw_event="{nonsense"),
        Script(raw_event="[]"),
        Script(raw_event='{"error": {"message": "out of memory", "type": "x"}}'),
    ],
)
def test_a_stream_that_breaks_says_so_and_does_not_seem_whole(script: Script) -> None:
    with serving.gateway(fake.app(script=script)) as gate:
        answer = post(gate, CHAT | {"stream": True})
        assert answer.status_code == 200
        *_, last = [line for line in answer.text.splitlines() if line.startswith("data: ")]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["type"] == "server_error"
        assert "[DONE]" not in answer.text
        assert set(error) == {"message", "type", "param", "code"}
        with pytest.raises(openai.APIError, match="engine"):
            list(client(gate).chat.completions.create(**CHAT, stream=True))


def test_who_computes_may_be_absent() -> None:
    with serving.gateway(address="http://127.0.0.1:9/v1") as gate:
        answer = post(gate, CHAT)
        assert answer.status_code == 502
        assert answer.headers["retry-after"] == "5"
        assert "cannot be reached" in answer.json()["error"]["message"]


def test_what_is_not_ready_says_when_to_ask_again() -> None:
    with serving.gateway() as gate:
        for phase in ("starting", "engine down", "draining"):
            gate.house.status.phase = phase  # type: ignore[assignment]
            answer = post(gate, CHAT)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "5"
            assert (answer.headers.get("connection") == "close") == (phase == "draining")
            health = httpx.get(f"{gate.url}/health")
            assert (health.status_code, health.json()) == (503, {"status": phase})
            assert httpx.get(f"{gate.url}/healthz").status_code == 200
        gate.house.status.phase = "ready"
        assert httpx.get(f"{gate.url}/health").json() == {"status": "ready"}


def test_many_ask_at_once_and_each_gets_its_answer() -> None:
    script = Script(seconds_between=0.02)
    with serving.gateway(fake.app(script=script)) as gate:
        found: list[str] = []

        def ask() -> None:
            events = client(gate).chat.completions.create(**CHAT, stream=True)
            found.append("".join(event.choices[0].delta.content or "" for event in events))

        threads = [threading.Thread(target=ask) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert found == ["Hello."] * 12
