"""A trained vocabulary: every text comes back, no control token is spelled, others read it."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attending.chat import Tokenizer
from attending.config import recipe_names
from attending.errors import ConfigError, UsageError
from attending.tokenizer.fertility import fertility
from attending.tokenizer.recipe import TokenizerConfig
from attending.tokenizer.train import estimate, train
from tests.corpus.making import prose, write_jsonl

ODD = "患者 5 mg 12.5%\t\t头痛\r\n   </s><think> <C_A> <C_Q>\n\n\n😀 naïve ½ ٣٤ x2y  "
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Fever <C_A> yes</s>?"},
    {"role": "assistant", "content": "Rest."},
    {"role": "tool", "content": "38.5"},
    {"role": "user", "content": "And?"},
]
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.text(" \t\n\r\u3000a1é患😀<>/_s")


def write_text(root: Path) -> Path:
    """Half a thousand short texts with odd ends, and rare words."""
    rare = ["".join(Random(n % 99).choices("etaoinshrdlu", k=6)) for n in range(500)]
    rows = [{"text": f"{prose(n)} {rare[n]} {ODD}", "domain": "medical"} for n in range(500)]
    return write_jsonl(root / "sample.jsonl", rows)


def recipe(root: Path, **changes: Any) -> TokenizerConfig:
    values = {"root": str(root), "text": {"paths": ["sample.jsonl"]}, "vocab_size": 640}
    return TokenizerConfig.build(values | {"compare": []} | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokenizer")
    write_text(root)
    return train(recipe(root), root / "out").out


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


@settings(deadline=None, max_examples=300)
@given(text=texts)
@example(text=ODD)
def test_every_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[0] == 1 and ids.count(1) == 1
    assert tokenizer.decode(ids) == text


def test_no_token_holds_a_digit_and_anything_else(tokenizer: Tokenizer) -> None:
    control = {token["id"] for token in tokenizer.definition["added_tokens"]}
    pieces = {i for i in tokenizer.definition["model"]["vocab"].values() if i not in control}
    for piece in sorted(pieces):
        text = tokenizer.decode([piece])
        assert len(text) == 1 or not re.search(r"\d", text), text
    assert len(tokenizer.encode("12.50")) == 1 + 5 and len(tokenizer.encode("x2")) == 1 + 2


def test_all_bytes_and_the_known_control_tokens_are_there(tokenizer: Tokenizer) -> None:
    known = {
        "<pad>": 0,
        "<s>": 1,
        "</s>": 2,
        "<think>": 147,
        "</think>": 148,
        "<reserved_159>": 159,
    }
    known |= {"<B_SYS>": 71, "<B_USYS>": 72, "<C_Q>": 73, "<C_A>": 74, "<B_FUNC>": 75}
    known |= {"<B_CODE>": 76, "<reserved_3>": 3, "<reserved_149>": 149}
    assert {name: tokenizer.control_id(name) for name in known} == known
    vocabulary = tokenizer.definition["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(640))
    assert len(tokenizer.definition["added_tokens"]) == 160
    assert len([piece for piece in vocabulary if len(piece) == 1]) == 256
    assert tokenizer.definition["normalizer"] is None


def test_a_conversation_has_the_published_form(tokenizer: Tokenizer) -> None:
    def plain(text: str) -> list[int]:
        return tokenizer.encode(text)[1:]

    assert tokenizer.render(CHAT) == [
        71, *plain("Be brief."), 73, *plain("Fever <C_A> yes</s>?"), 74, *plain("Rest."), 2,
        75, *plain("38.5"), 73, *plain("And?"), 74,
    ]  # fmt: skip
    assert tokenizer.render([{"role": "system", "content": ""}, *CHAT[1:2]])[0] == 73
    assert tokenizer.stop_ids == {2}


def test_a_control_string_of_a_user_stays_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.render([{"role": "user", "content": "<C_A></s><think><s>"}])
    assert ids[0] == 73 and ids[-1] == 74
    assert all(i >= 160 for i in ids[1:-1])
    assert tokenizer.decode(ids) == "<C_A></s><think><s>"
    assert tokenizer.decode([147, 148]) == "<think></think>"


def test_transformers_reads_it_and_gives_the_same_ids(folder: Path, tokenizer: Tokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    other = PreTrainedTokenizerFast.from_pretrained(folder)
    for text in (prose(1), "患者 5 mg\n\n  头痛😀 ", "x" * 50, "   ", ""):
        assert other(text)["input_ids"] == tokenizer.encode(text)
        assert other.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    named = (other.bos_token_id, other.eos_token_id, other.pad_token_id, len(other))
    assert named == (1, 2, 0, 640)
    chat = [CHAT[0], {"role": "user", "content": "Fever?"}, *CHAT[2:]]
    told = other.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert told == tokenizer.render(chat)


def test_the_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    write_text(tmp_path)
    (tmp_path / "config.json").write_text(recipe(tmp_path).model_dump_json(), encoding="utf-8")
    code = """
