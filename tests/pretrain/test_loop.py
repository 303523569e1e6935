import errno
import json
import shutil
from pathlib import Path
from traceback import StackSummary
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

import attending
from attending.errors import CheckpointError, ConfigError, TrainingError, UsageError
from attending.logs import read_metrics
from attending.pretrain.loop import pretrain
from attending.train import run, step
from attending.train.state import states
from tests.train.making import (
    LLAMA,
    M1,
    HaltedError,
    column,
    halt_at,
    make_corpus,
    make_tokenizer,
    recipe,
)

Text = tuple[Path, Path]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    folder = tmp_path_factory.mktemp("text")
    tokenizer = make_tokenizer(folder / "tokenizer")
    return make_corpus(folder / "corpus", tokenizer), tokenizer


@pytest.fixture(scope="module")
def trained(text: Text, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = recipe(
        *text,
        stages=[
            {
                "name": "only",
                "tokens": 12_000,
                "context": 64,
                "rope_theta": 1e4,
                "mixture": {"general": 1, "medical": 1},
            }
        ],
        heldout={"every_tokens": 6000, "prompts": ["aspirin may"], "sample_tokens": 8},
    )
    return pretrain(config, tmp_path_factory.mktemp("run") / "base")


def test_a_model_learns_its_text(trained: Path) -> None:
    rows = list(read_metrics(trained / "metrics.jsonl"))
    for domain in ("general", "medical"):
        scores = [row[key] for row in rows if (key := f"heldout/{domain}_bits_per_byte") in row]
        assert len(scores) == 3 and scores[-1] < 0.6 * scores[0]
    losses = [row["train/loss_nats"] for row in rows if "train/loss_nats" in row]
    assert len(losses) == 94 and losses[-1] < 0.6 * losses[0]


def test_what_comes_out_is_a_model_folder(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "run.json", "README.md"} <= names
    assert "state" not in names
    told = json.loads((trained / "run.json").read_text("utf-8"))
    assert told["verb"] == "pretrain" and len(told["parents"]) == 2
    assert set(told["metrics"]) >= {"heldout/medical_bits_per_byte_low"}
    samples = [json.loads(x) for x in (trained / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in samples] == [0, 47, 94]
    assert all(row["prompt"] == "aspirin may" for row in samples)
    model = attending.load(trained)
    assert model.arch.eos_ids and model.arch.rope.theta == 1e4


def test_held_out_bits_are_those_of_the_model_that_comes_out(trained: Path, text: Text) -> None:
    from attending.shards import Shards

    model, shards = attending.load(trained), Shards(text[0] / "heldout" / "medical")
    nats = 0.0
    for number in range(shards.num_documents):
        ids = torch.from_numpy(shards.document(number).astype(np.int64))
        for start in range(0, len(ids) - 1, 64):  # the context of the run, documents begin anew
            part = ids[start : start + 65]
            logits = model.logits([part[:-1].tolist()])[0]
            nats += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
    told = json.loads((trained / "run.json").read_text("utf-8"))["metrics"]
    wanted = nats / np.log(2) / column(shards, "bytes").sum()
    assert told["heldout/medical_bits_per_byte"] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    "model", [LLAMA, {**LLAMA, "model_type": "qwen3", "head_dim": 8}, {**M1, "conv_window": 1}]
)
def test_other_architectures_train_too(text: Text, tmp_path: Path, model: dict[str, Any]) -> None:
    out = pretrain(recipe(*text, model=model), tmp_path / "out")
    assert attending.load(out).arch.family == model["model_type"]


def test_half_precision_keeps_float32_weights_and_learns(text: Text, tmp_path: Path) -> None:
    config = recipe(*text, compute={"precision": "bfloat16"})
    plain = pretrain(recipe(*text), tmp_path / "plain")
    half = pretrain(config, tmp_path / "half")
    assert {w.dtype for w in load_file(half / "model.safetensors").values()} == {torch.float32}
    first, second = ([*read_metrics(out / "metrics.jsonl")][1:] for out in (plain, half))
    for name, index, near in (
        ("train/loss_nats", 0, 1e-3),
        ("train/gradient_norm", 0, 0.02),
        ("train/loss_nats", -2, 0.1),
    ):
        assert second[index][name] == pytest.approx(first[index][name], rel=near)


def test_the_rope_base_and_the_context_change_with_the_stage(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, loss = [], step.next_token_loss

    def look(decoder: Any, batch: Any, scale: float) -> Any:
        seen.append((decoder.model.rope.theta, max(batch.lengths)))
        return loss(decoder, batch, scale)

    monkeypatch.setattr("attending.pretrain.loop.next_token_loss", look)
    out = pretrain(recipe(*text), tmp_path / "out")
    assert {theta for theta, _ in seen[:20]} == {1e4} and {theta for theta, _ in seen[20:]} == {1e5}
    assert max(n for _, n in seen[:20]) <= 32 < max(n for _, n in seen[20:]) <= 64
    assert json.loads((out / "config.json").read_text("utf-8"))["rope_theta"] == 1e5


# What goes wrong


def test_a_vocabulary_larger_than_the_models_is_refused(text: Text, tmp_path: Path) -> None:
    small = {**M1, "vocab_size": 256}
    with pytest.raises(CheckpointError, match=r"up to 257.*vocabulary is 256.*at least 258"):
        pretrain(recipe(*text, model=small), tmp_path / "out")


def test_another_tokenizer_than_the_corpus_is_refused(text: Text, tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path / "other")
    definition = json.loads((other / "tokenizer.json").read_text("utf-8"))
    definition["model"]["vocab"]["zz"] = 300
    (other / "tokenizer.json").write_text(json.dumps(definition), "utf-8")
    with pytest.raises(ConfigError, match="not encoded with the tokenizer"):
        pretrain(recipe(text[0], other), tmp_path / "out")


def test_a_shard_cut_short_is_refused(text: Text, tmp_path: Path) -> None:
    corpus = shutil.copytree(text[0], tmp_path / "corpus")
    shard = next(iter(sorted((corpus / "train").glob("*.bin"))))
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=f"{shard.name} is absent or not whole"):
        pretrain(recipe(corpus, text[1]), tmp_path / "out")


def test_a_loss_that_is_no_number_stops_and_keeps_the_state(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, loss = [], step.next_token_loss

    def spoil(decoder: Any, batch: Any, scale: float) -> Any:
        calls.append(1)
        total, values = loss(decoder, batch, scale)
        return (total * torch.nan, values * torch.nan) if len(calls) == 23 else (total, values)

    monkeypatch.setattr("attending.pretrain.loop.next_token_loss", spoil)
    config, out = recipe(*text), tmp_path / "out"
    with pytest.raises(TrainingError, match=r"step 12: the loss is nan.*made #\d+"):
        pretrain(config, out)
    assert states(tmp_path / "out.tmp")[-1].name == "step_000000010"
    monkeypatch.undo()
    pretrain(config, out, resume=True)
    whole = pretrain(config, tmp_path / "whole")
    first, second = (load_file(path / "model.safetensors") for path in (out, whole))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_a_changed_recipe_is_listed_and_refused_unless_told(text: Text, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(HaltedError):
        pretrain(recipe(*text), out, show=halt_at(6))
    changed = recipe(
        *text, optimizer={"peak": 2e-2, "final": 1e-3, "warmup_tokens": 256, "clip_norm": 0.5}
    )
    with pytest.raises(ConfigError) as error:
        pretrain(changed, out, resume=True)
    assert "optimizer.peak: 0.01 -> 0.02" in str(error.value)
    assert "optimizer.clip_norm: 1.0 -> 0.5" in str(error.value)
    assert "warmup" not in str(error.value) and "--accept-changes" in str(error.value)
    pretrain(changed, out, resume=True, accept_changes=True)
    told = json.loads((out / "run.json").read_text("utf-8"))
    assert told["recipe"]["optimizer"]["peak"] == 2e-2
    last = list(read_metrics(out / "metrics.jsonl"))[-2]
    assert last["train/learning_rate"] > 1e-2 / 10  # of the new peak


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_memory_that_ends_names_the_setting(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> Any:
        raise error

    monkeypatch.setattr("attending.pretrain.loop.next_token_loss", fail)
    with pytest.raises(TrainingError, match=r"micro_tokens=64. Halve it.*recompute"):
        pretrain(recipe(*text), tmp_path / "out")


def test_other_runtime_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), run.memory_and_disk(64, Path()):
        raise RuntimeError("shapes cannot be multiplied")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": {"tokens": 100, "micro_tokens": 64}}, "rows of 32"),
        ({"batch": {"tokens": 128, "micro_tokens": 32}}, "rows of 64"),
        ({"model": {**M1, "max_position_embeddings": 32}}, r"context of 64.*is 32: raise it"),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    text: Text, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pretrain(recipe(*text, **changes), tmp_path / "out")


def test_nothing_is_overwritten_and_no_run_is_begun_twice(
    text: Text, tmp_path: Path, trained: Path
) -> None:
    with pytest.raises(UsageError, match="exists"):
        pretrain(recipe(*text), trained)
    (tmp_path / "out.tmp" / "state" / "step_000000002").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds a stopped run: --resume"):
        pretrain(recipe(*text), tmp_path / "out")


def test_a_damaged_state_says_so(text: Text, tmp_path: Path) -> None:
    with pytest.raises(HaltedError):
        pretrain(recipe(*text), tmp_path / "out", show=halt_at(6))
    state = states(tmp_path / "out.tmp")[-1]
    for file in state.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(
        CheckpointError, match=rf"{state.name} cannot be read \(.{{1,200}}\): remove"
    ):
        pretrain(recipe(*text), tmp_path / "out", resume=True)


def test_a_corpus_built_anew_is_no_way_to_go_on(text: Text, tmp_path: Path) -> None:
    corpus = shutil.copytree(text[0], tmp_path / "corpus")
    with pytest.raises(HaltedError):
        pretrain(recipe(corpus, text[1]), tmp_path / "out", show=halt_at(6))
    shutil.rmtree(corpus)
    make_corpus(corpus, text[1], documents=150)
    with pytest.raises(ConfigError, match="parents"):
        pretrain(recipe(corpus, text[1]), tmp_path / "out", resume=True)


def test_killed_before_it_is_published_it_is_only_published(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("attending.train.run.export", fail)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe(*text), tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr("attending.pretrain.loop.accumulate", fail)
    out = pretrain(recipe(*text), tmp_path / "out", resume=True)
    told = json.loads((out / "run.json").read_text("utf-8"))["metrics"]
    assert told["heldout/general_documents"] == 4
    assert len((out / "heldout_general.jsonl").read_text("utf-8").splitlines()) == 4
    assert not list(out.glob("told.json"))


def test_a_corpus_without_held_out_text_trains_unwatched(text: Text, tmp_path: Path) -> None:
    corpus = shutil.copytree(text[0], tmp_path / "corpus")
    shutil.rmtree(corpus / "heldout" / "general")
    out = pretrain(recipe(corpus, text[1]), tmp_path / "out")
    told = json.loads((out / "run.json").read_text("utf-8"))["metrics"]
    assert {name.split("_")[0] for name in told} == {"heldout/medical"}


def test_a_failure_while_publishing_loses_nothing(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> Any:
        raise HaltedError

    monkeypatch.setattr("attending.artifact.settle", fail)
    with pytest.raises(HaltedError):
        pretrain(recipe(*text), tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr("attending.pretrain.loop.accumulate", fail)  # nothing is trained again
    out = pretrain(recipe(*text), tmp_path / "out", resume=True)
    assert attending.load(out).arch.is_m1 and not (out / "state").exists()


def test_a_full_disk_says_so_and_the_run_goes_on_later(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_: object, **__: object) -> None:
        raise CheckpointException("save", {0: (full, StackSummary())})

    monkeypatch.setattr("attending.train.state.save", fail)
    with pytest.raises(CheckpointError, match="the disk is full"):
        pretrain(recipe(*text), tmp_path / "out")
    monkeypatch.undo()
    pretrain(recipe(*text), tmp_path / "out", resume=True)  # from the beginning: none was saved
    told = [row["step"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl")]
    assert told[:3] == [0, 1, 2]  # and what the first try wrote is gone


def test_new_values_reach_the_optimizer(
    text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HaltedError):
        pretrain(recipe(*text), tmp_path / "out", show=halt_at(6))
    seen, step = [], torch.optim.AdamW.step

    def look(optimizer: torch.optim.AdamW, **told: Any) -> Any:
        seen.append([(g["weight_decay"], g["betas"], g["eps"]) for g in optimizer.param_groups])
        return step(optimizer, **told)

    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    values = {"peak": 1e-2, "final": 1e-3, "warmup_tokens": 256}
    changed = recipe(
        *text, optimizer={**values, "weight_decay": 0.5, "betas": [0.5, 0.6], "eps": 1e-3}
    )
    pretrain(changed, tmp_path / "out", resume=True, accept_changes=True)
    assert seen[-1] == [(0.5, (0.5, 0.6), 1e-3), (0.0, (0.5, 0.6), 1e-3)]


@pytest.mark.parametrize("change", [{"conv_window": 1}, {"intermediate_size": 64}])
def test_another_model_is_never_accepted_on_the_way(
    text: Text, tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(HaltedError):
        pretrain(recipe(*text), tmp_path / "out", show=halt_at(6))
    changed = recipe(*text, model={**M1, **change})
    with pytest.raises(ConfigError, match=r"(?s)model\.\w+: .*these cannot change on the way"):
        pretrain(changed, tmp_path / "out", resume=True, accept_changes=True)
    (tmp_path / "out.tmp" / "state" / "told.json").unlink()
    with pytest.raises(CheckpointError, match="no telling"):
        pretrain(changed, tmp_path / "out", resume=True, accept_changes=True)


def test_a_change_inside_a_list_is_named_alone(text: Text, tmp_path: Path) -> None:
    with pytest.raises(HaltedError):
        pretrain(recipe(*text), tmp_path / "out", show=halt_at(6))
    stages = [stage.model_dump(mode="json") for stage in recipe(*text).stages]
    stages[1]["tokens"] = 768
    with pytest.raises(ConfigError, match=r"stages\.1\.tokens: 640 -> 768\n[^\[]*$"):
        pretrain(recipe(*text, stages=stages), tmp_path / "out", resume=True)


def test_a_later_stage_with_a_wrong_domain_is_refused_at_the_start(
    text: Text, tmp_path: Path
) -> None:
    stages = [stage.model_dump(mode="json") for stage in recipe(*text).stages]
    stages[2]["mixture"] = {"medcial": 1.0}
    with pytest.raises(ConfigError, match="'medcial'"):
        pretrain(recipe(*text, stages=stages), tmp_path / "out")


def test_a_token_that_the_model_lacks_names_the_documents(text: Text, tmp_path: Path) -> None:
    corpus = shutil.copytree(text[0], tmp_path / "corpus")
    for shard in (corpus / "train").glob("*.bin"):
        ids = np.fromfile(shard, "<u4")
        ids[5::40] = 5000
        ids.tofile(shard)
    with pytest.raises(CheckpointError, match=r"damaged: token 5000 in a step with made #\d+"):
        pretrain(recipe(corpus, text[1]), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"peak": 1e-3, "final": 1e-2, "warmup_tokens": 0}}, "exceed peak"),
        ({"optimizer": {"peak": 1.0, "final": 0.1, "warmup_tokens": 9999}}, "warmup_tokens"),
        ({"optimizer": {"peak": 1, "final": 1, "warmup_tokens": 0, "betas": [1.5, 0.9]}}, "betas"),
        ({"compute": {"compile": True, "recompute": True}}, "exclude each other"),
        ({"data_seed": -1}, "data_seed"),
        ({"heldout": {"every_tokens": 1, "prompts": [""]}}, "prompts"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(Path("corpus"), Path("tokenizer"), **changes)


def test_a_missing_corpus_says_which_setting_names_it(text: Text, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no train/index.json.*--set corpus"):
        pretrain(recipe(tmp_path / "nowhere", text[1]), tmp_path / "out")
