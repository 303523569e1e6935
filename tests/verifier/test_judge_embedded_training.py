"""The embedded judge's training: pairs by hand, resume bit for bit, figures with known values."""

import asyncio
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from attending import sources
from attending.cli import app
from attending.errors import CheckpointError, UsageError
from attending.evaluate.judging import JudgeSetup, open_judge
from attending.verifier.judge import pairs, training
from attending.verifier.judge.ask import JudgeOptions
from attending.verifier.judge.encoder import Bert, load_bert
from attending.verifier.judge.pairs import Pair, Supported
from attending.verifier.judge.recipe import JudgeConfig
from attending.verifier.judge.verdict import Judge
from tests.conftest import SHARED
from tests.verifier.tiny_bert import save_tiny_bert

KQA = SHARED / "data/eval/kqa_201_physician_rubric.jsonl"
MEDQUAD = SHARED / "data/train/medquad_qa.jsonl"
SAFE, UNSAFE = "the drug is safe.", "the drug is unsafe."


@pytest.fixture
def tiny(tmp_path: Path, one_thread: None) -> Bert:
    save_tiny_bert(tmp_path / "bert")
    return load_bert(tmp_path / "bert")


def config(**changes: object) -> JudgeConfig:
    values = {"rank": 4, "batch": 4, "epochs": 24, "rate": 0.05, "documents": 2, "kqa_weight": 2.0}
    return JudgeConfig.build(values | changes)


def some_pairs() -> list[Pair]:
    """Met is what speaks of these three words."""
    words = ["safe", "daily", "before", "after", "pain", "heart"]
    return [
        Pair(f"{begin} {word}", ["a dose."], word in words[:3], "plain", "q", 1.0)
        for word in words
        for begin in ("the drug is", "take a dose")
    ]


def nothing(*_: object) -> None:
    """A progress that is not shown."""


