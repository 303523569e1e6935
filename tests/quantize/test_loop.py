"""A float folder in, a quantised one out: every family, method and format; stopped and resumed."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import attending
from attending.cli import app
from attending.errors import CheckFailed, CheckpointError, ConfigError, UsageError
from attending.logs import read_metrics
from attending.model.checkpoint import open_checkpoint
from attending.model.weights import load_decoder, read_tensor, save_weights
from attending.quantize import gate, loop, rounding
from attending.quantize.loop import quantize
from attending.quantize.rotate import rotate
from attending.quantize.stream import Stream
from tests.engine.folders import write_model
from tests.quantize.making import MODEL
from tests.quantize.text import M1, recipe
from tests.train.making import HaltedError

SIGNS = {"method": "signed", "signed": {"steps": 3, "batch": 4}}


def figures(out: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((out / "run.json").read_text("utf-8"))["metrics"]
    return found


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"method": "gptq", "symmetric": False, "form": "gptq", "bits": 8}),
        ("qwen3", SIGNS | {"group": -1, "kv": "fp8", "floats": "bfloat16"}),
        ("baichuan_m1", SIGNS | {"method": "gptq+signed", "head": True, "search": 4}),
        ("baichuan_m1", {"method": "gptq", "rotate": True, "form": "qqq", "group": 128}),
        ("llama", {"method": "gptq", "static_groups": False, "form": "gptq"}),
    ],
)
def test_every_family_comes_back_near_to_what_it_was(
    family: str, changes: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    config = MODEL | {"model_type": family} | (M1 if family == "baichuan_m1" else {})
    source = write_model(tmp_path / "float", **config)
    out = quantize(recipe(source, text, **changes), tmp_path / "out")
    assert not (out / "state").exists() and (out / "gate.svg").is_file()
    made, before = open_checkpoint(out), load_decoder(open_checkpoint(source))
    assert made.arch.family == family
    reference = rotate(before, 0) if changes.get("rotate") else before
    asked = set(reference.arch.tensor_shapes())
    if "head" not in changes:
        asked.remove("lm_head.weight")
    for name in asked:
        exact, found = reference.state_dict()[name].numpy(), made.read(name)
        is_rounded = made.quantized(name) is not None
        assert is_rounded == (name.endswith(("_proj.weight", "W_pack.weight", "lm_head.weight")))
        # Of random weights plain rounding loses 0.1; on so little text others make up for more.
        near = 0.4 if is_rounded else 0.003
        assert np.linalg.norm(found - exact) <= near * np.linalg.norm(exact), name
    told = json.loads((out / "overflow.json").read_text("utf-8"))
    layers = [name for name in told["layers"] if name.endswith(("o_proj", "down_proj"))]
    assert len(layers) == 2 * config["num_hidden_layers"] and len(told["fp8_scales"]) == 2
    for domain in ("notes", "talks"):
        assert 0 < figures(out)[f"gate/{domain}_divergence_nats"] < 0.3
    ids = [[5, 9, 200, 31]]
    assert attending.load(out, dtype="float32").logits(ids).shape == (1, 4, 304)


def test_gptq_and_signs_do_better_than_plain_rounding(
    model: Path, text: Path, tmp_path: Path
) -> None:
    found = {}
    for name, changes in (
        ("plain", {}),
        ("gptq", {"method": "gptq"}),
        ("signed", {"method": "signed", "signed": {"steps": 30, "rate": 0.02}}),
    ):
        out = quantize(recipe(model, text, **changes), tmp_path / name)
        found[name] = figures(out)["quantize/last_block_error_share"]
    assert found["gptq"] < 0.6 * found["plain"]
    assert found["signed"] < 0.6 * found["plain"]


def test_a_stopped_run_goes_on_and_gives_the_same_bits(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe(model, text, **SIGNS)
    whole = quantize(config, tmp_path / "whole")

    def halt(done: int, total: int | None, what: str) -> None:
        if what == "blocks" and done == 4:  # in the second block's first step
            raise HaltedError

    with pytest.raises(HaltedError):
        quantize(config, tmp_path / "out", progress=halt)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"out.tmp holds a stopped run: --resume"):
        quantize(config, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"signed.steps: 3 -> 4"):
        changed = recipe(model, text, "signed.steps=4", **SIGNS)
        quantize(changed, tmp_path / "out", resume=True)
    rounded = []
    of_block = rounding.of_block

    def count(*given: Any) -> Any:
        rounded.append(given[3])
        return of_block(*given)

    monkeypatch.setattr(rounding, "of_block", count)
    gated = recipe(model, text, "gate.max_flips=1.0", **SIGNS)  # the gate may change on the way
    out = quantize(gated, tmp_path / "out", resume=True)
    assert len(rounded) == 1
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, out))
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    steps = [row["step"] for row in read_metrics(out / "metrics.jsonl")]
    assert steps == [1, 2]


def test_only_some_layers(model: Path, text: Path, tmp_path: Path) -> None:
    config = recipe(model, text, layers=r".*1\.mlp\.(up|gate)_proj")
    made = open_checkpoint(quantize(config, tmp_path / "out"))
    names = [n for n in made.arch.tensor_shapes() if made.quantized(n)]
    assert names == [f"model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up")]


def test_the_folder_names_the_cache_that_it_was_measured_with(
    model: Path, text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = quantize(recipe(model, text, kv="int8"), tmp_path / "out")
    config = json.loads((out / "config.json").read_text("utf-8"))
    assert config["attending_kv_cache"] == "int8"
    assert config["quantization_config"]["kv_cache_scheme"] is None  # vLLM refuses one by token
    served = attending.load(out, threads=1)
    assert served.is_native and served.path["kv"] == "int8"
    assert attending.load(out, threads=1, kv="float16").path["kv"] == "float16"
    assert attending.load(model, threads=1).path["kv"] == "float16"
    wide = quantize(recipe(model, text, kv="fp8"), tmp_path / "wide")
    scales = {n: v for n, v in load_file(wide / "model.safetensors").items() if "_scale" in n}
    assert [v.item() for n, v in scales.items() if n.endswith(".k_scale")] == [1.0, 1.0]
    caplog.clear()
    assert attending.load(wide, threads=1).path["kv"] == "float16"
    assert "asks for a cache in FP8" in caplog.text


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"kv": "int8"}, {"cache": "int8"}),
        (
            {"method": "gptq", "rotate": True, "form": "qqq", "group": 128},
            {"rounds_activations": True},
        ),
    ],
)
def test_the_gate_rounds_what_is_rounded_where_it_is_served(
    changes: dict[str, Any], how: dict[str, Any], model: Path, text: Path, tmp_path: Path
) -> None:
    texts: dict[str, torch.Tensor] = {}

    def keep(*_: object) -> None:
        if not texts:
            found = load_file(tmp_path / "out.tmp" / "state" / "samples.safetensors")
            texts.update({n[11:]: ids for n, ids in found.items() if n.startswith("evaluation.")})

    out = quantize(recipe(model, text, **changes), tmp_path / "out", progress=keep)
    before, made = open_checkpoint(model), open_checkpoint(out)
    divergences = []
    for told in (how, {}):
        streams = (
            Stream(before.arch, partial(read_tensor, before)),
            Stream(made.arch, partial(read_tensor, made), **told),
        )
        (notes, _), _ = gate.compare(*streams, {name: texts[name] for name in ("notes", "talks")})
        divergences.append(notes.divergence)
    measured = figures(out)["gate/notes_divergence_nats"]
    assert measured == pytest.approx(divergences[0], rel=1e-5)
    assert abs(measured - divergences[1]) > 1e-3 * measured


def stopped(*_: Any, **__: Any) -> None:
    """In the place of a function."""
    raise HaltedError


def test_the_suite_is_asked_before_and_after(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {
            "id": str(i),
            "question": f"{i}?",
            "options": {"A": "water", "B": "salt"},
            "answer_idx": "A",
        }
        for i in range(6)
    ]
    data = tmp_path / "data"
    data.mkdir()
    (data / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    suite = tmp_path / "suite.toml"
    suite.write_text('[tasks.asked]\nkind = "choice"\ndata = "asked.jsonl"\n', "utf-8")
    told = {"suite": str(suite), "data": str(data), "max_choice_flips": 1.0}
    with monkeypatch.context() as broken, pytest.raises(HaltedError):
        broken.setattr(loop.artifact, "finish", stopped)  # behind the gate: what was asked stays
        quantize(recipe(model, text, gate=told), tmp_path / "out")
    kept = {file.parent.name: file.stat() for file in tmp_path.rglob("asked.answers.jsonl")}
    out = quantize(recipe(model, text, gate=told), tmp_path / "out", resume=True)
    for name in ("before", "after"):
        now = (out / "forgetting" / name / "asked.answers.jsonl").stat()
        assert (now.st_ino, now.st_size) == (kept[name].st_ino, kept[name].st_size)
    report = json.loads((out / "gate.json").read_text("utf-8"))
    assert 0 <= report["choice_flips"]["asked"] <= 1
    (asked,) = report["tasks"]
    assert (asked["task"], asked["a"], asked["b"]) == ("asked", "before", "after")
    assert figures(out)["gate/asked_choice_flips_share"] == report["choice_flips"]["asked"]


def test_bad_models_and_recipes_are_refused(model: Path, text: Path, tmp_path: Path) -> None:
    out = quantize(recipe(model, text), tmp_path / "out")
    with pytest.raises(CheckpointError, match="quantised already"):
        quantize(recipe(out, text), tmp_path / "again")
    with pytest.raises(UsageError, match="out exists"):
        quantize(recipe(model, text), out)
    with pytest.raises(UsageError, match=r"no multiple of 96 \(of \[16, 32, 64, 128\]\)"):
        quantize(recipe(model, text, group=96), tmp_path / "b")
    limit = "gate.max_choice_flips=0.1"
    with pytest.raises(ConfigError, match=r"gate.max_choice_flips would compare nothing"):
        quantize(recipe(model, text, limit), tmp_path / "b")
    suite = tmp_path / "suite.toml"
    suite.write_text('[tasks.one]\nkind = "maths"\ndata = "one.jsonl"\n', "utf-8")
    (tmp_path / "one.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n', "utf-8")
    with pytest.raises(ConfigError, match="has no multiple-choice task"):
        told = f"gate.suite={suite}", f"gate.data={tmp_path}"
        quantize(recipe(model, text, limit, *told), tmp_path / "b")
    with pytest.raises(UsageError, match="matches 6 of 14 linear layers, and qqq"):
        some = {"method": "gptq", "form": "qqq", "group": -1, "layers": ".*mlp.*"}
        quantize(recipe(model, text, **some), tmp_path / "b")
    replies = tmp_path / "mine.jsonl"
    replies.write_text('{"question": "what?"}', "utf-8")
    with pytest.raises(ConfigError, match=r"mine.jsonl holds something else.* line 1"):
        quantize(recipe(model, text, f"calibration.replies={replies}"), tmp_path / "b")
    assert replies.read_text("utf-8") == '{"question": "what?"}'
    for wrong in ({"form": "qqq", "symmetric": False}, {"group": 0}):
        with pytest.raises(ConfigError):
            recipe(model, text, **wrong)
    with pytest.raises(ConfigError, match="needs neighbours"):
        recipe(model, text, **SIGNS, static_groups=False)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_numbers_that_are_none_end_the_run(
    value: float, model: Path, text: Path, tmp_path: Path
) -> None:
    """NaN in a weight; or weights so large that what comes out is none."""
    source = write_model(tmp_path / "m", **MODEL)
    weights = {
        name: tensor.clone() for name, tensor in load_file(source / "model.safetensors").items()
    }
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"):
        weights[name][:] = value
    save_weights(weights, source)
    message = "gate_proj.weight holds" if value != value else r"layers\.1 gives"
    with pytest.raises(CheckpointError, match=message) as told:
        quantize(recipe(source, text), tmp_path / "out")
    assert "no numbers" in str(told.value)
    assert value == value or not [*tmp_path.glob("out.tmp/**/block_*")]  # before any is rounded


def test_a_damaged_embedding_is_said_before_anything_is_computed(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "m", **MODEL)
    weights = {n: tensor.clone() for n, tensor in load_file(source / "model.safetensors").items()}
    weights["model.embed_tokens.weight"][3, 0] = float("nan")
    save_weights(weights, source)
    monkeypatch.setattr(loop.calibration, "prepare", stopped)
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight holds values that are no num"):
        quantize(recipe(source, text), tmp_path / "out")


def test_floats_that_do_not_fit_are_named(model: Path, text: Path, tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", **MODEL)
    weights = {n: tensor.clone() for n, tensor in load_file(source / "model.safetensors").items()}
    weights["model.layers.1.input_layernorm.weight"][0] = 1e5
    save_weights(weights, source)
    with pytest.raises(
        CheckpointError, match=r"input_layernorm.weight does not fit into .*float16"
    ):
        quantize(recipe(source, text, floats="float16"), tmp_path / "out")
    assert not [*tmp_path.glob("out.tmp/**/block_*")]  # and before the first block is rounded


def test_a_full_disk_says_so_and_the_run_goes_on_later(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"the disk is full .*with --resume"):
        quantize(recipe(model, text), tmp_path / "out")
    monkeypatch.undo()
    assert (quantize(recipe(model, text), tmp_path / "out", resume=True) / "run.json").is_file()


def test_the_verb(model: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    parts = 'parts.notes = { path = "notes.jsonl", text = "{a}", id = "{id}" }'
    size = "samples = 2\nevaluation = 1\nlength = 16\n"
    head = f'model = "{model}"\nmethod = "plain"\ngroup = 32\n[calibration]\nroot = "{text}"\n'
    file.write_text(head + size + parts, "utf-8")

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["quantize", str(file), *words])

    planned = run("--dry-run")
    assert planned.exit_code == 0
    takes = json.loads(planned.stdout)["takes"]
    assert takes["memory"]["fits"] and takes["layers"] == 14
    out = str(tmp_path / "out")
    strict = run("--out", out, "--set", "gate.max_divergence=1e-9", "--json")
    assert isinstance(strict.exception, CheckFailed) and strict.exception.exit_code == 3
    assert "gate/notes_divergence_nats" in json.loads(strict.stdout)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    again = run("--out", str(tmp_path / "b"), "--set", "gate.max_divergence=9")
    assert again.exit_code == 0 and again.stdout.strip() == str(tmp_path / "b")
