"""What a number's own arithmetic says: check digits and dates that can be."""

import ipaddress
import re
from collections.abc import Callable

WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
VIN_WEIGHTS = (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2)
VIN_VALUES = dict(zip("ABCDEFGHJKLMNPRSTUVWXYZ", "12345678123457923456789", strict=True))


def resident_id(text: str) -> bool:
    """A resident identity number: a birth date, and ISO 7064 MOD 11-2 over 17 digits (GB 11643)."""
    number = re.sub(r"[ -]", "", text).upper()
    if not re.fullmatch(r"\d{17}[\dX]", number) or not _is_day(number[10:12], number[12:14]):
        return False
    return resident_check_digit(number) == number[17]


def resident_check_digit(number: str) -> str:
    """The last sign of a resident identity number, from the 17 digits before it."""
    total = sum(weight * int(digit) for weight, digit in zip(WEIGHTS, number, strict=False))
    return "10X98765432"[total % 11]


def luhn(text: str) -> bool:
    """A payment card: 13 to 19 digits whose Luhn sum is a multiple of ten (ISO/IEC 7812)."""
    digits = [int(digit) for digit in re.sub(r"\D", "", text)]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return 13 <= len(digits) <= 19 and (sum(digits[::-2]) + sum(doubled)) % 10 == 0


def iban(text: str) -> bool:
    """An international bank account number: 1 modulo 97 (ISO 13616)."""
    plain = text.replace(" ", "")
    return int("".join(str(int(sign, 36)) for sign in plain[4:] + plain[:4])) % 97 == 1


def vin(text: str) -> bool:
    """A vehicle identification number by its check digit, the ninth (ISO 3779, 49 CFR 565)."""
    values = [int(VIN_VALUES.get(sign, sign)) for sign in text if sign.isalnum()]
    if not (re.search("[A-Z]", text) and re.search(r"\d", text)):
        return False
    total = sum(weight * value for weight, value in zip(VIN_WEIGHTS, values, strict=True))
    return "0123456789X"[total % 11] == text[8]


def ipv6(text: str) -> bool:
    """An IPv6 address; a time of day is none."""
    if not re.search(r"::|(?:[0-9A-Fa-f]+:){4}", text):
        return False
    try:
        return ipaddress.ip_address(text).version == 6
    except ValueError:
        return False


def phone(text: str) -> bool:
    """As many digits as a telephone number or an extension has."""
    return 4 <= len(re.sub(r"\D", "", text)) <= 16


def long_phone(text: str) -> bool:
    """As many digits as a whole local number has."""
    return 7 <= len(re.sub(r"\D", "", text)) <= 15


def spelled(text: str) -> bool:
    """Letters of one case, told one by one, not all the same and not a list of first letters."""
    letters = re.sub(r"[^A-Za-z]", "", text)
    return (
        len(letters) >= 4
        and len(set(letters.lower())) >= 3
        and letters[1:].islower() | letters.isupper()
    )


def plate(text: str) -> bool:
    """A number plate: five to eight letters and digits, at least one of each."""
    plain = re.sub(r"\W", "", text)
    return 5 <= len(plain) <= 17 and not plain.isalpha() and not plain.isdigit()


def handle(text: str) -> bool:
    """An account's name rather than a word."""
    return bool(re.search(r"[\d_-]", text)) or len(text) >= 6


def numeric_date(text: str) -> bool:
    """Day and month in either order; a version or a section number has no such parts."""
    first, second, last = re.split(r"[ ]?[/.\-–][ ]?", text)
    return (_is_day(first, second) or _is_day(second, first)) and len(last) != 3


def short_date(text: str) -> bool:
    """yy-mm-dd with a day that exists; a ratio has no such parts."""
    _, month, day = re.split(r"[/.\-]", text)
    return _is_day(month, day)


Check = Callable[[str], bool]


def _is_day(month: str, day: str) -> bool:
    return 1 <= int(month) <= 12 and 1 <= int(day) <= 31 - (int(month) in (4, 6, 9, 11))


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        resident_id,
        luhn,
        iban,
        vin,
        ipv6,
        phone,
        long_phone,
        spelled,
        plate,
        handle,
        numeric_date,
        short_date,
    )
}
