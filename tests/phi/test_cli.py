"""`attending phi` on files: lines, records, streams, and what is refused."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from attending.cli import app
from attending.errors import AttendingError, UsageError
from attending.phi import PhiError, matcher

NOTE = "Patient: John Smith, MRN: 0012345\nStable.\n患者王小明，电话13812345678"


def run(*words: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, ["phi", *words], input=stdin)


def refused(*words: str, kind: type[AttendingError] = UsageError) -> str:
    result = run(*words)
    assert isinstance(result.exception, kind), result.output
    return str(result.exception)


@pytest.fixture
def note(tmp_path: Path) -> Path:
    path = tmp_path / "note.txt"
    path.write_text(NOTE, encoding="utf-8")
    return path


def test_scan_prints_a_line_of_spans_for_every_line(note: Path) -> None:
    result = run("scan", str(note), "--json")
    assert result.exit_code == 0
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    lines = NOTE.split("\n")
    assert len(rows) == len(lines)
    told = [
        [(s["category"], line[s["start"] : s["end"]]) for s in row["spans"]]
        for row, line in zip(rows, lines, strict=True)
    ]
    assert told == [
        [("name", "John Smith"), ("mrn", "0012345")],
        [],
        [("name", "王小明"), ("phone", "13812345678")],
    ]
    assert set(rows[0]["spans"][0]) == {"start", "end", "category", "score"}


def test_scan_counts_without_json_and_reads_a_pipe(note: Path) -> None:
    result = run("scan", "-", stdin=NOTE)
    assert result.exit_code == 0
    assert "2  name" in result.stdout
    assert "4  in all" in result.stdout


def test_records_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    rows = [{"id": 1, "note": "MRN: 0012345"}, {"id": 2, "note": "患者王小明，好转"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("redact", str(path), "--field", "note")
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"id": 1, "note": "MRN: [MRN]"},
        {"id": 2, "note": "患者[NAME]，好转"},
    ]
    assert len(run("scan", str(path), "--field", "note", "--json").stdout.splitlines()) == 2
    assert "line 1 has no text 'text'" in refused("scan", str(path))
    piped = run("redact", "-", "--records", "--field", "note", stdin=path.read_text())
    assert piped.stdout == result.stdout
    assert "--field needs JSON records" in refused("scan", "-", "--field", "note")
    path.write_text('\n{"note": "MRN: 0012345"}\n{')
    assert "line 3 is no JSON" in refused("redact", str(path), "--field", "note")


def test_records_dates_are_shifted_by_their_own_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PHI_KEY", "sixteen bytes at least")
    path = tmp_path / "notes.jsonl"
    rows = [{"who": who, "text": "DOB: 13/05/1962"} for who in ("a", "b", "a")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["redact", str(path), "--category", "date=shift", "--key-variable", "PHI_KEY"]
    told = run(*words, "--patient-field", "who").stdout.splitlines()
    first, second, third = (json.loads(line)["text"] for line in told)
    assert first == third != second
    assert "name one" in refused(*words)
    assert "no 'nobody'" in refused(*words, "--patient-field", "nobody")


def test_redact_writes_the_text(note: Path) -> None:
    text = "Patient: [NAME], MRN: [MRN]\nStable.\n患者[NAME]，电话[PHONE]"
    assert run("redact", str(note)).stdout == text
    out = note.with_name("clean.txt")
    assert run("redact", str(note), "--to", str(out), "--second-pass").exit_code == 0
    assert out.read_text(encoding="utf-8") == text
    assert "exists" in refused("redact", str(note), "--to", str(out))
    assert "no folder" in refused("redact", str(note), "--to", str(out / "a" / "b.txt"))


def test_redact_takes_actions_and_a_key(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI_KEY", "sixteen bytes at least")
    words = ["--action", "mask", "--category", "mrn=hash", "--key-variable", "PHI_KEY"]
    told = run("redact", str(note), *words).stdout
    assert told.startswith("Patient: **** *****, MRN: [MRN:")
    assert "secret key" in refused("redact", str(note), "--action", "hash")
    assert "CATEGORY=ACTION" in refused("redact", str(note), "--category", "mrn")


def test_nothing_is_written_if_a_part_fails(note: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(matcher, "paint", fail)
    out = note.with_name("clean.txt")
    refused("redact", str(note), "--to", str(out), kind=PhiError)
    assert [path.name for path in note.parent.iterdir()] == [note.name]
    assert run("redact", str(note)).stdout == ""


def test_bad_files_are_refused(tmp_path: Path) -> None:
    assert "is no file" in refused("scan", str(tmp_path / "nope.txt"))
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    assert "not UTF-8 at byte 3" in refused("scan", str(path))


def test_an_empty_file_has_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "empty.txt"
    path.write_text("")
    assert run("scan", str(path), "--json").stdout == ""


def test_training_can_be_looked_at_without_running() -> None:
    result = run("train", "--dry-run", "--set", "notes=5")
    assert json.loads(result.stdout)["notes"] == 5
