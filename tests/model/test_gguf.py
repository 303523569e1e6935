"""GGUF files written by the `gguf` package, read as Hugging Face model folders."""

import json
import random
import resource
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer

from attending.errors import CheckpointError, TokenizerError
from attending.model.gguf_file import GGUFFile, open_gguf
from attending.model.gguf_tokenizer import tokenizer_config, tokenizer_json

HIDDEN, HEADS, KV_HEADS, FFN, VOCAB = 256, 4, 2, 512, 32
SIZES = {
    "block_count": 1,
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 0.5,
}
SHAPES = {
    "token_embd.weight": (VOCAB, HIDDEN),
    "output_norm.weight": (HIDDEN,),
    "blk.0.attn_norm.weight": (HIDDEN,),
    "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
    "blk.0.attn_k.weight": (HIDDEN // 2, HIDDEN),
    "blk.0.attn_v.weight": (HIDDEN // 2, HIDDEN),
    "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
    "blk.0.ffn_norm.weight": (HIDDEN,),
    "blk.0.ffn_gate.weight": (FFN, HIDDEN),
    "blk.0.ffn_up.weight": (FFN, HIDDEN),
    "blk.0.ffn_down.weight": (HIDDEN, FFN),
}
KINDS = [kind for kind, (block, _) in gguf.GGML_QUANT_SIZES.items() if block > 1]
KINDS += [GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.F64]
ATTENTION = "model.layers.0.self_attn"


def tokenizer_of(file: GGUFFile) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_json(file.metadata)))


Values = dict[str, Any]


def weights() -> Values:
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def write(
    path: Path,
    tensors: Values | None = None,
    keys: Values | None = None,
    arch: str = "llama",
    split: int = 0,
) -> Path:
    """A one-layer model; a tensor may be a pair of raw bytes and their type."""
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    for key, value in (SIZES | (keys or {})).items():
        name = key if key.startswith("tokenizer.") else f"{arch}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        else:
            add: dict[type, Any] = {
                bool: writer.add_bool,
                int: writer.add_uint32,
                float: writer.add_float32,
            }
            add.get(type(value), writer.add_string)(name, value)
    for name, value in (weights() if tensors is None else tensors).items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(shape: tuple[int, ...], kind: GGMLQuantizationType) -> np.ndarray:
    """Bytes of this type whose values are finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = shape[0] * shape[1] // block
    blocks = np.random.default_rng(int(kind)).integers(0, 256, (4 * count, size), np.uint8)
    try:
        with np.errstate(all="ignore"):
            blocks = blocks[np.isfinite(dequantize(blocks, kind)).all(axis=1)]
    except NotImplementedError:
        pass
    return blocks[:count].reshape(shape[0], -1)


def in_half_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's rows 0, d/2, 1, d/2 + 1, ... of each head, back in the order of the halves."""
    size = len(rows) // heads
    order = [h * size + i for h in range(heads) for i in (*range(0, size, 2), *range(1, size, 2))]
    return rows[order]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    a, b = a.astype(np.float32), b.astype(np.float32)
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_type_reads_as_the_package_dequantises_it(
    tmp_path: Path, kind: GGMLQuantizationType
) -> None:
    tensors = weights()
    # More than one chunk, the last one short.
    tensors["token_embd.weight"] = np.resize(tensors["token_embd.weight"], (1100, HIDDEN))
    names = ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "token_embd.weight")
    for name in names:
        try:
            tensors[name] = quantize(tensors[name], kind), kind
        except NotImplementedError:
            tensors[name] = random_blocks(tensors[name].shape, kind), kind
    path = write(tmp_path / "m.gguf", tensors)
    file = open_gguf(path)
    stored = {t.name: t.data for t in gguf.GGUFReader(path).tensors}
    try:
        query, key, embedding = (dequantize(stored[name], kind) for name in names)
    except NotImplementedError:
        with pytest.raises(
            CheckpointError, match=rf"q_proj\.weight: cannot dequantise {kind.name}"
        ):
            file.read(f"{ATTENTION}.q_proj.weight")
        return
    assert same_bits(file.read(f"{ATTENTION}.q_proj.weight"), in_half_order(query, HEADS))
    assert same_bits(file.read(f"{ATTENTION}.k_proj.weight"), in_half_order(key, KV_HEADS))
    assert same_bits(file.read("model.embed_tokens.weight"), embedding)


