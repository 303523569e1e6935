"""From prompts to a draft folder, on a model of a few thousand weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import attending
from attending.artifact import alone, digest
from attending.corpus.split import is_held_out
from attending.draft import data
from attending.draft.estimate import estimate
from attending.draft.loop import draft
from attending.draft.recipe import DraftConfig
from attending.engine.native.build import status
from attending.errors import CheckpointError, ConfigError, UsageError
from attending.logs import read_metrics
from attending.model.eagle import load_eagle
from attending.sft.loop import sft
from attending.sft.recipe import SftConfig
from attending.shards import Shards
from attending.train.start import open_start
from tests.train.making import CHATML, LLAMA, M1, HaltedError, halt_at, make_model, make_tokenizer

QUESTIONS = 120
WORDS = [
    "aspirin",
    "fever",
    "dose",
    "cough",
    "ibuprofen",
    "pulse",
    "rash",
    "insulin",
    "clot",
    "eye",
]
Made = tuple[Path, Path]


def make(folder: Path, model: dict[str, Any]) -> Path:
    tokenizer = make_tokenizer(folder / "tokenizer")
    (tokenizer / "chat_template.jinja").write_text(CHATML, "utf-8")
    return make_model(folder / "model", tokenizer, {**model, "max_position_embeddings": 128})


def certain(model: Path) -> None:
    """Make it sure of what it says, mostly by the last token: a rule that can be learnt soon."""
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 8
    for name in weights:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weights[name] *= 0.3
    save_file(weights, model / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A folder of prompts and a model; its engine writes the answers once, in `answers/`."""
    folder = tmp_path_factory.mktemp("made")
    model = make(folder, {**LLAMA, "num_hidden_layers": 4, "initializer_range": 0.3})
    certain(model)
    rows = [{"q": f"{w} {v}?", "n": n} for n, (w, v) in enumerate(zip(WORDS, WORDS, strict=True))]
    rows += [{"q": f"{WORDS[n % 10]} {n}"} for n in range(QUESTIONS - len(rows))]
    rows.append({"other": "has no question"})
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "questions.jsonl").write_text("".join(lines), "utf-8")
    return folder, model


def recipe(made: Made, **changes: Any) -> DraftConfig:
    values: dict[str, Any] = {
        "model": str(made[1]),
        "root": str(made[0]),
        "prompts": {"questions": {"path": "questions.jsonl", "prompt": "{q}"}},
        "writing": {"max_tokens": 12, "engine": {"dtype": "float32", "context": 128}},
        "dialogues": str(made[0] / "answers"),
        "head": {"vocabulary": 150, "dtype": "float32"},
        "unroll": 3,
        "epochs": 1.0,
        "context": 96,
        "batch": {"tokens": 384, "micro_tokens": 192},
        "optimizer": {"peak": 1e-2, "final": 1e-3, "warmup_tokens": 384, "skip_window": 0},
        "state": {"every_tokens": 768},
        "heldout": {"every_tokens": 1500, "max_tokens": 200},
    }
    return DraftConfig.build({**values, **changes})


def test_the_target_writes_and_the_draft_learns_to_foresee(made: Made, tmp_path: Path) -> None:
    notes: list[str] = []
    told: list[tuple[int, int | None]] = []
    out = draft(
        recipe(made, epochs=6.0),
        tmp_path / "draft",
        note=notes.append,
        progress=lambda done, total, _: told.append((done, total)),
    )
    assert told[-1] == (QUESTIONS, QUESTIONS)
    answers = [json.loads(line) for line in (made[0] / "answers" / data.ANSWERS).open("rb")]
    start = open_start(str(made[1]))
    words = [{"role": "user", "content": "aspirin aspirin?"}]
    [asked] = [one.asked for one in data.prompts(recipe(made)) if one.messages == words]
    first = next(row for row in answers if row["asked"] == asked)
    assert first["prompt"] == start.tokenizer.render(words)
    assert 1 <= len(first["answer"]) <= 12
    stops = {row["answer"][-1] in start.tokenizer.stop_ids for row in answers}
    assert {row["finish"] for row in answers} <= {"stop", "length"} and stops
    assert "questions: " in notes[0] and "120 answers" in notes[0]
    rows = list(read_metrics(out / "metrics.jsonl"))
    key = "heldout/questions_tokens_per_round@3"
    measured = [row for row in rows if key in row]
    assert measured[0]["step"] == 0  # before the first step
    assert measured[-1][key] > measured[0][key] >= 1
    losses = [row["train/loss_nats"] for row in rows if "train/loss_nats" in row]
    assert losses[-1] < 0.8 * losses[0]
    run = json.loads((out / "run.json").read_text("utf-8"))
    assert run["verb"] == "draft" and run["metrics"][key] == measured[-1][key]
    assert run["parents"][0]["sha256"] == digest(made[1])
    eagle = load_eagle(out)
    eagle.config.require_target("model", digest(made[1]), start.arch)
    with pytest.raises(CheckpointError, match=r"was trained for model \(.*not for stranger"):
        eagle.config.require_target("stranger", "0" * 64, start.arch)
    assert eagle.config.draft_vocab == 150 and eagle.t2d[1]  # the end of an answer
    assert not (out / "data").exists() and not (out / "state").exists()
    assert "heldout/questions" in (out / "README.md").read_text("utf-8")


