"""What the engine refuses, forgets or survives: wrong requests, full queues, clients that go."""

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from attending.engine.api import CompletionRequest, parse
from attending.engine.replying import Replying
from attending.engine.server import Service, _Running
from tests.engine.folders import write_model
from tests.engine.served import ASK, ENDLESS, WEATHER, client, serve


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("chat", {"model": "gpt-4", "messages": ASK}, 404, "'tiny' and no other"),
        ("chat", {"messages": ASK}, 400, "model"),
        ("chat", {"model": "tiny", "messages": ASK, "tempreature": 1}, 400, "'temperature'"),
        ("chat", {"model": "tiny", "messages": ASK, "max_tokens": 999}, 400, "999 more.*256"),
        ("chat", {"model": "tiny", "messages": ASK, "logit_bias": {"99999": 1}}, 400, "0 to 299"),
        ("chat", {"model": "tiny", "messages": ASK, "logit_bias": {"x": 1}}, 400, "token ids"),
        ("chat", {"model": "tiny", "messages": ASK, "store": True}, 400, "store"),
        ("chat", {"model": "tiny", "messages": ASK, "tools": [WEATHER]}, 400, "no place for tools"),
        ("chat", {"model": "tiny", "messages": ASK, "stream_options": {}}, 400, "stream: true"),
        ("chat", {"model": "tiny", "messages": ASK, "top_logprobs": 2}, 400, "logprobs: true"),
        ("chat", {"model": "tiny", "messages": ASK * 90}, 400, r"\d{3,} tokens.*256"),
        (
            "chat",
            {
                "model": "tiny",
                "messages": ASK,
                "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 3}}},
            },
            400,
            "cannot be enforced",
        ),
        ("text", {"model": "tiny", "prompt": [1, 99999]}, 400, "0 to 299"),
        ("text", {"model": "tiny", "prompt": []}, 400, "prompt"),
        ("text", {"model": "tiny", "prompt": "a", "suffix": "b"}, 400, "suffix"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_field(
    served: tuple[str, Service], path: str, body: dict[str, Any], status: int, says: str
) -> None:
    route = {"chat": "/v1/chat/completions", "text": "/v1/completions"}[path]
    answer = httpx.post(served[0] + route, json=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert re.search(says, error["message"]), error["message"]


def test_a_full_queue_says_when_to_come_again(folder: Path) -> None:
    model = write_model(folder / "busy")
    with serve(model, dtype="float32", max_running=1, max_waiting=1) as (url, _):
        ask = client(url).completions
        ask.create(model="busy", prompt="a", max_tokens=1)  # the client imports at first use
        body = {"model": "busy", "prompt": "a", "n": 2, "max_tokens": 200, "stream": True}
        body |= {"logit_bias": ENDLESS}
        with (
            httpx.stream("POST", f"{url}/v1/completions", json=body) as first,
            pytest.raises(openai.RateLimitError, match="too many requests") as refused,
        ):
            lines = first.iter_lines()  # kept: when it is collected, the stream is closed
            assert next(lines)
            ask.create(model="busy", prompt="a", max_tokens=1)
        assert int(refused.value.response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_place(folder: Path, *, stream: bool) -> None:
    with serve(write_model(folder / f"gone{stream}"), dtype="float32") as (url, service):
        scheduler = service._model.scheduler
        body = {"model": f"gone{stream}", "prompt": "a", "stream": stream, "logit_bias": ENDLESS}
        with pytest.raises(httpx.TimeoutException):
            if stream:
                with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=0.2) as one:
                    next(one.iter_lines())
                    raise httpx.ReadTimeout("leaves in the middle")
            httpx.post(f"{url}/v1/completions", json=body, timeout=0.05)
        deadline = time.monotonic() + 10
        while scheduler.num_running and time.monotonic() < deadline:
            time.sleep(0.02)
        assert scheduler.num_running == 0
        assert scheduler.pages.num_available == scheduler.pages.num_pages
        assert scheduler.counters.cancelled == 1
        assert "attending_engine_cancelled_total 1.0" in httpx.get(f"{url}/metrics").text


def test_a_slow_reader_loses_nothing(served: tuple[str, Service]) -> None:
    """What waits in the queue when the last token comes is still part of the answer."""
    service = served[1]
    body = {"model": "tiny", "prompt": "a", "max_tokens": 200, "logit_bias": ENDLESS}
    asked = parse(CompletionRequest, json.dumps(body | {"n": 4, "return_token_ids": True}).encode())

    async def late() -> dict[str, Any]:
        post = service.worker.post
        service.worker.post = asyncio.get_running_loop().call_soon_threadsafe
        job = service._jobs.complete(asked)
        running = _Running(job, Replying(job, service._model.tokenizer, "tiny"), service.worker)
        while not all(ticket.is_over for ticket in running._tickets):
            await asyncio.sleep(0.01)  # nothing is read until all has been written
        service.worker.post = post
        return await running.whole()

    answer = asyncio.run(late())
    assert [len(choice["token_ids"]) for choice in answer["choices"]] == [200] * 4
    assert answer["usage"]["completion_tokens"] == 800


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("text", {"prompt": ["a"] * 50, "n": 128}, "6,400 answers"),
        ("text", {"prompt": [2**40], "echo": True}, "0 to 299"),
        ("text", {"prompt": "word " * 400_000}, "context"),
        ("text", {"prompt": "a", "repetition_penalty": 1e-310, "temperature": 1.0}, "repetition"),
        ("text", {"prompt": [-1] * 300_000}, "prompt"),
        ("chat", {"messages": [0] * 300_000}, "messages"),
        ("chat", {"messages": ASK, "chat_template_kwargs": {"messages": []}}, "must not hold"),
        ("chat", {"messages": ASK, "chat_template_kwargs": {"self": 1}}, "template refused"),
        (
            "chat",
            {
                "messages": ASK,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"schema": {"minimum": 10**400}},
                },
            },
            "cannot be enforced",
        ),
    ],
)
def test_what_would_break_the_engine_is_refused_at_once(
    served: tuple[str, Service], path: str, body: dict[str, Any], says: str
) -> None:
    route = {"chat": "/v1/chat/completions", "text": "/v1/completions"}[path]
    start = time.monotonic()
    answer = httpx.post(served[0] + route, json={"model": "tiny", **body}, timeout=30)
    assert answer.status_code == 400 and says in answer.json()["error"]["message"]
    assert time.monotonic() - start < 5
