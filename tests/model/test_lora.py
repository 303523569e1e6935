"""An adapter trains alone, merges into the same function, and is peft's on the disk."""

import json
import math
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from attending.chat import Tokenizer
from attending.errors import CheckpointError, ConfigError
from attending.model import lora
from attending.model.attend import Packed
from attending.model.decoder import Decoder
from attending.model.lora import LoraConfig
from attending.model.weights import save_model
from attending.train.parallel import build as build_for_training
from attending.train.parallel import process_group, whole_weights
from attending.train.recipe import ComputeConfig
from tests.model.tiny import FAMILIES, build, configs
from tests.train.making import LLAMA, M1, make_tokenizer

WIDE: dict[str, Any] = {"initializer_range": 0.3}  # an error must show in the logits
CONFIGS = {name: {**LLAMA, **WIDE, "model_type": name} for name in FAMILIES[:3]}
CONFIGS["baichuan_m1"] = {**M1, **WIDE}
MLP = {"gate_proj", "up_proj", "down_proj"}
LAYERS = dict.fromkeys(FAMILIES[:3], {"q_proj", "k_proj", "v_proj", "o_proj"} | MLP)
LAYERS["baichuan_m1"] = {"W_pack", "o_proj"} | MLP
IDS = torch.arange(14) * 5 % 11


def config_of(rank: int = 2, alpha: float = 3, **more: Any) -> LoraConfig:
    return LoraConfig.build({"rank": rank, "alpha": alpha, **more})


def adapted(
    config: dict[str, Any], told: LoraConfig, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Decoder:
    """With an adapter in which nothing is zero."""
    decoder = build(config, seed, dtype)
    lora.add(decoder, told)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if name.endswith(lora.ADDED):
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return decoder


def logits(decoder: Decoder) -> Tensor:
    return decoder.logits(decoder(IDS, Packed([9, 5])))


def plain(config: dict[str, Any], weights: dict[str, Tensor]) -> Decoder:
    decoder = build(config, dtype=next(iter(weights.values())).dtype)
    decoder.load_state_dict(weights, strict=True)
    return decoder


def test_a_merge_by_hand() -> None:
    weights = {
        "norm.weight": torch.tensor([5.0]),
        "q.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "q.lora_A.weight": torch.tensor([[1.0, -1.0]]),
        "q.lora_B.weight": torch.tensor([[2.0], [0.5]]),
    }
    found = lora.merged(weights, config_of(rank=1, alpha=3))
    assert {k: v.tolist() for k, v in found.items()} == {
        "norm.weight": [5.0],
        "q.weight": [[1 + 3 * 2, 2 - 3 * 2], [3 + 3 * 0.5, 4 - 3 * 0.5]],
    }
    assert weights["q.weight"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_half_precision_weight_is_rounded_once_after_the_sum() -> None:
    # At 1 bfloat16 has steps of 2^-7. A little more than half of one goes up; a product rounded
    # before the sum would be half, and go down to even.
    weights = {
        "q.weight": torch.tensor([[1.0]], dtype=torch.bfloat16),
        "q.lora_A.weight": torch.tensor([[2.0**-8 + 2.0**-17]]),
        "q.lora_B.weight": torch.tensor([[1.0]]),
    }
    found = lora.merged(weights, config_of(rank=1, alpha=1))["q.weight"]
    assert found.dtype == torch.bfloat16 and found.item() == 1 + 2.0**-7


def test_the_scale_is_alpha_over_the_rank_or_over_its_root() -> None:
    assert config_of(rank=16, alpha=8).scale == 0.5
    assert config_of(rank=16, alpha=8, rank_stabilised=True).scale == 2.0


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_merged_equals_unmerged(family: str, data: st.DataObject) -> None:
    torch.set_num_threads(1)
    config = data.draw(configs(family))
    targets = data.draw(st.lists(st.sampled_from(sorted(LAYERS[family])), unique=True))
    told = config_of(
        rank=data.draw(st.integers(1, 5)),
        alpha=data.draw(st.floats(0.5, 8)),
        targets=targets,
        rank_stabilised=data.draw(st.booleans()),
    )
    decoder = adapted(config, told, seed=data.draw(st.integers(0, 99)))
    with torch.no_grad():
        apart, without = logits(decoder), logits(build(config, dtype=torch.float64))
        whole = lora.merged(decoder.state_dict(), told)
        assert set(whole) == set(decoder.arch.tensor_shapes())
        torch.testing.assert_close(logits(plain(config, whole)), apart, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(apart, without)


@pytest.mark.parametrize("family", FAMILIES)
def test_empty_targets_are_every_linear_layer_of_the_blocks(family: str) -> None:
    decoder = adapted(CONFIGS[family], config_of())
    official = decoder.arch.tensor_shapes()
    endings = tuple(f".{layer}.weight" for layer in LAYERS[family])
    stems = {name.removesuffix(".weight") for name in official if name.endswith(endings)}
    shapes = {name: tuple(weight.shape) for name, weight in decoder.named_parameters()}
    added = {f"{stem}.lora_A.weight": (2, official[f"{stem}.weight"][1]) for stem in stems}
    added |= {f"{stem}.lora_B.weight": (official[f"{stem}.weight"][0], 2) for stem in stems}
    assert shapes == {**official, **added}
    assert {n for n, w in decoder.named_parameters() if w.requires_grad} == set(added)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])  # bfloat16 goes through FSDP2
def test_training_builds_it_empty_and_moves_the_adapter_alone(precision: str) -> None:
    torch.set_num_threads(1)
    told = config_of(targets=["v_proj", "down_proj"])
    base = build(CONFIGS["llama"]).state_dict()
    filled = []

    def fill(name: str, weight: Tensor) -> None:
        filled.append(name)
        if name.endswith(lora.ADDED):
            lora.init_weight(name, weight, seed=7)
        else:
            weight.copy_(base[name])

    arch = build(CONFIGS["llama"]).arch
    with process_group(precision) as (place, device):
        compute = ComputeConfig.build({"precision": precision})
        decoder = build_for_training(
            arch, fill, place, device, compute, partial(lora.add, config=told)
        )
        weights = dict(decoder.named_parameters())
        assert sorted(filled) == sorted(weights) and set(base) < set(weights)
        first = whole_weights(decoder)
        before = {name: weight.clone() for name, weight in first.items()}
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.1, weight_decay=0.1)
        for _ in range(2):  # A's gradient is zero as long as B is
            optimizer.zero_grad()
            decoder.measure(IDS, Packed([14]), lambda hidden, head: hidden @ head.T)[
                :, 3
            ].sum().backward()
            optimizer.step()
        assert all((w.grad is not None) == n.endswith(lora.ADDED) for n, w in weights.items())
        after = whole_weights(decoder)
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) != name.endswith(lora.ADDED), name
    assert set(lora.merged(after, told)) == set(arch.tensor_shapes())


