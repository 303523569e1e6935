"""Reinforcement learning from end to end, on a model of a few thousand weights."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import attending
from attending.errors import CheckFailed, ConfigError, EndpointError, UsageError
from attending.logs import read_metrics
from attending.rl import loop, verify, vllm, watch
from attending.rl.estimate import estimate
from attending.rl.loop import rl
from attending.rl.recipe import RlConfig, WatchConfig
from attending.train import run
from attending.train.watch import Progress
from attending.verifier.judge.verdict import Verdict
from tests.pretrain.conftest import one_thread  # noqa: F401  (a fixture)
from tests.rl.test_vllm import Server, server  # noqa: F401  (a fixture)
from tests.train.making import CHATML, LLAMA, HaltedError, halt_at, make_model, make_tokenizer
from tests.train.ranks import require_two_equal_one

RULE = {"kind": "regex", "pattern": "e"}
Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model of noise, and cases that an answer with an e in it passes."""
    folder = tmp_path_factory.mktemp("rl")
    tokenizer = make_tokenizer(folder / "tokenizer")
    (tokenizer / "chat_template.jinja").write_text(CHATML, "utf-8")
    model = make_model(folder / "model", tokenizer, {**LLAMA, "max_position_embeddings": 128})
    for name, words in (("train", "abcdefghij"), ("heldout", "klmn")):
        rows = [
            {
                "id": f"{name}-{word}",
                "messages": [{"role": "user", "content": word}],
                "kind": "letters",
                "rule": RULE,
            }
            for word in words
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return folder, model


def recipe(made: Made, **changes: Any) -> RlConfig:
    values: dict[str, Any] = {
        "model": str(made[1]),
        "cases": str(made[0] / "train.jsonl"),
        "heldout": str(made[0] / "heldout.jsonl"),
        "steps": 4,
        "prompts": 4,
        "group": 4,
        "max_tokens": 8,
        "max_prompt": 32,
        "micro_tokens": 128,
        "sampler": {"weights": "float"},
        "optimizer": {"peak": 1e-2, "final": 1e-2, "warmup_tokens": 0, "skip_window": 0},
        "state": {"every_tokens": 20},
        "watch": {"every_steps": 2, "heldout_answers": 8},
    }
    return RlConfig.build({**values, **changes})


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "metrics.jsonl") if "rl/reward" in row]


@pytest.mark.parametrize("weights", ["float", "w8"])
def test_what_is_rewarded_is_written_more_often(made: Made, tmp_path: Path, weights: str) -> None:
    notes: list[str] = []
    config = recipe(made, steps=30, sampler={"weights": weights, "threads": 1})
    out = rl(config, tmp_path / "out", note=notes.append)
    told = rows(out)
    assert len(told) == 30
    first, last = (sum(row["rl/reward"] for row in part) / 5 for part in (told[:5], told[-5:]))
    assert first < 0.5 and last > first + 0.3
    held = [
        row["heldout/score"]
        for row in read_metrics(out / "metrics.jsonl")
        if "heldout/score" in row
    ]
    assert held[-1] > held[0] + 0.3
    limit = 1e-9 if weights == "float" else 1e-3
    assert all(row["rl/mismatch_kl_nats"] < limit for row in told if "rl/mismatch_kl_nats" in row)
    assert {"time/sampling_seconds", "time/training_seconds", "rl/zero_advantage_share"} <= {
        *told[0]
    }
    assert attending.load(out).arch.family == "llama"
    page = (out / "rollouts.html").read_text("utf-8")
    assert "Step 30" in page and "train-" in page and "<script" not in page
    assert not (out / "packed").exists() and any("10 cases" in line for line in notes)


@pytest.mark.parametrize("weights", ["float", "w8"])
@pytest.mark.parametrize("step", [1, 3])
def test_resume_is_bitwise_and_samples_the_same(
    made: Made, tmp_path: Path, weights: str, step: int
) -> None:
    config = recipe(made, sampler={"weights": weights, "threads": 1})
    whole = rl(config, tmp_path / "whole")
    with pytest.raises(HaltedError):
        rl(config, tmp_path / "cut", show=halt_at(step))
    cut = rl(config, tmp_path / "cut", resume=True)
    one, other = (load_file(out / "model.safetensors") for out in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / "rollouts.jsonl").read_bytes() == (cut / "rollouts.jsonl").read_bytes()
    clocks = ("run/", "time/", "train/tokens_per_second", "train/ceiling", "train/peak")

    def told(out: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows(out)]

    assert told(whole) == told(cut)


