"""Requests are checked field by field, and a refusal never repeats what the client sent."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attending.engine.api import ChatRequest, CompletionRequest, RequestError, parse

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "secret"}]}


def refusal(kind: Any, body: Any) -> RequestError:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(RequestError) as caught:
        parse(kind, raw)
    assert caught.value.status == 400 and "secret" not in json.dumps(caught.value.body)
    return caught.value


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"tempurature": 1}, "tempurature", "Did you mean 'temperature'"),
        ({"messages": "secret"}, "messages", "array"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "valid string"),
        ({"messages": [{"role": "nurse", "content": ""}]}, "messages.0.role", "'system'"),
        (
            {"messages": [{"role": "user", "content": "", "hue": 1}]},
            "messages.0.hue",
            "known field",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "secret"}]}]},
            "messages.0.content.0.type",
            "'text'",
        ),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"stop": ["a", ""]}, "stop.1", "at least 1 character"),
        ({"store": True}, "store", "False"),
        ({"functions": []}, "functions", "null"),
        ({"tool_choice": "sometimes"}, "tool_choice", "'none'"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], param: str, says: str) -> None:
    error = refusal(ChatRequest, CHAT | change)
    assert (error.param or "").startswith(param) and says in str(error)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b'{"model": "\xe9"}', b"[" * 100_000, b'{"a":' * 5000, b'"\\ud800"'],
)
def test_what_is_not_json_is_said(body: bytes) -> None:
    assert "JSON" in str(refusal(ChatRequest, body))


def test_harmless_values_of_inapplicable_fields_are_accepted() -> None:
    harmless = {
        "user": "u",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "modalities": ["text"],
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "reasoning_effort": None,
        "parallel_tool_calls": True,
        "logit_bias": {"5": -100},
        "stream_options": {"include_usage": True},
    }
    assert parse(ChatRequest, json.dumps(CHAT | harmless).encode()).user == "u"


@pytest.mark.parametrize("prompt", ["a", ["a", "b"], [1, 2], [[1], [2, 3]]])
def test_a_prompt_is_text_or_ids_one_or_several(prompt: Any) -> None:
    found = parse(CompletionRequest, json.dumps({"model": "m", "prompt": prompt}).encode()).prompt
    assert json.loads(json.dumps(found)) == prompt


@pytest.mark.parametrize("prompt", ["", [], [[]], ["a", 1], [1, -1], [[1], "a"], None, 3, {}])
def test_other_prompts_are_refused(prompt: Any) -> None:
    assert (refusal(CompletionRequest, {"model": "m", "prompt": prompt}).param or "").startswith(
        "prompt"
    )


@given(st.binary(max_size=200))
def test_no_bytes_are_anything_but_a_request_or_a_refusal(body: bytes) -> None:
    with pytest.raises(RequestError):
        parse(ChatRequest, body)
