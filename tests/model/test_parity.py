"""Logits equal transformers' (Llama, Qwen2, Qwen3) and mlx-lm's (Baichuan-M1), in float32."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.model.attend import Packed
from tests.model.tiny import build, configs

transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-4
CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}


@pytest.mark.parametrize("family", CLASSES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_logits_equal_transformers(family: str, data: st.DataObject) -> None:
    config = data.draw(configs(family))
    ids = data.draw(st.lists(st.integers(0, config["vocab_size"] - 1), min_size=1, max_size=40))
    decoder = build(config, seed=data.draw(st.integers(0, 99)))
    config_class, model_class = (getattr(transformers, name) for name in CLASSES[family])
    reference = model_class(config_class(**config)).eval()
    result = reference.load_state_dict(decoder.state_dict(), strict=False)
    # A tied head is the same tensor under two names there; nothing else may be left over.
    assert set(result.missing_keys) <= {"lm_head.weight"} and not result.unexpected_keys
    assert bool(result.missing_keys) == config["tie_word_embeddings"]
    with torch.no_grad():
        ours = decoder.logits(decoder(torch.tensor(ids), Packed([len(ids)])))
        theirs = reference(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_logits_equal_mlx_for_baichuan_m1(data: st.DataObject) -> None:
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.models import baichuan_m1

    config = data.draw(configs("baichuan_m1"))
    ids = data.draw(st.lists(st.integers(0, config["vocab_size"] - 1), min_size=1, max_size=40))
    decoder = build(config, seed=data.draw(st.integers(0, 99)))
    reference = _mlx_model(baichuan_m1, mx, config, decoder)
    with torch.no_grad():
        ours = decoder.logits(decoder(torch.tensor(ids), Packed([len(ids)])))
    theirs = np.array(reference(mx.array([ids])))[0]
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=TOLERANCE, atol=TOLERANCE)


def _mlx_model(module: Any, mx: Any, config: dict[str, Any], decoder: torch.nn.Module) -> Any:
    reference = module.Model(module.ModelArgs.from_dict(config))
    weights = {name: mx.array(w.numpy()) for name, w in decoder.state_dict().items()}
    reference.load_weights(list(reference.sanitize(weights).items()), strict=True)
    return reference