def biased(key_rows: list[int]) -> tuple[Values, Values]:
    """Heads of eight rows, all attention biases, and keys and values that show their row."""
    tensors, rows = weights(), np.array(key_rows, np.float32)
    tensors["blk.0.attn_q.weight"] = np.zeros((32, HIDDEN), np.float32)
    tensors["blk.0.attn_q.bias"] = np.zeros(32, np.float32)
    tensors["blk.0.attn_output.weight"] = np.zeros((HIDDEN, 32), np.float32)
    for name in ("blk.0.attn_k", "blk.0.attn_v"):
        tensors[f"{name}.weight"] = np.repeat(rows[:, None], HIDDEN, axis=1)
        tensors[f"{name}.bias"] = rows
    sizes = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    return tensors, dict.fromkeys(sizes, 8)


def test_permutation_by_hand(tmp_path: Path) -> None:
    # Two heads of eight rows; row r of head h is 10 h + r. GGUF interleaves each head's halves.
    stored = [0, 4, 1, 5, 2, 6, 3, 7, 10, 14, 11, 15, 12, 16, 13, 17]
    wanted = [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15, 16, 17]
    tensors, keys = biased(stored)
    qwen = open_gguf(write(tmp_path / "q.gguf", tensors, keys, arch="qwen2"))
    assert qwen.read(f"{ATTENTION}.k_proj.bias").tolist() == stored
    tensors["blk.0.attn_output.bias"] = np.zeros(HIDDEN, np.float32)
    llama = open_gguf(write(tmp_path / "l.gguf", tensors, keys))
    assert llama.hf_config()["attention_bias"] is True
    assert llama.read(f"{ATTENTION}.k_proj.bias").tolist() == wanted
    assert llama.read(f"{ATTENTION}.k_proj.weight")[:, 99].tolist() == wanted
    assert llama.read(f"{ATTENTION}.v_proj.bias").tolist() == stored


def test_stored_and_read_rows_rotate_alike(tmp_path: Path) -> None:
    """Rotating neighbours of the stored query equals rotating halves of the one that is read."""
    stored = weights()["blk.0.attn_q.weight"].astype(np.float64)
    read = open_gguf(write(tmp_path / "m.gguf")).read(f"{ATTENTION}.q_proj.weight")
    x, half = np.random.default_rng(1).standard_normal(HIDDEN), HIDDEN // HEADS // 2
    turn = np.exp(7j * 10_000.0 ** (-np.arange(half) / half))
    pairs = (stored @ x).reshape(HEADS, half, 2)
    neighbours = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
    pairs = (read.astype(np.float64) @ x).reshape(HEADS, 2, half)
    np.testing.assert_allclose(neighbours, (pairs[:, 0] + 1j * pairs[:, 1]) * turn, rtol=1e-9)


def test_threads_read_the_same(tmp_path: Path) -> None:
    tensors, kind = weights(), GGMLQuantizationType.IQ2_XS  # its grid is built on first use
    for name in ("blk.0.ffn_up.weight", "blk.0.ffn_gate.weight", "token_embd.weight"):
        tensors[name] = random_blocks(tensors[name].shape, kind), kind
    file = open_gguf(write(tmp_path / "m.gguf", tensors))
    names = list(file.shapes) * 4
    with ThreadPoolExecutor(4) as pool:
        for name, values in zip(names, pool.map(file.read, names), strict=True):
            assert values.flags.writeable
            assert same_bits(values, file.read(name))


