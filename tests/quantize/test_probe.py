"""The overflow probe: the largest activations by hand, and the verdict."""

import pytest
import torch

from attending.quantize import kv
from attending.quantize.probe import HALF_MAX, Peak, Probe
from attending.quantize.stream import Stream
from tests.model.test_checkpoint import config_of
from tests.model.tiny import build


def test_peaks_of_every_layer_over_all_samples() -> None:
    decoder, probe = build(config_of("qwen2")), Probe()
    stream = Stream(decoder.arch, decoder.state_dict().__getitem__, batch=1, seen=probe.seen)
    block, x = stream.block(0), torch.randn(3, 5, decoder.arch.hidden_size)
    x[1] *= 4
    with probe.watching(block, 0), torch.no_grad():
        stream.step(block, x.clone())
    inputs = block.input_layernorm(x)
    found = probe.layers["model.layers.0.self_attn.v_proj"]
    with torch.no_grad():
        v = block.self_attn.v_proj(inputs)
    assert found.inputs == pytest.approx(float(inputs.abs().max()), rel=1e-5)
    assert found.outputs == pytest.approx(float(v.abs().max()), rel=1e-5)
    assert len(probe.layers) == 7
    sums = []  # behind the attention
    block.post_attention_layernorm.register_forward_hook(lambda _, given, out: sums.extend(given))
    whole = x.clone()
    with torch.no_grad():
        stream.step(block, whole)
    peak = probe.blocks["model.layers.0"]
    most = max(float(one.abs().max()) for one in (x, *sums))
    assert peak.inputs == pytest.approx(most, rel=1e-5)
    assert peak.outputs == pytest.approx(float(whole.abs().max()), rel=1e-5)
    assert probe.caches["model.layers.0"] >= float(v.abs().max()) / kv.E4M3_MAX * 0.999
    before = dict(probe.layers)
    with torch.no_grad():
        stream.step(block, 100 * x)  # no longer watched
    assert probe.layers == before


@pytest.mark.parametrize(("value", "holds"), [(HALF_MAX, True), (65_505.0, False)])
def test_the_verdict(value: float, holds: bool) -> None:
    probe = Probe()
    probe.layers = {"a": Peak(3.0, 2.0), "model.layers.5.mlp.down_proj": Peak(value, 9.0)}
    probe.caches = {"model.layers.5": 0.5 if holds else 2.0}
    lines = probe.lines()
    assert lines[0].startswith("model.layers.5.mlp.down_proj: largest input 65,50")
    assert ("holds every layer" in lines[2]) == holds
    said = "does not hold 1 layers or blocks, model.layers.5.mlp.down_proj first"
    assert (said in lines[2]) != holds
    assert lines[3].endswith("cuts nothing off" if holds else "is too small: 2.00 is needed")
    told = probe.report()
    probe.blocks = {"model.layers.6": Peak(1.0, 7e4)}
    assert "does not hold" in probe.lines()[3] and probe.lines()[2].startswith("model.layers.6: l")
    assert [row["holds"] for row in told["layers"].values()] == [True, holds]
