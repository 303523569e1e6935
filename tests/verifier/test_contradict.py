"""Contradictions: hand-checked vectors, and silence where no rule is sure."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attending.verifier.contradict import contradict

VECTORS = [
    ("Robaxin can cause an allergic reaction.", "Robaxin cannot cause an allergic reaction."),
    ("Hives may also itch.", "Hives cannot itch."),
    ("Mastitis is an infection.", "Mastitis is not an infection."),
    ("Side effects include nausea.", "Side effects do not include nausea."),
    ("Liraglutide reduces appetite.", "Liraglutide does not reduce appetite."),
    ("It has been linked to cancer.", "It has not been linked to cancer."),
    ("The cream has side effects.", "The cream does not have side effects."),
    ("Seek help at once.", "Do not seek help at once."),
    ("Please seek help.", "Please do not seek help."),
    ("Never share needles.", "Share needles."),
    ("Wounds don’t need stitches.", "Wounds do need stitches."),
    ("There is no cure.", "There is a cure."),
    ("There are no known interactions.", "There are some known interactions."),
    ("Most people with HPV are well.", "No people with HPV are well."),
    ("If you are ill, you should rest.", "If you are ill, you should not rest."),
    ("People who are ill should rest.", "People who are ill should not rest."),
    ("The drug that is used should be safe.", "The drug that is used should not be safe."),
    ("布洛芬可以饭前服用。", "布洛芬不可以饭前服用。"),
    ("儿童没有风险", "儿童有风险"),
]
OPPOSITES = [
    ("Take it before meals.", "Take it after meals."),
    ("It is a safe drug.", "It is an unsafe drug."),
    ("It is an effective drug.", "It is an ineffective drug."),
    ("From low to high doses.", "From low to high doses."),  # both are there: silence
    ("It increases the risk.", "It decreases the risk."),
    ("It lasts more than a day.", "It lasts less than a day."),
    ("布洛芬饭前服用。", "布洛芬饭后服用。"),
]
NUMBERS = [
    ("Take 20 mg.", "Take 5 mg."),
    ("Take 2 tablets.", "Take 6 tablets."),
    ("Every 4 to 6 hours.", "Every 12 to 18 hours."),
    ("Of 1,500 mg.", "Of 500 mg."),
    ("A 12-year-old child.", "A 4-year-old child."),
    ("In 40% of them.", "In 10% of them."),
    ("In 50% of them.", "In 16.7% of them."),
    ("For two weeks.", "For six weeks."),
    ("6岁以下儿童", "2岁以下儿童"),
]
SILENT = [
    "",
    "  ",
    "Can I take it?",
    "Type 2 diabetes.",
    "For 1 day.",
    "Clogged ducts.",
    "Vitamin B12 deficiency",
]


def of_kind(text: str, kind: str) -> list[str]:
    return [new for new, its in contradict(text) if its == kind]


@pytest.mark.parametrize(("text", "wanted"), VECTORS)
def test_a_negation_comes_first(text: str, wanted: str) -> None:
    assert contradict(text)[0] == (wanted, "negation")


@pytest.mark.parametrize(("text", "wanted"), OPPOSITES)
def test_one_word_becomes_its_opposite(text: str, wanted: str) -> None:
    assert of_kind(text, "opposite") == ([] if wanted == text else [wanted])


@pytest.mark.parametrize(("text", "wanted"), NUMBERS)
def test_a_number_with_a_unit_becomes_another(text: str, wanted: str) -> None:
    assert of_kind(text, "number") == [wanted]


@pytest.mark.parametrize("text", SILENT)
def test_where_no_rule_is_sure_there_is_nothing(text: str) -> None:
    assert contradict(text) == []


def test_words_inside_a_phrase_have_no_opposite() -> None:
    for text in ("Signs of the common cold.", "More often than not.", "Sometimes it hurts."):
        assert not of_kind(text, "opposite")


def test_an_entity_needs_another_of_its_class() -> None:
    text = "Ivermectin treats scabies."
    assert not any(kind == "entity" for _, kind in contradict(text, [text]))
    found = contradict(text, ["Permethrin is a cream.", "The skin itches."])
    assert ("Permethrin treats scabies.", "entity") in found
    assert {kind for _, kind in found} == {"negation", "entity"}
    assert found[-1][1] == "entity"


def test_the_same_sentence_gives_the_same_contradictions_and_never_itself() -> None:
    for text, _ in [*VECTORS, *OPPOSITES, *NUMBERS]:
        found = contradict(text, ["aspirin"])
        assert found == contradict(text, ["aspirin"])
        assert text not in [new for new, _ in found]
        assert len({new for new, _ in found}) == len(found)


PIECES = [*"不无有2, -.%İſK1", " is ", " no ", " some ", " safe ", " mg", "take ", "who ", "has "]


@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_no_text_makes_it_fail(text: str) -> None:
    assert text.strip() not in [new for new, _ in contradict(text, [text])]
