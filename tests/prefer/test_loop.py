import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import attending
from attending.chat import Tokenizer
from attending.errors import CheckFailed, ConfigError, TrainingError
from attending.evaluate import forgetting
from attending.evaluate.page import Change
from attending.logs import read_metrics
from attending.mesh import World
from attending.model.decoder import Decoder
from attending.prefer import method
from attending.prefer.loop import prefer
from attending.prefer.setup import open_models, prepare
from attending.train import run
from attending.train.watch import Notes, Progress
from tests.prefer.making import ask, make_model, make_pairs, recipe, write
from tests.train.making import HaltedError, halt_at
from tests.train.ranks import require_two_equal_one

CLOCKS = ("run/elapsed_seconds", "train/tokens_per_second", "train/ceiling_share")
CLOCKS += ("train/peak_memory_bytes",)
SAMPLE = {"group": 2, "max_tokens": 6, "bridge": "="}
RULE = {"kind": "regex", "pattern": "e"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return make_pairs(tmp_path / "pairs.jsonl")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """The answer is the question; an answer with an e in it is right."""
    rows = ({"prompt": ask(q), "answer": q, "rule": RULE} for q in "abcdefgh")
    return write(tmp_path / "questions.jsonl", rows)


def told(out: Path, *names: str) -> list[Any]:
    """Of every step: all but clocks, or some columns."""
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "train/loss_nats" in row]
    if names:
        return [[row[f"prefer/{name}"] for row in rows] for name in names]
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]


@pytest.mark.parametrize("name", ["dpo", "tdpo1", "tdpo2", "reward"])
def test_the_margin_grows_on_separable_pairs(
    name: str, model: Path, pairs: Path, tmp_path: Path
) -> None:
    config = recipe(model, pairs, name, steps=20)
    out = prefer(config, tmp_path / "out")
    margins, right = told(out, "margin_nats", "right_share")
    assert margins[0] == pytest.approx(0, abs=1e-5)  # nothing has been learnt
    assert margins[-1] > 0.1 and margins[-1] > max(margins[:3]) and right[-1] == 1.0
    losses = [row["train/loss_nats"] for row in told(out)]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-5) and losses[-1] < losses[0]
    sides = [told(out)[-1][f"train/{side}_loss_nats"] for side in ("chosen", "rejected")]
    assert sides[0] < sides[1] or name == "reward"


def test_what_comes_out_is_a_model_folder(model: Path, pairs: Path, tmp_path: Path) -> None:
    out = prefer(recipe(model, pairs, "dpo", steps=2), tmp_path / "out")
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "run.json", "README.md"} <= names
    assert "state" not in names and "score.json" not in names
    record = json.loads((out / "run.json").read_text("utf-8"))
    assert record["verb"] == "prefer" and len(record["parents"]) == 2
    assert record["metrics"]["prefer/right_share"] >= 0
    assert attending.load(out, device="cpu", dtype="float32").chat(ask("a"), max_tokens=2)


def test_elo_raises_the_likelihood_of_the_true_answers(
    model: Path, questions: Path, tmp_path: Path
) -> None:
    sample = {**SAMPLE, "group": 4, "direct_term": True}
    batch = {"units": 8, "max_tokens": 40, "micro_tokens": 640}
    config = recipe(model, questions, "elo", steps=20, sample=sample, batch=batch)
    out = prefer(config, tmp_path / "out")
    losses = [row["train/loss_nats"] for row in told(out)]
    assert losses[-1] < 0.8 * losses[0]
    assert told(out, "thought_tokens")[0][0] <= 6


def test_ppo_raises_the_reward(model: Path, questions: Path, tmp_path: Path) -> None:
    config = recipe(
        model,
        questions,
        "ppo",
        steps=40,
        sample={**SAMPLE, "group": 8},
        batch={"units": 8, "max_tokens": 20, "micro_tokens": 640},
        ppo={"penalty": 0.0},
        optimizer={"peak": 1e-2, "final": 1e-2, "warmup_tokens": 0, "skip_window": 0},
    )
    out = prefer(config, tmp_path / "out")
    rows = told(out)
    rewards = [row["prefer/reward"] for row in rows if "prefer/reward" in row]
    assert len(rows) == 40 and len(rewards) == 20
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert not any("score" in name for name in load_file(out / "model.safetensors"))