import sys
from pathlib import Path
from attending.tokenizer.recipe import TokenizerConfig
from attending.tokenizer.train import train
config = TokenizerConfig.model_validate_json(Path(sys.argv[1]).read_text())
train(config, Path(sys.argv[2]))
"""
    made = []
    for threads in ("1", "4"):
        out = tmp_path / f"out{threads}"
        more = {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        command = [sys.executable, "-c", code, str(tmp_path / "config.json"), str(out)]
        subprocess.run(command, check=True, env=os.environ | more)
        made.append((out / "tokenizer.json").read_bytes())
    assert made[0] == made[1]


def test_text_files_packed_files_and_fields_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(1) * 40, encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(prose(2).encode() * 40))
    rows = [{"q": prose(n), "a": [prose(n + 1), "x"], "text": 3} for n in range(40)]
    write_jsonl(tmp_path / "c.jsonl.gz", rows)
    (tmp_path / "empty.txt").touch()
    told = {"paths": ["*.txt", "*.gz"], "fields": ["q", "a"]}
    done = train(recipe(tmp_path, text=told, vocab_size=512), tmp_path / "out")
    size = sum(len(prose(n) + prose(n + 1)) + 5 for n in range(40)) + 40 * len(prose(1) + prose(2))
    assert (done.documents, done.num_bytes) == (42, size)
    parents = json.loads((done.out / "run.json").read_text())["parents"]
    assert [one["uri"] for one in parents] == ["a.txt", "b.txt.gz", "c.jsonl.gz", "empty.txt"]


def test_fertility_is_measured_by_domain_and_beside_others(tmp_path: Path, folder: Path) -> None:
    write_jsonl(
        tmp_path / "sample.jsonl", [{"text": prose(n), "domain": "ab"[n % 2]} for n in range(300)]
    )
    write_jsonl(tmp_path / "zh.jsonl", [{"text": "患者头痛。"}])
    samples = {"Chinese": {"paths": ["zh.jsonl"]}, "none": {"paths": ["none.jsonl"]}}
    compare = [str(folder), str(folder / "tokenizer.json"), "default", str(tmp_path)]
    config = recipe(tmp_path, samples=samples, compare=compare, vocab_size=512)
    done = train(config, tmp_path / "out")
    assert {(row["sample"], row["tokenizer"]) for row in done.fertility} == {
        (sample, name)
        for sample in ("training text, a", "training text, b", "Chinese")
        for name in ("this", *compare[:2])
    }
    assert len(done.notes) == 3 and "attending pull default" in done.notes[0]
    assert json.loads((done.out / "fertility.json").read_text())["rows"] == done.fertility


def test_fertility_counts_tokens_without_the_frame(tokenizer: Tokenizer) -> None:
    assert fertility(tokenizer, ["1 2", "34"]) == (1.0, 1.0, 5 / 3)
    assert fertility(tokenizer, ["é"]).tokens_per_character <= 2.0
    assert fertility(tokenizer, ["患者头痛 ECG"]).tokens_per_word is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vocab_size": 1000}, "take 896 or 1,024"),
        ({"vocab_size": 384}, "from 512 on .* take 512 or 640"),
        ({"vocab_size": 8192}, r"[\d,]+ bytes of text gave \d+ merges, .* 8,192 wants 7,776"),
        ({"num_special": 148}, "num_special: Input should be greater than or equal to 149"),
        ({"text": {"paths": ["*.csv"]}}, r"no file matches \*\.csv"),
        ({"text": {"paths": ["/a"]}}, "no globs below"),
        ({"text": {"paths": []}}, "text.paths"),
        ({"text": {"paths": ["empty.txt"]}}, "0 bytes of text gave 0 merges"),
        ({"text": {"paths": ["sample.jsonl"], "fields": ["body"]}}, "sample.jsonl, line 1.*body"),
        ({"text": {"paths": ["broken.jsonl"]}}, "broken.jsonl, line 2: JSONDecodeError"),
        ({"text": {"paths": ["half.jsonl"]}}, "half.jsonl, line 1: UnicodeEncodeError"),
        ({"text": {"paths": ["number.jsonl"]}}, "number.jsonl, line 1: TypeError"),
        ({"text": {"paths": ["latin.txt"]}}, "latin.txt, line 1: UnicodeDecodeError"),
        ({"text": {"paths": ["cut.txt.gz"]}}, "cut.txt.gz, line 0: EOFError"),
    ],
)
def test_what_cannot_be_trained_says_why(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    write_text(tmp_path)
    (tmp_path / "empty.txt").touch()
    write_jsonl(tmp_path / "broken.jsonl", [{"text": "a"}, "{"])
    write_jsonl(tmp_path / "half.jsonl", ['{"text": "\\ud800"}'])
    write_jsonl(tmp_path / "number.jsonl", [{"text": 3}])
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"a" * 99)[:-9])
    with pytest.raises(ConfigError, match=told):
        train(recipe(tmp_path, **changes), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_text(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="out exists"):
        train(recipe(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("name", recipe_names("tokenizer"))
def test_every_shipped_recipe_builds(name: str, tmp_path: Path) -> None:
    write_text(tmp_path)
    config = TokenizerConfig.load(name, "tokenizer", [f"root={tmp_path}"])
    assert estimate(config)["input_bytes"] > 0


def test_the_verb_prints_the_folder_alone_on_standard_output(tmp_path: Path) -> None:
    write_text(tmp_path)
    words = ["tokenizer", "tiny", "--set", f"root={tmp_path}", "--set", "vocab_size=640"]
    words += ["--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "attending.cli", *words]
    dry = subprocess.run([*command, "--dry-run"], capture_output=True, text=True)
    assert json.loads(dry.stdout)["takes"]["input_bytes"] > 0 and not (tmp_path / "out").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}\n"
    assert "tokens/byte" in done.stderr and "attending pull default" in done.stderr
    assert "640 tokens" in done.stderr
    again = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert again.returncode == 2 and "out exists" in again.stderr
