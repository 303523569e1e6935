"""Mid-training from end to end, on a model of a few thousand weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import attending
from attending.errors import CheckFailed, CheckpointError, ConfigError, UsageError
from attending.logs import read_metrics
from attending.midtrain.estimate import estimate
from attending.midtrain.loop import midtrain
from attending.midtrain.recipe import MidtrainConfig
from attending.train import run
from attending.train.watch import Notes
from tests.train.making import HaltedError, halt_at, make_corpus, make_model, make_tokenizer
from tests.train.ranks import require_two_equal_one

PARTS = {
    "medical": {"share": 2, "domain": "medical"},
    "general": {"share": 2, "domain": "general", "loss": "self_constraint", "is_kept": True},
    "maths": {"share": 1, "sources": ["sums"], "loss": "self_constraint", "is_kept": True},
}
Text = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    folder = tmp_path_factory.mktemp("text")
    tokenizer = make_tokenizer(folder / "tokenizer")
    corpus = make_corpus(folder / "corpus", tokenizer)
    return corpus, tokenizer, make_model(folder / "model", tokenizer)


def recipe(text: Text, **changes: Any) -> MidtrainConfig:
    values: dict[str, Any] = {
        "model": str(text[2]),
        "corpus": str(text[0]),
        "parts": PARTS,
        "tokens": 2560,
        "context": 64,
        "batch": {"tokens": 320, "micro_tokens": 64},
        "optimizer": {"peak": 1e-2, "final": 1e-3, "warmup_tokens": 320, "skip_window": 0},
        "state": {"every_tokens": 640},
        "heldout": {"every_tokens": 1280, "max_tokens": 200},
    }
    return MidtrainConfig.build({**values, **changes})


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def test_the_domain_is_learnt_and_the_rest_is_kept(text: Text, tmp_path: Path) -> None:
    notes: list[str] = []
    made = midtrain(recipe(text, tokens=16_000), tmp_path / "out", note=notes.append)
    report = json.loads((made / "forgetting.json").read_text("utf-8"))["changes"]
    rows = {one["task"]: one for one in report}
    assert rows["medical"]["says"] == "clear gain" and not rows["medical"]["is_kept"]
    assert rows["general"]["is_kept"]
    # The model began as noise: it learns the medical text and stays noise on the other.
    assert rows["medical"]["gain"] > 5 * abs(rows["general"]["gain"])
    told = json.loads((made / "run.json").read_text("utf-8"))
    assert told["verb"] == "midtrain" and len(told["parents"]) == 2
    assert told["metrics"]["forgetting/medical_gain"] == rows["medical"]["gain"]
    assert (made / "forgetting.svg").stat().st_size > 1000
    assert any(line.startswith("forgetting: tasks are not compared") for line in notes)
    losses = [row for row in read_metrics(made / "metrics.jsonl") if "train/loss_nats" in row]
    assert losses[0]["train/maths_loss_nats"] == pytest.approx(0, abs=1e-5)  # nothing has moved
    assert losses[0]["train/medical_loss_nats"] > 5
    assert attending.load(made).tokenizer.sha256 == attending.load(text[2]).tokenizer.sha256
    assert "state" not in {path.name for path in made.iterdir()}


def test_held_out_bits_are_kept_by_document_before_and_after(text: Text, tmp_path: Path) -> None:
    made = midtrain(recipe(text), tmp_path / "out")
    before, after = (
        [json.loads(line) for line in (made / name).read_text("utf-8").splitlines()]
        for name in ("heldout_medical_before.jsonl", "heldout_medical.jsonl")
    )
    assert len(before) == len(after) == 4
    assert [one["num_bytes"] for one in before] == [one["num_bytes"] for one in after]
    assert before != after


def test_resume_is_bitwise(text: Text, tmp_path: Path) -> None:
    whole = midtrain(recipe(text), tmp_path / "whole")
    with pytest.raises(HaltedError):
        midtrain(recipe(text), tmp_path / "cut", show=halt_at(5))
    cut = midtrain(recipe(text), tmp_path / "cut", resume=True)
    one, other = weights(whole), weights(cut)
    assert all(torch.equal(one[name], other[name]) for name in one)
    key = "train/loss_nats"
    first, second = (
        [row[key] for row in read_metrics(out / "metrics.jsonl") if key in row]
        for out in (whole, cut)
    )
    assert first == second and len(first) == 8


def test_what_comes_out_is_a_part_of_the_way(text: Text, tmp_path: Path) -> None:
    whole = midtrain(recipe(text), tmp_path / "whole")
    part = midtrain(recipe(text, interpolation=0.25), tmp_path / "part")
    start, end, found = weights(text[2]), weights(whole), weights(part)
    assert not torch.equal(end["model.norm.weight"], start["model.norm.weight"])
    for name in end:
        assert torch.allclose(found[name], start[name] + 0.25 * (end[name] - start[name]))

    def bits(out: Path, name: str) -> float:
        metrics = json.loads((out / "run.json").read_text("utf-8"))["metrics"]
        return float(metrics[f"heldout/{name}_bits_per_byte"])

    # It is what was measured: the same weights, gone on with at no rate, measure the same before.
    again = recipe((*text[:2], part), optimizer={"peak": 1e-30, "final": 1e-30, "warmup_tokens": 0})
    same = midtrain(again, tmp_path / "same")
    assert bits(same, "medical") == pytest.approx(bits(part, "medical"), rel=1e-6)
    assert bits(whole, "medical") < bits(part, "medical")


def test_going_on_after_the_last_step_goes_back_once(text: Text, tmp_path: Path) -> None:
    config = recipe(text, interpolation=0.5)
    whole = midtrain(config, tmp_path / "whole")

    def halt(told: object) -> None:
        if isinstance(told, Notes) and told.step == config.num_steps:
            raise HaltedError

    with pytest.raises(HaltedError):
        midtrain(config, tmp_path / "cut", show=halt)
    cut = midtrain(config, tmp_path / "cut", resume=True)
    one, other = weights(whole), weights(cut)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_ranks_equal_one(text: Text, tmp_path: Path) -> None:
    batch = {"tokens": 256, "micro_tokens": 64}
    compute = {"precision": "float64"}
    config = recipe(text, tokens=768, compute=compute, batch=batch, interpolation=0.5)
    names = ("train/loss", "train/medical", "train/maths", "train/gradient", "heldout/")
    require_two_equal_one("midtrain", config, tmp_path, names)


def test_a_limit_on_forgetting_fails_the_run_and_keeps_the_model(
    text: Text, tmp_path: Path
) -> None:
    parts = {
        "medical": {"share": 1, "domain": "medical"},
        "general": {"share": 1e-6, "domain": "general", "is_kept": True},
    }
    # Noise cannot forget: a model of general text is made first.
    general = {"general": {"share": 1, "domain": "general"}}
    start = midtrain(recipe(text, parts=general, tokens=9600), tmp_path / "general")
    config = recipe(
        (*text[:2], start), parts=parts, tokens=6400, forgetting={"max_forgetting": 0.05}
    )
    with pytest.raises(CheckFailed, match=r"general lost .* of what it was, and at most 5.0%"):
        midtrain(config, tmp_path / "out")
    assert attending.load(tmp_path / "out").arch.family == "llama"
    free = config.replace(forgetting={"max_forgetting": 1e6})
    assert midtrain(free, tmp_path / "free").is_dir()


def test_what_does_not_fit_is_refused_before_anything_is_trained(
    text: Text, tmp_path: Path
) -> None:
    other = make_tokenizer(tmp_path / "tokenizer")
    told = json.loads((other / "tokenizer.json").read_text("utf-8"))
    told["model"]["vocab"]["zz"] = 300
    (other / "tokenizer.json").write_text(json.dumps(told), "utf-8")
    stranger = make_model(tmp_path / "stranger", other)
    for changes, error, words in (
        ({"teacher": str(stranger)}, ConfigError, "the teacher .* has another vocabulary"),
        ({"model": str(stranger)}, ConfigError, "not encoded with the tokenizer of"),
        ({"corpus": str(tmp_path)}, CheckpointError, "has no train/index.json"),
        ({"context": 128}, ConfigError, "context=128 is more than the 64 tokens"),
        ({"batch": {"tokens": 100, "micro_tokens": 64}}, ConfigError, "batch.tokens=100"),
    ):
        with pytest.raises(error, match=words):
            midtrain(recipe(text, **changes), tmp_path / "out")
    masked = {"medical": {"share": 1, "domain": "medical", "loss": "masked_cross_entropy"}}
    with pytest.raises(ConfigError, match="part medical: none of 100 documents"):
        midtrain(recipe(text, parts=masked), tmp_path / "out")
    with pytest.raises(ConfigError, match="a part needs a domain or sources"):
        recipe(text, parts={"medical": {"share": 1}})
    with pytest.raises(ConfigError, match="a teacher is named and no part"):
        recipe(text, parts={"medical": {"share": 1, "domain": "medical"}}, teacher="default")


def test_a_changed_recipe_is_told_on_resume(text: Text, tmp_path: Path) -> None:
    with pytest.raises(HaltedError):
        midtrain(recipe(text), tmp_path / "out", show=halt_at(3))
    with pytest.raises(UsageError, match="holds a stopped run"):
        midtrain(recipe(text), tmp_path / "out")
    with pytest.raises(ConfigError, match='divergence: "reverse" -> "forward"'):
        midtrain(recipe(text, divergence="forward"), tmp_path / "out", resume=True)
    made = midtrain(
        recipe(text, divergence="forward"), tmp_path / "out", resume=True, accept_changes=True
    )
    assert made.is_dir() and run.newest(tmp_path / "out.tmp") is None


def test_the_estimate_says_what_the_teacher_costs(text: Text) -> None:
    with_teacher = estimate(recipe(text))
    parts = {name: {**part, "loss": "cross_entropy"} for name, part in PARTS.items()}
    without = estimate(recipe(text, parts=parts))
    flops = [one["stages"][0]["flops_per_token"] for one in (with_teacher, without)]
    assert flops[0] == pytest.approx(flops[1] * (1 + 0.6 / 3))  # 3 of 5 tokens are read twice
    assert with_teacher["memory_per_rank"]["frozen_gib"] >= 0
    assert with_teacher["tokens_by_part"] == {"medical": 1024, "general": 1024, "maths": 512}
    big = MidtrainConfig.load("m2_32b", "midtrain")
    told = estimate(big)
    assert told["parameters"] == pytest.approx(32.8e9, rel=0.01)
