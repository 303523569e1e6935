"""M2's four filters, with an endpoint that answers by hand."""

import asyncio
import json
from collections.abc import Callable

import httpx
import pytest

from attending.endpoint import Endpoint, EndpointOptions
from attending.errors import EndpointError, UsageError
from attending.verifier.rules.filters import Candidate, Filtered, filtered

OPTIONS = {"A": "aspirin", "B": "warfarin"}
BAND = (0.2, 0.8)
Say = Callable[[str], str | int]


def one(key: str, prompt: str = "", answer: str = "A", reference: str = "Answer: A") -> Candidate:
    rule = {"kind": "choice", "options": OPTIONS, "answer": answer}
    return Candidate(key, prompt or f"Question {key}?", rule, reference)


def run(
    candidates: list[Candidate], say: Say, rates: dict[str, float]
) -> tuple[Filtered, list[str]]:
    asked: list[str] = []

    def serve(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        assert body["max_tokens"] == 99
        asked.append(body["messages"][0]["content"])
        said = say(asked[-1])
        if isinstance(said, int):
            return httpx.Response(said)
        finish = "length" if said.endswith("[cut]") else "stop"
        choice = {"message": {"content": said}, "finish_reason": finish}
        return httpx.Response(200, json={"choices": [choice], "model": "m"})

    async def go() -> Filtered:
        options = EndpointOptions(max_tries=2, backoff_base_seconds=0.0)
        wire = lambda _: httpx.MockTransport(serve)  # noqa: E731
        async with Endpoint("http://127.0.0.1:9", "m", options=options, wire=wire) as endpoint:
            return await filtered(candidates, endpoint, rates, BAND, max_tokens=99)

    return asyncio.run(go()), asked


def answer(prompt: str) -> str:
    """What the advanced model says; a question's key says how it goes."""
    for key, said in {
        **{"wrong": "Hm.\nAnswer: B", "vague": "It is A.", "cut": "Answer: A [cut]"},
        **{
            "thought": "<think>Answer: A",
            "easy": "no",
            "odd": "Yes, because",
            "both": "Answer: A, B",
        },
    }.items():
        if f"Question {key}?" in prompt and ("one word" in prompt) == (key in ("easy", "odd")):
            return said
    if "只需回忆" in prompt:
        return "是。"
    if "另起一行" in prompt:
        return "分析。\n答案：A"
    return "yes" if "one word" in prompt else "<think>B?</think>So.\nAnswer: A"


def test_each_filter_removes_its_own_and_undecided_is_neither() -> None:
    candidates = [
        *(
            one("good"),
            one("中文", "患者发热，应选哪种药物？"),
            one("low"),
            one("high"),
            one("edge"),
        ),
        *(one("none", reference="It depends"), one("mismatch", reference="Answer: B")),
        *(one("twin1", "Which drug?"), one("twin2", "which  drug", "B", "Answer: B")),
        *(one(key) for key in ("wrong", "both", "vague", "cut", "thought", "easy", "odd")),
    ]
    rates = dict.fromkeys((c.key for c in candidates), 0.5) | {"low": 0.1, "high": 0.9, "edge": 0.8}
    found, asked = run(candidates, answer, rates)
    assert [c.key for c in found.kept] == ["good", "中文", "edge"]
    assert found.removed == {
        **dict.fromkeys(("none", "mismatch", "twin1", "twin2"), "definite"),
        **{"wrong": "agreed", "both": "agreed", "easy": "reasoning"},
        **{"low": "difficulty", "high": "difficulty"},
    }
    assert found.undecided == {
        **{"vague": "agreed", "cut": "agreed", "thought": "agreed", "odd": "reasoning"}
    }
    assert found.counts == {
        **{"kept": 3, "undecided": 4, "definite": 4, "agreed": 2, "reasoning": 1, "difficulty": 2}
    }
    assert not any("Which drug" in prompt or "none" in prompt for prompt in asked)
    assert sum("vague" in prompt for prompt in asked) == 2  # asked again once, as max_tries says


def test_an_endpoint_that_is_down_stops_everything() -> None:
    with pytest.raises(EndpointError):
        run([one("good")], lambda _: 500, {"good": 0.5})


def test_keys_are_unique_and_have_pass_rates() -> None:
    for candidates in ([one("a"), one("a")], [one("a"), one("b")]):
        with pytest.raises(UsageError, match="keys twice or without a pass rate"):
            run(candidates, answer, {"a": 0.5})
