"""The identifier filter: equal for every cut of the text, and blind to what is far away."""

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.phi import Policy, Stream, redact, scan
from attending.phi.generate import LANGUAGES, generate
from attending.phi.scan import BLOCK, LEFT, RIGHT, Marker, scan_lines

POLICY = Policy("surrogate", {"date": "shift", "mrn": "hash"}, b"sixteen bytes at least", "p")
PARTS = [
    *("Mr. ", "John Smith", " ", "\n", "\n\n", ",", "|", "\t", "MRN: ", "1234567", "Name | MRN\n"),
    *(
        "王小明",
        "患者",
        "住院号",
        "2021-03-04",
        "May ",
        "(555) 123-4567",
        "a@b.com",
        "1",
        "x",
        "-",
        ".",
    ),
    *(
        "A" * 30,
        "9" * 30,
        " " * 12,
        "\u00a0",
        "·",
        "电话",
        "幺三八零零幺三八零零零",
        "\u2003",
        "\r\n",
    ),
    *("https://a.example/", "Date of birth", ":", "é", "\U0001f600", "Parkinson disease"),
    *("12 Oak Street", "Room 4, ", "巴宾斯基征", "O'Neil-Ross", "m a c d ", "农历八月", "５月６日"),
]
texts = st.lists(st.sampled_from(PARTS), max_size=120).map("".join)


def streamed(text: str, cuts: list[int], policy: Policy) -> str:
    stream = Stream(policy)
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    told = [stream.feed(text[a:b]) for a, b in pairwise(edges)]
    return "".join(told) + stream.close()


@given(texts, st.lists(st.integers(0, 10_000), max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_stream_equals_the_whole_text_for_every_cut(text: str, cuts: list[int]) -> None:
    assert streamed(text, cuts, POLICY) == redact(text, POLICY)


@pytest.mark.parametrize("language", LANGUAGES)
def test_long_notes_stream_equally_letter_by_letter_and_at_random(language: str) -> None:
    text = "\n".join(note.text for note in generate(language, 3, seed=11))[: LEFT + 1500]
    whole = redact(text, POLICY)
    rng = random.Random(0)
    assert streamed(text, [rng.randrange(len(text)) for _ in range(40)], POLICY) == whole
    assert streamed(text, list(range(0, len(text), 7)), POLICY) == whole


@given(texts, texts, texts, texts, texts)
@settings(max_examples=40, deadline=None)
def test_marks_do_not_depend_on_what_is_far_away(
    before: str, other: str, core: str, after: str, last: str
) -> None:
    """The same LEFT characters before and RIGHT after give the same marks between them."""
    left, right = (before * 40 + "x" * LEFT)[-LEFT:], (after * 10 + "x" * RIGHT)[:RIGHT]
    marks = []
    for far_left, far_right in (("", ""), (other, last)):
        text = far_left + left + core + right + far_right
        pieces = list(Marker().all([text]))
        whole = [mark for piece in pieces for mark in piece.marks.tolist()]
        at = len(far_left) + len(left)
        marks.append(whole[at : at + len(core)])
    assert marks[0] == marks[1]


def test_a_text_of_several_blocks_is_marked_as_if_it_were_one() -> None:
    note = "\n".join(note.text for note in generate("en", 40, seed=5))
    text = (note * (3 * BLOCK // len(note) + 1))[: 2 * BLOCK + 777]
    small = [mark for piece in Marker(3001).all([text]) for mark in piece.marks.tolist()]
    large = [mark for piece in Marker().all([text]) for mark in piece.marks.tolist()]
    assert small == large


@given(texts)
@settings(max_examples=40, deadline=None)
def test_lines_hold_the_whole_texts_spans(text: str) -> None:
    lines = text.split("\n")
    found = list(scan_lines([text]))
    assert len(found) == len(lines) - (lines[-1] == "")
    hidden, start = set(), 0
    for line, spans in zip(lines, found, strict=False):
        hidden |= {start + i for span in spans for i in range(span.start, span.end)}
        assert all(0 <= span.start < span.end <= len(line) for span in spans)
        start += len(line) + 1
    whole = {i for span in scan(text) for i in range(span.start, span.end)}
    assert {i for i in whole if not text[i].isspace()} == {
        i for i in hidden if not text[i].isspace()
    }


@given(texts)
@settings(max_examples=40, deadline=None)
def test_no_identifier_that_was_found_is_left(text: str) -> None:
    """Unless it stands elsewhere too, where nothing tells that it is one."""
    redacted = redact(text)
    for span in scan(text):
        part = text[span.start : span.end]
        if len(part) > 3 and text.count(part) == 1:
            assert part not in redacted
