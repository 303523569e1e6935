"""Whole runs on small input: what comes out, what is removed, and why."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from attending.chat import Tokenizer
from attending.config import recipe_names
from attending.corpus import run, steps
from attending.corpus.ledger import funnel
from attending.corpus.read import plan
from attending.corpus.recipe import CorpusConfig
from attending.errors import AttendingError, CheckFailed, CheckpointError, ConfigError, UsageError
from attending.report import write_report
from attending.shards import Shards
from tests.corpus.making import Found, build, prose, recipe, write_jsonl

BAD = [
    {"text": prose(100) + "\x00\x01"},
    {"text": "患者 ECG 示 ST 段抬高，aspirin 300 mg 口服，" + "症状缓解后继续观察病情变化。" * 6},
    {"text": prose(102), "id": "same"},
    {"text": prose(103), "id": "same"},
    b'{"text": "\xff"}',
    '{"text": "cut',
    {"text": "word " * 20 + "x" * 3000},
    {"text": " \n "},
    {"text": "short"},
    {"other": 1},
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Good documents, exact and near copies, a test question, and every kind of bad record."""
    root = tmp_path_factory.mktemp("mixed")
    question = " ".join(f"question{n}" for n in range(20))
    write_jsonl(root / "a.jsonl", [{"text": prose(n)} for n in range(40)])
    near = prose(3).replace("case", "ward")
    copies = [{"text": prose(5)}] * 14 + [{"text": near}, {"text": f"{prose(60)} {question}"}]
    write_jsonl(root / "b.jsonl", copies)
    write_jsonl(root / "c.jsonl", [*BAD, '{"text": "half a pair \\ud800 of a surrogate, escaped"}'])
    (root / "empty.jsonl").touch()
    write_jsonl(root / "eval" / "test.jsonl", [{"q": question}])
    source = {"path": "*.jsonl", "private": False, "id": ""}
    config = recipe(
        root,
        sources={"notes": source},
        decontamination={"paths": ["eval/*.jsonl"]},
    )
    return build(config, root / "out")


def test_every_record_is_kept_or_removed_with_a_reason(mixed: Found) -> None:
    records = 40 + 16 + len(BAD) + 1 + 1  # and the empty file
    assert mixed.documents() + len(mixed.removed()) == records
    assert mixed.reasons() == {
        "broken_utf8": 2,
        "broken_json": 1,
        "empty_file": 1,
        "no_field": 1,
        "long_token": 1,
        "empty": 1,
        "too_short": 1,
        "exact_duplicate": 14,
        "near_duplicate": 1,
        "test_question": 1,
    }
    for row in mixed.removed():
        assert row["file"] and row["line"] and row["source"] == "notes" and "bytes" in row


def test_what_was_found_often_is_seen_often_but_at_most_ten_times(mixed: Found) -> None:
    tokenizer = Tokenizer.from_folder(mixed.out.parent / "tokenizer")
    shards = Shards(mixed.out / "train")
    texts = [tokenizer.decode(shards.document(n)) for n in range(shards.num_documents)]
    assert texts.count(prose(5)) == 10
    assert sum(text.startswith(prose(3)[:-8]) for text in texts) == 2
    assert texts.count(prose(7)) <= 1


def test_shards_are_whole_and_documents_end_with_end_of_text(mixed: Found) -> None:
    for part in ("train", "heldout/medical", "heldout/general"):
        shards = Shards(mixed.out / part)
        shards.verify()
    train = Shards(mixed.out / "train")
    assert len(train.shards) > 1 and train.num_tokens == sum(
        row["seen_tokens"] for row in mixed.funnel["tokens"] if row["part"] == "train"
    )
    assert train.index["sources"] == ["notes"] and train.index["begin_of_text"] is None


def test_the_layout_is_complete_and_nothing_else_is_left(mixed: Found) -> None:
    assert {path.name for path in mixed.out.iterdir()} == {
        "train", "heldout", "removed", "funnel.json", "run.json", "metrics.jsonl", "report.html",
    }  # fmt: skip
    told = json.loads((mixed.out / "run.json").read_text())
    assert told["verb"] == "corpus" and told["parents"][0]["sha256"]
    assert not list(mixed.out.rglob("*.tmp"))
    assert mixed.funnel["notes"]["unseen_characters"] == 2


