"""The tokenizer inside a GGUF file, as the `tokenizer.json` that it was once made from.

Deliberate: a normaliser of the family's own tokenizer is restored although no key states it; a byte
that a byte-level vocabulary lacks vanishes, as there, and never becomes the unknown token; after an
added token SentencePiece's space prefix comes again, as in llama.cpp.
"""

import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple, TypeVar

from gguf.constants import TokenType

from attending.config import suggest
from attending.errors import CheckpointError, TokenizerError

Json = dict[str, Any]
Metadata = Mapping[str, Any]  # numbers, flags, strings, lists of strings, tuples of numbers
T = TypeVar("T")
TABLES: Json = tomllib.loads((resources.files("attending.model") / "gguf.toml").read_text("utf-8"))
KEY = "tokenizer.ggml."
ADDED = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


class Vocabulary(NamedTuple):
    """Pieces and their kinds by id; named ids (bos, eos, unk, ...); every id that ends a turn."""

    pieces: list[str]
    kinds: tuple[int, ...]
    special: dict[str, int]
    ends: list[int]


def tokenizer_json(metadata: Metadata) -> Json:
    """The contents of `tokenizer.json`; control and user-defined tokens are its added tokens.

    Raises:
        CheckpointError: A key is missing, of another type, or does not fit the others.
        TokenizerError: The kind of tokenizer or the pre-tokenizer is not known.
    """
    vocabulary, family = read_vocabulary(metadata), _family(metadata)
    pieces, kinds, _, _ = vocabulary
    parts = (_byte_level if "split" in family else _sentencepiece)(metadata, vocabulary, family)
    frame = [mark for mark in ("bos", "A", "eos") if mark in ("A", *family["adds"])]
    single = [{"Sequence" if k == "A" else "SpecialToken": {"id": k, "type_id": 0}} for k in frame]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    ids = {k: get(metadata, TABLES["special_ids"][k], int) for k in family["adds"]}
    marks = {k: {"id": k, "ids": [i], "tokens": [pieces[i]]} for k, i in ids.items()}
    added = [
        {"id": index, "content": piece, "special": kind != TokenType.USER_DEFINED}
        for index, (piece, kind) in enumerate(zip(pieces, kinds, strict=True))
        if kind in ADDED
    ]
    return {
        "version": "1.0",
        **parts,
        "model": {"type": "BPE", "vocab": {p: i for i, p in enumerate(pieces)}, **parts["model"]},
        "added_tokens": [token | TABLES["added_token"] for token in added],
        "post_processor": TABLES["frame"]
        | {"single": single, "pair": pair, "special_tokens": marks},
    }


def tokenizer_config(metadata: Metadata) -> Json:
    """The contents of `tokenizer_config.json`; `extra_eos_tokens` end a turn as EOS does."""
    pieces, _, special, ends = read_vocabulary(metadata)
    template = get(metadata, "tokenizer.chat_template", str, "")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"add_{k}_token": k in _family(metadata)["adds"] for k in ("bos", "eos")},
        **{f"{k}_token": pieces[special[k]] for k in ("bos", "eos", "unk", "pad") if k in special},
        "extra_eos_tokens": [pieces[index] for index in ends if index != special.get("eos")],
        **({"chat_template": template} if template else {}),
    }


def read_vocabulary(metadata: Metadata) -> Vocabulary:
    """The vocabulary, checked; the kind of tokenizer may be one that is not known."""
    pieces, kinds = get(metadata, KEY + "tokens", list), get(metadata, KEY + "token_type", tuple)
    special = {k: get(metadata, v, int) for k, v in TABLES["special_ids"].items() if v in metadata}
    count, distinct = len(pieces), len(set(pieces))
    if not count == distinct == len(kinds) or not all(0 <= i < count for i in special.values()):
        raise CheckpointError(
            f"{count} tokens, {distinct} of them distinct, have {len(kinds)} types and named ids "
            f"{special}; expected equal counts and ids below. Convert the model again."
        )
    known, control = TABLES["end_of_turn"]["tokens"], int(TokenType.CONTROL)
    ends = [special[name] for name in ("eos", "eot", "eom") if name in special]
    ends += [i for i, kind in enumerate(kinds) if kind == control and pieces[i] in known]
    return Vocabulary(pieces, kinds, special, list(dict.fromkeys(ends)))


def get(metadata: Metadata, key: str, kind: type[T], default: T | None = None) -> T:
    """The value of a key, of exactly this type; an error if absent, unless there is a default."""
    value = metadata.get(key, default)
    if type(value) is not kind:
        found = "absent" if value is None else f"{value!r:.60}"
        raise CheckpointError(f"GGUF key {key} is {found}, not {kind.__name__}; convert it again.")
    return value


def _family(metadata: Metadata) -> Json:
    """What `gguf.toml` knows of this kind of tokenizer, and which of BOS and EOS it adds."""
    kind = get(metadata, KEY + "model", str)
    name = get(metadata, KEY + "pre", str) if kind == "gpt2" else kind
    known = TABLES["pre_tokenizers" if kind == "gpt2" else "tokenizers"]
    if name not in known:
        raise TokenizerError(f"tokenizer {name!r} is not implemented.{suggest(name, known)}")
    usual = {"bos": known[name].get("add_bos", False), "eos": False}
    adds = [k for k, yes in usual.items() if get(metadata, f"{KEY}add_{k}_token", bool, yes)]
    return {**known[name], "adds": adds}


def _byte_level(metadata: Metadata, vocabulary: Vocabulary, family: Json) -> Json:
    """GPT-2's kind: regexes split the text, then the bytes of each part merge."""
    merges = [line.split(" ") for line in get(metadata, KEY + "merges", list)]
    known = set(vocabulary.pieces)
    if lost := [m for m in merges if len(m) != 2 or not {*m, m[0] + m[1]} <= known]:
        raise CheckpointError(f"{len(lost)} merges are not two tokens that make one: {lost[:3]}.")
    split, regex = TABLES["split"], TABLES["regex"]
    splits = [split | {"pattern": {"Regex": regex[name]}} for name in family["split"]]
    return {
        "normalizer": {"type": "NFC"} if family.get("is_nfc") else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, TABLES["byte_level"]]},
        "decoder": TABLES["byte_level"],
        "model": {"merges": merges, "ignore_merges": family.get("ignore_merges", False)},
    }


def _sentencepiece(metadata: Metadata, vocabulary: Vocabulary, family: Json) -> Json:
    """SentencePiece's BPE: of all neighbours that make a piece, those with the best score merge."""
    pieces, kinds, special, _ = vocabulary
    scores, has_bytes = get(metadata, KEY + "scores", tuple), BYTES.issubset(pieces)
    if len(scores) != len(pieces) or not (has_bytes or "unk" in special):
        raise CheckpointError(f"{len(pieces)} tokens, {len(scores)} scores, or no unknown token.")
    scored = zip(pieces, scores, kinds, strict=True)
    normal = {piece: score for piece, score, kind in scored if kind == TokenType.NORMAL}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(normal, key=normal.__getitem__, reverse=True)
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    unk = pieces[special["unk"]] if "unk" in special else None
    model = {"merges": merges, "unk_token": unk, "fuse_unk": True, "byte_fallback": has_bytes}
    has_prefix = get(metadata, KEY + "add_space_prefix", bool, True)
    return {**family["prefixed" if has_prefix else "plain"], "model": model}
