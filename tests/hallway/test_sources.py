"""Sources, against servers of our own (index, Hub, one that misbehaves) and a stand-in for pip."""

import json
import logging
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest

from attending import sources
from attending.errors import SourceError
from tests.hallway.shelf import Shelf, make_wheel, publish, sha256

MODEL = bytes(range(256)) * 8192  # 2 MiB
WHEEL = make_wheel({"tiny_model/tiny.gguf": MODEL})
URI = "pypi:tiny-model==1.0"
COMMIT = "c0ffee" * 6 + "beef"
HUB_FILES = {"config.json": b"{}", "empty.txt": b"", "draft/model.safetensors": MODEL}
HUB_FILES |= {"pytorch_model.bin": b"pickle", "../escape.json": b"{}"}
HUB_WEIGHTS = f"/org/tiny/resolve/{COMMIT}/draft/model.safetensors"
SECRET = "hf_not_a_real_token"


@pytest.fixture
def served(
    open_shelf: Callable[[], Shelf], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Shelf:
    """The tiny model's wheel on a shelf, and a stand-in for pip."""
    package = tmp_path / "stand_in" / "pip"
    package.mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    shelf = open_shelf()
    (package / "__init__.py").touch()
    shelf.stand_in = package / "__main__.py"
    shelf.offer(WHEEL, sha256(WHEEL))
    return shelf


def slot() -> Path:
    return sources.cache_dir() / "pypi" / "tiny-model" / "1.0"


def part() -> Path:
    return slot().with_name("1.0.tmp") / "tiny-model-1.0.whl.part"


def leave_part(data: bytes) -> None:
    part().parent.mkdir(parents=True)
    part().write_bytes(data)


def assert_pulled() -> None:
    assert sources.resolve(URI).path.read_bytes() == MODEL
    assert sorted(path.name for path in slot().parent.iterdir()) == ["1.0", "1.0.lock"]
    assert sorted(path.name for path in slot().iterdir()) == ["source.json", "tiny_model"]


def run_pull(before: str = "pass") -> subprocess.Popen[str]:
    code = f"from attending import sources; {before}; sources.pull({URI!r})"
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


@pytest.fixture
def index(open_shelf: Callable[[], Shelf], monkeypatch: pytest.MonkeyPatch) -> Shelf:
    shelf, name = open_shelf(), "tiny_model-1.0-py3-none-any.whl"
    shelf.files[f"/files/{name}"] = WHEEL
    link = f'<a href="/files/{name}#sha256={sha256(WHEEL)}">{name}</a>'
    shelf.files["/simple/tiny-model/"] = link.encode()
    monkeypatch.delenv("PIP_NO_INDEX")
    address = shelf.address.replace("//", "//someone:hunter2@")
    monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple/")
    return shelf


def test_a_wheel_is_pulled_from_the_index_that_pip_is_configured_for(index: Shelf) -> None:
    assert sources.pull(URI).sha256 == sha256(MODEL)
    assert_pulled()
    record = json.loads((slot() / "source.json").read_text())
    assert record["uri"] == URI and record["sha256"] == sha256(MODEL)
    assert record["size_bytes"] == len(MODEL) and record["date"]
    if tuple(int(number) for number in version("pip").split(".")[:2]) >= (25, 3):
        moved = sum(get.sent for get in index.gets() if get.path.endswith(".whl"))
        assert moved < 1.1 * len(WHEEL)


def test_an_unknown_version_is_told_with_the_known_ones_and_without_the_index(index: Shelf) -> None:
    with pytest.raises(SourceError, match=r"tiny-model==9\.9.*from versions: 1\.0") as error:
        sources.pull("pypi:tiny-model==9.9")
    assert "127.0.0.1" not in str(error.value) and "hunter2" not in str(error.value)


def test_no_address_and_no_password_is_told_when_the_index_fails(served: Shelf) -> None:
    told = "ERROR: 503 for https://me:hunter2@index.example/simple/x/ (host='index.example')"
    served.stand_in.write_text(f"import sys; sys.exit({told!r})")
    with pytest.raises(SourceError, match="503") as error:
        sources.pull(URI)
    assert "hunter2" not in str(error.value) and "example" not in str(error.value)


def test_a_wheel_in_a_local_folder_needs_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny_model-1.0-py3-none-any.whl").write_bytes(WHEEL)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    sources.pull(URI)
    assert_pulled()


def test_a_python_without_pip_is_told_what_to_do(served: Shelf) -> None:
    served.stand_in.write_text("import sys; sys.exit('/bin/python: No module named pip')")
    with pytest.raises(SourceError, match="ensurepip"):
        sources.pull(URI)


def test_an_interrupted_pull_goes_on_where_it_stopped(served: Shelf) -> None:
    served.break_after = 0
    with pytest.raises(SourceError, match="pull again"):
        sources.pull(URI)
    assert not slot().exists()
    part().write_bytes(WHEEL[:700_000])
    served.break_after, served.requests = None, []
    sources.pull(URI)
    assert served.starts() == [700_000] and served.sent() == len(WHEEL) - 700_000
    assert_pulled()


def test_a_connection_that_breaks_now_and_then_moves_every_byte_once(served: Shelf) -> None:
    served.break_after = 1 << 20
    sources.pull(URI)
    assert len(served.gets()) == 3 and served.sent() == len(WHEEL)
    assert_pulled()


def test_a_body_that_ends_early_is_never_taken_for_the_file(served: Shelf) -> None:
    served.files["/tiny.whl"], served.claimed_bytes = WHEEL[:-9], len(WHEEL)
    with pytest.raises(SourceError):
        sources.pull(URI)
    assert not slot().exists()


def test_a_server_without_ranges_sends_it_all_again(served: Shelf) -> None:
    leave_part(WHEEL[:700_000])
    served.has_ranges = False
    sources.pull(URI)
    assert_pulled()
    assert len(served.gets()) == 1 and served.sent() == len(WHEEL)


@pytest.mark.parametrize("size", [1, 700_000, len(WHEEL), len(WHEEL) + 9])
def test_a_foreign_part_is_thrown_away_and_fetched_once_more(served: Shelf, size: int) -> None:
    leave_part(b"x" * size)
    sources.pull(URI)
    assert_pulled()
    assert served.starts() == [size, 0]


def test_a_part_that_is_already_whole_is_used(served: Shelf) -> None:
    leave_part(WHEEL)
    sources.pull(URI)
    assert_pulled()
    assert served.sent() == 0


def test_without_a_hash_nothing_is_resumed(served: Shelf) -> None:
    served.offer(WHEEL, "")
    leave_part(b"x" * 700_000)
    sources.pull(URI)
    assert_pulled()


def test_other_bytes_than_the_index_promised_are_refused_with_both_hashes(served: Shelf) -> None:
    other = served.files["/tiny.whl"] = make_wheel({"tiny_model/tiny.gguf": MODEL[::-1]})
    with pytest.raises(SourceError) as error:
        sources.pull(URI)
    assert sha256(other) in str(error.value) and sha256(WHEEL) in str(error.value)
    assert not slot().exists() and not part().exists() and len(served.gets()) == 1


def test_another_file_than_the_catalogue_pins_is_refused_with_both_hashes(
    served: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = sources.Entry(URI, "Tiny", sha256=sha256(b"another file"))
    sources.pull(URI)
    monkeypatch.setitem(sources.CATALOGUE, "tiny", pinned)
    with pytest.raises(SourceError, match="attending pull tiny"):
        sources.resolve("tiny")
    with pytest.raises(SourceError) as error:
        sources.pull("tiny")
    assert sha256(MODEL) in str(error.value) and pinned.sha256 in str(error.value)


def test_a_missing_wheel_is_told_with_its_status(served: Shelf) -> None:
    served.files.clear()
    with pytest.raises(SourceError, match="404") as error:
        sources.pull(URI)
    assert "127.0.0.1" not in str(error.value)


def test_progress_rises_to_the_size_of_the_wheel(served: Shelf) -> None:
    seen: list[tuple[int, int | None, str]] = []
    sources.pull(URI, progress=lambda *told: seen.append(told))
    moved = [(done, total) for done, total, what in seen if what.endswith(".whl")]
    assert {total for _, total in moved} == {len(WHEEL)}
    assert all(before < after for before, after in pairwise(done for done, _ in moved))
    assert moved[-1][0] == len(WHEEL)


def test_a_file_that_cannot_fit_is_refused_before_it_starts(served: Shelf) -> None:
    served.claimed_bytes = 1 << 60
    with pytest.raises(SourceError, match=rf"{1 << 60} bytes are needed, \d+ were free"):
        sources.pull(URI)
    assert not slot().exists() and part().stat().st_size == 0


def test_a_disk_that_fills_up_is_told_with_the_bytes_needed(served: Shelf) -> None:
    part().parent.mkdir(parents=True)
    part().symlink_to("/dev/full")
    with pytest.raises(SourceError, match=rf"No space left.*{len(WHEEL)} bytes are needed, \d+ "):
        sources.pull(URI)
    assert not slot().exists()


def test_what_fitted_before_the_limit_is_kept_and_resumed(served: Shelf) -> None:
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"
    process = run_pull(f"import resource; {limit}")
    assert "File too large" in process.communicate(timeout=20)[1]
    assert not slot().exists() and 0 < (kept := part().stat().st_size) <= 1_000_000
    served.requests.clear()
    sources.pull(URI)
    assert served.starts() == [kept]
    assert_pulled()


def test_a_cache_that_cannot_be_written_is_told(
    served: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTENDING_CACHE", str(served.stand_in / "cache"))
    with pytest.raises(SourceError, match="ATTENDING_CACHE"):
        sources.pull(URI)


def test_ctrl_c_leaves_no_whole_looking_file_and_the_next_pull_resumes(served: Shelf) -> None:
    served.seconds_per_chunk = 0.05
    process, deadline = run_pull(), time.monotonic() + 20
    while not (part().exists() and part().stat().st_size > 300_000):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=20)[1]
    assert not slot().exists() and 300_000 < (kept := part().stat().st_size) < len(WHEEL)
    served.seconds_per_chunk, served.requests = 0.0, []
    sources.pull(URI)
    assert served.starts() == [kept]
    assert_pulled()


def test_pulls_at_once_download_once_and_say_that_they_wait(
    served: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    served.seconds_per_chunk = 0.01
    processes = [run_pull(), run_pull()]
    while not slot().with_name("1.0.tmp").exists():
        assert None in [process.poll() for process in processes], "both ended without a draft"
    with caplog.at_level(logging.INFO):
        sources.pull(URI)
    assert "waiting for another" in caplog.text and str(sources.cache_dir()) not in caplog.text
    for process in processes:
        stderr = process.communicate(timeout=20)[1]
        assert process.returncode == 0, stderr
    assert served.sent() == len(WHEEL)
    assert_pulled()


def test_a_pulled_source_needs_no_network_no_pip_and_no_lock(served: Shelf) -> None:
    sources.pull(URI)
    served.requests.clear()
    served.stand_in.unlink()
    (lock := slot().with_name("1.0.lock")).unlink()
    lock.mkdir()
    assert sources.pull(URI) == sources.resolve(URI)
    assert served.requests == []


def test_what_was_damaged_in_the_cache_is_pulled_anew(served: Shelf) -> None:
    for damaged in (sources.pull(URI).path, slot() / "source.json"):
        damaged.write_bytes(b"{")
        sources.pull(URI)
        assert_pulled()


def test_a_folder_of_a_wheel_is_unpacked_alone(served: Shelf) -> None:
    files = {"data/a/config.json": b"{}", "data/a/deep/x.txt": b"x", "data/ab/other.txt": b"no"}
    wheel = make_wheel(files)
    served.offer(wheel, sha256(wheel))
    pulled = sources.pull(f"{URI}/data/a")
    found = {str(path.relative_to(pulled.path)) for path in pulled.path.rglob("*.*")}
    assert found == {"config.json", "deep/x.txt"} and pulled.sha256 == sha256(wheel)
    assert sources.resolve(f"{URI}/data/a") == pulled


@pytest.mark.parametrize("inner", ["", "/one.gguf", "/data/thre", "/data/three.gguf/x"])
def test_a_path_that_is_not_in_the_wheel_is_answered_with_those_that_are(
    inner: str, served: Shelf
) -> None:
    wheel = make_wheel({"data/two.gguf": b"2", "data/three.gguf": b"3"})
    served.offer(wheel, sha256(wheel))
    with pytest.raises(SourceError, match=r"data/two\.gguf, data/three\.gguf"):
        sources.pull(URI + inner)


@pytest.mark.parametrize("name", ["../../../evil.gguf", "/tmp/evil.gguf", "a/../../../evil.gguf"])
def test_a_wheel_cannot_write_outside_its_folder(name: str, served: Shelf, tmp_path: Path) -> None:
    wheel = make_wheel({name: b"evil"})
    served.offer(wheel, sha256(wheel))
    with pytest.raises(SourceError, match=r"has no single \.gguf file"):
        sources.pull(URI)
    assert not list(tmp_path.rglob("*evil*")) and not Path("/tmp/evil.gguf").exists()


def test_a_damaged_wheel_is_told(served: Shelf) -> None:
    served.offer(b"no zip", sha256(b"no zip"))
    with pytest.raises(SourceError, match="not a zip"):
        sources.pull(URI)


@pytest.fixture
def hub(open_shelf: Callable[[], Shelf], monkeypatch: pytest.MonkeyPatch) -> Shelf:
    shelf = open_shelf()
    monkeypatch.setenv("HF_ENDPOINT", shelf.address)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    publish(shelf, COMMIT, HUB_FILES)
    return shelf


def test_a_hub_model_is_pulled_without_pickles_and_its_commit_is_recorded(
    hub: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        pulled = sources.pull("hf:org/tiny@v1")
    assert pulled.revision == COMMIT
    names = {str(p.relative_to(pulled.path)) for p in pulled.path.rglob("*") if p.is_file()}
    assert names == {"config.json", "empty.txt", "draft/model.safetensors"}
    assert (pulled.path / "draft" / "model.safetensors").read_bytes() == MODEL
    tokens = {request.token for request in hub.requests if "/org/" in request.path}
    assert tokens == {f"Bearer {SECRET}"} and SECRET not in caplog.text
    hub.requests.clear()
    assert sources.resolve("hf:org/tiny@v1") == sources.pull("hf:org/tiny@v1") == pulled
    assert hub.requests == []


def test_the_token_does_not_follow_a_redirect_to_another_host(
    hub: Shelf, open_shelf: Callable[[], Shelf]
) -> None:
    store = open_shelf()
    store.files["/blob"] = MODEL
    hub.redirects[HUB_WEIGHTS] = store.address.replace("127.0.0.1", "localhost") + "/blob"
    sources.pull("hf:org/tiny")
    assert [request.token for request in store.requests] == [""]


def test_files_of_an_earlier_commit_are_not_mixed_in(hub: Shelf) -> None:
    publish(hub, COMMIT, HUB_FILES | {"a/only_then.json": b"{}"})
    hub.files[HUB_WEIGHTS] = MODEL[::-1]
    with pytest.raises(SourceError, match=sha256(MODEL)):
        sources.pull("hf:org/tiny")
    with pytest.raises(SourceError, match="attending pull"):
        sources.resolve("hf:org/tiny")
    publish(hub, "f00d" * 10, HUB_FILES | {"config.json": b'{"v": 2}'})
    pulled = sources.pull("hf:org/tiny")
    assert (pulled.path / "config.json").read_bytes() == b'{"v": 2}'
    assert not (pulled.path / "a").exists()


def test_an_unknown_hub_model_is_told_without_address_and_token(hub: Shelf) -> None:
    with pytest.raises(SourceError, match="hf:org/none") as error:
        sources.pull("hf:org/none")
    assert "127.0.0.1" not in str(error.value) and SECRET not in str(error.value)


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(SourceError, match="ConnectError"):
            sources.pull("hf:org/tiny")


def test_resolve_never_opens_a_socket(served: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    sources.pull(URI)
    monkeypatch.setattr(socket, "socket", None)
    assert sources.resolve(URI).path.is_file()
    with pytest.raises(SourceError, match=r"Run: attending pull default \(92\.9 MB\)"):
        sources.resolve("default")


def test_a_path_resolves_to_itself_but_a_name_of_the_catalogue_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m2").mkdir()
    monkeypatch.chdir(tmp_path)
    for source in ("./m2", str(tmp_path)):
        assert sources.resolve(source).path == sources.pull(source).path == Path(source)
        assert sources.resolve(source).name == Path(source).name
    with pytest.raises(SourceError, match="not in the cache"):
        sources.resolve("m2")


WRONG = {
    "defualt": "Did you mean 'default'",
    "": "does not exist",
    "./none": "'./none' does not exist",
    "pypi:tiny-model": "pypi:package==version",
    "pypi:tiny-model==1.0/../../etc/passwd": "is not a source",
    "pypi:..==1.0": "is not a source",
    "pypi:-r==1.0": "is not a source",
    "hf:org": "hf:org/name",
    "hf:../..": "is not a source",
    "hf:org/..": "is not a source",
    "hf:org/name@../../x": "is not a source",
    "hf:datasets/org/name": "hf:datasets/org/name[@revision]/path",
    "hf:datasets/org/name@main": "is not a source",
    "hf:datasets/org/name/../x.jsonl": "is not a source",
    "hf:datasets/org/name@v1/.x/y.jsonl": "is not a source",
    "https://example.org": "https://HOST/PATH",
    "https://example.org/v1": "is not a source",  # an endpoint
    "https://example.org/a/../x.jsonl": "is not a source",
    "https://example.org/.x.jsonl": "is not a source",
    "https://example.org/x.jsonl?key=1": "is not a source",
    "https://me:hunter2@example.org/x.jsonl": "'https://[...]@example.org/x.jsonl' is not",
    "http://example.org/x.jsonl": "is not a source",
    "http://localhost.example.org/x.jsonl": "is not a source",
}


@pytest.mark.parametrize("source", WRONG)
def test_a_wrong_source_is_told_what_is_right(source: str) -> None:
    for use in (sources.resolve, sources.pull):
        with pytest.raises(SourceError, match=re.escape(WRONG[source])):
            use(source)


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("ATTENDING_CACHE", "/a")
    assert sources.cache_dir() == Path("/a")
    monkeypatch.delenv("ATTENDING_CACHE")
    assert sources.cache_dir() == Path("/b/attending")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.cache_dir() == Path.home() / ".cache" / "attending"


def test_every_name_is_a_remote_source_with_a_licence_and_the_default_is_pinned() -> None:
    for name, entry in sources.CATALOGUE.items():
        assert entry.licence and entry.title and entry.note
        assert entry.size_bytes or entry.uri.startswith("https:")
        with pytest.raises(SourceError, match=f"attending pull {name}"):
            sources.resolve(name)
    default = sources.CATALOGUE["default"]
    assert len(default.sha256) == 64 and default.licence == "Apache-2.0"
    assert "demonstration" in default.note and "not for clinical use" in default.note


def test_shipped_configs_count_the_published_parameters(tmp_path: Path) -> None:
    m1, m2 = sources.shipped_config("m1"), sources.shipped_config("m2")
    assert m1 and m2 and sources.shipped_config("hf:baichuan-inc/Baichuan-M2-32B") == m2
    assert sources.shipped_config("default") is None is sources.shipped_config(str(tmp_path))
    hidden, inner = m1["hidden_size"], m1["intermediate_size"]
    total = 2 * m1["vocab_size"] * hidden + hidden
    for layer in range(m1["num_hidden_layers"]):
        kind = "swa_" if layer in m1["sliding_window_layers"] else ""
        heads, pairs = m1[f"num_{kind}attention_heads"], m1[f"num_{kind}key_value_heads"]
        packed = hidden + 2 * pairs * hidden // heads
        total += (packed + hidden) * hidden + 3 * hidden * inner + 2 * hidden
        total += 2 * pairs * m1["conv_window"]
    assert total == 14_470_764_320 and sources.CATALOGUE["m1"].size_bytes == 2 * total
    hidden, inner = m2["hidden_size"], m2["intermediate_size"]
    narrow = hidden // m2["num_attention_heads"] * m2["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * narrow + hidden + 2 * narrow
    layer += 3 * hidden * inner + 2 * hidden
    total = m2["num_hidden_layers"] * layer + 2 * m2["vocab_size"] * hidden + hidden
    assert sources.CATALOGUE["m2"].size_bytes == 2 * total
