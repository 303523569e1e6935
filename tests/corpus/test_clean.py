"""Normal form, faults, language, scores, the split rule and repeats."""

import random
import unicodedata
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.corpus.clean import fault, language_of, normalise
from attending.corpus.recipe import QualityConfig
from attending.corpus.score import SHIPPED, SPOILS, Scorer
from attending.corpus.split import draw, is_held_out, repeats

QUALITY = QualityConfig(min_characters=5, max_token_characters=30)


@settings(max_examples=500)
@given(st.text(max_size=80) | st.text("a \n\r\t\x00\u200b\u0301e\u2028\u3000\ufeff", max_size=40))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text).text
    assert normalise(once) == (once, 0)
    assert unicodedata.is_normalized("NFC", once)


def test_what_is_normalised_and_what_is_not() -> None:
    assert normalise("\ufeffa\r\nb\rc\x00\u200b d \n\n\n\n\n\ne ").text == "a\nb\nc d\n\n\ne"
    assert normalise("a\x00\x01b").num_unseen == 2
    assert normalise("e\u0301").text == "é"
    dose = "10 m² × 5 µg ½ ① Ａ"  # NFKC would write 10 m2 and 1⁄2
    assert normalise(dose).text == dose


def test_faults_are_found_and_chinese_is_no_long_token() -> None:
    assert [fault(t, QUALITY) for t in ("", "abcd", "abcde", "x" * 31)] == [
        "empty", "too_short", "", "long_token",
    ]  # fmt: skip
    assert fault("患者胸痛三天入院" * 20, QUALITY) == ""


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The patient was admitted with chest pain and a fever.", "en"),
        ("患者因胸痛三天入院，心电图示段抬高。", "zh"),
        ("患者 ECG 示 ST 段抬高，予 aspirin 300 mg 口服", "zh"),
        ("El paciente presenta dolor torácico y fiebre desde hace días.", "es"),
        ("患者は胸痛と発熱を訴えて来院した。", "ja"),
    ],
)
def test_languages_are_told_apart(text: str, language: str) -> None:
    assert language_of(("en", "zh"))(text) == language


def test_the_split_rule_is_sha256_mod_fifty() -> None:
    keys = [f"doc-{n}" for n in range(5000)]
    assert [is_held_out(key) for key in keys] == [
        int(sha256(key.encode()).hexdigest(), 16) % 50 == 0 for key in keys
    ]
    assert 60 < sum(map(is_held_out, keys)) < 140


@given(st.integers(1, 40), st.integers(1, 12), st.floats(0, 3), st.text(max_size=9))
def test_repeats_are_capped_then_weighted(found: int, most: int, weight: float, key: str) -> None:
    times = min(found, most) * weight
    assert repeats(found, most, weight, key) in (int(times), int(times) + (times > int(times)))
    assert repeats(found, most, weight, key) == repeats(found, most, weight, key)


def test_a_fraction_of_a_weight_takes_so_many_documents_more() -> None:
    total = sum(repeats(1, 10, 1.5, f"d{n}") for n in range(4000))
    assert abs(total / 4000 - 1.5) < 0.03
    assert draw("a", 1) == draw("a", 1) != draw("a", 2)


def test_the_shipped_scores_tell_prose_from_pages_and_medicine_from_history() -> None:
    scorer = Scorer(SHIPPED)
    medicine = "The patient was given aspirin and heparin and moved to intensive care at night."
    history = "The Industrial Revolution began in Britain in the eighteenth century with steam."
    menu = "Home | About | Contact | Log in | Cart | Search | Products | Menu | Careers | Help"
    assert scorer.score(medicine)["quality"] > 0.5 > scorer.score(menu)["quality"]
    assert scorer.score(medicine)["medical"] > 0.5 > scorer.score(history)["medical"]
    sizes = [path.stat().st_size for path in SHIPPED.glob("*.safetensors")]
    assert len(sizes) == 2 and sum(sizes) <= 600_000


def test_every_spoiler_changes_both_languages() -> None:
    for text in (
        "The patient has a fever and a cough today. " * 4,
        "患者发热咳嗽三天，给予补液治疗。" * 6,
    ):
        for spoil in SPOILS:
            assert spoil(text, random.Random(1)) not in ("", text)
