"""Answers of a prescribed form: what a random model writes under a grammar parses and fits."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Raw

from attending.chat import Tokenizer
from attending.engine.answer import AnswerWriter, Call, Part, Piece
from attending.engine.grammar import Constraint, Grammars
from attending.engine.sampler import Sampling
from attending.engine.scheduler import Request, Scheduler
from attending.errors import UsageError
from tests.engine.serving import Notebook
from tests.hallway.test_chat import CHATML, RAW, REASONING, says

SPARE = 20  # more logits than the tokenizer has ids, as released models have
END = RAW.token_to_id("<|im_end|>")
TOOLS = CHATML + "{% if tools %}{% endif %}"


def tokenizer(template: str = CHATML, *added: str) -> Tokenizer:
    raw = Raw.from_str(RAW.to_str())
    raw.add_tokens([AddedToken(name, special=False, normalized=False) for name in added])
    config = {"eos_token": "<|im_end|>", "chat_template": template}
    return Tokenizer(json.loads(raw.to_str()), config)


class Desk:
    """Random logits with one tokenizer, and answers of them."""

    def __init__(self, reader: Tokenizer) -> None:
        self.reader = reader
        self.vocab = len(RAW.get_vocab()) + 4 + SPARE
        self.scheduler = Scheduler(Notebook(num_pages=8, vocab=self.vocab))
        self.grammars = Grammars(reader, self.vocab, [END])

    def ask(
        self, grammar: Constraint, seed: int, *, max_tokens: int = 120, **variables: Any
    ) -> tuple[list[Part], AnswerWriter]:
        """Hot, so that all that is allowed is tried; text is made unlikely to go on for ever."""
        prompt = tuple(self.reader.render(says("q"), **variables))
        closing = [(i, 3.0) for i in (END, *(RAW.token_to_id(c) for c in '"}]'))]
        sampling = Sampling(
            temperature=1.5, seed=seed, max_tokens=max_tokens, logit_bias=tuple(closing)
        )
        handle = self.scheduler.submit(Request(prompt, sampling, frozenset({END}), grammar=grammar))
        writer = AnswerWriter.of_chat(self.reader, prompt, {END}, tools=True)
        parts: list[Part] = []
        while writer.finish_reason is None:
            for output in self.scheduler.step():
                assert output.error is None and output.handle == handle
                parts += writer.feed(output.token, output.finish)
        return parts, writer


def content(parts: list[Part]) -> str:
    return "".join(p.text for p in parts if isinstance(p, Piece) and p.kind == "content")


def is_point(value: Any) -> bool:
    return list(value) == ["x", "y"] and all(type(value[axis]) is int for axis in "xy")


def obj(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


POINT = obj(x={"type": "integer"}, y={"type": "integer"})
DOSE = {"type": "integer", "minimum": 5, "maximum": 12}
UNIT = {"enum": ["mg", "ml", "µg"]}
SCHEMAS: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "integers": (POINT, is_point),
    "enum_and_range": (
        obj(dose=DOSE, unit=UNIT),
        lambda v: (
            list(v) == ["dose", "unit"] and 5 <= v["dose"] <= 12 and v["unit"] in UNIT["enum"]
        ),
    ),
    "array": (
        {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
        lambda v: 2 <= len(v) <= 4 and all(type(item) is bool for item in v),
    ),
    "nested": (
        obj(points={"type": "array", "items": POINT, "maxItems": 2}, note=obj(ok={"const": None})),
        lambda v: all(map(is_point, v["points"])) and v["note"] == {"ok": None},
    ),
    "referenced": (
        obj(a={"$ref": "#/$defs/p"}, b={"$ref": "#/$defs/p"}) | {"$defs": {"p": POINT}},
        lambda v: is_point(v["a"]) and is_point(v["b"]),
    ),
    "string_of_a_pattern": (
        obj(code={"type": "string", "pattern": "^[A-Z][0-9]{2}$"}),
        lambda v: len(v["code"]) == 3 and v["code"][0].isupper() and v["code"][1:].isdigit(),
    ),
    "short_string_or_null": (
        obj(name={"anyOf": [{"type": "string", "maxLength": 6}, {"type": "null"}]}),
        lambda v: v["name"] is None or len(v["name"]) <= 6,
    ),
}


@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_answers_parse_and_fit_their_schema(name: str) -> None:
    schema, fits = SCHEMAS[name]
    desk = Desk(tokenizer())
    finished = 0
    for seed in range(6):
        parts, writer = desk.ask(desk.grammars.json(schema, opened=False), seed)
        if writer.finish_reason == "stop":
            finished += 1
            assert fits(json.loads(content(parts)))
    assert finished >= 3  # the others were cut at their limit, within a number or white space


def test_any_json_object() -> None:
    desk = Desk(tokenizer())
    ended = 0
    for seed in range(6):
        parts, writer = desk.ask(desk.grammars.json({"type": "object"}, opened=False), seed)
        assert content(parts).startswith("{")
        if writer.finish_reason == "stop":
            ended += 1
            assert isinstance(json.loads(content(parts)), dict)
    assert ended


def test_masks_are_as_long_as_the_logits_and_never_allow_ids_without_text() -> None:
    desk = Desk(tokenizer())
    grammar = desk.grammars.json({"type": "string"}, opened=False)
    for token in desk.reader.encode('"abc'):
        mask = grammar.allowed()
        assert mask is not None and mask.size >= desk.vocab and mask[token]
        assert not mask[len(RAW.get_vocab()) : desk.vocab].any()
        assert not mask[END]
        grammar.advance(token)
    grammar.advance(desk.reader.encode('"')[0])
    mask = grammar.allowed()
    assert mask is not None and np.flatnonzero(mask).tolist() == [END]


def test_two_answers_of_one_schema_do_not_share_their_place() -> None:
    grammars = Desk(tokenizer()).grammars
    one, two = (grammars.json(POINT, opened=False) for _ in range(2))
    one.advance(RAW.token_to_id("{"))
    mask = two.allowed()
    assert mask is not None and np.flatnonzero(mask).tolist() == [RAW.token_to_id("{")]


@pytest.mark.parametrize("closing", ["</think>", "text"])
def test_a_model_that_is_reasoning_is_free_until_it_ends(closing: str) -> None:
    desk = Desk(tokenizer(REASONING))
    grammar = desk.grammars.json(POINT, opened=True)
    for token in desk.reader.encode('let me see: {"x" <think> </thin'):
        assert grammar.allowed() is None
        grammar.advance(token)
    end = RAW.token_to_id("</think>")
    for token in [end] if closing == "</think>" else desk.reader.encode(" no </think>"):
        assert grammar.allowed() is None
        grammar.advance(token)
    mask = grammar.allowed()
    assert mask is not None and np.flatnonzero(mask).tolist() == [RAW.token_to_id("{")]


def test_reasoning_may_come_first_where_the_prompt_has_not_opened_it() -> None:
    desk = Desk(tokenizer(REASONING))
    think, brace = RAW.token_to_id("<think>"), RAW.token_to_id("{")
    for first in (think, brace):
        grammar = desk.grammars.json(POINT, opened=False)
        mask = grammar.allowed()
        assert mask is not None and set(np.flatnonzero(mask)) == {think, brace}
        grammar.advance(first)
        if first == think:
            assert grammar.allowed() is None
        else:
            mask = grammar.allowed()
            assert mask is not None and not mask[think] and mask[RAW.token_to_id('"')]


def test_without_reasoning_in_the_template_the_form_holds_from_the_first_token() -> None:
    grammar = Desk(tokenizer()).grammars.json(POINT, opened=False)
    mask = grammar.allowed()
    assert mask is not None and np.flatnonzero(mask).tolist() == [RAW.token_to_id("{")]


@pytest.mark.parametrize("mode", ["on", "off"])
def test_reasoning_and_form_in_one_answer(mode: str) -> None:
    desk = Desk(tokenizer(REASONING))
    ended = 0
    for seed in range(4):
        grammar = desk.grammars.json(obj(ok={"type": "boolean"}), opened=mode == "on")
        parts, writer = desk.ask(grammar, seed, max_tokens=100, thinking_mode=mode)
        if content(parts) and writer.finish_reason == "stop":
            ended += 1
            assert list(json.loads(content(parts))) == ["ok"]
    assert ended or mode == "on"  # a random model may think without end


FUNCTIONS = [
    ("dose", obj(mg=DOSE)),
    ("find.drug-2", obj(kind={"enum": ["pill", "drop"]})),
    ("now", obj()),
]


@pytest.mark.parametrize("added", [(), ("<tool_call>", "</tool_call>"), ("<tool_call>",)])
def test_a_forced_call_can_be_read_with_and_without_tokens_for_its_tags(
    added: tuple[str, ...],
) -> None:
    desk = Desk(tokenizer(TOOLS, *added))
    called = set()
    for seed in range(8):
        parts, writer = desk.ask(desk.grammars.call(FUNCTIONS, opened=False), seed)
        if writer.finish_reason == "length":
            continue
        (call,) = parts
        assert isinstance(call, Call) and writer.finish_reason == "tool_calls"
        arguments = json.loads(call.arguments)
        assert {
            "dose": lambda a: list(a) == ["mg"] and 5 <= a["mg"] <= 12,
            "find.drug-2": lambda a: a["kind"] in ("pill", "drop"),
            "now": lambda a: a == {},
        }[call.name](arguments)
        called.add(call.name)
        tag = desk.reader.control_id("<tool_call>")
        assert (tag is not None) == bool(added) and (tag is None or writer.token_ids[0] == tag)
    assert called


def test_a_call_of_one_named_function() -> None:
    desk = Desk(tokenizer(TOOLS))
    told = [desk.ask(desk.grammars.call(FUNCTIONS[2:], opened=False), seed) for seed in range(5)]
    ended = [parts for parts, writer in told if writer.finish_reason != "length"]
    assert ended and all(parts == [Call("now", "{}")] for parts in ended)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"type": 5},
        {"$ref": "#/nowhere"},
        {"$ref": "http://127.0.0.1:1/schema"},
        {"type": "string", "pattern": "("},
        {"type": "object", "properties": 3},
        {"enum": []},
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"not": {"type": "string"}},
        {"type": "array", "uniqueItems": True},
        {"type": "string", "format": "no such format"},
    ],
)
def test_what_cannot_be_enforced_is_refused_and_not_ignored(schema: dict[str, Any]) -> None:
    grammars = Desk(tokenizer(TOOLS)).grammars
    with pytest.raises(UsageError, match=r"the schema cannot be enforced: .") as error:
        grammars.json(schema, opened=False)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="the schema cannot be enforced"):
        grammars.call([("f", schema)], opened=False)
