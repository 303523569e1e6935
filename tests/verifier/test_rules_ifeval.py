"""IFEval: against the published checkers' recorded verdicts, and live ones where they are."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from attending.errors import ConfigError
from attending.verifier.rules import check
from attending.verifier.rules.ifeval import KINDS, accuracy, follows, variants

# Responses of our own making; verdicts of lm-eval 0.4.13 with langdetect seeded. Left out is where
# langdetect and py3langid disagree.
ROWS = [
    json.loads(row)
    for row in (Path(__file__).parent / "ifeval_oracle.jsonl").read_text("utf-8").splitlines()
]
ALL = Path(__file__).parents[3] / "shared/data/eval/ifeval_541.jsonl"
NEEDS = {"length_constraints:number_sentences": "punkt"}
LANGUAGE = {"language:response_language", "change_case:english_capital"}
NEEDS |= dict.fromkeys({*LANGUAGE, "change_case:english_lowercase"}, "py3langid")


def test_the_record_has_every_kind_and_both_verdicts() -> None:
    counts = Counter((row["instruction"], row["strict"] or row["loose"]) for row in ROWS)
    assert {name for name, _ in counts} == KINDS.keys() and len(KINDS) == 25
    assert all(counts[name, verdict] >= 8 for name in KINDS for verdict in (True, False))


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_recorded_verdict(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason="needs the extra verify")
    rows = [row for row in ROWS if row["instruction"] == name]
    for row in rows:
        strict, loose = (
            follows(row["response"], name, row["kwargs"], loose=loose) for loose in (False, True)
        )
        assert (strict, loose) == (row["strict"], row["loose"]), row


def test_the_published_checkers_still_say_so() -> None:
    utils = pytest.importorskip("lm_eval.tasks.ifeval.utils", reason="lm-eval is not installed")
    langdetect = pytest.importorskip("langdetect", reason="langdetect is not installed")
    langdetect.DetectorFactory.seed = 0
    for row in ROWS:
        told = utils.InputExample(0, [row["instruction"]], "", [dict(row["kwargs"])])
        for kind in ("strict", "loose"):
            judge = getattr(utils, f"test_instruction_following_{kind}")
            assert judge(told, row["response"]).follow_all_instructions is row[kind], row


def test_every_published_prompt_is_understood() -> None:
    if not ALL.is_file():
        pytest.skip("the published prompts are not here")
    for module in {*NEEDS.values()}:
        pytest.importorskip(module, reason="needs the extra verify")
    prompts = [json.loads(line) for line in ALL.read_text("utf-8").splitlines()]
    for prompt in prompts:
        fields = {name: prompt[name] for name in ("instruction_id_list", "kwargs")}
        for loose in (False, True):
            check({"kind": "ifeval", "loose": loose, **fields}, prompt["prompt"])
    assert len(prompts) == 541


def test_the_loose_verdict_takes_eight_variants() -> None:
    text = "Sure:\n*a*, b\nBye"
    assert variants(text) == [
        *(text, "*a*, b\nBye", "Sure:\n*a*, b", "*a*, b"),
        *("Sure:\na, b\nBye", "a, b\nBye", "Sure:\na, b", "a, b"),
    ]
    quoted = 'Here it is:\n*"quoted"*'
    assert not follows(quoted, "startend:quotation", {})
    assert follows(quoted, "startend:quotation", {}, loose=True)


def test_a_prompt_passes_with_all_its_instructions() -> None:
    names = ["punctuation:no_comma", "length_constraints:number_words"]
    own = [{"num_words": None}, {"relation": "less than", "num_words": 4}]
    spec = {"kind": "ifeval", "instruction_id_list": names, "kwargs": own}
    assert check(spec, "<think>a, b</think>one two three") == (True, "not followed: []", 1.0)
    found = check(spec, "one two, three four")
    assert (found.passed, found.score) == (False, 0.0)
    assert check(spec, "one, two").score == 0.5
    assert check(spec, "").score == 0.0
    # An empty first line is the first line: no variant is the last line alone.
    assert not check({**spec, "loose": True}, "\nfour words are here\none two").passed
    # Two of three prompts, four of five instructions.
    assert accuracy([[True, True], [False, True], [True]]) == (2 / 3, 4 / 5)


def test_sentences_are_counted_as_published() -> None:
    pytest.importorskip("punkt", reason="needs the extra verify")
    for text, count in {"Dr. Fox came. He left.": 2, "Stop!!": 2, "Stop!! Go.": 2}.items():
        for bound in (count, count + 1):
            own = {"relation": "at least", "num_sentences": bound}
            assert follows(text, "length_constraints:number_sentences", own) is (bound == count)


def test_what_differs_on_purpose() -> None:
    hashes = {"letter": "#", "let_frequency": 4, "let_relation": "at least"}
    assert follows("# ## a #", "keywords:letter_frequency", hashes)
    pytest.importorskip("py3langid", reason="needs the extra verify")
    capitals = "HELLO WORLD"  # langdetect: Somali
    assert follows(capitals, "change_case:english_capital", {})


@pytest.mark.parametrize(
    ("name", "kwargs", "told"),
    [
        ("keywords:existance", {}, "Did you mean 'keywords:existence'"),
        ("keywords:existence", {}, "lacks the argument 'keywords'"),
        ("keywords:existence", {"keyword": ["a"]}, "unknown argument 'keyword'"),
        (
            "length_constraints:number_words",
            {"relation": "atleast", "num_words": 3},
            "Did you mean 'at least'",
        ),
    ],
)
def test_what_is_unknown_or_absent_is_refused(name: str, kwargs: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        follows("text", name, kwargs)
    spec = {"kind": "ifeval", "instruction_id_list": [name], "kwargs": []}
    with pytest.raises(ConfigError, match="1 instructions and 0 kwargs"):
        check(spec, "text")
