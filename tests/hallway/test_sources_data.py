"""Sources that are one file of data: an address of the web, a file of a data set on the Hub."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attending import sources
from attending.cli import app
from attending.errors import SourceError
from tests.hallway.shelf import Shelf, publish, sha256

ROWS = b"".join(b'{"row": %d}\n' % number for number in range(100_000))  # 1.4 MB
COMMIT = "c0ffee" * 6 + "beef"
DATA = {"rows.jsonl": ROWS, "deep/er/x.parquet": b"PAR1", "README.md": b"#", "load.py": b"evil()"}
DATA |= {"pickled.pkl": b"evil", "../escape.json": b"{}", "a@b.csv": b"1"}


@pytest.fixture
def web(open_shelf: Callable[[], Shelf]) -> Shelf:
    shelf = open_shelf()
    shelf.files = {"/a/rows.jsonl": ROWS, "/b/rows.jsonl": b"other", "/a/source.json": b"{}"}
    return shelf


@pytest.fixture
def hub(open_shelf: Callable[[], Shelf], monkeypatch: pytest.MonkeyPatch) -> Shelf:
    shelf = open_shelf()
    monkeypatch.setenv("HF_ENDPOINT", shelf.address)
    publish(shelf, COMMIT, DATA, "datasets")
    return shelf


def part(uri: str) -> Path:
    slot = sources.cache_dir() / "web" / f"{sha256(uri.encode())[:16]}.tmp"
    return slot / "file" / f"{uri.rpartition('/')[2]}.part"


def test_a_file_of_the_web_is_pulled_once_and_its_hash_recorded(web: Shelf) -> None:
    uri = f"{web.address}/a/rows.jsonl"
    with pytest.raises(SourceError, match=re.escape(f"Run: attending pull {uri}")):
        sources.resolve(uri)
    pulled = sources.pull(uri)
    assert pulled.path.read_bytes() == ROWS and pulled.path.name == "rows.jsonl"
    assert pulled.sha256 == sha256(ROWS) and pulled.name == uri.removeprefix("http://")
    assert pulled.path.is_relative_to(sources.cache_dir() / "web" / sha256(uri.encode())[:16])
    assert sources.pull(uri) == sources.resolve(uri) == pulled and len(web.gets()) == 1
    assert sources.pull(f"{web.address}/b/rows.jsonl").path.read_bytes() == b"other"
    assert sources.pull(f"{web.address}/a/source.json").path.read_bytes() == b"{}"
    pulled.path.write_bytes(b"damaged")
    assert sources.pull(uri).path.read_bytes() == ROWS


def test_only_a_pinned_file_of_the_web_is_taken_up_again(
    web: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, pin, starts in (("free", "", [0]), ("pinned", sha256(ROWS), [700_000])):
        uri = f"{web.address}/a/rows.jsonl"
        monkeypatch.setitem(sources.CATALOGUE, name, sources.Entry(uri, name, sha256=pin))
        part(uri).parent.mkdir(parents=True)
        part(uri).write_bytes(ROWS[:700_000])
        web.requests.clear()
        assert sources.pull(name).sha256 == sha256(ROWS) and web.starts() == starts
        web.address = web.address.replace("127.0.0.1", "localhost")  # another slot
        monkeypatch.delitem(sources.CATALOGUE, name)


def test_another_file_of_the_web_than_pinned_is_refused(
    web: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = sources.Entry(f"{web.address}/b/rows.jsonl", "x", sha256=sha256(ROWS))
    monkeypatch.setitem(sources.CATALOGUE, "pinned", entry)
    with pytest.raises(SourceError, match=sha256(b"other")):
        sources.pull("pinned")
    assert not part(entry.uri).exists()


def test_what_the_web_does_not_give_is_told(web: Shelf) -> None:
    with pytest.raises(SourceError, match=r"none\.jsonl: HTTP status 404"):
        sources.pull(f"{web.address}/none.jsonl")
    with pytest.raises(SourceError, match=r"rows\.jsonl cannot be downloaded: \w+"):
        sources.pull("http://127.0.0.1:99999/rows.jsonl")


def test_healthbench_is_pulled_by_name_with_its_licence_and_warning(
    web: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, pins in (("", 1), ("-hard", 1), ("-consensus", 1), ("-meta", 0)):
        entry = sources.CATALOGUE[f"healthbench{name}"]
        assert entry.licence == "MIT" and len(entry.sha256) == 64 * pins
        assert sources.WEB.fullmatch(entry.uri)
        with pytest.raises(SourceError, match=f"Run: attending pull healthbench{name}$"):
            sources.resolve(f"healthbench{name}")
    entry = sources.CATALOGUE["healthbench"]
    fake = replace(entry, uri=f"{web.address}/a/rows.jsonl", sha256=sha256(ROWS))
    monkeypatch.setitem(sources.CATALOGUE, "healthbench", fake)
    told = CliRunner().invoke(app, ["pull", "healthbench", "--json"])
    assert told.exit_code == 0 and json.loads(told.stdout)["sha256"] == sha256(ROWS)
    told = CliRunner().invoke(app, ["pull", "healthbench"])
    assert "Licence: MIT." in told.stderr and "never train on it" in told.stderr
    assert Path(told.stdout.strip()).read_bytes() == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "deep/er/x.parquet", "a@b.csv"])
@pytest.mark.parametrize("revision", ["", "@v1", "@refs/convert/parquet"])
def test_one_file_of_a_data_set_is_pulled_and_nothing_else(
    name: str, revision: str, hub: Shelf
) -> None:
    uri = f"hf:datasets/org/tiny{revision}/{name}"
    pulled = sources.pull(uri)
    assert pulled.path.read_bytes() == DATA[name] and pulled.path.name == Path(name).name
    assert pulled.sha256 == sha256(DATA[name]) and pulled.revision == COMMIT
    fetched = [request.path for request in hub.gets() if "/resolve/" in request.path]
    assert len(fetched) == 1 and sources.resolve(uri) == sources.pull(uri) == pulled


def test_a_data_file_of_another_hash_than_the_hub_says_is_refused(hub: Shelf) -> None:
    hub.files[f"/datasets/org/tiny/resolve/{COMMIT}/deep/er/x.parquet"] = b"other"
    with pytest.raises(SourceError, match=sha256(b"PAR1")):
        sources.pull("hf:datasets/org/tiny/deep/er/x.parquet")


@pytest.mark.parametrize("name", ["none.jsonl", "load.py", "pickled.pkl", "deep", "README.md"])
def test_what_is_no_data_file_is_answered_with_those_that_are(name: str, hub: Shelf) -> None:
    told = re.escape(f"{name} is not there. Name a data file that is: rows.jsonl, deep/er/x.parq")
    with pytest.raises(SourceError, match=told):
        sources.pull(f"hf:datasets/org/tiny/{name}")
    assert not [request for request in hub.requests if "/resolve/" in request.path]


def test_an_unknown_data_set_is_told(hub: Shelf) -> None:
    with pytest.raises(SourceError, match=r"hf:datasets/org/none/x\.csv: .*gated dataset needs"):
        sources.pull("hf:datasets/org/none/x.csv")
