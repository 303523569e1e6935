"""Test examples in training text: by hand, in JSONL, in packed shards; and the canary."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attending.errors import ConfigError, TokenizerError, UsageError
from attending.evaluate.contamination import Contamination, Hit, against, contaminated
from attending.overlap import NgramIndex
from tests.corpus.making import build, recipe, write_jsonl, write_tokenizer

GUID = "12345678-9abc-def0-1234-56789abcdef0"
CANARY = f"madebench:{GUID}"
QUESTION = "A woman of 30 with a fever since Monday has a painful left knee; what comes next?"  # 17
WORD = st.sampled_from(["a", "b", "c", "肺", "炎"])
TEXT = st.lists(WORD, max_size=12).map(" ".join)


def test_run_and_share_are_those_of_the_example_in_one_text() -> None:
    texts = [("one", "x b c d y"), ("two", "a b c z c d e f g"), ("three", "p q r s t u v")]
    found = contaminated({"e": "A b, c d e f", "none": "m n o"}, texts, n=3)
    # 4 n-grams: `one` has bcd, `two` has abc and, apart from it, cde and def
    assert found == Contamination({"e": Hit(4, 0.75, "two")}, (), 3, 5 + 9 + 7)
    assert contaminated({"e": "A b, c d e f"}, texts[::-1], n=3).hits == found.hits
    assert contaminated({"e": "A b, c d e f"}, texts[:1], n=3).hits == {"e": Hit(3, 0.25, "one")}
    assert contaminated({"e": "abc"}, [], n=3) == Contamination({}, (), 0, 0)


def test_thirteen_words_in_common_are_enough_and_twelve_are_not() -> None:
    words = QUESTION.split()
    for shared, hits in ((12, {}), (13, {"q": Hit(13, 1 / 5, "t")})):
        texts = [("t", " ".join(["before", *words[2 : 2 + shared], "after"]))]
        assert contaminated({"q": QUESTION}, texts).hits == hits
    chinese = "患者男三十岁发热三天伴咳嗽咳痰"  # 15 characters
    assert contaminated({"q": chinese}, [("t", f"病例：{chinese[:13]}。")]).hits["q"].share == 1 / 3


def test_a_short_example_must_be_the_whole_text_and_an_empty_one_is_nothing() -> None:
    texts = [
        ("long", "well, what is asthma in a child"),
        ("same", "What is  ASTHMA?"),
        ("none", " "),
    ]
    found = contaminated({"short": "what is asthma", "empty": "?!"}, texts)
    assert found.hits == {"short": Hit(3, 1.0, "same")}


@given(st.dictionaries(st.sampled_from("uvwxyz"), TEXT, max_size=4), st.lists(TEXT, max_size=5))
def test_the_rule_is_the_one_by_which_the_corpus_removes(
    examples: dict[str, str], texts: list[str]
) -> None:
    index = NgramIndex(3)
    for name, text in examples.items():
        index.add(name, text)
    removed = {name for text in texts if text for name in index.overlap(text).ids}
    assert contaminated(examples, [("t", text) for text in texts], n=3).hits.keys() == removed


def test_every_text_of_every_row_is_read_and_a_damaged_row_stops_it(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": "one\u2028line"}, {"turns": [{"content": QUESTION}], "n": 3}]
    write_jsonl(tmp_path / "in" / "b.jsonl.gz", rows)
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"answer": CANARY.upper()}])
    write_jsonl(tmp_path / "in" / "notes.md", ["# " + QUESTION])
    told: list[tuple[int, int | None, str]] = []
    found = contaminated(
        {"q": QUESTION},
        against([tmp_path / "in"]),
        [CANARY],
        progress=lambda *one: told.append(one),
    )
    assert found.hits == {"q": Hit(17, 1.0, "b.jsonl.gz:2")} and found.canary == ("a.jsonl:1",)
    assert found.documents == 3 and told[-1] == (3, None, "training texts")
    write_jsonl(tmp_path / "in" / "a.jsonl", ['{"text": "cut'])
    with pytest.raises(ConfigError, match=r"a\.jsonl:1 is no JSON object"):
        contaminated({"q": QUESTION}, against([tmp_path / "in"]))


def test_packed_shards_are_read_as_text_whatever_the_tokens_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"Note {i}: filler about the weather, number {i} of many." for i in range(300)]
    texts[7] += f" {QUESTION} The end."
    texts[9] += f" Its canary GUID is {GUID}."
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "notes.jsonl", [{"text": text} for text in texts])
    near = {"duplicates": {"bands": 1, "rows": 8, "ngram": 5}}
    corpus = build(recipe(tmp_path / "in", **near), tmp_path / "corpus").out
    tokenizer = str(tmp_path / "in" / "tokenizer")
    found = contaminated({"q": QUESTION}, against([corpus], tokenizer), [CANARY])
    name = found.hits["q"].document
    assert found.hits["q"][:2] == (17, 1.0) and name.startswith("corpus:") and "(notes)" in name
    assert len(found.canary) == 1 and found.canary != (name,)
    index = json.loads((corpus / "train" / "index.json").read_text())
    assert found.documents == sum(one["documents"] for one in index["shards"]) > 256
    assert next(against([corpus / "train"], tokenizer))[0] == "train:0 (notes)"
    monkeypatch.chdir(tmp_path / "in")  # where the name in run.json leads to it
    assert next(against([corpus]))[0] == "corpus:0 (notes)"


def test_what_cannot_be_read_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "none.jsonl", write_tokenizer(tmp_path / "t")):
        with pytest.raises(UsageError, match=r"no training text in .* give a corpus or"):
            against([path])
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "notes.jsonl", [{"text": QUESTION * 9}])
    corpus = build(recipe(tmp_path / "in"), tmp_path / "corpus").out
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "t" / "tokenizer.json").rename(other / "tokenizer.json")
    definition = json.loads((other / "tokenizer.json").read_text())
    definition["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(
        UsageError, match=r"corpus/train' has another tokenizer, [0-9a-f]{12}, than"
    ):
        against([corpus], str(other))
    with pytest.raises(TokenizerError):
        against([corpus], str(tmp_path / "empty"))
    with pytest.raises(UsageError, match=r"must be named\. 'tokenizer' does not exist"):
        against([corpus])
    (corpus / "run.json").unlink()
    with pytest.raises(UsageError, match=r"must be named\. '' does not exist"):
        against([corpus])
