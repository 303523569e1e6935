"""Sentences are cut where a reader would cut, and nothing but markers is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attending.verifier.sentences import sentences

CASES = {
    "Dr. Lee gave 3.5 mg. daily, e.g. aspirin. Then stop!": [
        "Dr. Lee gave 3.5 mg. daily, e.g. aspirin.",
        "Then stop!",
    ],
    "It takes 5 mg. Then rest. Is it E. coli? Take it at 8 a.m. Then eat.": [
        "It takes 5 mg.",
        "Then rest.",
        "Is it E. coli?",
        "Take it at 8 a.m.",
        "Then eat.",
    ],
    "No. It needs vitamin C. See No. 5 and approx. Grade 3. Next": [
        "No.",
        "It needs vitamin C.",
        "See No. 5 and approx. Grade 3.",
        "Next",
    ],
    "1. Take aspirin. 2. Call 911.\n- **Rest** now\n\n3) Drink\nwater and\n  sleep.": [
        "Take aspirin.",
        "Call 911.",
        "Rest now",
        "Drink water and sleep.",
    ],
    "# Dose\n2.5 mg a day (see above.) Stop.": ["Dose", "2.5 mg a day (see above.)", "Stop."],
    "高血压很常见。不要停药！有3.5毫克吗？“是的。”他说": [
        "高血压很常见。",
        "不要停药！",
        "有3.5毫克吗？",
        "“是的。”",
        "他说",
    ],
    "一、休息。二、多喝水。（三）十二指肠溃疡": ["休息。", "多喝水。", "十二指肠溃疡"],
    "The limit is 140/90. Fever of 38.5. Wait... what?!": [
        "The limit is 140/90.",
        "Fever of 38.5.",
        "Wait...",
        "what?!",
    ],
    " \n--\n*\n": [],
}


@pytest.mark.parametrize(("text", "expected"), CASES.items())
def test_a_text_is_cut_where_a_reader_would_cut(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@given(st.text(st.sampled_from("abD .!?。！\n”5"), max_size=60))
def test_no_word_is_lost_or_changes_its_place(text: str) -> None:
    words = "".join(c for c in text if c.isalpha())
    assert "".join(c for c in "".join(sentences(text)) if c.isalpha()) == words
