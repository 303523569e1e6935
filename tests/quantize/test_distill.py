"""Scales and norms learnt end to end: what is learnt, what stays, what a stop leaves."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F  # noqa: N812  (the field's name for it)

from attending.errors import ConfigError, UsageError
from attending.logs import read_metrics
from attending.model.checkpoint import open_checkpoint
from attending.model.weights import read_tensor
from attending.quantize import distill as room
from attending.quantize.distill import Distillation
from attending.quantize.loop import quantize
from attending.quantize.stream import Stream
from tests.engine.folders import write_model
from tests.quantize.making import MODEL
from tests.quantize.text import M1, recipe
from tests.train.making import HaltedError

LEARNT = {"epochs": 12, "rate": 5e-3, "batch": 4}
FORMS = [
    ("llama", {"method": "plain", "layers": ".*mlp.*"}),
    ("qwen2", {"method": "plain", "floats": "bfloat16"}),  # biases
    ("llama", {"method": "gptq", "static_groups": False, "form": "gptq"}),
    ("qwen3", {"method": "plain", "symmetric": False, "bits": 8, "group": -1}),
    ("baichuan_m1", {"method": "plain", "symmetric": False, "head": True}),
    ("llama", {"method": "gptq", "rotate": True}),
]


def divergences(out: Path) -> list[float]:
    key = "distill/divergence_nats"
    return [row[key] for row in read_metrics(out / "metrics.jsonl") if key in row]


def watched(out: Path) -> tuple[float, float]:
    keys = ("distill/watched_before_nats", "distill/watched_nats")
    (row,) = (row for row in read_metrics(out / "metrics.jsonl") if keys[0] in row)
    return row[keys[0]], row[keys[1]]


def opened(folder: Path) -> Stream:
    found = open_checkpoint(folder)
    return Stream(found.arch, partial(read_tensor, found))


def apart(source: Path, folder: Path, ids: torch.Tensor) -> float:
    """KL(float || folder) over all tokens, by whole logits."""
    p, q = (
        F.linear(one.hidden(ids), one.head()).double().log_softmax(-1)
        for one in (opened(source), opened(folder))
    )
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("family", "changes"), FORMS)
def test_scales_and_norms_bring_the_rounded_model_nearer(
    family: str, changes: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    config = MODEL | {"model_type": family} | (M1 if family == "baichuan_m1" else {})
    source = write_model(tmp_path / "float", **config)
    ids: list[torch.Tensor] = []
    samples = tmp_path / "out.tmp" / "state" / "samples.safetensors"

    def keep(done: int, total: int | None, what: str) -> None:
        if what == "distillation" and not ids:
            found = load_file(samples).items()
            ids.append(torch.cat([x for n, x in sorted(found) if "calibration" in n]))

    is_8_bits, more = changes.get("bits") == 8, "calibration.samples=16"
    plain = quantize(recipe(source, text, more, **changes), tmp_path / "plain")
    # One batch: the first step's divergence is all's, before anything is learnt.
    how = LEARNT | {"batch": 16} | ({"rate": 1e-3} if is_8_bits else {})
    told = changes | {"distill": how}
    out = quantize(recipe(source, text, more, **told), tmp_path / "out", progress=keep)
    found, (learnt, held) = divergences(out), (ids[0][part] for part in room.sides(16))
    assert len(found) == 12
    assert found[0] == pytest.approx(apart(source, plain, learnt), rel=1e-3)
    assert apart(source, out, learnt) < 0.8 * found[0]
    assert apart(source, out, learnt) == pytest.approx(found[-1], rel=0.1)
    before, after = watched(out)  # and what is written is what was measured
    assert before == pytest.approx(apart(source, plain, held), rel=1e-3)
    assert after == pytest.approx(apart(source, out, held), rel=1e-3)
    assert after < before
    stored, now = open_checkpoint(plain), open_checkpoint(out)
    for name in stored.arch.tensor_shapes():
        one, other = stored.quantized(name), now.quantized(name)
        if one is None or other is None:
            is_norm = name.endswith("norm.weight")
            assert np.array_equal(stored.read(name), now.read(name)) == (not is_norm), name
            continue
        assert np.array_equal(one.values, other.values), name
        assert np.array_equal(one.scales, other.scales) == (name == "lm_head.weight"), name


def test_a_stopped_run_goes_on_and_gives_the_same_bits(
    model: Path, text: Path, tmp_path: Path
) -> None:
    config = recipe(model, text, distill=LEARNT)
    whole = quantize(config, tmp_path / "whole")

    def halt(done: int, total: int | None, what: str) -> None:
        if what == "distillation" and done == 11:
            raise HaltedError

    with pytest.raises(HaltedError):
        quantize(config, tmp_path / "out", progress=halt)
    steps: list[int] = []

    def count(done: int, total: int | None, what: str) -> None:
        if what == "distillation":
            steps.append(done)

    out = quantize(config, tmp_path / "out", resume=True, progress=count)
    assert steps[0] == 11 and steps[-1] == 21  # from the state of step 10 on
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, out))
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_recomputing_changes_nothing(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outs, made = [], list[int]()
    weight = room._Layer.weight

    def count(*given: Any) -> torch.Tensor:
        made[-1] += 1
        return weight(*given)

    monkeypatch.setattr(room._Layer, "weight", count)
    for again in (False, True):
        made.append(0)
        told = LEARNT | {"recompute": again, "epochs": 2}
        outs.append(quantize(recipe(model, text, distill=told), tmp_path / str(again)))
    layers, steps = 14, 4
    assert made == [layers * (steps + 2), layers * (2 * steps + 2)]
    one, other = (load_file(folder / "model.safetensors") for folder in outs)
    assert all(torch.allclose(one[n], other[n], rtol=1e-3) for n in one)
    assert divergences(outs[0]) == pytest.approx(divergences(outs[1]), rel=1e-4)


def test_what_comes_out_is_never_worse(model: Path, text: Path, tmp_path: Path) -> None:
    plain = quantize(recipe(model, text), tmp_path / "plain")
    wild = LEARNT | {"rate": 2.0, "epochs": 3}
    out = quantize(recipe(model, text, distill=wild), tmp_path / "out")
    before, after = watched(out)
    assert before == after
    one, other = (load_file(folder / "model.safetensors") for folder in (plain, out))
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_settings_of_learning_may_change_on_resume(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halt(done: int, total: int | None, what: str) -> None:
        if what == "distillation" and done == 11:
            raise HaltedError

    with pytest.raises(HaltedError):
        quantize(recipe(model, text, distill=LEARNT), tmp_path / "out", progress=halt)
    other = LEARNT | {"rate": 1e-3}
    whole = quantize(recipe(model, text, distill=other), tmp_path / "whole")
    out = quantize(
        recipe(model, text, batch=1, kv="int8", distill=other), tmp_path / "out", resume=True
    )
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, out))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_what_cannot_be_learnt_is_refused(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="qqq's scales are integers"):
        recipe(model, text, form="qqq", method="gptq", group=128, distill=LEARNT)
    monkeypatch.setattr(room, "_divergence", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(UsageError, match=r"divergence of step 1 is nan. Lower distill.rate"):
        quantize(recipe(model, text, distill=LEARNT), tmp_path / "out")
    assert Distillation(epochs=1.5, batch=4).steps(10) == 3  # two of ten are watched
    assert Distillation(epochs=3, batch=16).steps(10) == 3
    with pytest.raises(ConfigError, match="epochs"):
        recipe(model, text, "distill.epochs=inf")