def test_two_ranks_equal_one(made: Made, tmp_path: Path) -> None:
    own = {"weights": "w8", "threads": 1}
    config = recipe(made, steps=3, compute={"precision": "float64"}, sampler=own)
    names = ("train/loss", "train/gradient", "rl/", "heldout/")
    require_two_equal_one("rl", config, tmp_path, names)


def test_an_answer_each_with_its_own_prompt_teaches_the_same(made: Made, tmp_path: Path) -> None:
    how: dict[str, Any] = {"steps": 2, "compute": {"precision": "float64"}}
    outs = [
        rl(recipe(made, share_prompts=share, **how), tmp_path / str(share))
        for share in (True, False)
    ]
    one, other = (load_file(out / "model.safetensors") for out in outs)
    assert all(torch.allclose(one[key], other[key], rtol=1e-6, atol=1e-7) for key in one)


def test_groups_that_agree_teach_nothing_and_are_counted(made: Made, tmp_path: Path) -> None:
    cases = tmp_path / "cases.jsonl"
    lines = (made[0] / "train.jsonl").read_text("utf-8").splitlines()
    told = [json.loads(line) | {"rule": {"kind": "regex", "pattern": "(?s).*"}} for line in lines]
    cases.write_text("".join(json.dumps(row) + "\n" for row in told), "utf-8")
    told_of: list[Any] = []
    out = rl(recipe(made, cases=str(cases)), tmp_path / "out", show=told_of.append)
    assert all(row["rl/zero_advantage_share"] == 1 for row in rows(out))
    left = [one.seconds_left for one in told_of if isinstance(one, Progress)]
    assert len(left) == 4 and left[0] > left[-1] == 0
    one, other = (load_file(path / "model.safetensors") for path in (made[1], out))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_several_updates_on_one_draw(made: Made, tmp_path: Path) -> None:
    out = rl(recipe(made, updates=2), tmp_path / "out")
    told = rows(out)
    assert len(told) == 4 and told[0]["rl/reward"] == told[1]["rl/reward"]
    assert told[0]["rl/clip_share"] == 0 and told[0]["rl/reward"] != told[2]["rl/reward"]
    assert told[1]["rl/clip_share"] > 0  # the second update's ratios are to before the first


def test_what_does_not_fit_is_refused(made: Made, tmp_path: Path) -> None:
    for changes, words in (
        ({"max_prompt": 4}, "no case is left of 4: 4 long"),
        ({"prompts": 11}, "prompts=11 of a step, and there are 10"),
        ({"heldout": str(made[0] / "train.jsonl")}, "share cases"),
        ({"cases": str(tmp_path / "none")}, "none is no file"),
        ({"max_prompt": 125, "micro_tokens": 256}, "more than the 128 tokens"),
    ):
        with pytest.raises(ConfigError, match=words):
            rl(recipe(made, **changes), tmp_path / "out")
    with pytest.raises(ConfigError, match="micro_tokens must hold a whole group"):
        recipe(made, micro_tokens=32)
    rubric = [{"criterion": "Says e.", "points": 5, "tags": []}]
    row = {"id": "x", "messages": [{"role": "user", "content": "x"}], "kind": "k"}
    (tmp_path / "r.jsonl").write_text(json.dumps(row | {"rubrics": rubric}) + "\n", "utf-8")
    with pytest.raises(UsageError, match="1 cases have rubrics, 'x' first, and no judge"):
        rl(recipe(made, cases=str(tmp_path / "r.jsonl"), prompts=1), tmp_path / "out")
    (tmp_path / "n.jsonl").write_text(
        json.dumps(row | {"rubrics": [rubric[0] | {"points": -5}]}) + "\n", "utf-8"
    )
    clipped = recipe(made, cases=str(tmp_path / "n.jsonl"), reward={"form": "clipped"})
    with pytest.raises(ConfigError, match="1 cases have rubrics without positive points, 'x' firs"):
        rl(clipped, tmp_path / "out")


