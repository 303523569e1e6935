"""A folder appears whole or not at all, and says how it was made."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from attending import artifact
from attending.artifact import Record
from attending.errors import CheckpointError, UsageError


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with artifact.publish(target) as draft:
        (draft / "sub").mkdir()
        (draft / "sub" / "weights").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "weights").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir() if "model" in p.name] == ["model"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_nothing(tmp_path: Path, failure: type[BaseException]) -> None:
    with pytest.raises(failure), artifact.publish(tmp_path / "model") as draft:
        (draft / "weights").write_text("half")
        raise failure
    assert not [p for p in tmp_path.iterdir() if "model" in p.name]


def test_nothing_is_overwritten_but_a_dead_draft(tmp_path: Path) -> None:
    target = tmp_path / "model"
    (tmp_path / "model.tmp").mkdir()
    (tmp_path / "model.tmp" / "old").write_text("of a crash")
    with artifact.publish(target):
        pass
    assert list(target.iterdir()) == []
    with pytest.raises(UsageError, match="model exists"), artifact.publish(target):
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space (os error 28)"),
    ],
)
def test_a_full_disk_is_a_clear_error(tmp_path: Path, error: Exception) -> None:
    full = pytest.raises(CheckpointError, match=r"disk is full .* model was not written")
    with full, artifact.publish(tmp_path / "model"):
        raise error
    assert not (tmp_path / "model").exists()
    other = SafetensorError("Error while serializing: I/O error: File too large (os error 27)")
    with pytest.raises(SafetensorError), artifact.publish(tmp_path / "model"):
        raise other


def test_the_record_and_the_card_say_how_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/attending", "save", "/secret/place/model", "a b"])
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama",
                "num_hidden_layers": 2,
                "hidden_size": 8,
                "max_position_embeddings": 16,
            }
        )
    )
    parent = {"uri": "hf:a/b", "sha256": "0" * 64}
    record = Record("save", recipe={"steps": 3}, seed=7, parents=[parent])
    artifact.finish(tmp_path, record, title="T", note="A demonstration.", metrics={"a/b": 1.5})
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["command"] == "attending save model 'a b'"
    assert (run["verb"], run["seed"], run["recipe"]) == ("save", 7, {"steps": 3})
    assert run["parents"] == [parent] and run["metrics"] == {"a/b": 1.5}
    assert run["versions"]["python"] and run["hardware"] and run["wall_seconds"] >= 0
    card = (tmp_path / "README.md").read_text()
    for text in ("A demonstration.", "No claim of clinical fitness", "hf:a/b", "| a/b | 1.5 |"):
        assert text in card


def test_a_digest_follows_the_model_files_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = artifact.digest(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("x")
    assert artifact.digest(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert artifact.digest(tmp_path) != first


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("/data/ann/texts", "texts"),
        ("root=/data/ann/texts", "root=texts"),
        ('text.paths=["/a/b.jsonl", "c/d"]', 'text.paths=["b.jsonl", "c/d"]'),
        ("a/b/c", "a/b/c"),
        ("https://host/v1", "https://host/v1"),
        ("hf:org/name@main", "hf:org/name@main"),
        ({"corpus": "/a/b", "n": 3, "more": [["/c/d/"]]}, {"corpus": "b", "n": 3, "more": [["d"]]}),
    ],
)
def test_what_is_published_names_no_folder_of_this_machine(told: Any, kept: Any) -> None:
    assert artifact.without_folders(told) == kept
