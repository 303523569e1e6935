"""The parts of an answer are the same for every way its text is cut."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.engine.answer import AnswerParser, Call, Part, Piece

PIECES = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    '\n{"name": "f", "arguments": {"x": 1}}\n',
    '{"name": "f"}',
    "{bad",
    "<",
    "\n",
    " ",
    "a",
    "STOP",
    "ST",
    "</th",
    "<tool",
    "é",
]


def run(text: str, cuts: list[int], **options: object) -> tuple[list[Part], bool]:
    parser = AnswerParser(**options)  # type: ignore[arg-type]
    parts: list[Part] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        parts += parser.feed(text[start:end])
    ended = parser.ended
    parts += parser.finish()
    return merged(parts), ended


def merged(parts: list[Part]) -> list[Part]:
    out: list[Part] = []
    for part in parts:
        last = out[-1] if out else None
        if isinstance(part, Piece) and isinstance(last, Piece) and last.kind == part.kind:
            out[-1] = Piece(part.kind, last.text + part.text)
        else:
            out.append(part)
    return out


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_every_cut_gives_the_same_parts(data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=14)))
    options = {
        "reasons": data.draw(st.booleans()),
        "opened": data.draw(st.booleans()),
        "tools": data.draw(st.booleans()),
        "stops": data.draw(st.sampled_from([(), ("STOP",), ("TO", "STOP"), ("\n<", "a")])),
    }
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=20)))
    whole, by_character = run(text, [], **options), run(text, list(range(len(text))), **options)
    assert run(text, cuts, **options) == whole == by_character


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_nothing_but_tags_and_space_around_them_is_lost(data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=14)))
    parts, _ = run(text, [], tools=True)
    if not any(isinstance(part, Call) for part in parts):
        assert parts == ([Piece("content", text)] if text else [])
    # Without tools and reasoning an answer is its text.
    assert run(text, [])[0] == ([Piece("content", text)] if text else [])


def test_reasoning_calls_and_content_come_apart() -> None:
    text = (
        '<think>\nhm\n</think>\n\nLet me look. \n<tool_call>\n{"name": "find", "arguments": '
        '{"q": "x"}}\n</tool_call>\n<tool_call>\n{"name": "find", "arguments": "{}"}\n</tool_call>'
    )
    assert run(text, [], reasons=True, tools=True)[0] == [
        Piece("reasoning", "hm"),
        Piece("content", "Let me look."),
        Call("find", '{"q": "x"}'),
        Call("find", "{}"),
    ]


def test_a_call_that_is_none_stays_text() -> None:
    for body in ("", "{", "[]", '{"name": 3}', '{"name": "f", "arguments": [1]}', "[" * 100_000):
        text = f"see  <tool_call>{body}</tool_call> end"
        assert run(text, [3], tools=True)[0] == [Piece("content", text)]
    assert run("a <tool_call>{", [3], tools=True)[0] == [Piece("content", "a <tool_call>{")]


def test_cut_off_reasoning_is_not_an_answer() -> None:
    assert run("I think", [2], reasons=True, opened=True) == (
        [Piece("reasoning", "I think")],
        False,
    )


def test_the_stop_text_that_is_complete_first_ends_the_answer() -> None:
    assert run("one two", [5], stops=("wo", "two", "e t")) == ([Piece("content", "on")], True)


ANSWERS = [
    ("<think>\nbecause\n</think>\n\nanswer", False, "because", "answer"),
    ("  <think>x</think>y", False, "x", "y"),
    ("because\nof\n</think>\n\nanswer\n", True, "because\nof", "answer\n"),
    ("never closed\n\n", True, "never closed", ""),
    ("<think>cut </thi", False, "cut </thi", ""),
    ("no tags < here <thin", False, "", "no tags < here <thin"),
    ("<thi", False, "", "<thi"),
    ("a </think> b", False, "", "a </think> b"),
    ("\n\n", False, "", "\n\n"),
    ("</think>\n\nfast", True, "", "fast"),
    ("a\n\n</think", True, "a\n\n</think", ""),
]


@pytest.mark.parametrize(("text", "opened", "reasoning", "content"), ANSWERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_reasoning_is_split_alike_for_every_cut(
    text: str, opened: bool, reasoning: str, content: str, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    parts, _ = run(text, cuts, reasons=True, opened=opened)
    kinds = (("reasoning", reasoning), ("content", content))
    assert parts == [Piece(kind, words) for kind, words in kinds if words]  # type: ignore[arg-type]
