"""From tokens to parts with a real tokenizer: ends, characters in pieces, counts."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.chat import Tokenizer
from attending.engine.answer import AnswerParser, AnswerWriter, Call, Part, Piece
from tests.engine.test_grammar import END, TOOLS, tokenizer
from tests.hallway.test_chat import RAW, REASONING, says, texts
from tests.properties.test_answer_parser import merged

OPEN, CLOSE = RAW.token_to_id("<think>"), RAW.token_to_id("</think>")
READER, THINKER, CALLER = tokenizer(), tokenizer(REASONING), tokenizer(TOOLS)


def write(writer: AnswerWriter, ids: list[int], last: str | None = "stop") -> list[Part]:
    parts: list[Part] = []
    for index, token in enumerate(ids):
        finish = last if index == len(ids) - 1 else None
        parts += writer.feed(token, finish)  # type: ignore[arg-type]
    return merged(parts)


def chat(
    reader: Tokenizer = READER,
    stops: tuple[str, ...] = (),
    *,
    tools: bool = False,
    opened: bool = False,
) -> AnswerWriter:
    prompt = reader.render(says("q"), thinking_mode="on" if opened else "off")
    return AnswerWriter.of_chat(reader, prompt, {END}, stops, tools=tools)


@settings(max_examples=80, deadline=None)
@given(words=texts)
def test_an_answer_is_the_text_of_its_tokens_and_its_end_has_none(words: str) -> None:
    writer = chat()
    ids = [*READER.encode(words), END]
    parts = write(writer, ids)
    assert parts == ([Piece("content", words)] if words else [])
    assert writer.finish_reason == "stop" and writer.token_ids == ids
    assert writer.reasoning_tokens == 0


def test_a_character_in_pieces_comes_whole_or_as_a_replacement_at_the_end() -> None:
    first, *rest = READER.encode("😀")
    assert rest, "the vocabulary must spell it with several tokens"
    writer = chat()
    assert [writer.feed(i, None) for i in (first, *rest[:-1])] == [[]] * len(rest)
    assert writer.feed(rest[-1], None) == [Piece("content", "😀")]
    (cut,) = write(chat(), [*READER.encode("a"), first], "length")
    assert isinstance(cut, Piece) and cut.text.startswith("a\ufffd")
    (stopped,) = write(chat(), [first, END])
    assert isinstance(stopped, Piece) and stopped.text == "\ufffd"


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_what_was_held_back_comes_at_the_end(finish: str) -> None:
    writer = chat(stops=("STOP",))
    assert write(writer, READER.encode("an STO"), finish) == [Piece("content", "an STO")]
    assert writer.finish_reason == finish


def test_an_end_without_a_token_ends_the_answer() -> None:
    writer = chat()
    assert writer.feed(None, "length") == []
    assert (writer.finish_reason, writer.token_ids) == ("length", [])


@settings(max_examples=60, deadline=None)
@given(before=st.text("ab ", max_size=6), after=st.text("abS ", max_size=6))
def test_a_stop_text_ends_the_answer_wherever_tokens_end(before: str, after: str) -> None:
    writer = chat(stops=("STOP", "b a"))
    whole = before + "STOP" + after
    end = min(whole.find(s) for s in ("STOP", "b a") if s in whole)
    parts: list[Part] = []
    for token in READER.encode(whole):
        parts += writer.feed(token, None)
        if writer.finish_reason:
            break
    assert writer.finish_reason == "stop"
    assert merged(parts) == ([Piece("content", whole[:end])] if end else [])


def test_a_stop_text_that_the_last_token_completes_is_a_stop_and_no_length() -> None:
    writer = chat(stops=("b",))
    assert write(writer, READER.encode("ab"), "length") == [Piece("content", "a")]
    assert writer.finish_reason == "stop"


def test_a_stop_text_in_the_characters_that_only_the_end_shows() -> None:
    writer = chat(stops=("\ufffd",))
    first = READER.encode("😀")[0]
    assert write(writer, [*READER.encode("a"), first], "length") == [Piece("content", "a")]
    assert writer.finish_reason == "stop"


def test_reasoning_that_the_prompt_opened_is_counted_up_to_its_closing_tag() -> None:
    thought, said = THINKER.encode("hm, fever"), THINKER.encode("rest")
    writer = chat(THINKER, opened=True)
    parts = write(writer, [*thought, CLOSE, *said, END])
    assert parts == [Piece("reasoning", "hm, fever"), Piece("content", "rest")]
    assert writer.reasoning_tokens == len(thought) + 1


def test_reasoning_that_the_model_opens_is_counted_with_its_tags() -> None:
    thought, said = THINKER.encode("\nhm\n"), THINKER.encode("\n\nrest")
    writer = chat(THINKER)
    parts = write(writer, [OPEN, *thought, CLOSE, *said, END])
    assert parts == [Piece("reasoning", "hm"), Piece("content", "rest")]
    assert writer.reasoning_tokens == len(thought) + 2


def test_a_model_that_does_not_reason_has_no_reasoning_though_it_writes_the_tags() -> None:
    writer = chat(READER)
    assert write(writer, [OPEN, *READER.encode("a"), CLOSE, END]) == [
        Piece("content", "<think>a</think>")
    ]
    assert writer.reasoning_tokens == 0


def test_plain_completions_keep_everything() -> None:
    writer = AnswerWriter(CALLER, AnswerParser(), {END})
    words = "<tool_call>{}</tool_call>\n\n"
    assert write(writer, [*CALLER.encode(words), OPEN, END]) == [
        Piece("content", words + "<think>")
    ]


CALL = '<tool_call>\n{"name": "dose", "arguments": {"mg": 5, "of": "µ"}}\n</tool_call>'


@pytest.mark.parametrize("added", [(), ("<tool_call>", "</tool_call>")])
def test_calls_are_found_as_text_and_as_tokens(added: tuple[str, ...]) -> None:
    reader = tokenizer(TOOLS, *added)
    ids: list[int] = []
    for index, words in enumerate(CALL.replace("</tool_call>", "<tool_call>").split("<tool_call>")):
        tag = "<tool_call>" if index == 1 else "</tool_call>"
        known = reader.control_id(tag)
        ids += [] if not index else [known] if known is not None else reader.encode(tag)
        ids += reader.encode(words)
    writer = chat(reader, tools=True)
    (call,) = write(writer, [*ids, END])
    assert isinstance(call, Call) and call.name == "dose"
    assert json.loads(call.arguments) == {"mg": 5, "of": "µ"} and "µ" in call.arguments
    assert writer.finish_reason == "tool_calls"


def test_an_answer_that_was_cut_after_a_call_says_so() -> None:
    writer = chat(CALLER, tools=True)
    parts = write(writer, CALLER.encode(CALL + "\nand"), "length")
    assert [type(part) for part in parts] == [Call, Piece] and writer.finish_reason == "length"
    cut = chat(CALLER, tools=True)
    assert write(cut, CALLER.encode(CALL[:-3]), "length") == [Piece("content", CALL[:-3])]


def test_without_tools_a_call_is_text() -> None:
    writer = chat(CALLER)
    assert write(writer, [*CALLER.encode(CALL), END]) == [Piece("content", CALL)]
    assert writer.finish_reason == "stop"
