"""What can be read is read, and what cannot is said: one test a kind of damage."""

import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from pypdf import PdfWriter

from attending.corpus import read
from attending.corpus.read import Piece, Record, plan, records, render
from attending.corpus.recipe import SourceConfig
from attending.errors import ConfigError
from tests.corpus.making import prose, recipe, write_jsonl

LIMIT = 1_000_000


def read_all(path: Path, kind: str = "jsonl", max_bytes: int = LIMIT) -> list[Record]:
    source = SourceConfig.build({"path": path.name, "format": kind})
    piece = Piece("s", path.name, 0, path.stat().st_size, 0)
    return list(records(str(path.parent), piece, source, max_bytes))


def faults(found: list[Record]) -> list[str]:
    return [record.fault for record in found]


def test_each_broken_line_is_told_and_its_neighbours_live(tmp_path: Path) -> None:
    lines = [
        {"text": "one"},
        b'{"text": "\xff\xfe"}',
        '{"text": ',
        "[1]",
        "",
        "[" * 100_000,
        '{"text": ' + "9" * 5000 + "}",
        {"text": "two\x00\ufeff 中文 mixed"},
    ]
    found = read_all(write_jsonl(tmp_path / "a.jsonl", lines))
    assert faults(found) == [
        "", "broken_utf8", "broken_json", "no_object", "broken_json", "broken_json", "",
    ]  # fmt: skip
    assert [record.line for record in found] == [0, 1, 2, 3, 5, 6, 7]
    assert found[-1].fields["text"] == "two\x00\ufeff 中文 mixed"


def test_an_empty_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    assert faults(read_all(tmp_path / "a.jsonl")) == ["empty_file"]


def test_a_long_line_is_skipped_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "before"}\n{"text": "')
        for _ in range(64):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "after"}\n')
    code = f"""
import resource, sys
from pathlib import Path
from tests.corpus.test_read import read_all
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = read_all(Path({str(path)!r}))
print([(r.fault, r.num_bytes) for r in found])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told, grown = done.stdout.splitlines()
    assert told == "[('', 19), ('too_long', 64000013), ('', 18)]"
    assert int(grown) < 20_000  # KiB


def test_of_a_cut_gzip_all_before_the_cut_is_kept(tmp_path: Path) -> None:
    lines = [json.dumps({"text": prose(n)}) for n in range(400)]
    path = write_jsonl(tmp_path / "a.jsonl.gz", lines)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    found = read_all(path)
    assert faults(found)[-1] == "gzip_cut_short" and set(faults(found)[:-1]) == {""}
    assert [dict(r.fields) for r in found[:-1]] == [json.loads(x) for x in lines[: len(found) - 1]]
    assert len(found) > 100
    path.write_bytes(b"\x1f\x8b\x08" + b"junk" * 30)
    assert faults(read_all(path))[-1] in ("gzip_damaged", "gzip_cut_short")


def test_form_feeds_divide_a_text_and_a_broken_part_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one 中".encode() + b"\ftwo \xff\fthree")
    found = read_all(tmp_path / "a.txt", "text")
    assert faults(found) == ["", "broken_utf8", ""] and found[0].fields["text"] == "one 中"
    assert faults(read_all(tmp_path / "a.txt", "text", max_bytes=5)) == ["too_long"]


def test_html_gives_its_text_without_the_menu(tmp_path: Path) -> None:
    body = f"<p>{prose(1)}</p><p>{prose(2)}</p>"
    page = f"<html><body><nav>Home</nav><article>{body}</article></body></html>"
    (tmp_path / "a.html").write_text(page)
    (found,) = read_all(tmp_path / "a.html", "html")
    assert prose(1) in found.fields["text"] and "Home" not in found.fields["text"]
    (tmp_path / "b.html").write_text("<html></html>")
    assert faults(read_all(tmp_path / "b.html", "html")) == ["no_text"]


def test_a_pdf_without_text_layer_and_a_broken_one_are_told(tmp_path: Path) -> None:
    writer, data = PdfWriter(), io.BytesIO()
    writer.add_blank_page(200, 200)
    writer.write(data)
    (tmp_path / "a.pdf").write_bytes(data.getvalue())
    assert faults(read_all(tmp_path / "a.pdf", "pdf")) == ["no_text_layer"]
    (tmp_path / "b.pdf").write_bytes(data.getvalue()[:60])
    assert faults(read_all(tmp_path / "b.pdf", "pdf")) in (["broken_pdf"], ["no_text_layer"])
    (tmp_path / "c.pdf").write_bytes(b"not a pdf at all")
    assert faults(read_all(tmp_path / "c.pdf", "pdf")) == ["broken_pdf"]
    writer.encrypt("secret")
    writer.write(data := io.BytesIO())
    (tmp_path / "d.pdf").write_bytes(data.getvalue())
    assert faults(read_all(tmp_path / "d.pdf", "pdf")) == ["encrypted_pdf"]


def test_a_pdf_with_text_gives_it(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.text(0.1, 0.5, "Aspirin reduces fever")
    figure.savefig(tmp_path / "a.pdf", metadata={"CreationDate": None})
    (found,) = read_all(tmp_path / "a.pdf", "pdf")
    assert "Aspirin reduces fever" in found.fields["text"]


def test_parquet_rows_are_read_and_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["one", "two" * 50, "three"], "n": [1, 2, 3]}), path)
    found = read_all(path, "parquet", max_bytes=100)
    assert faults(found) == ["", "too_long", ""] and found[2].fields["n"] == 3
    path.write_bytes(path.read_bytes()[:-20])
    assert faults(read_all(path, "parquet")) == ["broken_parquet"]


@given(sizes=st.lists(st.integers(0, 300), min_size=1, max_size=60), tasks=st.integers(1, 7))
def test_pieces_cover_every_line_once_with_its_number(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], tasks: int
) -> None:
    root = tmp_path_factory.mktemp("pieces")
    path = write_jsonl(root / "a.jsonl", [{"n": n, "t": "x" * s} for n, s in enumerate(sizes)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(read, "CHUNK_BYTES", 64)
        spread = plan(recipe(root, executor={"tasks": tasks}))
    source = SourceConfig.build({"path": "a.jsonl"})
    pieces = [piece for task in spread for piece in task]
    found = [r for piece in pieces for r in records(str(root), piece, source, LIMIT)]
    assert sorted((r.line, r.fields["n"]) for r in found) == [(n, n) for n in range(len(sizes))]
    spans = sorted((piece.start, piece.stop) for piece in pieces)
    assert spans[0][0] == 0 and spans[-1][1] == path.stat().st_size


def test_one_large_file_is_spread_over_all_tasks(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "y" * 50_000} for _ in range(200)])
    spread = plan(recipe(tmp_path, executor={"tasks": 4}))
    loads = [sum(piece.stop - piece.start for piece in task) for task in spread]
    assert min(loads) > 0.5 * max(loads)


def test_a_source_without_files_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file matches"):
        plan(recipe(tmp_path))


def test_a_template_takes_fields_lists_and_what_is_below_them() -> None:
    fields = {"q": "a", "turns": [{"text": "x"}, {"text": "{y}"}], "m": {"n": 3}, "none": None}
    assert render("{q}: {turns[*].text} {m.n}", fields) == "a: x\n{y} 3"
    for wrong in ("{none}", "{absent}", "{q.a}", "{q[*]}", "{turns.text}"):
        with pytest.raises(LookupError):
            render(wrong, fields)


def test_gzip_is_read_like_plain_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"hello"))
    assert read_all(path, "text")[0].fields["text"] == "hello"
