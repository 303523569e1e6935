"""A rubric out of an answer: what it says is wanted, what contradicts that is not."""

import pytest

from attending.errors import ConfigError
from attending.verifier import Rubric
from attending.verifier.patient.find import find_case
from attending.verifier.rubric.check import check
from attending.verifier.rubric.reference import from_reference, statements, weigh
from attending.verifier.rubric.schema import parse_rubric
from attending.verifier.sentences import sentences

ASK = ({"role": "user", "content": "Is Tamosin safe with warfarin?"},)
ANSWER = """Great question! Tamosin is a drug for pain. It is taken at 20 mg twice a day, but it \
should not be taken with warfarin. However, they interact in the liver. It may cause bleeding.
Side effects include nausea, vomiting and diarrhea (watery), and headache.
Call 911 immediately if:
- You vomit blood
- Your stool is black

Do not stop warfarin on your own. Talk to your doctor about other drugs.
Please consult your healthcare provider. I hope this helps! Is that clear?"""
WANTED = [
    (4, "States: Tamosin is a drug for pain."),
    (7, "States: Tamosin is taken at 20 mg twice a day."),
    (8, "States: Tamosin should not be taken with warfarin."),
    (1, "States: Side effects include nausea."),
    (1, "States: Side effects include vomiting and diarrhea (watery)."),
    (1, "States: Side effects include headache."),
    (10, "Advises: Call 911 immediately if you vomit blood."),
    (10, "Advises: Call 911 immediately if your stool is black."),
    (8, "Advises: Do not stop warfarin on your own."),
    (4, "Advises: Talk to your doctor about other drugs."),
]


def made(answer: str = ANSWER, **how: object) -> Rubric:
    return from_reference("r", ASK, answer, **how)  # type: ignore[arg-type]


def test_an_answer_becomes_what_it_states_and_its_contradictions() -> None:
    """By hand: lists and clauses are split, "they" has no certain noun, so the "it" after it has
    none either, and filler and the second referral are gone.
    """
    rubric = made()
    positive = [(one.points, one.text) for one in rubric.criteria if one.points > 0]
    assert positive == WANTED
    negative = {one.text: one.points for one in rubric.criteria if one.points < 0}
    assert negative["States: Tamosin should be taken with warfarin."] == -8
    assert negative["Advises: Stop warfarin on your own."] == -8
    assert len(negative) == 5
    assert "bleeding" not in str(rubric)
    assert check(rubric) == []
    assert parse_rubric(rubric.row()) == rubric
    assert {one.tags[0] for one in rubric.criteria if one.points < 0} == {"axis:accuracy"}
    assert rubric.criteria[0].tags == ("axis:completeness", "level:example", "source:reference")


def test_the_weightiest_stay_and_keep_their_order() -> None:
    rubric = made(limit=8)
    kept = [(one.points, one.text) for one in rubric.criteria]
    assert kept[:6] == [each for each in WANTED if each[0] > 6 or each == WANTED[0]]
    assert [points for points, _ in kept[6:]] == [-10, -10]


def test_a_cases_facts_are_to_be_taken_into_account() -> None:
    rubric = made("Take it with food every day.", facts=["The patient is pregnant.", "  "])
    case = [one for one in rubric.criteria if "source:case" in one.tags]
    assert [(one.points, one.text) for one in case] == [
        (8, "Takes into account: The patient is pregnant."),
        (-8, "States: The patient is not pregnant."),
    ]


def test_chinese_answers_too() -> None:
    answer = (
        "是的，布洛芬会增加出血风险；不要与华法林合用。副作用包括恶心、呕吐和头痛。祝您健康！好吗？"
    )
    rubric = made(answer)
    assert [(one.points, one.text) for one in rubric.criteria if one.points > 0] == [
        (8, "指出：布洛芬会增加出血风险。"),
        (8, "建议：不要与华法林合用。"),
        (1, "指出：副作用包括恶心。"),
        (1, "指出：副作用包括呕吐。"),
        (1, "指出：副作用包括头痛。"),
    ]


@pytest.mark.parametrize(
    "fact",
    ["A 72-year-old man comes to the emergency room.", "The patient is a 24-year-old man.",
     "She is brought to the emergency department by ambulance.", "Patient is male.",
     "She was admitted to the hospital for further evaluation.",
     "患者女，67岁。", "患者男，因急诊入院。"],
)  # fmt: skip
def test_who_comes_and_where_makes_no_criterion(fact: str) -> None:
    facts = [fact, "A 4-year-old girl is brought to the emergency room because she took 40 pills."]
    case = [one for one in made(facts=facts).criteria if "source:case" in one.tags]
    assert [(one.points, one.text) for one in case] == [(4, f"Takes into account: {facts[1]}")]


