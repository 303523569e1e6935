"""Fine-tuning from end to end, on a model of a few thousand weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import attending
from attending.errors import ConfigError
from attending.logs import read_metrics
from attending.model.lora import load_adapter
from attending.sft.data import prepare
from attending.sft.estimate import estimate
from attending.sft.loop import sft
from attending.sft.recipe import SftConfig
from attending.shards import Shards
from tests.train.making import CHATML, LLAMA, HaltedError, halt_at, make_model, make_tokenizer
from tests.train.ranks import require_two_equal_one

DRUGS = ("aspirin", "insulin", "heparin", "digoxin", "codeine", "lithium")
Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = make_tokenizer(folder / "tokenizer")
    (tokenizer / "chat_template.jinja").write_text(CHATML, "utf-8")
    model = make_model(folder / "model", tokenizer, {**LLAMA, "max_position_embeddings": 128})
    data = folder / "data"
    data.mkdir()
    with (data / "qa.jsonl").open("w", encoding="utf-8") as file:
        for number in range(400):
            drug = DRUGS[number % len(DRUGS)]
            row = {"n": number, "q": f"what is {drug} {number}?", "a": f"{drug} is a drug"}
            file.write(json.dumps(row) + "\n")
    with (data / "talks.jsonl").open("w", encoding="utf-8") as file:
        for row in talks():
            file.write(json.dumps(row) + "\n")
    return data, model


def talks() -> list[dict[str, Any]]:
    said = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "my head hurts"},
        {"role": "assistant", "content": "since when?"},
        {"role": "user", "content": "today"},
        {"role": "assistant", "content": "rest"},
    ]
    no_turn = said[:2]
    unknown = [{"role": "nurse", "content": "hm"}, said[2]]
    long = [said[1], {"role": "assistant", "content": "so long " * 40}]
    silent = [said[1], {"role": "assistant", "content": "x", "weight": 0}]
    kinds: list[Any] = [said, no_turn, unknown, long, silent]
    return [{"messages": one} for one in kinds] + [{"text": "no messages"}]


def recipe(made: Made, **changes: Any) -> SftConfig:
    qa = [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"}]
    values: dict[str, Any] = {
        "model": str(made[1]),
        "root": str(made[0]),
        "data": {
            "qa": {"path": "qa.jsonl", "messages": qa, "id": "{n}", "limit": 200},
            "talks": {"path": "talks.jsonl"},
        },
        "epochs": 1.0,
        "context": 128,
        "batch": {"tokens": 256, "micro_tokens": 128},
        "optimizer": {"peak": 1e-2, "final": 1e-3, "warmup_tokens": 256, "skip_window": 0},
        "state": {"every_tokens": 1024},
        "heldout": {"every_tokens": 4096},
    }
    return SftConfig.build({**values, **changes})


def test_what_is_left_out_has_its_reason(made: Made, tmp_path: Path) -> None:
    config = recipe(made)
    found = prepare(config, attending.load(made[1]).tokenizer, tmp_path)
    assert found.reasons == {
        "fields_missing": 1,
        "no_assistant_turn": 2,
        "unknown_role": 1,
        "longer_than_context": 1,
    }
    rows = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text().splitlines()]
    assert {(row["number"], row["reason"]) for row in rows if row["source"] == "talks"} == {
        (1, "no_assistant_turn"),
        (2, "unknown_role"),
        (3, "longer_than_context"),
        (4, "no_assistant_turn"),
        (5, "fields_missing"),
    }
    qa = found.counts["qa"]
    assert qa["train"] + qa["held_out"] == qa["dialogues"] == 200 and qa["held_out"] > 0
    assert "head hurts" not in (tmp_path / "dropped.jsonl").read_text()


def test_only_the_assistants_words_and_their_ends_are_targets(made: Made, tmp_path: Path) -> None:
    tokenizer = attending.load(made[1]).tokenizer
    prepare(recipe(made), tokenizer, tmp_path)
    shards = Shards(tmp_path / "train")
    own = [n for n in range(shards.num_documents) if int(shards.record(n)["source"]) == 1]
    ids, learnt = shards.document(own[0]), shards.trained(own[0])
    assert tokenizer.spelled(ids.tolist()).startswith("<s>system\nbe kind</s><s>user\n")
    assert tokenizer.spelled(ids[learnt].tolist()) == "since when?</s>rest</s>"


@pytest.mark.parametrize("lora", [None, {"rank": 8, "alpha": 16}])
def test_answers_are_learnt(made: Made, tmp_path: Path, lora: dict[str, Any] | None) -> None:
    notes: list[str] = []
    config = recipe(made, epochs=4.0, lora=lora)
    out = sft(config, tmp_path / "out", note=notes.append)
    assert any(line.startswith("learnt: ") and "</s>" in line for line in notes)
    assert any("1 longer_than_context" in line for line in notes)
    report = json.loads((out / "forgetting.json").read_text("utf-8"))["changes"]
    (row,) = [one for one in report if one["task"] == "qa"]
    assert row["says"] == "clear gain" and row["after"] < (0.9 if lora else 0.5) * row["before"]
    told = json.loads((out / "run.json").read_text("utf-8"))
    assert told["verb"] == "sft" and len(told["parents"]) == 3
    assert told["metrics"]["data/qa_train"] > 190
    names = {path.name for path in out.iterdir()}
    assert "data" not in names and ("adapter" in names) == bool(lora)
    model = attending.load(out)
    if lora:
        before = load_file(made[1] / "model.safetensors")
        after = load_file(out / "model.safetensors")
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and all("proj" in name for name in changed)
        again = load_adapter(out / "adapter", before)
        assert all(torch.equal(again[name], after[name]) for name in after)
    else:
        answer = model.chat([{"role": "user", "content": "what is aspirin 3?"}], max_tokens=32)
        assert "is a drug" in answer.text


def test_resume_is_bitwise(made: Made, tmp_path: Path) -> None:
    whole = sft(recipe(made), tmp_path / "whole")
    with pytest.raises(HaltedError):
        sft(recipe(made), tmp_path / "cut", show=halt_at(9))
    cut = sft(recipe(made), tmp_path / "cut", resume=True)
    one, other = (load_file(out / "model.safetensors") for out in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    key = "train/loss_nats"
    first, second = (
        [row[key] for row in read_metrics(out / "metrics.jsonl") if key in row]
        for out in (whole, cut)
    )
    assert first == second and len(first) > 10


def test_a_changed_template_is_told_on_resume(made: Made, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in made[1].iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = recipe((made[0], model))
    with pytest.raises(HaltedError):
        sft(config, tmp_path / "out", show=halt_at(9))
    (model / "chat_template.jinja").write_text(CHATML + " ", "utf-8")
    with pytest.raises(ConfigError, match="template_sha256"):
        sft(config, tmp_path / "out", resume=True)


def test_a_limit_on_forgetting_that_measures_nothing_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_forgetting=0\.02 would compare nothing"):
        sft(recipe(made, forgetting={"max_forgetting": 0.02}), tmp_path / "out")


def test_changed_dialogues_cannot_be_accepted(made: Made, tmp_path: Path) -> None:
    with pytest.raises(HaltedError):
        sft(recipe(made), tmp_path / "out", show=halt_at(9))
    with pytest.raises(ConfigError, match=r"(?s)context: 128 -> 64.*these cannot"):
        changed = recipe(made, context=64, batch={"tokens": 128, "micro_tokens": 64})
        sft(changed, tmp_path / "out", resume=True, accept_changes=True)


def test_clusters_are_drawn_from_and_told(made: Made, tmp_path: Path) -> None:
    config = recipe(made, select={"budget": 30, "clusters": 6, "similarity": 1.0})
    found = prepare(config, attending.load(made[1]).tokenizer, tmp_path)
    trained = sum(own.get("train", 0) for own in found.counts.values())
    assert trained <= 30 and found.reasons["not_drawn"] > 100
    clusters = json.loads((tmp_path / "clusters.json").read_text("utf-8"))
    assert sum(one["drawn"] for one in clusters) == 30


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4}])
def test_two_ranks_equal_one(made: Made, tmp_path: Path, lora: Any) -> None:
    qa = recipe(made).data["qa"].model_dump() | {"limit": 60}
    config = recipe(made, compute={"precision": "float64"}, lora=lora, data={"qa": qa})
    names = ("train/loss", "train/gradient", "heldout/", "train/consumed")
    require_two_equal_one("sft", config, tmp_path, names)


def test_without_a_dialogue_the_reasons_are_told(made: Made, tmp_path: Path) -> None:
    tokenizer = attending.load(made[1]).tokenizer
    config = recipe(made, data={"talks": {"path": "talks.jsonl"}}, context=16)
    with pytest.raises(ConfigError, match=r"no dialogue is left .*2 no_assistant_turn"):
        prepare(config, tokenizer, tmp_path)


def test_a_sets_own_test_split_is_what_is_held_out(made: Made, tmp_path: Path) -> None:
    qa = [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "{a}"}]
    own = {"path": "qa.jsonl", "messages": qa, "id": "{n}", "holdout": {"n": ["3", "7", "11"]}}
    config = recipe(made, data={"qa": own})
    found = prepare(config, attending.load(made[1]).tokenizer, tmp_path)
    assert found.counts["qa"]["held_out"] == 3 and found.counts["qa"]["train"] == 397


def test_budgets_are_a_sources_own(made: Made, tmp_path: Path) -> None:
    select = {"budgets": {"qa": 20, "talks": 1}, "similarity": 1.0}
    config = recipe(made, select=select)
    found = prepare(config, attending.load(made[1]).tokenizer, tmp_path)
    assert found.counts["qa"]["train"] == 20 and found.counts["talks"]["train"] <= 1
    told = estimate(config)
    assert told["dialogues"] == 205 and "21 dialogues" in told["tokens_arithmetic"]
    with pytest.raises(ConfigError, match=r"select.budgets names 'typo'; data has qa, talks"):
        recipe(made, select={"budgets": {"typo": 3}})


def test_the_estimate_counts_dialogues(made: Made) -> None:
    told = estimate(recipe(made, epochs=3.0))
    assert told["dialogues"] == 205 and told["unreadable"] == 1
    assert told["steps"] > 10
    assert told["trained_parameters"] == told["parameters"]
    fewer = estimate(recipe(made, epochs=3.0, select={"budget": 41}))
    assert fewer["steps"] == pytest.approx(told["steps"] / 5, abs=1)
    adapted = estimate(recipe(made, epochs=3.0, lora={"rank": 2, "alpha": 4}))
    added = adapted["parameters"] - told["parameters"]
    assert adapted["trained_parameters"] == added and 0 < added < told["parameters"] / 4
    for name in ("gradients_gib", "optimizer_gib"):
        assert adapted["memory_per_rank"][name] <= told["memory_per_rank"][name] / 4
    assert adapted["time"]["hours"] <= told["time"]["hours"]