def test_shortness_alone_is_not_paid(made: Made, tmp_path: Path) -> None:
    points = [{"criterion": f"States: {one}.", "points": one, "tags": []} for one in (5, -5)]
    row = {"id": "x", "messages": [{"role": "user", "content": "x"}], "kind": "k"}
    (tmp_path / "r.jsonl").write_text(json.dumps(row | {"rubrics": points}) + "\n", "utf-8")
    for told, wrong, words in (
        ({"length_threshold": 0.4}, ConfigError, "case 'x' .* no criterion is worth 0.50"),
        ({"length_threshold": 0.5}, UsageError, "no judge"),  # only because nobody judges
        ({"length_threshold": 0.4, "form": "clipped"}, UsageError, "no judge"),
    ):
        with pytest.raises(wrong, match=words):
            rl(
                recipe(made, cases=str(tmp_path / "r.jsonl"), prompts=1, reward=told),
                tmp_path / "o",
            )


def test_changed_cases_are_told_on_resume(made: Made, tmp_path: Path) -> None:
    cases = tmp_path / "cases.jsonl"
    cases.write_text((made[0] / "train.jsonl").read_text("utf-8"), "utf-8")
    config = recipe(made, cases=str(cases))
    with pytest.raises(HaltedError):
        rl(config, tmp_path / "out", show=halt_at(3))
    cases.write_text(cases.read_text("utf-8").replace('"a"', '"A"'), "utf-8")
    for accept in (False, True):
        with pytest.raises(ConfigError, match=r"sha256(.|\n)*cannot change on the way"):
            rl(config, tmp_path / "out", resume=True, accept_changes=accept)


def test_a_limit_on_forgetting_that_measures_nothing_is_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"max_forgetting=0\.02 would compare nothing"):
        rl(recipe(made, forgetting={"max_forgetting": 0.02}), tmp_path / "out")


def test_limits_stop_a_run(made: Made, tmp_path: Path) -> None:
    config = recipe(made, watch={"min_entropy": 100.0})
    with pytest.raises(CheckFailed, match="stopped at step 1: the answers have become alike"):
        rl(config, tmp_path / "out")


def test_an_alarm_says_why_a_reward_is_not_to_be_trusted() -> None:
    """Rows as the loop writes them: held-out scores before step 1 and behind every tenth."""

    def made_rows(held: tuple[float, float], lengths: tuple[int, int], cut: float) -> Any:
        found: list[dict[str, float]] = [{"step": 0, "heldout/score": held[0]}]
        for step in range(1, 21):
            size = lengths[step > 10]
            row = {"rl/reward": step / 20, "rl/length_tokens": size, "rl/cut_share": cut}
            found.append({"step": step} | row)
            if step % 10 == 0:
                found.append({"step": step, "heldout/score": held[1]})
        return found

    assert watch.alarm(made_rows((0.2, 0.3), (10, 11), 0.0), 20) == ""
    assert "held-out score falls (0.300 -> 0.200)" in watch.alarm(
        made_rows((0.3, 0.2), (10, 11), 0.0), 20
    )
    assert "with the length (10 -> 30 tokens)" in watch.alarm(
        made_rows((0.2, 0.3), (10, 30), 0.0), 20
    )
    assert "95% of the answers are cut" in watch.alarm(made_rows((0.2, 0.3), (10, 11), 0.95), 20)
    turned = [
        {**row, "rl/reward": -row.get("rl/reward", 0)} for row in made_rows((1, 0), (1, 9), 1)
    ]
    assert watch.alarm(turned, 20) == "" and watch.alarm(turned[:5], 20) == ""


