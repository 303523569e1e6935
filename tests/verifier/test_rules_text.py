"""Rules about form."""

from typing import Any

import pytest

from attending.errors import ConfigError
from attending.verifier.rules import check


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        ({"kind": "regex", "pattern": r"\d mg"}, ["take 5 mg"], ["take 5 g", ""]),
        ({"kind": "regex", "pattern": "a+", "full": True}, ["aa"], ["aab"]),
        (
            {"kind": "json", "keys": ["a"]},
            ['{"a": 1}', '```json\n{"a": []}\n```', '<think>x</think>{"a": 1}'],
            ['{"b": 1}', "[1]", "{a: 1}", '{"a": NaN}', 'So: {"a": 1}', "[" * 100_000],
        ),
        ({"kind": "json"}, ["[1]", "null"], ["", "x"]),
        (
            {"kind": "think"},
            ["<think>a</think>b", "<think>\n\n</think>\n\nb"],
            [
                *("b", "<think>a", "a</think>b", "<think>a</think>", "<think>a</think> \n"),
                *("<think><think>a</think>b", "<think>a</think>b<think>c</think>", "x<think>"),
            ],
        ),
        (
            {"kind": "length", "unit": "words", "min": 3, "max": 4},
            ["the patient's well-being", "发热三天", "see COVID-19 rules now"],
            ["two words", "发热三天了", "<think>a b c</think>d"],
        ),
        ({"kind": "length", "unit": "characters", "max": 3}, ["a b\nc", "", "发热了"], ["abcd"]),
        ({"kind": "length", "unit": "han", "min": 2}, ["发热 fever"], ["发 fever fever"]),
        (
            {"kind": "language", "code": "zh", "by": "script"},
            ["患者发热", "使用CT检查头部"],
            ["fever", "12", "", "発 is one letter among many others"],
        ),
        (
            {"kind": "language", "code": "en", "by": "script"},
            ["The fever (发热) is high."],
            ["患者发热 fever", "у пациента лихорадка", "..."],
        ),
    ],
)
def test_form(spec: dict[str, Any], good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not check(spec, text).passed] == []
    assert [text for text in bad if check(spec, text).passed] == []


def test_sections_are_scored_by_share() -> None:
    spec: dict[str, Any] = {"kind": "sections", "names": ["Diagnosis", "Plan", "Follow-up"]}
    assert check(spec, "## Diagnosis\nx\n**Plan**: y\n3. Follow-up\nz") == (True, "lacks []", 1.0)
    for text in ("- {}: x", "* **{}:** x", "**{}**: x", "> {}", "• {}：x", "【{}】x", "__{}__\nx"):
        assert check(spec, "\n".join(map(text.format, spec["names"]))).passed, text
    assert not check(spec, "- Diagnosis of flu\n- My plan: x\n- Follow-up x").score
    assert check(spec, "\n" * 50_000).score == 0.0
    assert check({**spec, "names": ["Exam", "Plan"]}, "Plan: y").score == 0.5
    found = check(spec, "Plan: y\nDiagnosis: x\nThe follow-up is soon")
    assert found == (False, "lacks ['Plan', 'Follow-up']", pytest.approx(1 / 3))


def test_language_by_model() -> None:
    pytest.importorskip("py3langid", reason="needs the extra verify")
    german = "Der Patient klagt seit drei Tagen über Fieber und Husten."
    assert check({"kind": "language", "code": "de"}, german) == (True, "is de", 1.0)
    assert check({"kind": "language", "code": "zh"}, german).reason == "is de"
    assert check({"kind": "language", "code": "en"}, "THE PATIENT HAS A FEVER AND A COUGH.").passed
    assert not check({"kind": "language", "code": "en"}, "123").passed
    with pytest.raises(ConfigError, match="unknown code 'english'"):
        check({"kind": "language", "code": "english"}, german)
    with pytest.raises(ConfigError, match="Known: en, zh"):
        check({"kind": "language", "code": "de", "by": "script"}, german)
