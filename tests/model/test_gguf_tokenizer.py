"""Tokenizers stored in GGUF files give the ids of the libraries that trained them."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from gguf import TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from attending.errors import CheckpointError, TokenizerError
from attending.model.gguf_file import open_gguf
from attending.model.gguf_tokenizer import tokenizer_config, tokenizer_json
from tests.model.test_gguf import Values, tokenizer_of, write

TEXT = (
    "The patient reports 3 days of fever, 39.5 °C, and a dry cough; no chest pain.\n\n"
    "def dose(mg: int) -> float:\n\treturn mg * 0.25  # per kg\n"
    "患者咳嗽三天，体温39.5度。 Él no tiene dolor. Größe: 180cm — naïve café!  \r\n It's we'll I'D"
)


def train_sentencepiece(**options: Any) -> Any:
    stored = io.BytesIO()
    usual = {"vocab_size": 420, "byte_fallback": True, "split_by_whitespace": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n") * 3),
        model_writer=stored,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **(usual | options),
    )
    return sentencepiece.SentencePieceProcessor(model_proto=stored.getvalue())


def sentencepiece_keys(model: Any, **more: Any) -> Values:
    """A SentencePiece model as converters store it."""
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    kinds = [
        TokenType.UNKNOWN
        if model.is_unknown(i)
        else TokenType.CONTROL
        if model.is_control(i)
        else TokenType.BYTE
        if model.is_byte(i)
        else TokenType.USER_DEFINED
        if piece.startswith("<tool")
        else TokenType.NORMAL
        for i, piece in enumerate(pieces)
    ]
    keys = {"model": "llama", "tokens": pieces, "token_type": kinds}
    keys["scores"] = [model.get_score(i) for i in range(len(pieces))]
    ids = {"unknown": model.unk_id(), "bos": model.bos_id(), "eos": model.eos_id()}
    keys |= {f"{name}_token_id": index for name, index in ids.items()} | more
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def random_texts(count: int) -> Iterator[str]:
    """Pieces of real text among characters of many scripts, white space, marks and digits."""
    rng = random.Random(0)
    ranges = [(9, 13), (32, 126), (48, 57), (0xA0, 0x36F), (0x370, 0x5FF), (0x900, 0xDFF)]
    ranges += [(0x2000, 0x206F), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3)]
    ranges += [(0xFF00, 0xFFEF), (0x1F300, 0x1F6FF)]
    for _ in range(count):
        text = ""
        for _ in range(rng.randint(0, 6)):
            start = rng.randrange(len(TEXT))
            text += TEXT[start : start + rng.randint(1, 20)] + " " * rng.choice([0, 0, 1, 2, 5])
            text += "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(3))
        yield text


@pytest.mark.parametrize(
    "options",
    [{}, {"add_dummy_prefix": False}, {"byte_fallback": False, "vocab_size": 160}],
    ids=["prefixed", "plain", "unknown token"],
)
def test_ids_equal_sentencepiece(tmp_path: Path, options: Values) -> None:
    reference = train_sentencepiece(**options)
    keys = sentencepiece_keys(reference, add_space_prefix=options.get("add_dummy_prefix", True))
    tokenizer = tokenizer_of(open_gguf(write(tmp_path / "m.gguf", None, keys)))
    for text in ["", " ", "  leading", "trailing  ", TEXT, *random_texts(800)]:
        ids = tokenizer.encode(text).ids
        assert ids == [reference.bos_id(), *reference.encode(text)], repr(text)
        if "byte_fallback" not in options:
            assert tokenizer.decode(ids) == text


def test_control_and_user_defined_pieces(tmp_path: Path) -> None:
    reference = train_sentencepiece(user_defined_symbols=["<tool>", "<tool_end>"], vocab_size=430)
    keys = sentencepiece_keys(reference, add_bos_token=False, add_eos_token=True)
    file = open_gguf(write(tmp_path / "m.gguf", None, keys))
    tokenizer, eos = tokenizer_of(file), reference.eos_id()
    for text in ("a <tool><tool_end>", "fever<tool_end>"):
        assert tokenizer.encode(text).ids == [*reference.encode(text), eos]
    # Behind an added token a text is as if alone, which SentencePiece has no word for.
    alone = [reference.piece_to_id("<tool>"), *reference.encode("fever"), eos]
    assert tokenizer.encode("<tool>fever").ids == alone
    assert tokenizer.decode(tokenizer.encode("x</s><tool>").ids) == "x<tool>"
    assert tokenizer.encode("a</s>", add_special_tokens=False).ids[-1] == eos
    tokenizer.encode_special_tokens = True  # as for text from users
    assert eos not in tokenizer.encode("a</s>", add_special_tokens=False).ids
    assert file.hf_config()["eos_token_id"] == [eos]
    config = tokenizer_config(file.metadata)
    assert (config["add_bos_token"], config["add_eos_token"]) == (False, True)
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == (
        "<s>",
        "</s>",
        "<unk>",
    )


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
CASELESS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
LINES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def by_regex(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, plain])


FAMILIES = {  # as the families' own `tokenizer.json` have it
    "gpt-2": GPT2,
    "smollm": pre_tokenizers.Sequence([DIGITS, GPT2]),
    "command-r": pre_tokenizers.Sequence([DIGITS, GPT2]),
    "llama-bpe": by_regex(CASELESS + "{1,3}" + LINES),
    "qwen2": by_regex(CASELESS + LINES),
}


def train_byte_level(name: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer, tokenizer.decoder = FAMILIES[name], decoders.ByteLevel()
    if name in ("command-r", "qwen2"):
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXT.splitlines(), " 12 123 1999 2024" * 9] * 3, trainer)
    return tokenizer


def byte_level_keys(name: str, tokenizer: Tokenizer, **more: Any) -> Values:
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    keys = {"model": "gpt2", "pre": name, "tokens": pieces, "bos_token_id": 0}
    keys["merges"] = [" ".join(pair) for pair in model["merges"]]
    keys["token_type"] = [TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(pieces) - 2)
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | more).items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_ids_equal_the_family_tokenizer(tmp_path: Path, name: str) -> None:
    reference = train_byte_level(name)
    keys = byte_level_keys(name, reference) | {"tokenizer.chat_template": "{{ messages }}"}
    file = open_gguf(write(tmp_path / "m.gguf", None, keys))
    tokenizer, bos = tokenizer_of(file), [0] if name == "llama-bpe" else []
    for text in ["", "123456 7  89", "I'LL e\u0301 ſ", "a<|im_end|>\n", *random_texts(300)]:
        expected = reference.encode(text).ids
        assert tokenizer.encode(text).ids == bos + expected, repr(text)
        assert tokenizer.decode(expected) == reference.decode(expected)
    assert tokenizer_config(file.metadata) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(bos),
        "add_eos_token": False,
        "bos_token": "<|begin|>",
        "extra_eos_tokens": ["<|im_end|>"],
        "chat_template": "{{ messages }}",
    }
    assert file.hf_config()["eos_token_id"] == [1]


def test_a_whole_word_needs_no_merges_where_the_family_ignores_them(tmp_path: Path) -> None:
    trained = train_byte_level("llama-bpe")
    for name, count in (("llama-bpe", 1), ("smaug-bpe", 2)):
        keys = byte_level_keys(name, trained, add_bos_token=False)
        keys["tokenizer.ggml.tokens"] += ["zq"]
        keys["tokenizer.ggml.token_type"] += [TokenType.NORMAL]
        tokenizer = tokenizer_of(open_gguf(write(tmp_path / "m.gguf", None, keys)))
        assert len(tokenizer.encode("zq").ids) == count


def test_only_normal_pieces_are_made_by_merging(tmp_path: Path) -> None:
    for kind, ids in ((1, [3]), (3, [1, 2]), (4, [1, 2]), (5, [1, 2])):
        keys = {"model": "llama", "tokens": ["<unk>", "a", "b", "ab"], "unknown_token_id": 0}
        keys |= {"scores": [0.0, -3.0, -2.0, -1.0], "token_type": [2, 1, 1, kind]}
        keys |= {"add_bos_token": False, "add_space_prefix": False}
        named = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
        definition = tokenizer_json(open_gguf(write(tmp_path / "m.gguf", None, named)).metadata)
        without = Tokenizer.from_str(json.dumps(definition | {"added_tokens": []}))
        assert without.encode("ab").ids == ids


def test_tokenizers_that_cannot_be_read(tmp_path: Path) -> None:
    trained = train_byte_level("gpt-2")
    cases: list[tuple[Values, str]] = [
        ({"pre": "gpt2"}, r"'gpt2' is not implemented\. Did you mean 'gpt-2'\? Known: .*qwen2"),
        ({"model": "bert"}, "'bert' is not implemented. .*llama"),
        ({"merges": ["a b c"]}, "1 merges are not two tokens"),
        ({"merges": ["a nowhere"]}, "1 merges are not two tokens"),
        ({"add_eos_token": True}, "eos_token_id is absent"),
        ({"add_bos_token": 1}, "add_bos_token is 1, not bool"),
        ({"model": "llama"}, "scores is absent"),
    ]
    for changes, message in cases:
        file = open_gguf(
            write(tmp_path / "m.gguf", None, byte_level_keys("gpt-2", trained, **changes))
        )
        with pytest.raises((CheckpointError, TokenizerError), match=message):
            tokenizer_of(file)
    for changes in ({"bos_token_id": 400}, {"tokens": ["a"] * 400}, {"token_type": [1] * 399}):
        with pytest.raises(CheckpointError, match="400 tokens"):
            open_gguf(
                write(tmp_path / "m.gguf", None, byte_level_keys("gpt-2", trained, **changes))
            )
