"""A recipe as verl's folder: what it says, what it refuses, and that verl's own loader takes it."""

import asyncio
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from attending.chat import Tokenizer
from attending.errors import ConfigError
from attending.rl.export_verl import export_verl
from attending.rl.loss import Objective, Tokens, policy_loss
from attending.rl.recipe import LossConfig, RewardConfig, RlConfig
from attending.rl.verl_workers import UNSCORED, Consultations, Scorer
from tests.rl.test_loop import Made, made, recipe  # noqa: F401  (a fixture)

parquet = pytest.importorskip("pyarrow.parquet")
RUBRIC = {"criterion": "Names the dose.", "points": 5, "tags": []}


def with_case(made: Made, folder: Path, **scored: Any) -> RlConfig:  # noqa: F811
    """A recipe whose one more case is scored otherwise."""
    row = {"id": "other", "messages": [{"role": "user", "content": "a"}], "kind": "k", **scored}
    text = (made[0] / "train.jsonl").read_text("utf-8") + json.dumps(row) + "\n"
    (folder / "cases.jsonl").write_text(text, "utf-8")
    return recipe(made, cases=str(folder / "cases.jsonl"), judge="embedded")


def loaded(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_hold_the_cases(made: Made, tmp_path: Path) -> None:  # noqa: F811
    out = export_verl(recipe(made), tmp_path / "out")
    rows = parquet.read_table(out / "train.parquet").to_pylist()
    assert len(rows) == 10
    first = rows[0]
    assert first["prompt"] == [{"role": "user", "content": "a"}]
    assert json.loads(first["reward_model"]["ground_truth"])["rule"]["pattern"] == "e"
    assert first["extra_info"]["case"] == "train-a" and first["agent_name"] == "single_turn_agent"
    score = loaded(out / "attending_reward.py").compute_score
    truth = first["reward_model"]["ground_truth"]
    found = [asyncio.run(score("letters", text, truth, {})) for text in ("be", "ba")]
    assert [one["score"] for one in found] == [1.0, 0.0]
    for name in ("attending_agent.py", "attending_advantage.py"):
        compile((out / name).read_text("utf-8"), name, "exec")


def test_a_judge_without_a_word_is_unscored(
    made: Made,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = with_case(made, tmp_path, rubrics=[RUBRIC])
    out = export_verl(config, tmp_path / "out")
    assert "adv_estimator: attending_group" in (out / "attending.yaml").read_text("utf-8")
    rows = parquet.read_table(out / "train.parquet").to_pylist()
    from attending.rl import verl_workers
    from attending.verifier.judge.verdict import Verdict

    class Pair:
        async def __aenter__(self) -> Any:
            return self.judge, self.judge

        async def __aexit__(self, *_: object) -> None: ...

        async def judge(self, rubric: Any, answer: str) -> list[Verdict]:
            return [Verdict(None if "?" in answer else "5" in answer, "")]

    monkeypatch.setattr(verl_workers, "judges", lambda *_: Pair())

    async def scores(texts: Sequence[str]) -> list[float]:
        scorer = Scorer(out / "recipe.json")
        truth = rows[-1]["reward_model"]["ground_truth"]
        return [
            one["score"] for one in await asyncio.gather(*(scorer(t, truth, {}) for t in texts))
        ]

    assert asyncio.run(scores(["5 mg", "none", "?"])) == [1.0, 0.0, UNSCORED]


def test_a_consultation_is_held_once_and_judged(made: Made, tmp_path: Path) -> None:  # noqa: F811
    config = with_case(made, tmp_path, messages=[], patient="appendicitis")
    config = config.replace(max_prompt=900, micro_tokens=1024)
    out = export_verl(config, tmp_path / "out")
    rows = parquet.read_table(out / "train.parquet").to_pylist()
    assert rows[-1]["agent_name"] == "attending_consultation"
    room, tokenizer = Consultations(out / "recipe.json"), Tokenizer.from_folder(made[1])
    asked = tokenizer.encode("Do you have a fever?", is_first=False)

    async def write(ids: Sequence[int]) -> Sequence[int]:
        return asked

    async def play() -> float:
        truth = rows[-1]["reward_model"]["ground_truth"]
        fragment = await room.hold(truth, 10, write, 0, is_heldout=True)
        assert fragment.said[:1] == ("Do you have a fever?",)
        return await room.judge(fragment, asked)

    assert asyncio.run(play()) == 0.0  # said before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"judge": "some/model"}, "serve it"),
        ({"reward": RewardConfig(length_threshold=0.3, count_thinking=False)}, "count_thinking"),
        ({"loss": LossConfig().model_copy(update={"advantage": "spar"})}, "a factor for each step"),
    ],
)
def test_what_verl_cannot_do_is_refused(
    made: Made,  # noqa: F811
    tmp_path: Path,
    changes: dict[str, Any],
    reason: str,
) -> None:
    config = recipe(made).model_copy(update=changes)
    with pytest.raises(ConfigError, match=reason):
        export_verl(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


LOAD = """
import json, sys
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl.utils.config import omega_conf_to_dataclass, validate_config
with initialize_config_dir(sys.argv[1], version_base=None):
    config = compose("attending")
OmegaConf.resolve(config)
validate_config(config, use_reference_policy=False, use_critic=False)
for part in (config.actor_rollout_ref.rollout, config.algorithm):
    omega_conf_to_dataclass(part)
actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
print(json.dumps([actor.loss_agg_mode, actor.loss_scale_factor, actor.clip_ratio_high,
    actor.policy_loss.loss_mode, config.actor_rollout_ref.rollout.n, config.data.train_batch_size,
    config.algorithm.norm_adv_by_std_in_grpo, config.trainer.total_training_steps]))
"""


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_verls_loader_takes_it(made: Made, tmp_path: Path, level: Any) -> None:  # noqa: F811
    pytest.importorskip("verl", reason="verl is not installed")
    config = recipe(made, loss=LossConfig(level=level, eps_high=0.31))
    out = export_verl(config, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(out)], capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr[-2000:]
    want = {"token": ["seq-mean-token-sum-norm", 8], "sequence": ["seq-mean-token-mean", None]}
    mode = {"token": "vanilla", "sequence": "gspo"}[level]
    assert json.loads(done.stdout.splitlines()[-1]) == [*want[level], 0.31, mode, 4, 4, False, 4]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_verls_loss_is_ours(level: Any) -> None:
    pytest.importorskip("verl", reason="verl is not installed")
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.workers.config import ActorConfig

    random = torch.Generator().manual_seed(0)
    shape, lengths = (4, 6), torch.tensor([6, 3, 1, 4])
    mask = (torch.arange(6) < lengths[:, None]).double()
    old, now, sampler = (-torch.rand(shape, generator=random).double() * 2 for _ in range(3))
    worth = torch.tensor([1.0, -0.5, 0.25, -0.75], dtype=torch.float64)
    at = mask.bool()
    objective = Objective(8, 6, 0.2, 0.28, level, 1.1)
    if level == "sequence":
        sampler = old  # verl has no weight of a sequence's mean
    ours = policy_loss(
        Tokens(now[at], old[at], sampler[at], worth[:, None].expand(shape)[at], at.nonzero()[:, 0]),
        objective,
    ).loss
    mode = "seq-mean-token-mean" if level == "sequence" else "seq-mean-token-sum-norm"
    config = ActorConfig(
        strategy="fsdp2",
        rollout_n=4,
        use_dynamic_bsz=True,
        clip_ratio_low=0.2,
        clip_ratio_high=0.28,
        clip_ratio_c=1e9,
        loss_agg_mode=mode,
    )
    scale = None if level == "sequence" else 6
    config.global_batch_info.update(dp_size=1, global_batch_size=8, loss_scale_factor=scale)
    loss = get_policy_loss_fn("gspo" if level == "sequence" else "vanilla")
    weights = None if level == "sequence" else (old - sampler).exp().clamp(max=1.1)
    theirs, _ = loss(old, now, worth[:, None] * mask, mask, mode, config, weights)
    assert float(theirs) == pytest.approx(float(ours), rel=1e-6)


def test_the_estimator_adds_what_grpo_lacks(made: Made, tmp_path: Path) -> None:  # noqa: F811
    pytest.importorskip("verl", reason="verl is not installed")
    config = recipe(made, reward=RewardConfig(length_threshold=0.1))
    out = export_verl(config, tmp_path / "out")
    mask = (torch.arange(4) < torch.tensor([[4], [1], [2]])).float()
    rewards = torch.zeros(3, 4)
    rewards[:, 0] = torch.tensor([0.5, 0.25, UNSCORED])
    found, _ = loaded(out / "attending_advantage.py").attending_group(
        token_level_rewards=rewards, response_mask=mask, index=["a", "a", "a"]
    )
    # the 0.2-quantile of 0.25 and 0.5 is 0.3, so 0.5 gains 4 / sqrt(4): 2.5 and 0.25, mean 1.375
    assert found[:, 0].tolist() == [1.125, -1.125, 0.0] and found[1, 1] == 0


def test_verls_agent_loop_shares_a_consultation(
    made: Made,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("verl.experimental.agent_loop.agent_loop", reason="verl is not installed")
    config = with_case(made, tmp_path, messages=[], patient="appendicitis")
    config = config.replace(max_prompt=900, micro_tokens=1024)
    out = export_verl(config, tmp_path / "out")
    monkeypatch.syspath_prepend(str(out))
    loop_of = loaded(out / "attending_agent.py").Consultation
    asked = Tokenizer.from_folder(made[1]).encode("Do you have a fever?", is_first=False)
    prompts = []

    class Server:
        async def generate(self, prompt_ids: list[int], **_: Any) -> Any:
            prompts.append(tuple(prompt_ids))
            told = {"token_ids": asked, "log_probs": [-1.0] * len(asked), "extra_fields": {}}
            return SimpleNamespace(**told)

    async def group() -> list[Any]:
        row = parquet.read_table(out / "train.parquet").to_pylist()[-1] | {"uid": "u"}
        row["extra_info"]["split"] = "heldout"  # all turns
        loops = [object.__new__(loop_of) for _ in range(3)]
        for one in loops:
            one.server_manager = Server()
            one.rollout_config = SimpleNamespace(response_length=100)
        return await asyncio.gather(*(one.run({"temperature": 1.0}, **row) for one in loops))

    found = asyncio.run(group())
    assert len({tuple(one.prompt_ids) for one in found}) == 1
    assert prompts[-3:] == [tuple(found[0].prompt_ids)] * 3
    assert [one.reward_score for one in found] == [0.0] * 3  # said before
    assert found[0].response_mask == [1] * len(asked)
    turns = (found[0].num_turns - 2) // 2
    assert turns >= 1 and len(prompts) in (turns + 3, turns + 4)  # not once for each of the three