def test_the_loss_falls_and_a_resumed_run_gives_the_same_weights(
    tiny: Bert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "attending.verifier.judge.training")
    state, made = tmp_path / "state.safetensors", some_pairs()
    whole = training.fit(config(), tiny, made, nothing, state)
    losses = [float(record.message.split()[-1]) for record in caplog.records]
    assert len(losses) == 72  # 12 pairs in batches of 4, 24 times
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])
    assert not state.exists()

    class KilledError(Exception):
        """What ends the run."""

    def kill(done: int, total: int | None, what: str) -> None:
        if (done, total) == (20, 72):
            raise KilledError

    monkeypatch.setattr(training, "SAVE_SECONDS", 0)
    with pytest.raises(KilledError):
        training.fit(config(), tiny, made, kill, state)
    resumed = training.fit(config(), tiny, made, nothing, state, resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    other = training.fit(config(seed=1), tiny, made, nothing, state)
    assert not torch.equal(whole["head.hidden"], other["head.hidden"])


@pytest.mark.parametrize("reads", ["text", "measures"])
def test_a_judge_that_reads_one_thing_learns_that_alone(
    reads: str, tiny: Bert, tmp_path: Path
) -> None:
    state = tmp_path / "state.safetensors"
    weights = training.fit(config(reads=reads, epochs=2), tiny, some_pairs(), nothing, state)
    by_text = [name for name in weights if name.endswith(".up")] + ["head.hidden"]
    assert bool(weights["head.features"].any()) == (reads == "measures")
    assert any(bool(weights[name].any()) for name in by_text) == (reads == "text")


def test_a_run_may_be_judged_by_a_judge_of_ones_own(
    tiny: Bert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, (bert,) = tmp_path / "own", [path for path in tmp_path.iterdir() if path.is_dir()]
    folder.mkdir()
    save_file(training.start(config(), tiny), folder / "judge.safetensors")
    told = {"embedded": {"macro-F1": [0.5, 0.25, 0.75]}, "pairs": {"plain": 3}}
    (folder / "report.json").write_text(json.dumps(told), "utf-8")
    monkeypatch.setattr(sources, "resolve", lambda _: SimpleNamespace(path=bert))

    judge, facts = asyncio.run(opened(f"embedded:{folder}"))
    assert judge.name == "embedded" and "macro-F1 0.50 (0.25 to 0.75)" in judge.caution
    assert facts["agreement"]["value"] == 0.5
    with pytest.raises(CheckpointError, match="no judge in none"):
        asyncio.run(opened(f"embedded:{tmp_path / 'none'}"))


async def opened(source: str) -> tuple[Judge, dict[str, Any]]:
    async with open_judge(JudgeSetup(source), JudgeOptions(), []) as found:
        return found


def test_calibration_finds_the_slope_and_shift_that_made_the_labels() -> None:
    logits = np.array([-1.0, 0.5, 1.0])
    shares = 1 / (1 + np.exp(-(2 * logits + 1)))  # a label may be a share of many
    assert training.platt(logits, shares) == pytest.approx((2.0, 1.0), abs=1e-3)


def test_figures_have_their_values_by_hand() -> None:
    met, ones = np.array([1.0, 1.0, 0.0, 0.0]), np.ones(4)
    said = np.array([True, False, False, False])
    # met: P 1, R 1/2, F1 2/3; not met: P 2/3, R 1, F1 4/5
    assert training.macro_f1(said, met, ones) == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert training.macro_f1(said, met, np.array([1.0, 0, 1, 1])) == 1  # a miss without weight
    # bin 9: |0.95 - 1 + 0.95 - 0| = 0.9; bin 1: |0.15 - 0|; over three pairs
    chance = np.array([0.95, 0.95, 0.15])
    error = training.calibration_error(chance, np.array([1.0, 0, 0]), np.ones(3))
    assert error == pytest.approx((0.9 + 0.15) / 3)
    assert training.best_threshold(np.array([0.1, 0.2, 0.6, 0.9]), np.array([0.0, 0, 1, 1])) > 0.2


def test_the_bootstrap_draws_whole_questions() -> None:
    right = np.array([1.0] * 50 + [0.0] * 50)

    def share(weight: np.ndarray) -> list[float]:
        return [float((weight * right).sum() / weight.sum())]

    two = np.array([0] * 50 + [1] * 50)
    assert training.interval(share, two).tolist() == [[0.0], [1.0]]  # both alike: a coin's chance
    assert training.interval(share, np.zeros(100, int)).tolist() == [[0.5], [0.5]]
    low, high = training.interval(share, np.arange(100))[:, 0]
    assert 0.38 < low < 0.43 and 0.57 < high < 0.62  # sqrt(0.25 / 100) = 0.05, twice
    assert np.array_equal(training.interval(share, two), training.interval(share, two))


def test_pairs_of_a_case_are_as_their_kinds_say(tiny: Bert) -> None:
    statement, parts = "The drug is safe.", [SAFE, "take it before meals."]
    axes = dict(zip([statement, *parts, "the heart."], torch.eye(4), strict=True))
    vectors = axes | {statement: axes[SAFE]}
    case = Supported(statement, parts, [["the heart."]], "q", 2.0)
    made = pairs.construct(tiny._replace(known=vectors), [case], random.Random(0))
    by_kind = {kind: [p for p in made if p.kind == kind] for kind in training.KINDS}
    assert {kind: len(found) for kind, found in by_kind.items()} == {
        **dict.fromkeys(("plain", "elsewhere", "negated", "removed", "sibling"), 1),
        "contradicted": 2,
    }
    assert by_kind["plain"][0][:3] == (statement, parts, True)
    assert by_kind["removed"][0][:3] == (statement, parts[1:], False)
    assert by_kind["sibling"][0][:3] == (statement, ["the heart."], False)
    elsewhere = by_kind["elsewhere"][0]
    assert elsewhere.met and elsewhere.parts[0] == SAFE and elsewhere.parts != parts
    against, answered = by_kind["contradicted"]
    assert against.statement in ("The drug is not safe.", "The drug is unsafe.")
    assert against.parts == parts and not against.met
    assert answered.statement == statement and not answered.met
    assert answered.parts[1:] == parts[1:] and answered.parts[0] != SAFE
    negated = by_kind["negated"][0]
    assert negated.met and negated.statement == against.statement
    assert negated.parts == answered.parts
    assert all(pair.cluster == "q" and pair.weight == 2.0 for pair in made)


def test_a_statement_whose_support_is_not_plain_is_not_edited(tiny: Bert) -> None:
    vectors = {"The heart.": torch.eye(2)[0], SAFE: torch.eye(2)[1]}
    case = Supported("The heart.", [SAFE], [], "q", 1.0)
    made = pairs.construct(tiny._replace(known=vectors), [case], random.Random(0))
    assert [pair.kind for pair in made] == ["plain"]


def test_rewording_keeps_what_is_said() -> None:
    rng = random.Random(1)
    text = "However, signs (see below) include fever, cough, and pain in the chest."
    found = {pairs.reword(text, rng) for _ in range(40)}
    assert "Signs include cough" in {new.rstrip(".") for new in found}
    assert all(new.startswith("Signs") and "below" not in new for new in found)


def write(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def kqa_row(number: int) -> dict[str, object]:
    answer = f"Disease{number} is rare. Rest helps."
    lists = {"Must_have": [f"Disease{number} is rare", " "], "Nice_to_have": []}
    common = {"Question": f"What of disease{number}?", "ICD_10_diag": None}
    return {**common, "Free_form_answer": answer, **lists}


def test_the_parts_share_no_question_and_no_disease_that_is_held_out(tmp_path: Path) -> None:
    rows = pairs.read_kqa(write(tmp_path / "kqa.jsonl", *map(kqa_row, range(201))))
    cases = {part: [*pairs.kqa_cases(rows, part)] for part in pairs.PARTS}
    assert {part: len(found) for part, found in cases.items()} == {
        "train": 101,
        "tune": 40,
        "report": 60,
    }
    assert len({case.cluster for found in cases.values() for case in found}) == 201
    again = pairs.read_kqa(write(tmp_path / "kqa.jsonl", *map(kqa_row, reversed(range(201)))))
    assert again == rows
    held = rows[150]["Question"].split()[-1].rstrip("?")
    texts = "It makes the heart beat too fast in {0}. It hurts the brain of people with {0}. No."
    documents = [
        {"focus": name, "synonyms": [], "answer": texts.format(name)} for name in (held, "Gout")
    ]
    chosen = [*pairs.medquad_cases(documents, rows, 9, random.Random(0))]
    assert {case.cluster for case in chosen} == {"Gout"} and len(chosen) == 2


def test_a_file_of_other_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"kqa.jsonl is not a JSONL file whose rows have Question"):
        pairs.read_kqa(write(tmp_path / "kqa.jsonl", {"question": "?"}))
    with pytest.raises(UsageError):
        pairs.read_kqa(tmp_path / "absent.jsonl")


def test_training_publishes_weights_report_and_run(tiny: Bert, tmp_path: Path) -> None:
    kqa = write(tmp_path / "kqa.jsonl", *map(kqa_row, range(201)))
    text = "It makes the heart beat too fast in gout. It hurts the brain of the people. No."
    medquad = write(tmp_path / "m.jsonl", {"focus": "Gout", "synonyms": [], "answer": text})
    out = tmp_path / "out"
    result = training.run(config(epochs=1), tiny, (kqa, medquad), out, nothing)
    assert result["questions"] == 60 and result["pairs"]["plain"] == 60
    names = {"report.json", "run.json", "judge.safetensors"}
    assert {path.name for path in out.iterdir()} == names
    assert json.loads((out / "report.json").read_text("utf-8")) == result
    run = (out / "run.json").read_text("utf-8")
    assert str(tmp_path) not in run and '"uri": "kqa.jsonl"' in run


def test_the_command_line_shows_the_recipe() -> None:
    told = CliRunner().invoke(app, ["judge", "train", "a", "b", "--dry-run", "--set", "rank=3"])
    assert told.exit_code == 0 and json.loads(told.output)["rank"] == 3


def test_no_disease_of_a_held_out_question_is_trained_on() -> None:
    if not KQA.is_file() or not MEDQUAD.is_file():
        pytest.skip("K-QA or MedQuAD is not there")
    rows = pairs.read_kqa(KQA)
    documents = pairs.read_rows(MEDQUAD, "focus", "synonyms", "answer")
    cases = [*pairs.medquad_cases(documents, rows, 50, random.Random(0))]
    held = " ".join(json.dumps(row, ensure_ascii=False) for row in rows[101:]).lower()
    assert len(cases) == 100 and not any(case.cluster.lower() in held for case in cases)