def test_a_control_string_in_a_text_stays_text(tmp_path: Path) -> None:
    text = prose(1) + " <|endoftext|> " + prose(2)
    write_jsonl(tmp_path / "a.jsonl", [{"text": text, "n": n} for n in range(1)])
    found = build(recipe(tmp_path), tmp_path / "out")
    for part in ("train", "heldout/medical", "heldout/general"):
        shards = Shards(found.out / part)
        for number in range(shards.num_documents):
            ids = shards.document(number)
            assert np.flatnonzero(ids == shards.index["end_of_text"]).tolist() == [len(ids) - 1]


def test_repeated_ids_are_kept_and_made_different(tmp_path: Path) -> None:
    rows = [{"text": prose(n), "id": "same"} for n in range(6)]
    write_jsonl(tmp_path / "a.jsonl", rows[:4])
    write_jsonl(tmp_path / "b.jsonl", rows[4:])
    source = {"path": "*.jsonl", "private": False, "id": "{id}", "weight": 0.0}
    config = recipe(tmp_path, sources={"notes": source}, quality={"languages": []})
    with pytest.raises(CheckFailed, match="no document is left"):  # weight 0 removes them all
        build(config, tmp_path / "out")
    removed = Found.__new__(Found)
    removed.out = tmp_path / "out.tmp"
    ids = [row["id"] for row in removed.removed() if row["reason"] == "weight"]
    assert len(set(ids)) == len(ids) and (len(ids) == 6 or not ids)
    assert funnel(tmp_path / "out.tmp")["notes"]["repeated_ids"] == 5