def test_ppo_with_a_trained_reward_model(
    model: Path, pairs: Path, questions: Path, tmp_path: Path
) -> None:
    judge = prefer(recipe(model, pairs, "reward", steps=12), tmp_path / "judge")
    assert len(json.loads((judge / "score.json").read_text("utf-8"))["weight"]) == 32
    ppo = {"reward_model": str(judge)}
    config = recipe(model, questions, "ppo", steps=4, sample=SAMPLE, ppo=ppo)
    out = prefer(config, tmp_path / "out")
    record = json.loads((out / "run.json").read_text("utf-8"))
    assert [Path(one["uri"]).name for one in record["parents"]] == [
        "model",
        "judge",
        "questions.jsonl",
    ]


@pytest.mark.parametrize("name", ["tdpo2", "elo", "reward", "ppo"])
def test_resume_is_bitwise(
    name: str, model: Path, pairs: Path, questions: Path, tmp_path: Path
) -> None:
    samples = name in ("elo", "ppo")
    changes = {"sample": SAMPLE} if samples else {}
    config = recipe(model, questions if samples else pairs, name, **changes)
    whole, out = prefer(config, tmp_path / "whole"), tmp_path / "out"
    for number, step in enumerate((4, 7)):  # within a step of ppo's, or after the update
        with pytest.raises(HaltedError):
            prefer(config, out, resume=number > 0, show=halt_at(step))
    prefer(config, out, resume=True)
    found, wanted = (load_file(path / "model.safetensors") for path in (out, whole))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert told(out) == told(whole)
    assert (out / "score.json").exists() == (name == "reward")
    if name == "reward":
        assert (out / "score.json").read_bytes() == (whole / "score.json").read_bytes()


def test_a_reward_model_with_a_head_of_its_own_goes_on_too(pairs: Path, tmp_path: Path) -> None:
    untied = make_model(tmp_path / "untied", tie_word_embeddings=False)
    config = recipe(untied, pairs, "reward")
    with pytest.raises(HaltedError):
        prefer(config, tmp_path / "out", show=halt_at(4))
    out = prefer(config, tmp_path / "out", resume=True)
    before, after = (load_file(one / "model.safetensors") for one in (untied, out))
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_half_precision_learns_too(model: Path, pairs: Path, tmp_path: Path) -> None:
    config = recipe(model, pairs, "tdpo1", steps=20, compute={"precision": "bfloat16"})
    assert told(prefer(config, tmp_path / "out"), "margin_nats")[0][-1] > 0.1


def test_what_was_forgotten_is_told_and_may_fail_the_run(
    model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Change("maths", "score", "before", "after", 0.5, 0.4, -0.1, (-0.2, -0.05), False)
    found = forgetting.Forgetting([lost], frozenset({"maths"}))
    monkeypatch.setattr(forgetting, "compare", lambda *_: found)
    monkeypatch.setattr(forgetting, "require_measured", lambda *_: None)  # there is no suite
    limits = {"data": "data", "max_forgetting": 0.1}
    with pytest.raises(CheckFailed, match=r"maths lost 20\.0%"):
        prefer(recipe(model, pairs, "dpo", forgetting=limits), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))
    assert record["metrics"]["forgetting/maths_gain"] == -0.1


def test_two_ranks_equal_one(model: Path, pairs: Path, tmp_path: Path) -> None:
    config = recipe(model, pairs, "tdpo2", compute={"precision": "float64"}, steps=3)
    require_two_equal_one("prefer", config, tmp_path, ("train/loss", "train/gradient", "prefer/"))


def test_a_stop_saves_and_says_so(model: Path, pairs: Path, tmp_path: Path) -> None:
    def interrupt(now: Progress | Notes) -> None:
        if isinstance(now, Progress) and now.step == 3:
            signal.raise_signal(signal.SIGTERM)

    config = recipe(model, pairs, "dpo")
    with pytest.raises(run.Stopped, match=r"stopped after step 3; --resume goes on"):
        prefer(config, tmp_path / "out", show=interrupt)
    prefer(config, tmp_path / "out", resume=True)
    assert told(tmp_path / "out") == told(prefer(config, tmp_path / "whole"))