def test_a_draft_goes_on_from_another(made: Made, tmp_path: Path) -> None:
    """It begins where that one ended, and refuses one of another shape."""
    first = draft(recipe(made, epochs=2.0), tmp_path / "first")
    second = draft(recipe(made, begin=str(first)), tmp_path / "second")
    key = "heldout/questions_tokens_per_round@3"
    ends = [
        [r[key] for r in read_metrics(out / "metrics.jsonl") if key in r] for out in (first, second)
    ]
    assert ends[1][0] == pytest.approx(ends[0][-1])
    assert torch.equal(load_eagle(first).d2t, load_eagle(second).d2t)
    run = json.loads((second / "run.json").read_text("utf-8"))
    assert run["parents"][-1]["sha256"] == digest(first)
    with pytest.raises(ConfigError, match=r"that draft has 150 words, .* asked for are 149"):
        other = recipe(made, begin=str(first), head={"vocabulary": 149})
        draft(other, tmp_path / "third")


def test_answers_are_not_asked_for_again(made: Made, tmp_path: Path) -> None:
    """With a test before: what is missing is written, and equals what was there."""
    config, start = recipe(made), open_start(str(made[1]))
    folder = made[0] / "answers"
    if not (folder / data.ANSWERS).exists():
        data.prepare(config, start, folder, tmp_path / "first", lambda *_: None)
    copy = tmp_path / "answers"
    copy.mkdir()
    lines = sorted((folder / data.ANSWERS).read_text("utf-8").splitlines(keepends=True))
    (copy / data.ANSWERS).write_text("".join(lines[:-5]) + lines[-1][:20], "utf-8")
    (copy / data.TOLD).write_bytes((folder / data.TOLD).read_bytes())
    asked: list[int] = []
    counts = data.prepare(config, start, copy, tmp_path / "s", lambda done, *_: asked.append(done))
    assert asked == [116, 117, 118, 119, 120]
    assert sorted((copy / data.ANSWERS).read_text("utf-8").splitlines(keepends=True)) == lines
    shards = Shards(tmp_path / "s" / "train")
    learnt = sum(int(shards.trained(n).sum()) for n in range(shards.num_documents))
    assert counts["questions"]["tokens"] == learnt
    assert shards.index["target_sha256"] == start.sha256
    # Fewer prompts find theirs; of another length each is asked anew, and what was there stays.
    told = config.prompts["questions"].model_dump()
    few = recipe(made, prompts={"questions": told | {"limit": 9}})
    counts = data.prepare(few, start, copy, tmp_path / "few", lambda *_: pytest.fail())
    assert counts["questions"]["answers"] == 9
    short = recipe(made, prompts={"short": told | {"limit": 9, "max_tokens": 3}})
    asked.clear()
    data.prepare(short, start, copy, tmp_path / "short", lambda done, *_: asked.append(done))
    assert asked == [*range(1, 10)]
    assert len((copy / data.ANSWERS).read_text("utf-8").splitlines()) == len(lines) + 9
    with pytest.raises(ConfigError, match=r"answers of another model or engine:\n  engine"):
        other = recipe(made, writing={**config.writing.model_dump(), "engine": {}})
        data.prepare(other, start, copy, tmp_path / "s", lambda *_: None)
    with pytest.raises(ConfigError, match="target_sha256"):
        data.prepare(config, replace(start, sha256="0"), copy, tmp_path / "s", lambda *_: None)


