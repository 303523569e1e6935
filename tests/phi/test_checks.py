"""Check digits, by published examples and by hand."""

import pytest

from attending.phi import checks


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (checks.resident_id, "11010519491231002X", "110105194912310021"),  # GB 11643's own example
        (checks.resident_id, "440524 18800101 0014", "440524188013010014"),  # month 13
        (checks.luhn, "4111 1111 1111 1111", "4111 1111 1111 1112"),
        (checks.luhn, "378282246310005", "3782822463100"),
        (checks.iban, "GB82 WEST 1234 5698 7654 32", "GB82 WEST 1234 5698 7654 33"),
        (checks.vin, "1M8GDM9AXKP042788", "1M8GDM9A1KP042788"),  # 49 CFR 565's example
        (checks.ipv6, "2001:db8::1", "12:30:45"),
        (checks.phone, "555-1234", "12"),
        (checks.long_phone, "(555) 555-1234", "555-12"),
        (checks.plate, "ABC-1234", "2150/1800"),
        (checks.handle, "anna_k", "photo"),
        (checks.spelled, "a n n a l e e", "A B C D e f"),
        (checks.numeric_date, "31/12/2020", "31/31/2020"),
        (checks.numeric_date, "1.2.85", "1.2.850"),
        (checks.short_date, "24-02-29", "24-06-31"),
    ],
)
def test_what_its_arithmetic_allows(check: checks.Check, good: str, bad: str) -> None:
    assert check(good)
    assert not check(bad)


def test_any_single_changed_digit_of_a_resident_number_is_noticed() -> None:
    number = "11010519491231002X"
    for place in range(17):
        other = str((int(number[place]) + 1) % 10)
        assert not checks.resident_id(number[:place] + other + number[place + 1 :])