def objective(model: Path, data: Path, name: str, **changes: Any) -> tuple[Decoder, Any, Any]:
    config = recipe(model, data, name, compute={"precision": "float64"}, **changes)
    state, units, found = prepare(config, open_models(config), World(0, 0, 1), torch.device("cpu"))
    return state.decoder, units, found


@pytest.mark.parametrize("name", ["dpo", "tdpo1"])
def test_a_pair_of_equal_answers_adds_no_gradient(name: str, model: Path, pairs: Path) -> None:
    decoder, units, found = objective(model, pairs, name)
    with torch.no_grad():  # away from the reference
        for weight in decoder.parameters():
            weight.add_(
                0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
            )
    drawn = units.draw(1)
    same = drawn[0]._replace(answers=(drawn[0].answers[0],) * 2)
    gradients = []
    for some in (drawn, [*drawn, same]):
        decoder.zero_grad()
        found.gradients(decoder, found.passes(decoder, some, 0))
        gradients.append([w.grad.clone() for w in decoder.parameters() if w.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0 and torch.allclose(one, other, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["tdpo2", "elo", "reward", "ppo"])
def test_one_pass_equals_many(name: str, model: Path, pairs: Path, questions: Path) -> None:
    samples = name in ("elo", "ppo")
    gradients = []
    for micro in (80, 320):
        decoder, units, found = objective(
            model,
            questions if samples else pairs,
            name,
            batch={"units": 4, "max_tokens": 40, "micro_tokens": micro},
            **({"sample": SAMPLE} if samples else {}),
        )
        passes = found.passes(decoder, units.draw(4), 0)
        assert len(passes) == 320 // micro
        _, measured = found.gradients(decoder, passes)
        gradients.append([w.grad for w in decoder.parameters() if w.grad is not None])
        assert set(measured)
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


def test_a_chain_that_ended_is_trained_to_end_and_read_on_as_the_bridge(
    model: Path, questions: Path
) -> None:
    _, units, found = objective(model, questions, "elo", sample=SAMPLE)
    of = Tokenizer.from_folder(model)
    (unit,), end = units.draw(1), of.control_id("</s>")
    chain = found._chain((unit, [70, 71, end]))
    bridge, answer = of.encode("=", is_first=False), list(unit.answers[0])
    assert chain.inputs == [*unit.prompt, 70, 71, *bridge, *answer[:-1]]
    at = len(unit.prompt) - 1
    assert chain.targets[at:] == [70, 71, end, *answer]
    assert chain.kinds[at:] == [1, 1, 1, *[2] * len(answer)] and not any(chain.kinds[:at])
    cut = found._chain((unit, [70, 71]))
    assert cut.targets[at:] == [70, 71, *bridge, *answer]
    assert cut.kinds[at:] == [1, 1, 0, *[2] * len(answer)]


def test_what_is_sampled_has_the_probabilities_of_the_loss(model: Path, questions: Path) -> None:
    """PPO's ratio is 1 on the first update: nothing lies between sampling and training."""
    decoder, units, found = objective(model, questions, "ppo", sample=SAMPLE)
    drawn = [one._replace(rule={**RULE, "pattern": ""}) for one in units.draw(4)]  # all are right
    passes = found.passes(decoder, drawn, 0)
    _, measured = found.gradients(decoder, passes)
    assert measured["prefer/clipped_share"] == 0
    assert decoder.get_parameter(method.SCORE).grad.abs().max() > 0  # the critic learns as well
    same, later = (found.passes(decoder, drawn, step)[0].targets.tolist() for step in (0, 1))
    assert passes[0].targets.tolist() == same != later


def test_the_penalty_is_what_the_policy_has_left_the_reference_by(
    model: Path, questions: Path, tmp_path: Path
) -> None:
    """Undiscounted and without a critic, the first token's return is all that comes behind it."""
    other = str(make_model(tmp_path / "other", initializer_range=0.2))
    told = {"penalty": 0.5, "lam": 1.0}
    decoder, units, found = objective(
        model, questions, "ppo", sample=SAMPLE, ppo=told, reference=other
    )
    batch = found.passes(decoder, units.draw(1), 0)[0]
    reference = attending.load(other, dtype="float32")
    policy = attending.load(model, dtype="float32")
    at = place = 0
    for length in batch.lengths:
        own = slice(at, at + length)
        ids, targets = batch.ids[own], batch.targets[own]
        counts = batch.weights[own] > 0
        logs = [
            one.logits(ids[None])[0].log_softmax(-1)[torch.arange(length), targets][counts]
            for one in (policy, reference)
        ]
        score = float("e" in found.tokenizer.decode(targets[counts].tolist()))
        wanted = score - 0.5 * float((logs[0] - logs[1]).sum())
        assert float(batch.sampled.returns[place]) == pytest.approx(wanted, abs=1e-3)
        at, place = at + length, place + int(counts.sum())


def test_a_reward_model_reads_the_answers_last_id(model: Path, pairs: Path) -> None:
    decoder, units, found = objective(model, pairs, "reward")
    with torch.no_grad():
        decoder.get_parameter(method.SCORE).fill_(1.0)
    unit = units.draw(1)[0]
    cut = unit._replace(answers=tuple((*answer[:-1], 70) for answer in unit.answers))
    scores = [
        method.scored(decoder, found.passes(decoder, [one], 0)[0]).tolist() for one in (unit, cut)
    ]
    assert all(abs(one - other) > 1e-6 for one, other in zip(*scores, strict=True))


# What goes wrong


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dpo", {"ppo": {"clip": 0.1}}, "ppo has no effect with method = dpo"),
        ("elo", {"pairs": {"beta": 0.2}}, "pairs has no effect"),
        ("reward", {"reference": "default"}, "reference has no effect"),
        ("dpo", {"compute": {"compile": True}}, "compute.compile"),
        ("elo", {"compute": {"precision": "bfloat16"}}, "elo needs whole weights"),
        ("ppo", {"steps": 7}, r"multiple of ppo.updates \(2\)"),
        ("dpo", {"method": "dqo"}, "method"),
        (
            "dpo",
            {"batch": {"units": 4, "max_tokens": 40, "micro_tokens": 79}},
            "hold a whole unit: at least 80",
        ),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(Path("model"), Path("data"), name, **changes)


def test_samples_longer_than_the_context_are_refused(
    model: Path, pairs: Path, tmp_path: Path
) -> None:
    batch = {"units": 4, "max_tokens": 129, "micro_tokens": 258}
    with pytest.raises(ConfigError, match=r"max_tokens=129.*the 128 tokens of"):
        prefer(recipe(model, pairs, "dpo", batch=batch), tmp_path / "out")


def test_a_reference_of_another_vocabulary_is_refused(
    model: Path, pairs: Path, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", vocab_size=400)
    with pytest.raises(ConfigError, match=r"the reference .* has another vocabulary"):
        prefer(recipe(model, pairs, "dpo", reference=str(other)), tmp_path / "out")


def test_a_reward_model_without_a_head_is_refused(
    model: Path, questions: Path, tmp_path: Path
) -> None:
    config = recipe(model, questions, "ppo", sample=SAMPLE, ppo={"reward_model": str(model)})
    with pytest.raises(attending.errors.CheckpointError, match=r"no score.json"):
        prefer(config, tmp_path / "out")


def test_missing_data_says_which_setting_names_it(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.jsonl is no file.*--set data"):
        prefer(recipe(model, tmp_path / "nowhere.jsonl", "dpo"), tmp_path / "out")


def test_a_loss_that_is_no_number_names_the_rows(
    model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        method.losses,
        "dpo",
        lambda *_: method.losses.PairLoss(*[torch.tensor(torch.nan, requires_grad=True)] * 2),
    )
    with pytest.raises(TrainingError, match=r"step 1: the loss is nan.*row \d"):
        prefer(recipe(model, pairs, "dpo"), tmp_path / "out")