CASE = """This is most consistent with a stroke.
1. Call 911 now.
2. Note the time the symptoms started."""


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (CASE, [(6, "States: The diagnosis is most consistent with a stroke."),
                (10, "Advises: Call 911 now."),
                (4, "Advises: Note the time the symptoms started.")]),
        ("It’s appendicitis. It weakens the gut.", [(6, "States: The diagnosis is appendicitis.")]),
        ("Gout is rare. It's found in a body's joints.",
         [(4, "States: Gout is found in a body's joints.")]),
        ("Your leg is swollen. This looks like a clot.",
         [(4, "States: Your leg is swollen."), (6, "States: The diagnosis looks like a clot.")]),
        ("These symptoms suggest a migraine.", [(6, "States: The symptoms suggest a migraine.")]),
        ("This is an emergency.", [(10, "States: The situation is an emergency.")]),
        ("Sepsis is an infection. This is an emergency! Treat fast.",
         [(4, "States: Sepsis is an infection."), (10, "States: Sepsis is an emergency."),
          (6, "Advises: Treat fast.")]),
        ("Talk to a doctor first. Do not hesitate to call 911. See a doctor immediately.",
         [(4, "Advises: Talk to a doctor first."), (10, "Advises: Do not hesitate to call 911."),
          (10, "Advises: See a doctor immediately.")]),
        ("Likely diagnosis: stroke.\nThis suggests sepsis.",
         [(6, "States: Likely diagnosis: stroke."),
          (6, "States: The clinical picture suggests sepsis.")]),
        ("诊断是肺炎。", [(6, "指出：诊断是肺炎。")]),
        ("这很可能是脑卒中。请拨打120。",
         [(6, "指出：诊断很可能是脑卒中。"), (10, "建议：请拨打120。")]),
        ("It is a drug against pain. This is because it acts. It is used rarely.", []),
    ],
)  # fmt: skip
def test_diagnoses_orders_and_emergencies_are_kept(
    answer: str, expected: list[tuple[int, str]]
) -> None:
    rubric = made(answer + " Aspirin thins the blood of adults.")
    found = [(one.points, one.text) for one in rubric.criteria if one.points > 0]
    assert found == [*expected, (4, "States: Aspirin thins the blood of adults.")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # No certain noun: two candidates, none, another number, a clause that depends on another.
        ("If pain persists, see a doctor soon. It can be a bad sign.", 1),
        ("These are not well known today.", 0),
        ("Muscle relaxants are drugs for spasm. It can make you tired.", 1),
        # Nothing is stood for.
        ("It is important to drink enough water.", 1),
        # Compounds and clauses that are no list, and a list that is too short.
        ("Symptoms include fever, which may rise, chills, and a cough.", 1),
        ("Causes include viruses and bacteria of the nose.", 1),
        ("If it hurts and it is swollen and is red, rest the leg.", 1),
        ("Hello there. Ok then.", 0),
    ],
)
def test_what_is_not_sure_is_dropped_or_left_whole(text: str, expected: int) -> None:
    found = list(statements(text))
    assert len(found) == expected
    assert all(items == 1 for _, items in found)


def test_the_same_thing_twice_is_one_criterion() -> None:
    rubric = made("Aspirin thins the blood of adults. Aspirin thins the blood of the adults.")
    assert [one.text for one in rubric.criteria if one.points > 0] == [
        "States: Aspirin thins the blood of adults."
    ]


def test_points_go_by_the_gravest_word() -> None:
    assert [weigh(text) for text in ("Call 911 and take 5 mg", "Do not take 5 mg", "Take 5 mg",
            "Surgery helps", "It is blue", "立即就医", "孕妇禁用", "每次5毫克", "首选手术", "蓝色",
            "A pressure below 120/80 is normal", "It has an immediate-release form")
    ] == [10, 8, 7, 6, 4, 10, 8, 7, 6, 4, 4, 4]  # fmt: skip
    reference = find_case("appendicitis").reference
    assert [weigh(text) for text in sentences(reference)] == [6, 10, 8, 6, 8]


def test_an_answer_that_states_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="'r' states nothing"):
        made("Thank you! What do you mean?")