@pytest.fixture
def filter_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A stand-in for the identifier filter."""
    told: dict[str, Any] = {"fails": False}

    def redact(text: str, *, second_pass: bool) -> str:
        assert second_pass
        if told["fails"]:
            raise AttendingError("the identifier filter failed")
        return text.replace("Alice", "[NAME]")

    module = ModuleType("attending.phi")
    module.redact = redact  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "attending.phi", module)
    yield told


def test_the_sample_is_of_training_texts_behind_the_filter(
    tmp_path: Path, filter_of: dict[str, Any]
) -> None:
    rows = [{"text": f"{prose(n)} Alice came."} for n in range(120)] + [{"text": "short Alice"}]
    write_jsonl(tmp_path / "a.jsonl", [*rows, *rows[:50]])
    told = {"pack": recipe(tmp_path).pack.model_dump()}
    samples = {}
    for share in (0.0, 0.3, 1.0):
        told["pack"]["sample_share"] = share
        found = build(private(tmp_path, **told), tmp_path / f"out{share}")
        file = found.out / "sample.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        samples[share] = [json.loads(line) for line in lines]
    assert not (tmp_path / "out0.0" / "sample.jsonl").exists()
    (domain,) = {row["domain"] for row in samples[1.0]}
    assert domain in ("medical", "general")
    tokenizer = Tokenizer.from_folder(tmp_path / "tokenizer")
    shards = Shards(found.out / "train")
    texts = {tokenizer.decode(shards.document(n)) for n in range(shards.num_documents)}
    all_, some = ([row["text"] for row in samples[share]] for share in (1.0, 0.3))
    assert sorted(all_) == sorted(texts)  # each once, however often it is seen, and none held out
    assert set(some) < set(all_) and 0.2 < len(some) / len(all_) < 0.4
    assert all("[NAME]" in text and "Alice" not in text for text in all_)


def test_the_index_says_what_begins_a_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(n)} for n in range(20)])
    config = recipe(tmp_path)
    file = tmp_path / "tokenizer" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "$A $B", [("<s>", 300)])
    tokenizer.save(str(file))
    shards = Shards(build(config, tmp_path / "out").out / "train")
    assert shards.index["begin_of_text"] == 300
    assert {int(shards.document(n)[0]) for n in range(shards.num_documents)} == {300}


def private(root: Path, **changes: Any) -> CorpusConfig:
    return recipe(root, sources={"notes": {"path": "*.jsonl"}}, **changes)


def test_no_identifier_is_written_whatever_the_reason_of_removal(
    tmp_path: Path, filter_of: dict[str, Any]
) -> None:
    rows = [f"{prose(n)} Alice came." for n in range(8)]
    rows += [rows[0], rows[1].replace("case", "ward"), "Alice", "Alice " + "x" * 3000]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in rows])
    found = build(private(tmp_path), tmp_path / "out", keep_work=True)
    assert {"too_short", "long_token", "exact_duplicate"} <= found.reasons().keys()
    for row in found.removed():
        assert "Alice" not in row["text"] and "[NAME]" in row["text"]
    for name, data in found.bytes().items():
        assert b"Alice" not in data, name
    for path in (found.out / "work" / "documents").rglob("*.gz"):
        assert all("Alice" not in row["text"] for row, _ in steps.read_lines(path))


def test_if_the_filter_fails_the_run_fails(tmp_path: Path, filter_of: dict[str, Any]) -> None:
    filter_of["fails"] = True
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(1)}])
    with pytest.raises(AttendingError, match="the identifier filter failed"):
        build(private(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_a_clear_error_and_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(n)} for n in range(20)])
    config = recipe(tmp_path)

    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(steps.Mix, "apply", full)
        with pytest.raises(CheckpointError, match="disk is full"):
            build(config, tmp_path / "out")
    resumed = build(config, tmp_path / "out", resume=True)
    assert resumed.bytes() == build(config, tmp_path / "again").bytes()


def test_what_must_not_be_overwritten_or_mixed_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(n)} for n in range(3)])
    config = recipe(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="out exists"):
        build(config, tmp_path / "out")
    (tmp_path / "two.tmp" / "work").mkdir(parents=True)
    with pytest.raises(UsageError, match="--resume"):
        build(config, tmp_path / "two")
    run._plan(config, tmp_path / "two.tmp")
    changed = config.replace(weights={"general": 2.0})
    with pytest.raises(ConfigError, match="recipe changed"):
        build(changed, tmp_path / "two", resume=True)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(ConfigError, match="input files changed"):
        build(config, tmp_path / "two", resume=True)


def test_documents_that_vanish_are_an_error(tmp_path: Path) -> None:
    for step, documents in (("read", 3), ("clean", 2)):
        path = tmp_path / "work" / "counts" / step / "00000.json"
        path.parent.mkdir(parents=True)
        row = ["s", "medical", "", documents, 10]
        path.write_text(json.dumps({"rows": [row], "samples": {}, "notes": {}, "seconds": 0.0}))
    with pytest.raises(CheckFailed, match="step clean lost or invented documents"):
        funnel(tmp_path)


def test_domains_come_from_the_score_where_a_source_is_silent(tmp_path: Path) -> None:
    medicine = (
        "The patient was given aspirin and heparin for chest pain and moved to intensive care. "
    )
    history = (
        "The Industrial Revolution began in Britain in the eighteenth century with steam power. "
    )
    texts = [f"{text} Note {n}." for n in range(4) for text in (medicine, history)]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    found = build(recipe(tmp_path, duplicates={"bands": 2, "rows": 60}), tmp_path / "out")
    last = {row["domain"]: row["out"]["documents"] for row in found.funnel["rows"][-2:]}
    assert last == {"medical": 4, "general": 4}


def test_scores_are_trained_first_where_the_recipe_has_samples(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(n)} for n in range(60)])
    write_jsonl(
        tmp_path / "s" / "b.jsonl", [{"text": f"war king trade {n} " * 9} for n in range(60)]
    )
    samples = {"good": ["*.jsonl", "s/*"], "medical": ["*.jsonl"], "general": ["s/*.jsonl"]}
    found = build(recipe(tmp_path, samples=samples), tmp_path / "out")
    metrics = json.loads((found.out / "run.json").read_text())["metrics"]
    assert metrics["corpus/medical_en_accuracy"] == 1.0
    assert {path.name for path in (found.out / "scorer").iterdir()} == {
        "quality.safetensors", "medical.safetensors",
    }  # fmt: skip
    again = recipe(tmp_path, quality={"scorer": str(found.out / "scorer"), "languages": []})
    assert build(again, tmp_path / "again").documents() > 0


def test_the_page_shows_the_funnel_and_what_was_removed(mixed: Found) -> None:
    page = write_report(mixed.out).read_text(encoding="utf-8")
    assert "Funnel" in page and "exact_duplicate 14" in page and "test question" in page


@pytest.mark.parametrize("name", recipe_names("corpus"))
def test_every_shipped_recipe_builds(name: str) -> None:
    assert CorpusConfig.load(name, "corpus").sources


def test_slurm_jobs_are_built_in_order_and_submitted_to_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(1)}])
    options = {"partition": "cpu", "time": "01:00:00"}
    config = recipe(tmp_path, executor={"kind": "slurm", "tasks": 4, "options": options})
    stages = run.build_executors(config, tmp_path / "out.tmp", plan(config))
    assert [stage.name for stage in stages] == [
        "clean", "find", "sign", "compare", "cluster", "tokenise", "pack",
    ]  # fmt: skip
    assert [s.executor.tasks for s in stages] == [4, 1, 4, 6, 1, 4, 4]
    for before, after in pairwise(stages):
        assert after.executor.depends is before.executor
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho Submitted job 7\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    result = run.build(config, tmp_path / "out")
    assert result.out is None and (tmp_path / "out.tmp").is_dir()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sum("--dependency=afterok:7" in call for call in calls) == 6
    script = tmp_path / "out.tmp" / "work" / "stages" / "clean" / "launch_script.slurm"
    assert "--partition=cpu" in script.read_text()


def test_ray_jobs_are_built(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(1)}])
    config = recipe(tmp_path, executor={"kind": "ray", "tasks": 4, "workers": 2})
    stages = run.build_executors(config, tmp_path / "out.tmp", plan(config))
    assert type(stages[0].executor).__name__ == "RayPipelineExecutor" and len(stages) == 7
    if find_spec("ray") is None:
        with pytest.raises(ConfigError, match=r"'\.\[scale\]'"):
            run.build(config, tmp_path / "out")
    with pytest.raises(ConfigError, match="options do not suit ray"):
        wrong = recipe(tmp_path, executor={"kind": "ray", "options": {"partition": "x"}})
        run.build_executors(wrong, tmp_path / "out.tmp", plan(wrong))


def test_a_dry_run_writes_nothing_and_says_what_it_takes(tmp_path: Path) -> None:
    size = write_jsonl(tmp_path / "a.jsonl", [{"text": prose(1)}]).stat().st_size
    takes = run.estimate(recipe(tmp_path))
    assert takes["input_bytes"] == {"notes": size} and takes["disk_bytes"] > size


def test_the_command_line_builds_with_several_processes(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(n)} for n in range(30)])
    config = recipe(tmp_path)
    write_recipe(tmp_path / "r.toml", config)
    words = ["corpus", str(tmp_path / "r.toml"), "--set", "executor.workers=2", "--json"]
    words += ["--out", str(tmp_path / "out")]
    code = "from attending.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["tokens"]["train"] == Shards(tmp_path / "out" / "train").num_tokens
    assert Found(tmp_path / "out").bytes() == build(config, tmp_path / "one").bytes()


def write_recipe(path: Path, config: CorpusConfig) -> None:
    """The recipe's values as TOML."""
    source = config.sources["notes"]
    lines = [f'root = "{config.root}"', "[sources.notes]", f'path = "{source.path}"']
    lines += ["private = false", "[quality]", "min_quality = 0.0", "languages = []"]
    lines += ["[duplicates]", "bands = 6", "rows = 4"]
    lines += ["[pack]", f'tokenizer = "{config.pack.tokenizer}"', "tokens_per_shard = 4000"]
    lines += ["[executor]", "tasks = 3"]
    path.write_text("\n".join(lines), encoding="utf-8")


def test_a_run_killed_after_its_last_step_only_has_its_work_to_remove(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": prose(n)} for n in range(4)])
    config = recipe(tmp_path)
    first = run.build(config, tmp_path / "out", keep_work=True)
    assert (tmp_path / "out" / "work").is_dir()
    assert run.build(config, tmp_path / "out", resume=True) == first
    assert not (tmp_path / "out" / "work").exists()
