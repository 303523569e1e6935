"""Cases by name, and many in one file."""

import json
from pathlib import Path

import pytest

from attending.errors import ConfigError, UsageError
from attending.verifier.patient.find import find_case, find_cases


def test_a_name_means_one_case_and_a_file_of_rows_means_all_of_them(tmp_path: Path) -> None:
    one = find_case("appendicitis")
    assert [*find_cases("appendicitis")] == [one]
    file = tmp_path / "cases.jsonl"
    two = one.replace(id="again", complaint="It hurts\u2028here.")
    rows = [case.model_dump(mode="json") for case in (one, two)]
    file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    assert [*find_cases(str(file))] == [one, two]


def test_what_is_no_case_is_named_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'appendicitis'"):
        [*find_cases("apendicitis")]
    file = tmp_path / "cases.jsonl"
    with pytest.raises(UsageError, match=r"cases\.jsonl' is no"):
        [*find_cases(str(file))]
    for data, wrong in (
        (b'\n{"id": 1', r"cases\.jsonl:2 is no JSON"),
        (b"\xff", r"cases\.jsonl:1 is no JSON"),
        (b"\n\n[1]", r"cases\.jsonl:3 is no object"),
        (b"null", r"cases\.jsonl:1 is no object"),
    ):
        file.write_bytes(data)
        with pytest.raises(ConfigError, match=wrong):
            [*find_cases(str(file))]
        with pytest.raises(ConfigError, match=wrong):
            find_case(f"{file}:7")
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"cases\.jsonl:1"):
        [*find_cases(str(file))]
