"""The suite of a model before and after, asked of this machine's engine."""

import json
import sys
from pathlib import Path

import pytest

from attending.errors import UsageError
from attending.evaluate.forgetting import ForgettingConfig, check, compare, require_measured
from attending.verifier.rules import text
from tests.train.making import CHATML, LLAMA, make_model, make_tokenizer

SUITE = """
[tasks.letters]
kind = "choice"
data = "letters.jsonl"
prompt = "mmlu"
columns = { id = "id" }

[tasks.text]
kind = "text"
data = "text.jsonl"
"""


def test_a_suite_is_asked_of_both_and_kept_with_the_run(tmp_path: Path) -> None:
    tokenizer, data, told = make_tokenizer(tmp_path / "tokenizer"), tmp_path / "data", list[str]()
    (tokenizer / "chat_template.jinja").write_text(CHATML, "utf-8")
    shape = {**LLAMA, "max_position_embeddings": 256}
    before, after = (make_model(tmp_path / name, tokenizer, shape) for name in ("before", "after"))
    data.mkdir()
    questions = [
        {"id": f"{i}", "question": f"Is it {i}?", "options": [*"abc"], "answer_idx": "ABC"[i % 3]}
        for i in range(6)
    ]
    texts = [{"id": str(i), "text": f"the mill by the river, {i}"} for i in range(4)]
    for name, rows in (("letters", questions), ("text", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{name}.jsonl").write_text(lines, "utf-8")
    suite = tmp_path / "suite.toml"
    suite.write_text(SUITE, "utf-8")
    config = ForgettingConfig(suite=str(suite), data=str(data), limit=3, max_forgetting=0.01)
    found = compare(config, str(before), after, frozenset(), lambda *_: None, told.append)
    assert {one.task for one in found.changes} == {"letters", "text"}
    for model in ("before", "after"):
        asked = sorted((after / "forgetting" / model).glob("*.answers.jsonl"))
        assert [len(one.read_text("utf-8").splitlines()) for one in asked] == [3, 3]
    # Of the same weights nothing is lost, to the last bit.
    assert all(one.before == one.after and one.gain == 0 for one in found.changes)
    assert found.kept == {"letters", "text"} and any("letters" in line for line in told)
    written = json.loads((after / "forgetting.json").read_text("utf-8"))
    assert [one["task"] for one in written["changes"]] == [one.task for one in found.changes]
    check(found, config.max_forgetting)


def test_what_the_suite_needs_is_missed_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ForgettingConfig(data=str(tmp_path))
    with pytest.raises(UsageError, match=r"no data 'gsm8k_test.jsonl'.*not in --data"):
        require_measured(config, frozenset())
    sums = {"question": "1 + 1?", "answer": "#### 2"}
    asked = {"key": 1, "prompt": "Write.", "kwargs": [{"language": "de"}]}
    asked["instruction_id_list"] = ["language:response_language"]
    for name, row in (
        ("gsm8k_test", sums),
        ("ifeval_541", asked),
        ("general_openstax", {"book": "b", "module": "m", "text": "A mill."}),
    ):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    text._identifier.cache_clear()
    with pytest.raises(UsageError, match=r"needs py3langid.*'\.\[verify\]'"):
        require_measured(config, frozenset())
    monkeypatch.undo()
    require_measured(config, frozenset())