def test_an_adapter_begins_as_nothing_and_by_its_name() -> None:
    told = config_of(rank=64)
    decoder, again = adapted(CONFIGS["llama"], told), adapted(CONFIGS["llama"], told, seed=1)
    for name, weight in decoder.named_parameters():
        if name.endswith(lora.ADDED):
            lora.init_weight(name, weight, seed=7)
    for name, weight in reversed(list(again.named_parameters())):
        if name.endswith(lora.ADDED):
            lora.init_weight(name, weight, seed=7)
            assert torch.equal(weight, decoder.get_parameter(name))
    assert torch.equal(logits(decoder), logits(build(CONFIGS["llama"], dtype=torch.float64)))
    q, k = (decoder.get_parameter(f"model.layers.0.self_attn.{n}_proj.lora_A.weight") for n in "qk")
    bound = 1 / math.sqrt(32)
    assert 0.98 * bound < q.abs().max() <= bound and q.mean().abs() < 0.05 * bound
    assert not torch.equal(q, k)
    lora.init_weight("model.layers.0.self_attn.q_proj.lora_A.weight", k.data, seed=8)
    assert not torch.equal(q, k)


def test_a_resumed_adapter_goes_on_bit_for_bit() -> None:
    def step(decoder: Decoder, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        logits(decoder)[:, 3].sum().backward()
        optimizer.step()

    def begin(seed: int) -> tuple[Decoder, torch.optim.Optimizer]:
        decoder = adapted(CONFIGS["llama"], config_of(), seed)
        some = [weight for weight in decoder.parameters() if weight.requires_grad]
        return decoder, torch.optim.AdamW(some, lr=0.1)

    first, other = begin(0), begin(1)
    step(*first)
    model, states = get_state_dict(*first)
    assert set(states["state"]) == {name for name in model if name.endswith(lora.ADDED)}
    kept, states = deepcopy((dict(model), states))
    set_state_dict(*other, model_state_dict=kept, optim_state_dict=states)
    step(*other)
    step(*first)
    for name, weight in first[0].state_dict().items():
        assert torch.equal(weight, other[0].state_dict()[name]), name
        assert torch.equal(weight, kept[name]) != name.endswith(lora.ADDED), name


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama", ["q_porj", "v_proj"], r"no .* is q_porj\. Did you mean 'q_proj'\? Known: down_"),
        ("llama", ["lm_head"], r"lm_head\..* Known: down_proj, gate_proj, k_proj, o_proj, q_proj"),
        ("baichuan_m1", ["q_proj"], r"Known: W_pack, down_proj, gate_proj, o_proj, up_proj\."),
    ],
)
def test_targets_that_do_not_exist_are_an_error(
    family: str, targets: list[str], message: str
) -> None:
    decoder = build(CONFIGS[family])
    with pytest.raises(ConfigError, match=message):
        lora.add(decoder, config_of(targets=targets))
    assert all(weight.requires_grad for weight in decoder.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_comes_back_from_the_disk(tmp_path: Path, family: str) -> None:
    told = config_of(rank=3, alpha=2.5, rank_stabilised=True, targets=["o_proj", "up_proj"])
    decoder = adapted(CONFIGS[family], told)
    weights, base = decoder.state_dict(), build(CONFIGS[family], dtype=torch.float64).state_dict()
    lora.save_adapter(tmp_path, weights, told, "org/base")
    found, whole = lora.load_adapter(tmp_path, base), lora.merged(weights, told)
    assert list(found) == list(base)
    assert all(torch.equal(found[name], whole[name]) for name in base)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA" and written["target_modules"] == ["o_proj", "up_proj"]
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (3, 2.5, True)


def written(folder: Path) -> dict[str, Tensor]:
    """An adapter in a folder, and the base it fits."""
    told = config_of(targets=["q_proj"])
    lora.save_adapter(folder, adapted(CONFIGS["llama"], told).state_dict(), told, "org/base")
    return build(CONFIGS["llama"]).state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type is 'IA3'; only plain LoRA .*\(merge_and_unload"),
        ({"use_dora": True}, "use_dora is True; only plain LoRA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"use_something_new": True}, "use_something_new is True"),
        ({"r": "2"}, r"rank: .* valid integer \(got '2'\)\): expected"),
        ({"target_modules": "("}, r"no whole adapter \(missing \)"),
        ({"r": 4}, r"4 misshaped: .*lora_A\.weight \[2, 32\] instead of \[4, 32\]"),
        ({"target_modules": ["q_proj", "o_proj"]}, r"org/base\. 4 missing: base_model\.model\.mod"),
        ({"target_modules": None}, "4 unexpected: base_model"),
    ],
)
def test_what_is_no_plain_lora_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    base, file = written(tmp_path), tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        lora.load_adapter(tmp_path, base)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    wider = build({**CONFIGS["llama"], "hidden_size": 48}).state_dict()
    with pytest.raises(CheckpointError, match=r"trained on is org/base\. 4 misshaped: .*\[2, 48\]"):
        lora.load_adapter(tmp_path, wider)
    deeper = build({**CONFIGS["llama"], "num_hidden_layers": 3}).state_dict()
    with pytest.raises(CheckpointError, match=r"2 missing: .*layers\.2\.self_attn\.q_proj"):
        lora.load_adapter(tmp_path, deeper)


def test_a_damaged_adapter_is_named(tmp_path: Path) -> None:
    base, file = written(tmp_path), tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)}, file)
    with pytest.raises(CheckpointError, match=r"1 unexpected: .*lm_head\.lora_A"):
        lora.load_adapter(tmp_path, base)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="is no whole adapter"):
        lora.load_adapter(tmp_path, base)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected adapter_config\.json and adapter_model"):
        lora.load_adapter(tmp_path, base)


