"""The embedded judge: its encoder is BERT, and what it says has a reason."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertModel

from attending import sources
from attending.errors import CheckpointError, ConfigError, SourceError, UsageError
from attending.verifier.judge import embedded
from attending.verifier.judge.embedded import EmbeddedJudge, nearest, sentences
from attending.verifier.judge.encoder import Bert, embed, encode, load_bert, tokenise
from attending.verifier.judge.recipe import JudgeConfig
from attending.verifier.judge.training import start
from attending.verifier.rubric.schema import Criterion, Rubric
from tests.conftest import USER_CACHE
from tests.verifier.tiny_bert import save_tiny_bert

TEXTS = [("take the drug daily", "the drug is not safe. take a dose before meals."), ("a", "pain")]

CRITERIA = (
    "Aspirin is not safe during pregnancy.",
    "Aspirin is safe in pregnancy.",
    "Mastitis needs antibiotics.",
)


@pytest.fixture
def tiny(tmp_path: Path) -> Bert:
    save_tiny_bert(tmp_path / "bert")
    return load_bert(tmp_path / "bert")


@pytest.fixture
def folder(tiny: Bert, tmp_path: Path) -> Path:
    config = JudgeConfig.load("embedded", "judge", ["rank=2"])
    save_file(start(config, tiny), tmp_path / "judge.safetensors")
    report = {"embedded": {"macro-F1": [0.5, 0.25, 0.75]}}
    (tmp_path / "report.json").write_text(json.dumps(report), "utf-8")
    return tmp_path


def assert_equal(bert: Bert, peer: BertModel) -> None:
    ids, segments, mask = tokens = tokenise(bert, TEXTS)
    with torch.no_grad():
        wanted = peer(input_ids=ids, token_type_ids=segments, attention_mask=mask)
    found = encode(bert, tokens, {})
    assert mask.sum() < mask.numel()  # one is padded
    torch.testing.assert_close(
        found[mask.bool()], wanted.last_hidden_state[mask.bool()], atol=1e-4, rtol=0
    )


def test_the_encoder_equals_transformers(tmp_path: Path) -> None:
    peer = save_tiny_bert(tmp_path)
    assert_equal(load_bert(tmp_path), peer)


def test_the_encoder_equals_transformers_on_real_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTENDING_CACHE", str(USER_CACHE))
    try:
        path = sources.resolve("judge").path
    except SourceError:
        pytest.skip("the judge's base is not in the cache: run attending pull judge")
    bert = load_bert(path)
    assert_equal(bert, BertModel.from_pretrained(path).eval())
    texts = ["Aspirin thins the blood.", "Aspirin is a blood thinner.", "It rains."]
    first, like, other = (embed(bert, texts)[text] for text in texts)
    assert first @ like > 0.8 > 0.3 > first @ other
    told = EmbeddedJudge(bert).judge(
        [
            (criterion, "Mastitis is common. Aspirin is not safe in pregnancy. Rest helps.")
            for criterion in CRITERIA
        ]
    )
    assert [verdict.met for verdict in told] == [True, False, False]
    assert told[0].explanation.startswith("'Aspirin is not safe in pregnancy.': met with")


def test_an_adapter_adds_its_product_to_a_layer(tiny: Bert) -> None:
    name, tokens = "encoder.layer.1.intermediate.dense", tokenise(tiny, TEXTS)
    down, up = torch.randn(2, 16), torch.randn(24, 2)
    changed = tiny.weights | {f"{name}.weight": tiny.weights[f"{name}.weight"] + up @ down}  # type: ignore[operator]
    wanted = encode(tiny._replace(weights=changed), tokens, {})
    found = encode(tiny, tokens, {f"{name}.down": down, f"{name}.up": up})
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, encode(tiny, tokens, {}))


def test_an_embedding_has_length_one_and_does_not_depend_on_its_neighbours(tiny: Bert) -> None:
    texts = ["the drug is safe", "take a dose daily before meals", "pain"]
    together = embed(tiny, texts)
    for text in texts:
        torch.testing.assert_close(together[text].norm(), torch.tensor(1.0))
        torch.testing.assert_close(together[text], embed(tiny._replace(known={}), [text])[text])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_base_that_is_not_whole_is_refused(tmp_path: Path, name: str) -> None:
    save_tiny_bert(tmp_path)
    (tmp_path / name).write_text("{}", "utf-8")
    with pytest.raises(CheckpointError, match="no whole BERT"):
        load_bert(tmp_path)


def test_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_tiny_bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}), "utf-8")
    with pytest.raises(CheckpointError, match=r"intermediate.dense is not \(32, 16\)"):
        load_bert(tmp_path)


def test_a_text_is_split_at_sentences_lines_and_items() -> None:
    text = "Take it, e.g. at night. Rest!\n- Drink water - Sleep\n12.\n避免饮酒。多喝水"
    wanted = ["Take it, e.g. at night.", "Rest!", "Drink water", "Sleep", "避免饮酒。", "多喝水"]
    assert sentences(text) == wanted
    assert sentences(" \n 3. ") == []


def test_evidence_is_what_is_nearest_and_is_measured() -> None:
    criterion, parts = (
        "take 20 tablets daily",
        ["Tablets help.", "Do not take 20 tablets.", "Rest."],
    )
    vectors = {
        criterion: torch.tensor([1.0, 0.0]),
        parts[0]: torch.tensor([0.6, 0.8]),
        parts[1]: torch.tensor([0.8, 0.6]),
        parts[2]: torch.tensor([0.0, 1.0]),
    }
    found = nearest(criterion, parts, vectors)
    assert found.quote == parts[1]
    assert found.text == f"{parts[0]} {parts[1]}"  # in the answer's order
    # of take, 20, tablet and daily three are there; one side says not; 20 is not lost
    assert found.features == pytest.approx((0.8, 0.6, 1.0, 0.0)) and found.shared == 0.75
    assert nearest(criterion, parts[:1], vectors).features[-1] == 1.0


def rubric(*texts: str) -> Rubric:
    return Rubric("one", ({"role": "user", "content": "?"},), tuple(Criterion(t, 1) for t in texts))


def test_a_verdict_quotes_its_sentence_and_tells_the_probability(tiny: Bert, folder: Path) -> None:
    judge = EmbeddedJudge(tiny, folder)
    answer = "take a dose before meals. pain is not safe."
    found = asyncio.run(judge(rubric("pain is not safe.", "the heart", "dose"), answer))
    assert len(found) == 3
    assert found[0].explanation.startswith("'pain is not safe.': met with probability 0.")
    chance = float(found[0].explanation.split()[-1].rstrip("."))
    assert found[0].met == (chance >= 0.5)
    alone = [asyncio.run(judge(rubric(t), answer))[0] for t in ("pain is not safe.", "the heart")]
    assert alone == found[:2]
    assert "macro-F1 0.50 (0.25 to 0.75), not with physicians" in judge.caution
    assert "instruction" in judge.caution


def test_the_threshold_decides(tiny: Bert, folder: Path) -> None:
    weights = load_file(folder / "judge.safetensors")
    for threshold, met in ((0.0, True), (1.0, False)):
        save_file(weights | {"threshold": torch.tensor(threshold)}, folder / "judge.safetensors")
        assert EmbeddedJudge(tiny, folder).judge([("dose", "a dose.")])[0].met is met


def test_an_answer_without_sentences_meets_nothing(tiny: Bert, folder: Path) -> None:
    judge = EmbeddedJudge(tiny, folder)
    found = asyncio.run(judge(rubric("the drug", "the heart"), "  ...\n"))
    assert found == [(False, "The answer has no sentence.", False)] * 2
    mixed = judge.judge([("the drug", ""), ("the drug", "the drug is safe.")])
    assert mixed[0] == found[0] and "'the drug is safe.'" in mixed[1].explanation


def test_the_words_that_make_a_criterion_are_not_part_of_its_statement(
    tiny: Bert, folder: Path
) -> None:
    judge = EmbeddedJudge(tiny, folder)
    criteria = ("States: the drug is not safe.", "the drug is not safe.")
    [made, plain] = asyncio.run(judge(rubric(*criteria), TEXTS[0][1]))
    assert made == plain


def test_what_is_not_english_is_unscored(tiny: Bert, folder: Path) -> None:
    judge = EmbeddedJudge(tiny, folder)
    verdicts = asyncio.run(judge(rubric("指出：需要住院。"), "您需要住院。"))
    assert [verdict.met for verdict in verdicts] == [None]


def test_an_empty_criterion_is_refused(tiny: Bert, folder: Path) -> None:
    with pytest.raises(UsageError, match="without text"):
        EmbeddedJudge(tiny, folder).judge([(" ", "the drug")])
    with pytest.raises(ConfigError):
        rubric(" ")


@pytest.mark.parametrize("change", ["missing", "misshaped", "left over", "damaged"])
def test_weights_that_do_not_fit_are_refused(tiny: Bert, folder: Path, change: str) -> None:
    file = folder / "judge.safetensors"
    weights = load_file(file)
    if change == "missing":
        del weights["head.hidden"]
    elif change == "misshaped":
        weights["head.hidden"] = torch.zeros(17)
    else:
        weights["encoder.layer.2.output.dense.up"] = torch.zeros(16, 2)
    save_file(weights, file)
    if change == "damaged":
        file.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="rain it"):
        embedded.load_weights(folder, tiny)


def test_the_shipped_weights_are_small_and_what_they_say_is_reported() -> None:
    assert (embedded.SHIPPED / "judge.safetensors").stat().st_size < 3_000_000
    report = json.loads((embedded.SHIPPED / "report.json").read_text("utf-8"))
    assert report["labels"] == "constructed" and report["questions"] == 60
    value, low, high = report["embedded"]["macro-F1"]
    assert 0 < low < value < high < 1
    run = json.loads((embedded.SHIPPED / "run.json").read_text("utf-8"))
    assert run["metrics"]["judge/macro_f1"] == value


def test_importing_the_verifier_imports_no_torch() -> None:
    code = "import sys, attending.verifier, attending.verifier.judge.verdict as v; v.Judge; "
    code += "import attending.verifier.contradict; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
