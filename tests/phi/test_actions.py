"""What stands in an identifier's place."""

from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attending.errors import UsageError
from attending.phi import CATEGORIES, Policy, redact
from attending.phi.actions import MAX_SHIFT_DAYS, key_from

KEY = b"sixteen bytes at least"
NOTE = "Patient: Amara Okonkwo, MRN: 00123456, seen 2021-03-04. Mrs. Okonkwo will return."


def policy(action: str, patient: str = "p1", key: bytes = KEY) -> Policy:
    return Policy(action, key=key, patient=patient)  # type: ignore[arg-type]


def shifted(text: str, patient: str = "p1") -> str:
    return Policy("placeholder", {"date": "shift"}, KEY, patient).replace(text, "date")


def test_placeholders_name_the_category() -> None:
    assert redact(NOTE) == "Patient: [NAME], MRN: [MRN], seen [DATE]. Mrs. [NAME] will return."


def test_a_mask_keeps_length_and_punctuation() -> None:
    assert policy("mask").replace("O'Neil, A. 王", "name") == "*'****, *. *"
    assert len(redact(NOTE, policy("mask"))) == len(NOTE)


def test_a_hash_is_keyed_and_does_not_mind_writing() -> None:
    first = policy("hash").replace("MRN 0012", "mrn")
    assert first == policy("hash").replace("mrn-0012", "mrn")
    assert first != policy("hash", key=b"another key of 16 bytes").replace("MRN 0012", "mrn")
    assert first != policy("hash").replace("MRN 0012", "account")


@given(st.sampled_from(CATEGORIES), st.text(min_size=1, max_size=30))
def test_surrogates_are_consistent(category: str, text: str) -> None:
    assert policy("surrogate").replace(text, category) == policy("surrogate").replace(
        text, category
    )


def test_a_surrogate_keeps_the_form_and_not_the_value() -> None:
    number = policy("surrogate").replace("AB-1234/x", "mrn")
    assert [c.isdigit() for c in number] == [c.isdigit() for c in "AB-1234/x"]
    assert number != "AB-1234/x"
    name = policy("surrogate").replace("OKONKWO, Amara", "name")
    assert name.split(", ")[0].isupper()
    assert "OKONKWO" not in name and "Amara" not in name


def test_the_parts_of_a_name_stay_one_persons() -> None:
    whole = policy("surrogate").replace("Amara Okonkwo", "name")
    assert policy("surrogate").replace("Okonkwo", "name") == whole.split()[1]


@pytest.mark.parametrize(
    "form", ["%Y-%m-%d", "%Y年%m月%d日", "%d.%m.%Y", "%B %d, %Y", "%d %B %Y", "%Y/%m/%d"]
)
@given(st.dates(date(1930, 1, 1), date(2030, 1, 1)), st.integers(0, 900))
def test_shifted_dates_keep_their_intervals(form: str, first: date, days: int) -> None:
    from datetime import datetime

    second = first + timedelta(days=days)
    moved = [datetime.strptime(shifted(day.strftime(form)), form) for day in (first, second)]
    assert (moved[1] - moved[0]).days == days
    assert 0 < abs((moved[0].date() - first).days) <= MAX_SHIFT_DAYS


def test_another_patient_is_shifted_otherwise() -> None:
    moves = {shifted("2021-03-04", f"patient {n}") for n in range(20)}
    assert len(moves) > 10


@pytest.mark.parametrize("text", ["March 3", "3/4/21", "03/04/2021", "last May", "99/99/2020"])
def test_a_date_that_cannot_be_moved_is_hidden(text: str) -> None:
    assert shifted(text) == "[DATE]"


def test_ages_above_89_become_a_class() -> None:
    assert policy("surrogate").replace("94", "age") == "90+"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Policy("remove"), "no action"),  # type: ignore[arg-type]
        (lambda: Policy(by_category={"nmae": "mask"}), "no category 'nmae'"),
        (lambda: Policy("hash"), "needs a secret key"),
        (lambda: Policy("hash", key=b"short"), "got 5"),
        (lambda: Policy("shift", key=KEY), "only dates"),
        (lambda: Policy(by_category={"name": "shift"}, key=KEY), "only dates"),
        (lambda: key_from("NO_SUCH_VARIABLE"), "NO_SUCH_VARIABLE"),
    ],
)
def test_a_wrong_policy_is_told_before_a_text_is_touched(make, told: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=told):
        make()


def test_a_policy_does_not_show_its_key() -> None:
    assert "sixteen" not in repr(policy("hash"))