def test_a_loop_whose_held_out_score_falls_says_so(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter((0.9, 0.5, 0.4))

    async def fall(*_: Any) -> dict[str, float]:
        return {"heldout/score": next(scores), "heldout/unscored_share": 0.0}

    monkeypatch.setattr(loop, "answer_heldout", fall)
    notes: list[str] = []
    watched = {"every_steps": 10, "alarm_steps": 20}
    rl(recipe(made, steps=20, watch=watched), tmp_path / "out", note=notes.append)
    told = [one for one in notes if "ALARM" in one]
    assert len(told) == 1 and "step 20" in told[0] and "(0.900 -> 0.400)" in told[0]


def test_a_state_is_saved_as_if_all_answers_were_of_full_length(made: Made, tmp_path: Path) -> None:
    config = recipe(made, steps=6, state={"every_tokens": 2 * 16 * 8})
    with pytest.raises(HaltedError):
        rl(config, tmp_path / "out", show=halt_at(4))
    newest = run.newest(tmp_path / "out.tmp")
    assert newest and newest.name == "step_000000002"


def test_held_out_cases_without_a_verdict_have_no_score(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rubric = [{"criterion": "Says e.", "points": 5, "tags": ["axis:\u8bca\u65ad"]}]
    row = {"messages": [{"role": "user", "content": "x"}], "kind": "\u95ee\u8bca"}
    for name, count in (("train", 4), ("heldout", 2)):
        rows_of = [row | {"id": f"{name} {i}", "rubrics": rubric} for i in range(count)]
        lines = "".join(json.dumps(one) + "\n" for one in rows_of)
        (tmp_path / f"{name}.jsonl").write_text(lines, "utf-8")
    says: list[Any] = []

    async def judge(rubric: Any, answer: str) -> list[Verdict]:
        return [Verdict("e" in answer, "")]

    async def silent(rubric: Any, answer: str) -> list[Verdict]:
        return says or [Verdict(None, "no word")]

    monkeypatch.setattr(verify, "answer_of", lambda text: text or "nothing")

    @asynccontextmanager
    async def judges(*_: Any) -> AsyncIterator[Any]:
        yield judge, silent

    monkeypatch.setattr(loop, "judges", judges)
    files = {
        f: str(tmp_path / f"{n}.jsonl") for f, n in (("cases", "train"), ("heldout", "heldout"))
    }
    config, notes = recipe(made, **files), list[str]()
    with pytest.raises(CheckFailed, match=r"step 0: held-out ones without a verdict are 1\.0"):
        rl(config, tmp_path / "out", note=notes.append)
    assert "step 0: held-out without a verdict" in notes
    (first,) = read_metrics(tmp_path / "out.tmp" / "metrics.jsonl")
    assert "heldout/score" not in first
    says.append(Verdict(True, ""))
    out = rl(config, tmp_path / "out", resume=True)
    names = {name for one in read_metrics(out / "metrics.jsonl") for name in one}
    own = [
        name for name in names if re.fullmatch(r"(rl/part_axis|heldout/score)_[0-9a-f]{8}", name)
    ]
    assert len(own) == 2


@pytest.mark.parametrize("error", [EndpointError, CheckFailed])
def test_a_judge_that_dies_ends_the_run_with_its_state(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    lines = (made[0] / "train.jsonl").read_text("utf-8").splitlines()
    rubric = [{"criterion": "Says e.", "points": 5, "tags": []}]
    told = [json.loads(line) | {"rubrics": rubric} for line in lines]
    cases = tmp_path / "cases.jsonl"
    rows_of = [{k: v for k, v in row.items() if k != "rule"} for row in told]
    cases.write_text("".join(json.dumps(row) + "\n" for row in rows_of), "utf-8")
    left = 40  # verdicts; then it is gone

    async def judge(rubric: Any, answer: str) -> list[Verdict]:
        nonlocal left
        left -= 1
        if left < 0:
            raise error("gone.")
        return [Verdict("e" in answer, "")]

    @asynccontextmanager
    async def judges(*_: Any) -> AsyncIterator[Any]:
        yield judge, judge

    monkeypatch.setattr(loop, "judges", judges)
    config = recipe(made, cases=str(cases))
    with pytest.raises(error, match=r"no judge to go on with: gone\. The last saved state"):
        rl(config, tmp_path / "out")
    assert run.newest(tmp_path / "out.tmp")
    left = 1000
    out = rl(config, tmp_path / "out", resume=True)
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4]


def test_a_server_that_dies_ends_the_run_with_its_state(
    made: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: Server,  # noqa: F811
) -> None:
    def dies(told: Any) -> None:
        if isinstance(told, Progress) and told.step == 2:
            server.fails = 10**6

    monkeypatch.setattr(vllm, "PAUSE_SECONDS", 0.0)
    served = {"address": server.address, "folder": str(tmp_path / "served")}
    server.varies, limits = True, {"every_steps": 2, "max_mismatch": 100.0}
    config = recipe(made, sampler=served, state={"every_tokens": 1}, watch=limits)
    with pytest.raises(EndpointError, match=r"sampling server failed \(500\).*--resume goes on"):
        rl(config, tmp_path / "out", show=dies)
    newest = run.newest(tmp_path / "out.tmp")
    assert newest and newest.name == "step_000000002"
    server.fails = 0
    out = rl(config, tmp_path / "out", resume=True)
    assert [row["step"] for row in rows(out)] == [1, 2, 3, 4]


def test_the_estimate_has_its_arithmetic(made: Made) -> None:
    told = estimate(recipe(made))
    assert told["tokens_written"] == 4 * 16 * 8 and "bench" in told["arithmetic"]
    assert WatchConfig().every_steps == 10
