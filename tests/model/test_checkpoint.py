"""Folders go out and come back unchanged, load elsewhere, and damage is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from attending.errors import CheckpointError
from attending.model.attend import Packed
from attending.model.checkpoint import open_checkpoint
from attending.model.decoder import Decoder
from attending.model.files import INDEX, SINGLE, read_config
from attending.model.weights import load_decoder, read_tensor, save_weights
from tests.model.tiny import FAMILIES, ROPES, build

BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_swa_attention_heads": 2,
    "num_swa_key_value_heads": 1,
    "sliding_window": 5,
    "sliding_window_layers": [1],
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rope_scaling": ROPES["llama3"],
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
IDS = torch.arange(12) % 40


def config_of(family: str) -> dict[str, Any]:
    scaling = None if family == "baichuan_m1" else BASE["rope_scaling"]
    return {**BASE, "model_type": family, "rope_scaling": scaling}


def write(folder: Path, config: dict[str, Any], limit: int = 10**9) -> Decoder:
    folder.mkdir()
    decoder = build(config)
    save_weights(decoder.state_dict(), folder, limit)
    (folder / "config.json").write_text(json.dumps(decoder.arch.to_config()))
    return decoder


@torch.no_grad()
def logits(decoder: Decoder) -> Tensor:
    return decoder.logits(decoder(IDS, Packed([len(IDS)])))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("limit", [10**9, 2_000])
def test_a_folder_comes_back_bit_for_bit(tmp_path: Path, family: str, limit: int) -> None:
    written = write(tmp_path / "m", config_of(family), limit)
    assert (tmp_path / "m" / INDEX).exists() == (limit == 2_000)
    read = load_decoder(open_checkpoint(tmp_path / "m"))
    assert read.arch == written.arch
    for name, weight in written.state_dict().items():
        assert torch.equal(read.state_dict()[name], weight), name
    assert torch.equal(logits(read), logits(written))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "baichuan_m1"])
@pytest.mark.parametrize("limit", [10**9, 2_000])
def test_our_folders_load_in_transformers_and_theirs_here(
    tmp_path: Path, family: str, limit: int
) -> None:
    transformers = pytest.importorskip("transformers")
    written = write(tmp_path / "ours", config_of(family), limit)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32
    )
    with torch.no_grad():
        reference = theirs(IDS[None]).logits[0]
    torch.testing.assert_close(logits(written), reference, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=f"{limit // 1000}KB")
    read = load_decoder(open_checkpoint(tmp_path / "theirs"))
    torch.testing.assert_close(logits(read), reference, rtol=1e-4, atol=1e-4)


def test_a_tied_head_loads_whether_stored_once_or_twice(tmp_path: Path) -> None:
    config = {**BASE, "tie_word_embeddings": True}
    written = write(tmp_path / "m", config)
    file = tmp_path / "m" / SINGLE
    weights = load_file(file)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):  # as auto-round writes it, too
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].to(dtype, copy=True)
        save_file(weights, file)
        assert torch.equal(logits(load_decoder(open_checkpoint(tmp_path / "m"))), logits(written))
    weights["lm_head.weight"][3, 3] += 1
    save_file(weights, file)
    with pytest.raises(CheckpointError, match=r"1 unexpected: lm_head\.weight"):
        open_checkpoint(tmp_path / "m")


def test_stored_precision_is_kept_off_the_cpu_and_widened_on_it(tmp_path: Path) -> None:
    write(tmp_path / "m", {**BASE, "torch_dtype": "bfloat16"})
    file = tmp_path / "m" / SINGLE
    save_file({k: v.bfloat16() for k, v in load_file(file).items()}, file)
    checkpoint = open_checkpoint(tmp_path / "m")
    stored = read_tensor(checkpoint, "lm_head.weight")
    assert stored.dtype == torch.bfloat16 and checkpoint.blocks("lm_head.weight") is None
    assert torch.equal(torch.from_numpy(checkpoint.read("lm_head.weight")), stored.float())
    assert load_decoder(checkpoint).model.norm.weight.dtype == torch.float32
    assert load_decoder(checkpoint, device="meta").model.norm.weight.dtype == torch.bfloat16


def test_changing_what_was_read_does_not_change_the_file(tmp_path: Path) -> None:
    written = write(tmp_path / "m", BASE)
    before = (tmp_path / "m" / SINGLE).read_bytes()
    decoder = load_decoder(open_checkpoint(tmp_path / "m"))
    with torch.no_grad():
        decoder.lm_head.weight.zero_()
    again = load_decoder(open_checkpoint(tmp_path / "m"))
    assert torch.equal(again.lm_head.weight, written.lm_head.weight)
    assert (tmp_path / "m" / SINGLE).read_bytes() == before


def test_a_dtype_that_is_no_float_is_named(tmp_path: Path) -> None:
    write(tmp_path / "m", BASE)
    weights = load_file(tmp_path / "m" / SINGLE)
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)
    save_file(weights, tmp_path / "m" / SINGLE)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is stored as I8; expected F64"):
        open_checkpoint(tmp_path / "m")


def test_integers_are_no_weights(tmp_path: Path) -> None:
    write(tmp_path / "m", BASE)
    weights = load_file(tmp_path / "m" / SINGLE)
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int32)
    save_file(weights, tmp_path / "m" / SINGLE)
    with pytest.raises(CheckpointError, match=r"1 tensors are stored as integers .* lm_head\.wei"):
        open_checkpoint(tmp_path / "m")


def rename(weights: dict[str, Tensor]) -> None:
    weights["model.layers.0.attn.q.weight"] = weights.pop("model.layers.0.self_attn.q_proj.weight")


def drop(weights: dict[str, Tensor]) -> None:
    for name in [n for n in weights if n.startswith("model.layers.1.")]:
        del weights[name]


def reshape(weights: dict[str, Tensor]) -> None:
    weights["lm_head.weight"] = weights["lm_head.weight"].T.contiguous()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rename, r"1 missing: .*q_proj\.weight; 1 unexpected: model\.layers\.0\.attn\.q\.weight"),
        (drop, r"9 missing: .* and 4 more"),
        (reshape, r"1 misshaped: lm_head\.weight \[16, 40\] instead of \[40, 16\]"),
    ],
)
def test_tensors_that_do_not_fit_are_all_listed(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    write(tmp_path / "m", BASE)
    weights = load_file(tmp_path / "m" / SINGLE)
    damage(weights)
    save_file(weights, tmp_path / "m" / SINGLE)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "m")


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_truncated_file_is_damaged_or_incomplete(tmp_path: Path, keep: int) -> None:
    write(tmp_path / "m", BASE)
    file = tmp_path / "m" / SINGLE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or incomplete"):
        open_checkpoint(tmp_path / "m")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "m", BASE, 2_000)
    next((tmp_path / "m").glob("model-00003-*")).unlink()
    with pytest.raises(CheckpointError, match=r"1 of \d+ shards .* missing: model-00003-of"):
        open_checkpoint(tmp_path / "m")


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BASE))
    with pytest.raises(CheckpointError, match=r"no model\.safetensors .* found: config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json; found: nothing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen22"}, "model_type 'qwen22' is not implemented. Did you mean 'qwen2'"),
        ({"model_type": None}, "lacks 'model_type'"),
        ({"hidden_size": "16"}, "hidden_size is '16'; expected a whole number"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "RoPE kind 'longrope' is not implemented"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE kind 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "lacks 'low_freq_factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantised by 'awq'.*Known: .*gptq"),
        ({"num_key_value_heads": 3}, "heads must divide"),
        ({"torch_dtype": "int8"}, "dtype 'int8'"),
        ({"model_type": "baichuan_m1", "conv_window": 3}, "conv_window is 3"),
        ({"model_type": "baichuan_m1", "sliding_window_layers": [7]}, "outside 0..1"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types must hold 2",
        ),
    ],
)
def test_a_configuration_that_is_not_implemented_names_the_key(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    base = {k: v for k, v in BASE.items() if k != "rope_scaling"}
    (tmp_path / "config.json").write_text(json.dumps(base | change))
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)


def test_config_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_config(tmp_path)


def test_both_generations_of_rope_keys_mean_the_same(tmp_path: Path) -> None:
    old = {**BASE, "rope_theta": 5000.0}
    new = {k: v for k, v in BASE.items() if k not in ("rope_scaling", "torch_dtype")}
    new |= {"rope_parameters": {**ROPES["llama3"], "rope_theta": 5000.0}, "dtype": "float32"}
    (tmp_path / "old.json").write_text(json.dumps(old))
    (tmp_path / "new.json").write_text(json.dumps(new))
    assert read_config(tmp_path / "old.json") == read_config(tmp_path / "new.json")