def test_configuration_of_a_plain_llama(tmp_path: Path) -> None:
    assert open_gguf(write(tmp_path / "m.gguf")).hf_config() == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "max_position_embeddings": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HIDDEN // HEADS,
        "rms_norm_eps": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
    }


def test_configuration_follows_the_tensors(tmp_path: Path) -> None:
    tensors = weights() | {"output.weight": weights()["token_embd.weight"]}
    tensors |= {f"blk.0.ffn_{n}.bias": np.zeros(FFN, np.float32) for n in ("gate", "up")}
    tensors["blk.0.ffn_down.bias"] = np.zeros(HIDDEN, np.float32)
    llama = open_gguf(write(tmp_path / "l.gguf", tensors))
    assert llama.hf_config()["mlp_bias"] is True
    assert llama.hf_config()["tie_word_embeddings"] is False
    assert llama.shapes["lm_head.weight"] == (VOCAB, HIDDEN)
    norms = {f"blk.0.attn_{name}_norm.weight": np.ones(64, np.float32) for name in "qk"}
    keys = {"attention.sliding_window": 32}
    qwen = open_gguf(write(tmp_path / "q.gguf", weights() | norms, keys, arch="qwen3"))
    window = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}
    assert qwen.hf_config().items() >= window.items()
    assert qwen.shapes[f"{ATTENTION}.q_norm.weight"] == (64,)


def llama3_factors(factor: float, theta: float, size: int, context: int = 8192) -> np.ndarray:
    """As the published models compute them, one frequency after the other."""
    found = []
    for i in range(0, size, 2):
        wave = 2 * np.pi * theta ** (i / size)
        share = (context / wave - 1) / 3
        between = 1 / ((1 - share) / factor + share)
        found.append(1.0 if wave < context / 4 else factor if wave > context else between)
    return np.array(found, np.float32)


