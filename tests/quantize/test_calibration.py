"""Calibration text: disjoint, the same at every call, whole samples, replies asked once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attending.artifact import digest
from attending.corpus.split import is_held_out
from attending.errors import ConfigError
from attending.quantize import calibration
from attending.quantize.recipe import CalibrationConfig
from attending.train.start import open_start
from tests.engine.folders import write_model
from tests.quantize.text import recipe, write_text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m")


def prepared(model: Path, config: CalibrationConfig, folder: Path, seed: int = 0) -> Any:
    folder.mkdir(exist_ok=True)
    notes: list[str] = []
    found = calibration.prepare(
        config, open_start(str(model)), folder, seed, lambda *_: None, notes.append
    )
    return found, notes


def test_samples_are_whole_disjoint_and_fixed(model: Path, tmp_path: Path) -> None:
    root = write_text(tmp_path / "text")
    config = recipe(model, root).calibration
    found, notes = prepared(model, config, tmp_path / "a")
    assert {n: tuple(ids.shape) for n, ids in found.calibration.items()} == {
        "notes": (4, 24),
        "talks": (4, 24),
    }
    assert {n: len(ids) for n, ids in found.evaluation.items()} == {"notes": 1, "talks": 1}
    assert notes == []
    again, _ = prepared(model, config, tmp_path / "b")
    other, _ = prepared(model, config, tmp_path / "c", seed=1)
    assert torch.equal(again.calibration["talks"], found.calibration["talks"])
    assert not torch.equal(other.calibration["talks"], found.calibration["talks"])
    for name in config.parts:
        sides = calibration.records(config, name, 0)
        ids = [{one.id for one in side} for side in sides]
        assert not ids[0] & ids[1] and all(is_held_out(one) for one in ids[1])
        texts = [one[1:] for side in sides for one in side]
        assert len(set(texts)) == len(texts)


def test_dialogues_go_through_the_template_and_documents_end(model: Path, tmp_path: Path) -> None:
    root = write_text(tmp_path / "text")
    config = recipe(model, root).calibration
    found, _ = prepared(model, config, tmp_path / "a")
    tokenizer = open_start(str(model)).tokenizer
    told = tokenizer.spelled(found.calibration["talks"][0].tolist())
    first = calibration.records(config, "talks", 0)[0][0]
    turns = [{"role": "user", "content": first.prompt}]
    start = tokenizer.spelled(tokenizer.render(turns))
    assert (start + first.text).startswith(told) or told.startswith(start + first.text)
    row, wanted = found.calibration["notes"].flatten().tolist(), list[int]()
    for one in calibration.records(config, "notes", 0)[0]:
        ids = [*tokenizer.encode(one.text), min(tokenizer.stop_ids)]
        wanted += ids[: config.length]  # so that one long document is not all there is
    assert row == wanted[: len(row)]


def test_a_reply_that_was_cut_does_not_end(model: Path) -> None:
    tokenizer = open_start(str(model)).tokenizer
    whole = calibration.Record("a", "x", "hm")
    ids, cut = (
        list(calibration._encode(tokenizer, one)) for one in (whole, whole._replace(is_cut=True))
    )
    assert {*ids[len(cut) :]} & tokenizer.stop_ids and ids[: len(cut)] == cut
    assert tokenizer.spelled(cut).endswith("hm")


def test_less_than_a_sample_is_an_error_and_less_than_asked_is_said(
    model: Path, tmp_path: Path
) -> None:
    root = write_text(tmp_path / "text")
    short = recipe(model, root, "calibration.length=100000").calibration
    with pytest.raises(ConfigError, match=r"text of notes is .* less than one sample of 100,000"):
        prepared(model, short, tmp_path / "a")
    many = recipe(model, root, "calibration.evaluation=400").calibration
    found, notes = prepared(model, many, tmp_path / "b")
    size = len(found.evaluation["notes"])
    assert 0 < size < 200 and notes[0] == f"notes: text for {size} of 200 samples (evaluation)"


def test_replies_are_asked_once_and_kept_for_other_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, kept = write_text(tmp_path / "text"), tmp_path / "kept" / "replies.jsonl"
    parts = {"own": {"path": "notes.jsonl", "prompt": "{q}", "id": "{id}"}}
    changed = recipe(model, root).calibration.model_dump(mode="json")
    changed |= {"parts": parts, "replies": str(kept), "samples": 2, "evaluation": 1}
    config = CalibrationConfig.build(changed)
    found, _ = prepared(model, config, tmp_path / "a")
    rows = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) >= 2
    asked = {one.prompt for side in calibration.records(config, "own", 0) for one in side}
    assert {row["prompt"] for row in rows} <= asked

    def refuse(*_: object) -> None:
        raise AssertionError("asked again")

    monkeypatch.setattr("attending.endpoint.open", refuse)
    with kept.open("a") as file:
        file.write('{"key": "half')  # of a crash
    again, _ = prepared(model, config, tmp_path / "b")
    assert torch.equal(again.calibration["own"], found.calibration["own"])
    # Another way of asking is another reply.
    hotter = changed | {"sampling": {"max_tokens": 6, "temperature": 1.0}}
    with pytest.raises(AssertionError, match="asked again"):
        prepared(model, CalibrationConfig.build(hotter), tmp_path / "c")


def test_parts_share_all_samples_and_none_is_without() -> None:
    """Three equal parts of 128, by largest remainders; a small share still has one."""
    how: dict[str, Any] = {"samples": 128, "evaluation": 3}
    parts: dict[str, Any] = {name: {"path": "x", "text": "{t}"} for name in ("a", "b", "c")}
    counts = calibration._counts(CalibrationConfig.build({**how, "parts": parts}))
    assert [counts[f"calibration.{name}"] for name in "abc"] == [43, 43, 42]
    assert [counts[f"evaluation.{name}"] for name in "abc"] == [1, 1, 1]
    parts["c"]["share"] = 0.001
    counts = calibration._counts(CalibrationConfig.build({**how, "parts": parts}))
    assert counts["calibration.c"] == counts["evaluation.c"] == 1
    parts["c"]["share"] = 0.0
    with pytest.raises(ConfigError, match="share"):
        CalibrationConfig.build({**how, "parts": parts})


def test_files_are_named_with_their_sum(model: Path, tmp_path: Path) -> None:
    config = recipe(model, write_text(tmp_path / "text")).calibration
    found = calibration.digests(config)
    sha256 = digest(tmp_path / "text" / "notes.jsonl")
    assert found == [{"uri": f"{n}/notes.jsonl", "sha256": sha256} for n in ("notes", "talks")]
