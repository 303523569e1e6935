"""Odd input that once crashed a run, lost documents, or gave another result than was asked for."""

import datetime
import io
import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from pypdf import PdfWriter

from attending.corpus import run
from attending.errors import ConfigError, TokenizerError, UsageError
from tests.corpus.making import build, prose, recipe, write_jsonl
from tests.corpus.test_read import faults, read_all


def test_a_file_name_of_any_bytes_is_told_readably(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jsonl")
    write_jsonl(tmp_path / name, [{"text": prose(n)} for n in range(3)] + [b"\xff"])
    found = build(recipe(tmp_path), tmp_path / "out")
    assert found.documents() == 3
    assert [(row["file"], row["reason"]) for row in found.removed()] == [
        ("caf\\udce9.jsonl", "broken_utf8")
    ]


def test_dates_and_bytes_of_parquet_are_text(tmp_path: Path) -> None:
    day = datetime.date(2024, 2, 1)
    table = {"text": [prose(1).encode(), b"\xff" * 90], "day": [day, day]}
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    source = {"path": "*.parquet", "format": "parquet", "private": False, "text": "{day} {text}"}
    found = build(recipe(tmp_path, sources={"notes": source}), tmp_path / "out")
    assert found.documents() == 1 and found.reasons() == {"broken_utf8": 1}


def test_an_encrypted_pdf_of_any_kind_is_told(tmp_path: Path) -> None:
    writer, data = PdfWriter(), io.BytesIO()
    writer.add_blank_page(200, 200)
    writer.encrypt("secret")
    writer.write(data)
    # As AES asks for a package that is not here before it can tell that it is encrypted.
    (tmp_path / "a.pdf").write_bytes(data.getvalue().replace(b"/V 2", b"/V 5", 1))
    assert faults(read_all(tmp_path / "a.pdf", "pdf"))[0] in ("encrypted_pdf", "broken_pdf")


def test_readers_of_pages_log_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.4\nnonsense\n%%EOF")
    (tmp_path / "a.html").write_bytes(b"<html><body></body></html>")
    with caplog.at_level(logging.WARNING):
        assert faults(read_all(tmp_path / "a.pdf", "pdf")) == ["broken_pdf"]
        assert faults(read_all(tmp_path / "a.html", "html")) == ["no_text"]
    assert caplog.text == ""


def test_a_test_question_that_cannot_be_read_stops_the_run(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(1)}])
    write_jsonl(tmp_path / "eval" / "q.jsonl", [{"q": "x"}, b'{"q": "\xff"}'])
    config = recipe(tmp_path, decontamination={"paths": ["eval/*.jsonl"]})
    with pytest.raises(ConfigError, match=r"q.jsonl:2 is no JSON object \(broken_utf8\)"):
        build(config, tmp_path / "out")


def test_test_questions_and_scores_are_those_of_now(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(n)} for n in range(4)])
    config = recipe(tmp_path, decontamination={"paths": ["eval/*.jsonl"]})
    for number in (1, 2):
        write_jsonl(tmp_path / "eval" / "q.jsonl", [{"q": prose(number)}])
        (gone,) = build(config, tmp_path / f"out{number}").removed()
        assert gone["text"] == prose(number)


def test_what_would_stop_the_last_stage_stops_the_first(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(1)}])
    good = recipe(tmp_path)
    other = tmp_path / "tokenizer" / "other.json"
    other.write_bytes((tmp_path / "tokenizer" / "tokenizer.json").read_bytes())
    wrong = {"pack": {"tokenizer": str(other)}}  # once read as its neighbour, tokenizer.json
    with pytest.raises(TokenizerError, match=r"other\.json"):
        build(good.replace(**wrong), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"quality\.languages"):
        build(good.replace(quality={"languages": ["xx"]}), tmp_path / "out")
    with pytest.raises(ConfigError, match="no file matches 'eval"):
        build(good.replace(decontamination={"paths": ["eval/*"]}), tmp_path / "out")
    with pytest.raises(ConfigError, match="no glob"):
        build(good.replace(sources={"notes": {"path": "/etc/*"}}), tmp_path / "out")
    with pytest.raises(ConfigError, match="pattern"):
        recipe(tmp_path, sources={"notes": {"path": "*", "text": "no field"}})
    assert not (tmp_path / "out.tmp").exists()


def test_a_corpus_does_not_read_itself(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": prose(n)} for n in range(3)])
    source = {"path": "**/*.jsonl", "private": False}
    config = recipe(tmp_path / "in", sources={"notes": source})
    with pytest.raises(UsageError, match="below the root"):
        build(config, tmp_path / "in" / "out")
    assert build(config, tmp_path / "out").documents() == 3


def test_a_folder_need_not_have_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.md").write_text(prose(1) + prose(2))
    tokenizer = recipe(tmp_path).pack.tokenizer
    from attending.corpus.recipe import CorpusConfig

    told = [f"root={tmp_path / 'in'}", f"pack.tokenizer={tokenizer}", "quality.languages=[]"]
    told += ["quality.min_quality=0.0", "executor.tasks=1", "executor.workers=1"]
    config = CorpusConfig.load("folder", "corpus", told)
    assert build(config, tmp_path / "out").documents() == 1
    (tmp_path / "in" / "a.md").unlink()
    with pytest.raises(ConfigError, match="no file below"):
        build(config, tmp_path / "again")


def test_a_finished_run_resumed_is_what_it_was(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(n)} for n in range(3)])
    first = run.build(recipe(tmp_path), tmp_path / "out")
    before = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run.build(recipe(tmp_path), tmp_path / "out", resume=True) == first
    assert json.loads((tmp_path / "out" / "run.json").read_text()) == before
