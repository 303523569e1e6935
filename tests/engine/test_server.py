"""The engine's API by the official client: every feature."""

import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from attending import endpoint
from attending.engine.local import Model
from attending.engine.server import Service
from tests.engine.folders import write_model
from tests.engine.served import ASK, WEATHER, client, serve
from tests.hallway.test_chat import RAW, REASONING

SCHEMAS = json.loads((Path(endpoint.__file__).parent / "engine" / "replies.json").read_text())
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
THINK = RAW.token_to_id("<think>")


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


def test_echo_scores_a_prompt_as_the_model_itself_does(folder: Path) -> None:
    with serve(write_model(folder / "float"), dtype="float32") as (url, service):
        echoes(url, service._model)


def echoes(url: str, model: Model) -> None:
    prompt = "the patient has a fever " * 12
    answer = client(url).completions.create(
        model="float", prompt=prompt, max_tokens=0, echo=True, logprobs=2
    )
    [choice] = answer.choices
    assert choice.text == prompt and choice.logprobs is not None
    ids = model.tokenizer.encode(prompt)
    log_probabilities = model.logits([ids])[0].double().log_softmax(-1)
    expected = [float(log_probabilities[i, token]) for i, token in enumerate(ids[1:])]
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert "".join(choice.logprobs.tokens or []) == prompt
    assert choice.logprobs.text_offset is not None and choice.logprobs.text_offset[0] == 0
    by_ids = client(url).completions.create(
        model="float", prompt=ids, max_tokens=0, echo=True, logprobs=0
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


def test_content_in_parts_is_one_text(served: tuple[str, Service]) -> None:
    ask, words = client(served[0]).chat.completions, "has the patient a fever"
    parts: Any = [{"type": "text", "text": words[:9]}, {"type": "text", "text": words[9:]}]
    in_parts, whole = (
        ask.create(
            model="tiny", messages=[{"role": "user", "content": content}], seed=1, max_tokens=9
        )
        for content in (parts, words)
    )
    assert in_parts.choices[0].message.content == whole.choices[0].message.content
    assert in_parts.usage and whole.usage
    assert in_parts.usage.prompt_tokens == whole.usage.prompt_tokens
