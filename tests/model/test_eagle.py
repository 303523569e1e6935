"""The draft head: the stock layout, its pair, its vocabulary, its pass against whole rows."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attending.errors import CheckpointError, ConfigError
from attending.model.architecture import parse_config
from attending.model.attend import Packed, Paged, PagePool, Rows
from attending.model.decoder import Features
from attending.model.eagle import Eagle, fold_rotation, load_eagle, save_eagle
from attending.model.eagle_files import (
    EagleConfig,
    choose_vocabulary,
    eagle_config,
    feature_layers,
    open_eagle,
    parse_eagle,
)
from tests.model.tiny import build, pool_of

H, INNER, VOCAB, DRAFT = 32, 48, 96, 40
TARGET = {
    "vocab_size": VOCAB,
    "hidden_size": H,
    "intermediate_size": INNER,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "torch_dtype": "float32",
    "eos_token_id": 5,
}
SLIDING = {"sliding_window": 8, "sliding_window_layers": [1, 3, 5, 7]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "baichuan_m1": {**SLIDING, "num_swa_attention_heads": 4, "num_swa_key_value_heads": 4},
}
TABLE = {  # facts of the stock layout, H hidden, 4 query and 2 key-value heads of 8
    "fc.weight": (H, 3 * H),
    "midlayer.input_layernorm.weight": (H,),
    "midlayer.hidden_norm.weight": (H,),
    "midlayer.post_attention_layernorm.weight": (H,),
    "midlayer.self_attn.q_proj.weight": (32, 2 * H),
    "midlayer.self_attn.k_proj.weight": (16, 2 * H),
    "midlayer.self_attn.v_proj.weight": (16, 2 * H),
    "midlayer.self_attn.o_proj.weight": (H, 32),
    "midlayer.mlp.gate_proj.weight": (INNER, H),
    "midlayer.mlp.up_proj.weight": (INNER, H),
    "midlayer.mlp.down_proj.weight": (H, INNER),
    "norm.weight": (H,),
    "lm_head.weight": (DRAFT, H),
    "d2t": (DRAFT,),
    "t2d": (VOCAB,),
}


def target_config(family: str) -> dict[str, Any]:
    return {**TARGET, **FAMILIES[family], "model_type": family}


def made(family: str = "llama", *, gated: bool = False, **how: Any) -> Eagle:
    """A head with random weights, norms included, on a random vocabulary."""
    arch = parse_config(target_config(family))
    told = eagle_config(arch, DRAFT, name="tiny", sha256="ab" * 32, gated=gated)
    eagle = Eagle(told, **how)
    random = torch.Generator().manual_seed(3)
    for weight in eagle.parameters():
        with torch.no_grad():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=random) + (weight.dim() == 1))
    counts = np.random.default_rng(0).integers(100, size=VOCAB)
    d2t, t2d = choose_vocabulary(counts, DRAFT, [5])
    eagle.d2t.copy_(torch.from_numpy(d2t))
    eagle.t2d.copy_(torch.from_numpy(t2d))
    return eagle.requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_the_stock_ones(family: str, tmp_path: Path) -> None:
    eagle = made(family)
    state = eagle.state_dict()
    assert {name: tuple(one.shape) for name, one in state.items()} == TABLE
    assert (state["d2t"].dtype, state["t2d"].dtype) == (torch.int64, torch.bool)
    save_eagle(tmp_path, eagle.config, state)
    stored = load_file(tmp_path / "model.safetensors")
    assert {name: tuple(one.shape) for name, one in stored.items()} == TABLE
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 1)
    assert (config["draft_vocab_size"], config["vocab_size"]) == (DRAFT, VOCAB)
    # Below `eagle_config` the numbers are SGLang's: outputs of layers, so one less.
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 3, 4]
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4, 5]
    again = load_eagle(tmp_path)
    assert again.config == eagle.config
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in state.items())


def test_the_gate_and_an_own_embedding_are_further_tensors(tmp_path: Path) -> None:
    eagle = made(gated=True, has_embedding=True)
    more = {"midlayer.self_attn.g_proj.weight": (32, 2 * H), "embed_tokens.weight": (VOCAB, H)}
    found = {name: tuple(one.shape) for name, one in eagle.state_dict().items()}
    assert found == TABLE | more
    save_eagle(tmp_path, eagle.config, eagle.state_dict())
    assert load_eagle(tmp_path).config.gated


def test_features_are_read_where_engines_read_them() -> None:
    assert feature_layers(64) == (2, 32, 61)
    assert feature_layers(36) == (2, 18, 33)
    assert feature_layers(8) == (2, 4, 5)
    assert feature_layers(4) == (1, 2, 3)
    assert feature_layers(2) == (0, 1, 2)


def test_the_vocabulary_by_hand() -> None:
    counts = np.array([0, 9, 3, 0, 7, 0, 3, 1])
    d2t, t2d = choose_vocabulary(counts, 4, [5])
    # 1 and 4 are frequent, 5 ends answers, and of 2 and 6 the lower is taken: 1 2 4 5.
    assert d2t.tolist() == [1, 1, 2, 2]
    assert np.flatnonzero(t2d).tolist() == [1, 2, 4, 5]
    assert d2t.dtype == np.int64 and t2d.dtype == np.bool_
    assert (choose_vocabulary(counts, 8, [5])[0] == 0).all()
    for size, stops in ((0, []), (1, [5, 6]), (9, [])):
        with pytest.raises(ConfigError, match="a draft vocabulary of"):
            choose_vocabulary(counts, size, stops)


def test_draft_ids_become_the_targets() -> None:
    eagle = made()
    used = torch.nonzero(eagle.t2d)[:, 0]
    assert torch.equal(eagle.used, used)
    assert torch.equal(eagle.target_ids(torch.tensor([0, 7, 39])), used[[0, 7, 39]])


def test_another_target_is_refused_with_both_names() -> None:
    config = made().config
    arch = parse_config(target_config("llama"))
    config.require_target("tiny", "ab" * 32, arch)
    with pytest.raises(CheckpointError, match=r"trained for tiny \(sha256 abab.*not for other"):
        config.require_target("other", "cd" * 32, arch)
    wider = parse_config(target_config("llama") | {"vocab_size": VOCAB + 1})
    with pytest.raises(CheckpointError, match="not for tiny"):
        config.require_target("tiny", "ab" * 32, wider)
    for layers in ((-1, 2, 3), (1, 2, 99)):
        with pytest.raises(CheckpointError, match=r"and tiny has \d+ layers: expected 0 to that"):
            replace(config, layers=layers).require_target("tiny", "ab" * 32, arch)
    nameless = parse_eagle({k: v for k, v in config.to_config().items() if k != "target_sha256"})
    with pytest.raises(CheckpointError, match='"target_sha256": "abab'):
        nameless.require_target("tiny", "ab" * 32, arch)


def test_a_folder_is_read_strictly(tmp_path: Path) -> None:
    eagle = made()
    state = dict(eagle.state_dict())
    save_eagle(tmp_path, eagle.config, state)
    file = tmp_path / "model.safetensors"

    def refused(words: str, **changes: Tensor | None) -> None:
        told = {name.replace("__", "."): one for name, one in changes.items()}
        save_file({n: w for n, w in {**state, **told}.items() if w is not None}, file)
        with pytest.raises(CheckpointError, match=words):
            open_eagle(tmp_path)

    refused("1 missing: fc.weight", fc__weight=None)
    refused("1 unexpected: extra.weight", extra__weight=torch.zeros(3))
    refused(r"1 misshaped: norm.weight \[3\] instead of \[32\]", norm__weight=torch.zeros(3))
    refused("d2t and t2d do not name the same tokens", d2t=state["d2t"] + 1)
    refused("d2t and t2d do not name the same tokens", t2d=~state["t2d"])


def test_what_is_not_stock_is_not_read() -> None:
    config = made().config.to_config()
    for changes in (
        {"norm_before_residual": True},
        {"eagle_config": {"fc_norm": True}},
        {"num_hidden_layers": 2},
        {"attention_bias": True},
        {"norm_output": False},
    ):
        with pytest.raises(CheckpointError, match="is not read"):
            parse_eagle({**config, **changes})
    named = "eagle_aux_hidden_state_layer_ids"
    stock = {k: v for k, v in config.items() if k not in ("eagle_config", named)}
    sglang = {**stock, "eagle_config": {named: [0, 2, 4]}}
    assert parse_eagle(sglang).layers == (1, 3, 5)
    assert parse_eagle({**stock, named: [0, 2, 4]}).layers == (0, 2, 4)
    assert parse_eagle(stock, parse_config(target_config("llama"))).layers == (2, 4, 5)
    with pytest.raises(CheckpointError, match="names no eagle_config"):
        parse_eagle(stock)
    for layers in ([1, 2], [2, 1, 3], [1, 2, "3"], [1] * 300):
        for told in ({"eagle_config": {named: layers}}, {named: layers}):
            with pytest.raises(CheckpointError, match="expected three layers of the target"):
                parse_eagle({**stock, **told})
    with pytest.raises(ConfigError, match="a draft vocabulary of 97"):
        eagle_config(parse_config(target_config("llama")), 97)


def by_hand(eagle: Eagle, embedded: Tensor, features: Tensor) -> Tensor:
    """The forward pass of one sequence as the facts tell it, row by row."""

    def norm(x: Tensor, name: str) -> Tensor:
        weight: Tensor = weights[f"{name}.weight"]
        return x / (x.square().mean() + eagle.arch.norm_eps).sqrt() * weight

    def turned(x: Tensor, at: int) -> Tensor:
        angle = at * 10_000.0 ** (-torch.arange(0, 8, 2).double() / 8)
        one, two = x.view(-1, 2, 4).unbind(1)
        parts = one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()
        return torch.stack(parts, 1).view(-1, 8)

    weights = eagle.state_dict()
    at = "midlayer.self_attn"
    keys, values, out = [], [], []
    for place, (token, feature) in enumerate(zip(embedded, features, strict=True)):
        h = weights["fc.weight"] @ feature
        x = torch.cat((norm(token, "midlayer.input_layernorm"), norm(h, "midlayer.hidden_norm")))
        q, k, v = (weights[f"{at}.{name}_proj.weight"] @ x for name in "qkv")
        keys.append(turned(k, place))
        values.append(v.view(2, 8))
        mixed = []
        for head, query in enumerate(turned(q, place)):
            scores = torch.stack([key[head // 2] @ query for key in keys]) / 8**0.5
            mixed.append(scores.softmax(0) @ torch.stack([one[head // 2] for one in values]))
        found = torch.cat(mixed)
        if eagle.config.gated:
            found = found * (weights[f"{at}.g_proj.weight"] @ x).sigmoid()
        y = h + weights[f"{at}.o_proj.weight"] @ found
        z = norm(y, "midlayer.post_attention_layernorm")
        gate, up = (weights[f"midlayer.mlp.{one}_proj.weight"] @ z for one in ("gate", "up"))
        out.append(
            y + weights["midlayer.mlp.down_proj.weight"] @ (torch.nn.functional.silu(gate) * up)
        )
    return torch.stack(out)


@pytest.mark.parametrize("gated", [False, True])
def test_the_forward_pass_by_hand(gated: bool) -> None:
    eagle = made(gated=gated).double()
    random = torch.Generator().manual_seed(0)
    embedded, features = (
        torch.randn(6, n * H, generator=random, dtype=torch.float64) for n in (1, 3)
    )
    whole = eagle(embedded, eagle.fc(features), Packed([6]))
    assert torch.allclose(whole, by_hand(eagle, embedded, features), 1e-5, 1e-5)
    # The same by pages, in two steps.
    pool, pages = PagePool(eagle.arch, [2], torch.float64), [torch.tensor([1])]
    parts = [
        eagle(embedded[at], eagle.fc(features[at]), Paged(pool, [Rows(done, pages, count)]))
        for at, done, count in ((slice(0, 4), 0, 4), (slice(4, 6), 4, 2))
    ]
    assert torch.allclose(torch.cat(parts), whole, rtol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_paged_pass_gives_the_features_of_whole_sequences(family: str) -> None:
    target = build(target_config(family), dtype=torch.float64)
    ids = torch.randint(0, VOCAB, (11,), generator=torch.Generator().manual_seed(1))
    asked = Features((2, 4, 8))
    with torch.no_grad():
        hidden = target(ids, Packed([11]), asked)
    whole = asked.whole()
    assert torch.allclose(target.model.norm(whole[:, 2 * H :]), hidden)  # after the last block
    pool, found = pool_of(target, 1), []
    tables = [torch.tensor([0]) for _ in target.arch.windows]
    for start, stop in ((0, 7), (7, 11)):
        asked = Features((2, 4, 8))
        with torch.no_grad():
            target(ids[start:stop], Paged(pool, [Rows(start, tables, stop - start)]), asked)
        found.append(asked.whole())
    assert torch.allclose(torch.cat(found), whole, rtol=1e-9)


@pytest.mark.parametrize("has_embedding", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_a_rotated_target_is_followed_after_folding(gated: bool, has_embedding: bool) -> None:
    eagle = made(gated=gated, has_embedding=has_embedding).double()
    random = torch.Generator().manual_seed(5)
    embedded, features = (
        torch.randn(9, n * H, generator=random, dtype=torch.float64) for n in (1, 3)
    )
    rotation, _ = torch.linalg.qr(torch.randn(H, H, generator=random, dtype=torch.float64))
    folded = Eagle(eagle.config, has_embedding=has_embedding).double().requires_grad_(False)
    folded.load_state_dict(fold_rotation(eagle.state_dict(), rotation))
    whole = eagle(embedded, eagle.fc(features), Packed([9]))
    turned = features.view(9, 3, H) @ rotation
    tokens = embedded if has_embedding else embedded @ rotation
    found = folded(tokens, folded.fc(turned.flatten(1)), Packed([9]))
    assert torch.allclose(found, whole, rtol=1e-9)
    assert torch.allclose(folded.logits(found), eagle.logits(whole), rtol=1e-9)
    # Its own state is fed back unrotated, so going on is the same, too.
    assert torch.allclose(folded(tokens, found, Packed([9])), eagle(embedded, whole, Packed([9])))
    stale = eagle(tokens, eagle.fc(turned.flatten(1)), Packed([9]))
    assert not torch.allclose(stale, whole, rtol=1e-2)


def test_a_config_survives_its_file() -> None:
    config = made().config
    assert isinstance(config, EagleConfig) and parse_eagle(config.to_config()) == config
