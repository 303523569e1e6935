"""The formats' own libraries agree: our folders load in transformers, and theirs load here.

llm-compressor and auto-round are in no requirement of ours, since they want other versions of what
is; their tests run in an environment of their own that has them, `attending` and pytest.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import attending
from attending.model.checkpoint import open_checkpoint
from attending.model.quantized import Scheme
from attending.quantize.loop import quantize
from tests.engine.folders import write_model
from tests.quantize import text
from tests.quantize.making import MODEL, decoded, write_quantized

IDS = [[5, 9, 200, 31, 7, 7, 101, 250]]
W4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
ROW = {"strategy": "channel", "group_size": None}


def groups(**changed: Any) -> dict[str, Any]:
    return {"group_0": {"targets": ["Linear"], "weights": W4 | changed}}


RECIPES: dict[str, dict[str, Any]] = {
    "symmetric": {"config_groups": groups(), "ignore": ["lm_head"]},
    "asymmetric": {
        "config_groups": groups(symmetric=False, group_size=32),
        "ignore": ["re:.*lm_head"],
    },
    "row int8": {"config_groups": groups(num_bits=8, **ROW), "ignore": ["lm_head"]},
    "row asymmetric, head too": {"config_groups": groups(symmetric=False, **ROW), "ignore": []},
    "mixed": {
        "config_groups": {
            "a": {"targets": ["re:.*self_attn.*"], "weights": W4 | {"num_bits": 8} | ROW},
            "b": {"targets": ["re:.*mlp.*", "Linear"], "weights": W4 | {"group_size": 128}},
        },
        "ignore": ["lm_head", "re:.*layers.1.mlp.up_proj"],
    },
}


def theirs(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def unpacked(folder: Path) -> Any:
    """As `theirs`, by compressed-tensors alone.

    transformers makes an empty model first, whose zero points compressed-tensors 0.20 does not
    pack: together they load no asymmetric folder, whoever wrote it.
    """
    transformers = pytest.importorskip("transformers")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    told = json.loads((folder / "config.json").read_text("utf-8"))
    quantization = pytest.importorskip("compressed_tensors.quantization").QuantizationConfig
    [scheme] = quantization.model_validate(told.pop("quantization_config")).config_groups.values()
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith(".weight_packed")]:
        at = name.removesuffix("weight_packed")
        own = {n.removeprefix(at): tensors.pop(n) for n in [*tensors] if n.startswith(at)}
        own["weight_scale"] = own["weight_scale"].float()  # its product has the scale's dtype
        back = compressors.PackedQuantizationCompressor.decompress(own, scheme)
        tensors[f"{at}weight"] = back["weight"]
    config = transformers.AutoConfig.for_model(**told)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.load_state_dict(tensors, strict=True)
    return model


def assert_equal_logits(folder: Path, reference: Any) -> None:
    with torch.no_grad():
        expected = reference(torch.tensor(IDS)).logits
    ours = torch.as_tensor(attending.load(folder, dtype="float32").logits(IDS))
    print(
        f"largest logit {expected.abs().max():.3f}, difference {(ours - expected).abs().max():.2e}"
    )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(4, 64, True),
        Scheme(4, 32, False),
        Scheme(4, 128, True),
        Scheme(4, -1, False),
        Scheme(8, -1, True),
        Scheme(8, 128, False),
    ],
)
@pytest.mark.parametrize("left", [("lm_head",), ("model.layers.0.mlp.down_proj",)])
def test_ours_load_in_transformers_through_compressed_tensors(
    tmp_path: Path, scheme: Scheme, left: tuple[str, ...]
) -> None:
    pytest.importorskip("compressed_tensors")
    write_quantized(tmp_path / "m", "compressed-tensors", scheme, left)
    read = theirs if scheme.symmetric else unpacked
    assert_equal_logits(tmp_path / "m", read(tmp_path / "m"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kv", "near"), [("float16", 1e-4), ("fp8", 0.5), ("int8", 0.2)])
def test_what_the_verb_writes_loads_in_transformers(
    tmp_path: Path, kv: Literal["float16", "fp8", "int8"], near: float, tied: bool
) -> None:
    """With a cache of eight bits as well, whose rounding compressed-tensors plays there."""
    pytest.importorskip("compressed_tensors")
    shape = MODEL | {"tie_word_embeddings": tied}
    source, notes = write_model(tmp_path / "m", **shape), text.write_text(tmp_path / "t")
    out = quantize(text.recipe(source, notes, method="gptq", kv=kv), tmp_path / "out")
    with torch.no_grad():
        expected = theirs(out)(torch.tensor(IDS), use_cache=False).logits
    found = torch.as_tensor(attending.load(out, dtype="float32").logits(IDS))
    torch.testing.assert_close(found, expected, rtol=0, atol=near)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_of_llm_compressor_loads_here(
    tmp_path: Path, recipe: str, dtype: torch.dtype
) -> None:
    llmcompressor = pytest.importorskip("llmcompressor")
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = theirs(write_model(tmp_path / "float", **MODEL)).to(dtype)
    llmcompressor.oneshot(model=model, recipe=[QuantizationModifier(**RECIPES[recipe])])
    rounded = {n: p.clone() for n, p in model.state_dict().items() if n.endswith("weight")}
    model.save_pretrained(tmp_path / "m", save_compressed=True)
    if dtype == torch.float32:
        assert_equal_logits(tmp_path / "m", theirs(tmp_path / "m"))
    checkpoint = open_checkpoint(tmp_path / "m")
    compressed = _decompressed(tmp_path / "m")
    layers = [n for n in checkpoint.shapes if checkpoint.quantized(n) is not None]
    assert layers == [n for n in checkpoint.shapes if n.removesuffix(".weight") in compressed]
    assert len(layers) == {"mixed": 13, "row asymmetric, head too": 15}.get(recipe, 14)
    for name in layers:
        expected = compressed[name.removesuffix(".weight")].float().numpy()
        exact = checkpoint.read(name)
        if dtype == torch.bfloat16:  # theirs rounds its product to that
            exact = torch.from_numpy(exact).bfloat16().float().numpy()
        assert np.array_equal(exact, expected), name
        blocks = checkpoint.blocks(name)
        assert blocks is not None and rounded[name].shape == blocks.values.shape


def _decompressed(folder: Path) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme_of = QuantizationConfig.model_validate(config).config_groups
    stored, found = load_file(folder / "model.safetensors"), {}
    for name in [n.removesuffix(".weight_packed") for n in stored if n.endswith("weight_packed")]:
        parts = {n[len(name) + 1 :]: t for n, t in stored.items() if n.startswith(f"{name}.")}
        scheme = scheme_of["group_1" if len(scheme_of) > 1 and ".mlp." in name else "group_0"]
        found[name] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    return found


@pytest.mark.parametrize(
    ("form", "symmetric"),
    [
        ("auto_gptq", True),
        ("auto_gptq", False),
        ("auto_round:auto_gptq", True),
        ("auto_round:auto_gptq", False),
        ("llm_compressor", True),  # its asymmetric one fails in auto-round 0.15.1 itself
    ],
)
def test_a_folder_of_auto_round_loads_here(tmp_path: Path, form: str, symmetric: bool) -> None:
    auto_round = pytest.importorskip("auto_round")
    transformers = pytest.importorskip("transformers")
    source = write_model(tmp_path / "float", **MODEL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    rounding = auto_round.AutoRound(
        theirs(source),
        tokenizer,
        bits=4,
        group_size=64,
        sym=symmetric,
        iters=2,
        nsamples=4,
        batch_size=2,
        seqlen=16,
        dataset=[torch.randint(0, 300, (1, 16)) for _ in range(4)],
        device_map="cpu",
    )
    model, _ = rounding.quantize()
    rounded = {name: weight.float().numpy() for name, weight in model.state_dict().items()}
    rounding.save_quantized(str(tmp_path / "m"), format=form)
    checkpoint = open_checkpoint(tmp_path / "m")
    layers = {n: q for n in checkpoint.shapes if (q := checkpoint.quantized(n)) is not None}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert (layer.zeros is None) == symmetric and (layer.scales < 0).any() == symmetric
        exact = torch.from_numpy(layer.dequantise()).bfloat16().float().numpy()  # as it holds them
        assert np.array_equal(exact, rounded[name]), name


@pytest.mark.parametrize("scheme", [Scheme(4, 32, True), Scheme(4, -1, True)])
def test_our_gptq_folders_load_in_transformers_through_auto_round(
    tmp_path: Path, scheme: Scheme
) -> None:
    pytest.importorskip("auto_round")
    made = write_quantized(tmp_path / "m", "gptq", scheme)
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    method = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    config["quantization_config"] |= method  # the same layout; GPTQModel wants more than two cores
    file.write_text(json.dumps(config))
    modules = dict(theirs(tmp_path / "m").named_modules())
    for name, layer in made.items():  # a unit matrix through each gives its weights, in float16
        inputs = torch.eye(layer.values.shape[1], dtype=torch.float16)
        torch.testing.assert_close(modules[name](inputs).T, decoded(layer).half(), rtol=0, atol=0)