def test_llama3_rope_is_recovered_from_its_factors(tmp_path: Path) -> None:
    factors, keys = llama3_factors(32.0, 500_000.0, 64), {"rope.freq_base": 500_000.0}
    file = open_gguf(write(tmp_path / "m.gguf", weights() | {"rope_freqs.weight": factors}, keys))
    assert "rope_freqs.weight" not in file.shapes
    assert file.hf_config()["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    other = llama3_factors(32.0, 500_000.0, 64, context=4096)
    for wrong in (other, factors[1:], np.append(factors[:-1], np.float32(32.001))):
        path = write(tmp_path / "x.gguf", weights() | {"rope_freqs.weight": wrong}, keys)
        with pytest.raises(CheckpointError, match="not of Llama 3's rule"):
            open_gguf(path)


def test_rope_scaling_keys(tmp_path: Path) -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    yarn = linear | {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 64}
    path = tmp_path / "m.gguf"
    rope = open_gguf(write(path, None, linear)).hf_config()["rope_parameters"]
    assert rope == {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
    more = {"rope.scaling.finetuned": True, "rope.scaling.yarn_beta_fast": 16.0}
    rope = open_gguf(write(path, None, yarn | more)).hf_config()["rope_parameters"]
    assert (rope.pop("beta_fast"), rope.pop("original_max_position_embeddings")) == (16.0, 64)
    assert rope == {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0}
    unread = {"rope.scaling.attn_factor": 1.2}
    for keys in (
        {"rope.scaling.type": "longrope"},
        yarn | unread,
        unread,
        {"rope.scaling.factor": 2.0},
    ):
        with pytest.raises(CheckpointError, match="rope scaling"):
            open_gguf(write(path, None, keys))
    factors = {"rope_freqs.weight": np.ones(32, np.float32)}
    with pytest.raises(CheckpointError, match="rope scaling 'linear'"):
        open_gguf(write(path, weights() | factors, linear))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_are_the_stored_integers_and_give_exactly_what_read_gives(
    tmp_path: Path, kind: str
) -> None:
    tensors, stored = weights(), GGMLQuantizationType[kind]
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_down.weight"):
        tensors[name] = random_blocks(tensors[name].shape, stored), stored
    file = open_gguf(write(tmp_path / "m.gguf", tensors))
    for name in (f"{ATTENTION}.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        blocks = file.blocks(name)
        assert blocks is not None and blocks.values.dtype == np.uint8
        assert blocks.bits == int(kind[1]) and blocks.values.max() == 2**blocks.bits - 1
        assert blocks.scale.dtype == np.float16 and (blocks.minimum is None) == (kind != "Q4_1")
        scale = blocks.scale.astype(np.float32)
        zero = -scale * 2 ** (blocks.bits - 1) if blocks.minimum is None else blocks.minimum
        values = blocks.values.reshape(*scale.shape, 32)
        assert np.array_equal(
            (scale[..., None] * values + zero.astype(np.float32)[..., None]).reshape(-1),
            file.read(name).reshape(-1),
        )
    assert file.blocks("model.norm.weight") is file.blocks("model.embed_tokens.weight") is None


@pytest.mark.parametrize(
    "keys",
    [
        {"expert_count": 8},
        {"logit_scale": 0.5},
        {"attention.sliding_window": 4096},
        {"attention.causal": False},
        {"rope.dimension_count": 32},
        {"attention.value_length": 32},
    ],
    ids=str,
)
def test_what_would_change_the_arithmetic_is_refused(tmp_path: Path, keys: Values) -> None:
    with pytest.raises(
        CheckpointError, match=rf"llama is implemented for .* not .*{next(iter(keys))}"
    ):
        open_gguf(write(tmp_path / "m.gguf", None, keys))


def test_tensors_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    tensors = weights() | {"blk.0.ffn_gate_inp.weight": np.zeros((8, HIDDEN), np.float32)}
    tensors["blk.0.attn_v.weight"] = np.zeros((8, HIDDEN), np.float32)
    del tensors["blk.0.ffn_up.weight"]
    with pytest.raises(CheckpointError) as error:
        open_gguf(write(tmp_path / "m.gguf", tensors))
    assert str(error.value).splitlines()[:4] == [
        "m.gguf: 3 tensors do not fit the configuration:",
        "  blk.0.attn_v.weight: (8, 256), not (128, 256)",
        "  blk.0.ffn_gate_inp.weight: (8, 256), not known",
        "  blk.0.ffn_up.weight: absent, not (512, 256)",
    ]
    with pytest.raises(CheckpointError, match=r"token_embd\.weight: absent"):
        open_gguf(write(tmp_path / "m.gguf", {"output_norm.weight": np.ones(HIDDEN, np.float32)}))
    with pytest.raises(CheckpointError, match="'gemma2' is not implemented"):
        open_gguf(write(tmp_path / "m.gguf", arch="gemma2"))
    with pytest.raises(CheckpointError, match=r"block_count is 1\.0, not int"):
        open_gguf(write(tmp_path / "m.gguf", None, {"block_count": 1.0}))
    with pytest.raises(CheckpointError, match="there is no tensor 'lm_head'"):
        open_gguf(write(tmp_path / "m.gguf")).read("lm_head")


def test_split_files(tmp_path: Path) -> None:
    whole = open_gguf(write(tmp_path / "whole.gguf"))
    write(tmp_path / "m.gguf", split=3)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 4
    for part in (parts[0], parts[2]):
        file = open_gguf(part)
        assert file.hf_config() == whole.hf_config()
        assert all(same_bits(file.read(name), whole.read(name)) for name in whole.shapes)
    renamed = parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(CheckpointError, match=r"renamed\.gguf do not belong together"):
        open_gguf(renamed)
    with pytest.raises(CheckpointError, match=r"1 of 4 files are missing: .*m-00001-of-00004"):
        open_gguf(parts[1])
    parts[0].write_bytes(parts[1].read_bytes())
    with pytest.raises(CheckpointError, match="do not belong together"):
        open_gguf(parts[1])


def string(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def info(*dims: int, kind: int = 0, offset: int = 0, rank: int | None = None) -> bytes:
    rank = len(dims) if rank is None else rank
    return string(b"t") + struct.pack(f"<I{len(dims)}QIQ", rank, *dims, kind, offset)


def head(tensors: int, keys: int, *rest: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(rest)


TOKENIZER = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab", "▁", "▁a", "<tool>"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -9.0, -9.0, -1.0, -9.0, -2.0, 0.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1, 1, 4],
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": "{{ messages }}",
}
HUGE, KEY = 2**63, string(b"key")
DAMAGED = {
    "expected a whole GGUF": b"PK\3\4" + bytes(40),
    "version 1,": head(0, 0, version=1),
    "little-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    f"{HUGE} keys": head(0, HUGE),
    f"{HUGE} tensors": head(HUGE, 0),
    "the header ends before byte 9": head(0, 1, struct.pack("<Q", HUGE)),
    "the header ends before byte 32": head(0, 1000),
    f"{HUGE} values of type 8": head(0, 1, KEY, struct.pack("<IIQ", 9, 8, HUGE)),
    "the header ends before byte 4": head(0, 1, KEY, struct.pack("<IIQ", 9, 10, 1 << 19)),
    "1 values of type 9": head(0, 1, KEY, struct.pack("<IIQ", 9, 9, 1)),
    "1 values of type 13": head(0, 1, KEY, struct.pack("<I", 13)),
    "key key occurs twice": head(0, 2, (KEY + struct.pack("<IB", 0, 7)) * 2),
    "'utf-8' codec": head(0, 1, KEY, struct.pack("<I", 8), string(b"\xff")),
    "the alignment is 0": head(0, 1, string(b"general.alignment"), struct.pack("<II", 4, 0)),
    r"tensor t \(8,\) occurs twice": head(2, 0, info(8) * 2, bytes(99)),
    "tensor t ends at byte 1": head(1, 0, info(8, offset=64)),
    f"tensor t ends at byte {2**82 + 96}": head(1, 0, info(2**40, 2**40)),
    r"tensor t \(0,\) .* is empty": head(1, 0, info(0)),
    r"tensor t \(33,\) .* breaks a block": head(1, 0, info(33, kind=2)),
    "4294967295 dimensions": head(1, 0, info(1, rank=2**32 - 1)),
    "999 is not a valid": head(1, 0, info(8, kind=999)),
    "general.architecture is absent": head(0, 0),
    "an empty file": b"",
}


@pytest.mark.parametrize("message", DAMAGED)
def test_a_damaged_header_is_an_error(tmp_path: Path, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(DAMAGED[message])
    with pytest.raises(CheckpointError, match=message):
        open_gguf(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"1 of 1 files are missing: .*absent\.gguf"):
        open_gguf(tmp_path / "absent.gguf")


def test_damage_anywhere_is_an_error_or_harmless(tmp_path: Path) -> None:
    """Truncations and flipped bytes: never another exception, never much memory."""
    factors = {"rope_freqs.weight": llama3_factors(8.0, 10_000.0, 64)}
    path = write(tmp_path / "m.gguf", weights() | factors, TOKENIZER)
    whole, damaged = path.read_bytes(), tmp_path / "damaged.gguf"
    end = min(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors)
    use(open_gguf(path))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in (*range(0, end, 97), *range(end, len(whole), 50_021)):
        damaged.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            open_gguf(damaged)
    rng, outcomes = random.Random(0), [0, 0]
    for _ in range(1000):
        at = rng.randrange(end)
        damaged.write_bytes(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :])
        try:
            use(open_gguf(damaged))
            outcomes[0] += 1
        except (CheckpointError, TokenizerError):
            outcomes[1] += 1
    assert min(outcomes) > 50
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200 * 2 ** (20 if sys.platform == "darwin" else 10)


def use(file: GGUFFile) -> None:
    file.read(f"{ATTENTION}.q_proj.weight")
    tokenizer_of(file).encode("ab <tool>cab")
    tokenizer_config(file.metadata)
