"""The engine's API by the official client: every feature, refusals, clients that go, the child."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest

from attending import endpoint
from attending.engine.server import EngineOptions, Service, prepare
from attending.errors import CheckpointError, ConfigError, EndpointError, SourceError
from tests.engine.folders import write_model
from tests.hallway.test_chat import RAW, REASONING
from tests.running import running

SCHEMAS = json.loads((Path(endpoint.__file__).parent / "engine" / "replies.json").read_text())
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"enum": ["mg", "ml"]}},
            "required": ["unit"],
            "additionalProperties": False,
        },
    },
}
ENDLESS = {str(RAW.token_to_id("<|im_end|>")): -100}
THINK = RAW.token_to_id("<think>")
ASK: list[Any] = [{"role": "user", "content": "has the patient a fever"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[tuple[str, Service]]:
    with serve(write_model(folder / "tiny")) as both:
        yield both


def serve(model: Path, **options: Any) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def context() -> Iterator[tuple[str, Service]]:
        chosen = EngineOptions.build(options)
        service = Service(prepare(str(model), chosen), chosen)
        engine = threading.Thread(target=service.worker.run)
        engine.start()
        with running(service.app()) as url:
            yield url, service
        engine.join(10)
        assert not engine.is_alive()

    return context()


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)


def test_chat_whole_and_streamed_say_the_same(served: tuple[str, Service]) -> None:
    ask = client(served[0]).chat.completions
    plain = ask.create(model="tiny", messages=ASK, seed=3, max_tokens=24)
    assert plain.object == "chat.completion" and plain.choices[0].message.role == "assistant"
    text, reason, usage = "", None, None
    for event in ask.create(
        model="tiny",
        messages=ASK,
        seed=3,
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
    ):
        for choice in event.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
        usage = event.usage or usage
    assert text == plain.choices[0].message.content
    assert reason == plain.choices[0].finish_reason
    assert usage is not None and plain.usage is not None
    assert usage.completion_tokens == plain.usage.completion_tokens
    assert usage.prompt_tokens == plain.usage.prompt_tokens


def test_every_answer_is_of_its_schema(served: tuple[str, Service]) -> None:
    base, post = {"model": "tiny", "max_tokens": 8, "seed": 1, "return_token_ids": True}, httpx.post
    chat = base | {"messages": ASK, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1}
    text = base | {"prompt": ["a fever", "system"], "logprobs": 2, "echo": True, "n": 2}
    text["prompt_logprobs"] = 0
    for path, body, name in (
        ("/chat/completions", chat, "ChatCompletion"),
        ("/completions", text, "Completion"),
    ):
        validator = jsonschema_rs.validator_for(SCHEMAS | {"$ref": f"#/$defs/{name}"})
        answer = post(f"{served[0]}/v1{path}", json=body).json()
        validator.validate(answer)
        streamed = post(
            f"{served[0]}/v1{path}",
            json=body | {"stream": True, "stream_options": {"include_usage": True}},
        ).text
        chunk = "ChatChunk" if name == "ChatCompletion" else name
        validator = jsonschema_rs.validator_for(SCHEMAS | {"$ref": f"#/$defs/{chunk}"})
        events = [line.removeprefix("data: ") for line in streamed.splitlines() if line]
        assert events[-1] == "[DONE]"
        for event in events[:-1]:
            validator.validate(json.loads(event))
        assert json.loads(events[-2])["usage"] == answer["usage"]
    models = httpx.get(f"{served[0]}/v1/models").json()
    jsonschema_rs.validator_for(SCHEMAS | {"$ref": "#/$defs/ModelList"}).validate(models)


def test_n_answers_differ_and_the_first_is_the_lone_one(served: tuple[str, Service]) -> None:
    ask = client(served[0]).chat.completions
    many = ask.create(model="tiny", messages=ASK, seed=5, n=3, max_tokens=16, temperature=1.0)
    texts = [choice.message.content for choice in many.choices]
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    for copy in range(3):  # copy i is what its own seed gives alone
        lone = ask.create(model="tiny", messages=ASK, seed=5 + copy, max_tokens=16, temperature=1.0)
        assert lone.choices[0].message.content == texts[copy]


def test_log_probabilities_line_up_whole_and_streamed(served: tuple[str, Service]) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": ASK, "seed": 1, "max_tokens": 12}
    ask |= {"logprobs": True, "top_logprobs": 3}
    plain = client(served[0]).chat.completions.create(**ask)
    whole = plain.choices[0].logprobs
    assert whole is not None and whole.content is not None and plain.usage is not None
    assert len(whole.content) == plain.usage.completion_tokens
    for place in whole.content:
        assert len(place.top_logprobs) == 3 and place.logprob <= place.top_logprobs[0].logprob
    pieces: list[Any] = []
    for event in client(served[0]).chat.completions.create(**ask, stream=True):
        if event.choices and event.choices[0].logprobs:
            pieces += event.choices[0].logprobs.content or []
    assert [p.token for p in pieces] == [p.token for p in whole.content]
    # Alone or beside prompt scores, the numbers agree to rounding only.
    assert [p.logprob for p in pieces] == pytest.approx([p.logprob for p in whole.content])


def test_echo_scores_a_prompt_as_the_model_itself_does(served: tuple[str, Service]) -> None:
    url, service = served
    prompt = "the patient has a fever " * 12
    answer = client(url).completions.create(
        model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=2
    )
    [choice] = answer.choices
    assert choice.text == prompt and choice.logprobs is not None
    model = service._model
    ids = model.tokenizer.encode(prompt)
    log_probabilities = model.logits([ids])[0].double().log_softmax(-1)
    expected = [float(log_probabilities[i, token]) for i, token in enumerate(ids[1:])]
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert "".join(choice.logprobs.tokens or []) == prompt
    assert choice.logprobs.text_offset is not None and choice.logprobs.text_offset[0] == 0
    by_ids = client(url).completions.create(
        model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=0
    )
    assert by_ids.choices[0].text == prompt


def test_token_ids_given_back_are_those_that_were_scored(served: tuple[str, Service]) -> None:
    body = {"model": "tiny", "messages": ASK, "seed": 2, "max_tokens": 9, "return_token_ids": True}
    answer = httpx.post(f"{served[0]}/v1/chat/completions", json=body).json()
    ids, written = answer["prompt_token_ids"], answer["choices"][0]["token_ids"]
    assert len(written) == answer["usage"]["completion_tokens"]
    tokenizer = served[1]._model.tokenizer
    assert ids == tokenizer.render(ASK)
    again = {"model": "tiny", "prompt": ids, "seed": 2, "max_tokens": 9, "return_token_ids": True}
    more = httpx.post(f"{served[0]}/v1/completions", json=again).json()
    assert more["choices"][0]["token_ids"] == written


def test_stop_texts_end_an_answer_wherever_token_borders_fall(served: tuple[str, Service]) -> None:
    ask = client(served[0]).completions
    whole = ask.create(model="tiny", prompt="a fever", seed=4, max_tokens=40).choices[0].text
    assert len(whole) > 20
    stop = whole[9:14]
    cut = ask.create(model="tiny", prompt="a fever", seed=4, max_tokens=40, stop=[stop, "\x00\x01"])
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage is not None and cut.usage.completion_tokens < 40


def test_a_shared_beginning_is_found_and_counted(served: tuple[str, Service]) -> None:
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "seed": 1}
    ask["prompt"] = "im_start im_end system think " * 9
    first, second = (client(served[0]).completions.create(**ask) for _ in range(2))
    assert first.choices[0].text == second.choices[0].text
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens == 64


def test_tools_are_offered_called_and_forced(folder: Path) -> None:
    with serve(write_model(folder / "tools", TOOLS, max_position_embeddings=1024)) as (url, _):
        ask = client(url).chat.completions
        named = {"type": "function", "function": {"name": "look_up"}}
        for choice in ("required", named):
            answer = ask.create(
                model="tools",
                messages=ASK,
                tools=[WEATHER],  # type: ignore[list-item]
                tool_choice=choice,  # type: ignore[arg-type]
                max_tokens=150,
                seed=1,
            ).choices[0]
            assert answer.finish_reason == "tool_calls" and answer.message.tool_calls
            [call] = answer.message.tool_calls
            assert call.type == "function" and call.function.name == "look_up"
            assert json.loads(call.function.arguments)["unit"] in ("mg", "ml")
            assert answer.message.content is None
        # The call and its answer go back into the conversation.
        turn: Any = {"role": "assistant", "tool_calls": [call.model_dump()], "content": None}
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": "5"}
        more = ask.create(model="tools", messages=[*ASK, turn, result], max_tokens=3)
        assert more.choices[0].message.role == "assistant"
        with_tools = ask.create(
            model="tools",
            messages=ASK,
            tools=[WEATHER],  # type: ignore[list-item]
            max_tokens=1,
        )
        without = ask.create(model="tools", messages=ASK, max_tokens=1)
        assert with_tools.usage and without.usage
        assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens + 20
        events = ask.create(
            model="tools",
            messages=ASK,
            tools=[WEATHER],  # type: ignore[list-item]
            tool_choice="required",
            max_tokens=150,
            seed=1,
            stream=True,
        )
        deltas = [event.choices[0].delta for event in events]
        [streamed] = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
        assert streamed.function is not None
        assert streamed.function.arguments == call.function.arguments


def test_json_schema_begins_only_after_the_reasoning(folder: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"dose": {"type": "integer", "maximum": 9}, "unit": {"enum": ["mg", "ml"]}},
        "required": ["dose", "unit"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "dose", "schema": schema}}
    with serve(write_model(folder / "thinks", REASONING)) as (url, service):
        close = service._model.tokenizer.control_id("</think>")
        body: dict[str, Any] = {"model": "thinks", "messages": ASK, "response_format": form}
        body |= {"seed": 1, "max_tokens": 200, "temperature": 0.0, "return_token_ids": True}
        url = f"{url}/v1/chat/completions"
        # The random model is led out of its thoughts: the closing tag becomes the likeliest token
        # only there, since the grammar does not allow it in the JSON.
        on = body | {
            "chat_template_kwargs": {"thinking_mode": "on"},
            "logit_bias": {str(close): 15.0},
        }
        off = body | {"logit_bias": {str(THINK): -100}}  # else the model may choose to think
        for asked, opened in ((on, True), (off, False)):
            answer = httpx.post(url, json=asked).json()["choices"][0]
            dose = json.loads(answer["message"]["content"])
            assert dose["unit"] in ("mg", "ml") and dose["dose"] <= 9
            assert answer["finish_reason"] == "stop"
            assert (close in answer["token_ids"]) == opened


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
    with serve(model, max_running=1, max_waiting=1) as (url, _):
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
    with serve(write_model(folder / f"gone{stream}")) as (url, service):
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


def test_endpoint_open_runs_a_child_that_ends_with_the_block(folder: Path) -> None:
    model = write_model(folder / "child")

    async def use() -> tuple[str, int]:
        async with endpoint.open(str(model), engine={"max_running": 2, "threads": 1}) as opened:
            reply = await opened.chat(ASK, max_tokens=5, seed=1)
            assert reply.output_tokens and opened.model == "child"
            child = next(
                int(pid)
                for pid in (entry.name for entry in Path("/proc").iterdir())
                if pid.isdigit() and b"engine.server" in command(pid) and b"child" in command(pid)
            )
            return reply.text, child

    def command(pid: str) -> bytes:
        try:
            return (Path("/proc") / pid / "cmdline").read_bytes()
        except OSError:
            return b""

    _, child = asyncio.run(use())
    assert b"engine.server" not in command(str(child))


def test_a_child_ends_when_its_parent_is_killed(folder: Path) -> None:
    model = write_model(folder / "orphan")
    code = (
        "import asyncio, sys\nfrom attending import endpoint\n"
        "async def main():\n"
        "    child = endpoint.EngineProcess(sys.argv[1], {'threads': 1})\n"
        "    await child.start()\n"
        "    print(child._child.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(model)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_child_is_seen_and_can_be_started_again(folder: Path) -> None:
    model = write_model(folder / "killed")

    async def use() -> None:
        child = endpoint.EngineProcess(str(model), {"threads": 1})
        await child.start()
        assert child._child is not None
        child._child.kill()
        assert await child.wait() == -signal.SIGKILL
        async with endpoint.Endpoint(
            child.url, "killed", options=endpoint.EndpointOptions(max_tries=1)
        ) as broken:
            with pytest.raises(EndpointError):
                await broken.chat(ASK)
        await child.start()
        async with endpoint.Endpoint(child.url, "killed") as mended:
            assert (await mended.chat(ASK, max_tokens=2)).output_tokens
        await child.stop()

    asyncio.run(use())


@pytest.mark.parametrize(
    ("engine", "error", "says"),
    [
        (None, SourceError, "does not exist"),
        ({"colour": 1}, ConfigError, "colour: unknown"),
        ("empty", CheckpointError, "config.json"),
    ],
)
def test_a_child_that_cannot_load_says_why(
    tmp_path: Path, engine: Any, error: type[Exception], says: str
) -> None:
    (tmp_path / "empty").mkdir()
    name = str(tmp_path / "empty") if engine == "empty" else "no-such-model"

    async def use() -> None:
        options = engine if isinstance(engine, dict) else None
        async with endpoint.open(name, engine=options):
            pass

    with pytest.raises(error, match=says):
        asyncio.run(use())
