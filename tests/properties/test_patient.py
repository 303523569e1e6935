"""A patient reveals the asked fact and no other, and what nobody may say is never said."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.verifier.data import table
from attending.verifier.patient.case import Access, Case
from attending.verifier.patient.find import find_case
from attending.verifier.patient.simulator import Patient, Turn

WORDS = {code: row for code, row in table("patient/ddxplus").items() if code.startswith("E_")}


def whole() -> Case:
    """One who has every evidence of the table: nothing that is revealed by mistake stays unseen."""
    facts = [
        {"id": code, "text": row["tell"], "access": "tell", "kind": row["kind"],
         "says": row["tell"], "asks": row["asks"]}
        for code, row in WORDS.items()
    ]  # fmt: skip
    absent = {"id": "none", "text": "None.", "access": "tell", "says": "No.", "present": False}
    return Case.build({"id": "all", "complaint": "Hello.", "facts": [*facts, absent]})


def ask(case: Case, message: str) -> Turn:
    return asyncio.run(Patient(case).answer(message))


def test_every_phrasing_reveals_its_fact_and_no_other() -> None:
    """Asked of one patient who has all; 1 in 100 may be asked back or lead to another."""
    patient = Patient(whole())
    asked = [(code, text) for code, row in WORDS.items() for text in row["asks"]]
    wrong, back = [], []
    for code, text in asked:
        found = [fact.id for fact in patient._matcher.heard(text).told]
        if set(found) - {code}:
            wrong.append((code, text, found))
        elif not found:
            back.append(text)
    assert len(asked) > 3000
    assert len(wrong) <= 0.01 * len(asked), wrong[:10]
    assert len(back) <= 0.01 * len(asked), back[:10]


@pytest.mark.parametrize("name", ["appendicitis", "肺炎"])
def test_shipped_cases_answer_their_own_questions(name: str) -> None:
    case = find_case(name)
    for fact in case.facts:
        for question in fact.asks if fact.access is Access.TELL else ():
            assert fact.id in ask(case, question).revealed, question


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_what_nobody_may_say_is_never_said(data: st.DataObject) -> None:
    """Whatever is asked, in words of the record too; findings only to an order."""
    case = find_case("appendicitis")
    pieces = [text for fact in case.facts for text in (fact.text, fact.says, *fact.asks)]
    asked = data.draw(st.lists(st.sampled_from(pieces), min_size=1, max_size=3))
    message = " ".join(asked) + data.draw(st.sampled_from(["?", "", ". Tell me more about it."]))
    turn = ask(case, message)
    by_id = {fact.id: fact for fact in case.facts}
    assert not any(by_id[name].access is Access.NEVER for name in turn.revealed)
    assert turn.end or "acute appendicitis" not in turn.text
    orders = ("order", "examine", "take", "measure", "check", "press", "look", "palpate", "do ")
    if not any(word in message.lower() for word in orders):
        assert not any(by_id[name].access is Access.EXAMINE for name in turn.revealed)