def test_resume_is_bitwise(made: Made, tmp_path: Path) -> None:
    config = recipe(made, epochs=2.0)
    whole = draft(config, tmp_path / "whole")
    with pytest.raises(HaltedError):
        draft(config, tmp_path / "cut", show=halt_at(7))
    with pytest.raises(UsageError, match="holds a stopped run"):
        draft(config, tmp_path / "cut")
    cut = draft(config, tmp_path / "cut", resume=True)
    one, other = (load_file(out / "model.safetensors") for out in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    first, second = (
        [
            {k: v for k, v in row.items() if k.startswith(("train/loss", "heldout", "data"))}
            for row in read_metrics(out / "metrics.jsonl")
        ]
        for out in (whole, cut)
    )
    assert first == second


def tuned(made: Made, folder: Path) -> Path:
    """The model with adapters that were learnt, merged: what `attending sft` writes."""
    qa = [{"role": "user", "content": "{q}"}, {"role": "assistant", "content": "take {q}"}]
    told = {
        "model": str(made[1]),
        "root": str(made[0]),
        "data": {"qa": {"path": "questions.jsonl", "messages": qa}},
        "lora": {"rank": 4, "alpha": 8},
        "state": {"every_tokens": 4096},
        "heldout": {"every_tokens": 4096},
        "epochs": 1.0,
        "context": 96,
        "batch": {"tokens": 384, "micro_tokens": 192},
        "optimizer": {"peak": 1e-2, "final": 1e-3, "warmup_tokens": 384, "skip_window": 0},
    }
    return sft(SftConfig.build(told), folder / "tuned")


@pytest.mark.parametrize("kind", ["m1", "lora"])
def test_other_targets_have_drafts_that_serve(made: Made, tmp_path: Path, kind: str) -> None:
    """One with convolutions and windows, one that was tuned: learnt, and no answer is another."""
    if kind == "m1":
        model = make(tmp_path, {**M1, "num_hidden_layers": 4, "initializer_range": 0.3})
        certain(model)
    else:
        model = tuned(made, tmp_path)
    told = {"path": "questions.jsonl", "prompt": "{q}"}
    config = recipe((made[0], model), prompts={"p": told}, dialogues="", epochs=4.0)
    out = draft(config, tmp_path / "draft")
    eagle = load_eagle(out)
    assert eagle.config.layers == (1, 2, 3)
    assert eagle.config.target_sha256 == digest(model) != digest(made[1])
    rows = read_metrics(out / "metrics.jsonl")
    losses = [row["train/loss_nats"] for row in rows if "train/loss_nats" in row]
    assert losses[-1] < 0.9 * losses[0]
    answers = []
    for how in ({"draft": "none"}, {"draft": str(out), "draft_depth": 3}):
        serving = attending.load(str(model), dtype="float32", **how)
        serving.limit_context(128)
        asked = [[{"role": "user", "content": word}] for word in WORDS]
        answers.append([serving.chat(one, temperature=0.0, max_tokens=24).text for one in asked])
    assert answers[0] == answers[1]
    speculation = serving.scheduler.speculation
    assert speculation and speculation.rounds and speculation.accepted.sum()


def test_what_does_not_fit_is_refused(made: Made, tmp_path: Path) -> None:
    for changes, words in (
        ({"context": 256}, "context=256 is more than the 128 tokens"),
        ({"batch": {"tokens": 100, "micro_tokens": 96}}, "batch.tokens=100"),
        (
            {"epochs": 0.1, "context": 8, "batch": {"tokens": 8, "micro_tokens": 8}},
            "no answer is le",
        ),
        ({"head": {"vocabulary": 1}}, "vocabulary of 1"),
        ({"prompts": {"p": {"path": "none.jsonl"}}}, "no file matches"),
        ({"compute": {"precision": "bfloat16"}}, "float32 or float64"),
    ):
        with pytest.raises(ConfigError, match=words):
            draft(recipe(made, **changes), tmp_path / "draft")


def test_a_question_is_asked_once(made: Made, tmp_path: Path) -> None:
    lines = [json.dumps({"q": word}) for word in ("fever", "cough", "fever", "rash", "cough")]
    (tmp_path / "twice.jsonl").write_text("\n".join(lines), "utf-8")
    told = {"twice": {"path": "twice.jsonl", "prompt": "{q}"}}
    asked = list(data.prompts(recipe(made, root=str(tmp_path), prompts=told)))
    assert sorted(one.messages[0]["content"] for one in asked) == ["cough", "fever", "rash"]


def test_what_numbers_the_answers_cannot_change_on_the_way(made: Made, tmp_path: Path) -> None:
    with pytest.raises(HaltedError):
        draft(recipe(made), tmp_path / "out", show=halt_at(4))
    for changes in ({"context": 48}, {"head": {"vocabulary": 100, "dtype": "float32"}}):
        with pytest.raises(ConfigError, match="cannot change on the way"):
            draft(recipe(made, **changes), tmp_path / "out", resume=True, accept_changes=True)


def test_the_estimate_counts_prompts_and_weights(made: Made) -> None:
    told = estimate(recipe(made))
    assert told["prompts"] == QUESTIONS
    assert told["answer_tokens_at_most"] == QUESTIONS * 12
    # fc 32 x 96, q and o 32 x 64 + 32 x 32, k and v 16 x 64, MLP 3 x 32 x 48, head 150 x 32, norms.
    assert told["draft_parameters"] == 3072 + 3072 + 2048 + 4608 + 4800 + 4 * 32
    assert told["memory"]["fits"]


def test_words_that_are_held_out_anywhere_are_held_out(made: Made, tmp_path: Path) -> None:
    """Whatever their case and spaces, and whichever source asks them."""
    keys = {is_held_out(f"{n}"): f"{n}" for n in range(500)}
    rows = [{"q": "Fever?", "k": keys[False]}, {"q": "cough?", "k": keys[False]}]
    more = [{"q": "fever? ", "k": keys[True]}, {"q": "Cough?", "k": keys[False]}]
    for name, own in (("one", rows), ("two", more)):
        lines = [json.dumps(row) for row in own]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
    told = {"prompt": "{q}", "holdout_key": "{k}"}
    two = {name: {"path": f"{name}.jsonl", **told} for name in ("one", "two")}
    asked = list(data.prompts(recipe(made, root=str(tmp_path), prompts=two)))
    assert sorted((one.messages[0]["content"], one.is_held_out) for one in asked) == [
        ("Fever?", True),
        ("cough?", False),
    ]


def test_two_runs_do_not_share_a_folder_of_answers_at_once(made: Made, tmp_path: Path) -> None:
    (tmp_path / "answers").mkdir()
    with alone(tmp_path / "answers", "wait"), pytest.raises(UsageError, match="another process"):
        draft(recipe(made, dialogues=str(tmp_path / "answers")), tmp_path / "out")


def test_kinds_of_prompts_are_asked_in_one_shuffled_order(made: Made, tmp_path: Path) -> None:
    """So what a stopped run has is a sample of all of them."""
    told = {"path": "questions.jsonl", "prompt": "{q}"}
    two = {"first": {**told, "limit": 30}, "second": {**told, "prompt": "Say {q}", "limit": 30}}
    config = recipe(made, prompts=two, dialogues=str(tmp_path / "answers"))
    data.prepare(config, open_start(str(made[1])), tmp_path / "a", tmp_path / "s", lambda *_: None)
    of = {one.asked: one.source for one in data.prompts(config)}
    lines = (tmp_path / "a" / data.ANSWERS).read_text("utf-8").splitlines()
    early = [of[json.loads(line)["asked"]] for line in lines[:30]]
    assert 8 <= early.count("first") <= 22


@pytest.mark.skipif(status().path is None, reason="no native engine here")
def test_a_draft_of_what_the_native_engine_serves(made: Made, tmp_path: Path) -> None:
    """Its features are the runner's, kept on disk; what is written proposes what was measured."""
    folder, writing = tmp_path / "answers", {"max_tokens": 12, "engine": {"context": 128}}
    config = recipe(made, epochs=6.0, dialogues=str(folder), writing=writing, keep_features=True)
    out = draft(config, tmp_path / "draft")
    key = "heldout/questions_tokens_per_round@3"
    measured = [row[key] for row in read_metrics(out / "metrics.jsonl") if key in row]
    assert measured[-1] > measured[0]
    size = (folder / "features.bin").stat().st_size
    again = draft(config, tmp_path / "again")  # of what is kept: the same numbers
    one, other = (load_file(path / "model.safetensors") for path in (out, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (folder / "features.bin").stat().st_size == size
    # By the engine that it was made for: rounds of a held-out answer as they were counted.
    model = attending.load(str(made[1]), draft=str(out), draft_depth=3)
    model.limit_context(128)
    for one in data.prompts(config):
        if one.is_held_out:
            model.chat(one.messages, temperature=0.0, max_tokens=12)
    told = model.scheduler.speculation
    assert told and told.acceptance_length == pytest.approx(measured[-1], rel=0.1)