def peft_base(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of a folder that we wrote."""
    transformers = pytest.importorskip("transformers")
    decoder = build(CONFIGS[family], dtype=dtype)
    tokenizer = Tokenizer.from_folder(make_tokenizer(folder / "tokenizer"))
    (folder / "base").mkdir()
    save_model(folder / "base", decoder.arch, decoder.state_dict(), tokenizer, {})
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)


@torch.no_grad()
def close(theirs: Any, ours: Decoder) -> None:
    expected = torch.cat([theirs(IDS[None, :9]).logits[0], theirs(IDS[None, 9:]).logits[0]])
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_peft_reads_what_we_write(tmp_path: Path, family: str) -> None:
    peft = pytest.importorskip("peft")
    told = config_of(rank=3, rank_stabilised=family == "qwen2")
    decoder = adapted(CONFIGS[family], told, dtype=torch.float32)
    base = peft_base(tmp_path, family)
    lora.save_adapter(tmp_path, decoder.state_dict(), told, str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    close(theirs, decoder)
    close(
        theirs.merge_and_unload(),
        plain(CONFIGS[family], lora.load_adapter(tmp_path, build(CONFIGS[family]).state_dict())),
    )


@pytest.mark.parametrize(
    "targets", [["q_proj", "mlp.down_proj"], "all-linear", r".*\.1\.self_attn\.[qv]_proj"]
)
@pytest.mark.parametrize("stabilised", [False, True])
def test_we_read_what_peft_writes(
    tmp_path: Path, targets: list[str] | str, stabilised: bool
) -> None:
    peft = pytest.importorskip("peft")
    told = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=targets, use_rslora=stabilised, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(peft_base(tmp_path, "llama"), told).eval()
    for name, weight in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, 0.0, 0.3)
    theirs.save_pretrained(tmp_path)
    base = build(CONFIGS["llama"])
    found = lora.load_adapter(tmp_path, base.state_dict())
    assert not torch.allclose(logits(plain(CONFIGS["llama"], found)), logits(base))
    close(theirs, plain(CONFIGS["llama"], found))
