"""The loss and gradients of the same rollouts by TRL, where its definitions are ours.

TRL's `dr_grpo` without `scale_rewards` is Baichuan-M2's objective; its sequence level under `grpo`
is GSPO's. It pads a sequence for each answer; here the prompt stands once.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from attending.model.checkpoint import open_checkpoint
from attending.model.weights import load_decoder
from attending.rl.advantage import advantages
from attending.rl.batch import collate
from attending.rl.loss import Objective, answer_values, differentiated
from attending.rl.shared import Shared
from attending.rl.types import Sample
from tests.prefer.making import make_model
from tests.rl.making import rollout

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

OURS = Objective(num_samples=6, max_tokens=8)
GSPO = OURS._replace(level="sequence", eps_low=0.03, eps_high=0.04)
PROMPTS = {"a": (258, 10, 11, 12), "b": (258, 20, 21, 22, 23, 24)}
SIZES = {"a": (3, 8, 1), "b": (5, 2, 7)}
REWARDS = [1.0, 0.0, 0.3, 0.9, 0.2, 0.4]


def samples() -> list[list[Sample]]:
    """Random ids, log-probabilities of a sampler that is not the model."""
    generator = torch.Generator().manual_seed(1)
    rollouts = [
        rollout(
            PROMPTS[case],
            torch.randint(2, 258, (size,), generator=generator).tolist(),
            (-7.5 + 2 * torch.rand(size, generator=generator)).tolist(),
            case,
        )
        for case, sizes in SIZES.items()
        for size in sizes
    ]
    gains = advantages([one.case for one in rollouts], REWARDS).values.tolist()
    found = [Sample(*three) for three in zip(rollouts, REWARDS, gains, strict=True)]
    return [found[:3], found[3:]]


def trainer(model: Any, told: Objective, folder: Path, out: Path) -> Any:
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.pad_token = "</s>"
    config = trl.GRPOConfig(
        output_dir=str(out),
        beta=0.0,
        epsilon=told.eps_low,
        epsilon_high=told.eps_high,
        importance_sampling_level=told.level,
        loss_type="dr_grpo" if told.level == "token" else "grpo",
        max_completion_length=told.max_tokens,
        num_generations=3,
        per_device_train_batch_size=6,
        scale_rewards="none",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    found = trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": "x"}] * 2),
        processing_class=tokenizer,
    )
    found.model.eval()
    return found


def padded(rows: list[list[float]], left: bool = False) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    pad = [[0] * (longest - len(row)) for row in rows]
    whole = [more + row if left else row + more for row, more in zip(rows, pad, strict=True)]
    ones = [[1] * len(row) for row in rows]
    mask = [more + one if left else one + more for one, more in zip(ones, pad, strict=True)]
    return torch.tensor(whole), torch.tensor(mask)


def inputs(groups: list[list[Sample]], old: Tensor) -> dict[str, Tensor]:
    flat = [sample for group in groups for sample in group]
    sizes = [len(one.rollout.ids) for one in flat]
    prompts, prompt_mask = padded([[*one.rollout.prompt] for one in flat], left=True)
    ids, mask = padded([[*one.rollout.ids] for one in flat])
    logs, _ = padded([one.tolist() for one in old.split(sizes)])
    sampler, _ = padded([[*one.rollout.logprobs] for one in flat])
    return {
        "prompt_ids": prompts,
        "prompt_mask": prompt_mask,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor([one.advantage for one in flat]),
        "old_per_token_logps": logs,
        "importance_sampling_ratio": (logs - sampler).exp().clamp(max=2.0),
        "num_items_in_batch": mask.sum(),
    }


@pytest.mark.parametrize("told", [OURS, GSPO], ids=["token", "sequence"])
def test_the_loss_and_its_gradients_equal_trls(told: Objective, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", initializer_range=0.2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    oracle = trainer(theirs, told, folder, tmp_path / "trl")
    decoder = load_decoder(open_checkpoint(folder)).requires_grad_()

    groups = samples()
    batch = collate(groups, {"a": 0, "b": 1})
    hidden, head = decoder(batch.ids, Shared(batch.groups)), decoder.head_weight()
    logs = answer_values(hidden, head, batch).logprobs
    old = logs + 0.25 * torch.randn(len(logs), generator=torch.Generator().manual_seed(2))
    if told.level == "token":  # else TRL's weights of the sampler are a token's, ours an answer's
        oracle.use_vllm, oracle.vllm_importance_sampling_correction = True, True
    batch = replace(batch, old=old, sampler=batch.sampler if told.level == "token" else old)
    found, _ = differentiated(hidden, head, batch, told)
    found.loss.backward()
    wanted = oracle.compute_loss(oracle.model, inputs(groups, old))
    wanted.backward()

    assert 0 < float(found.is_clipped.float().mean()) < 1
    assert found.is_truncated.any() == (told.level == "token")
    assert float(found.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    named = {name: one.grad for name, one in oracle.model.named_parameters()}
    parts = [(one.grad, named[name]) for name, one in decoder.named_parameters()]
    apart = max(float((one - other).norm()) for one, other in parts)
    assert apart / float(torch.cat([one.flatten() for one, _ in parts]).norm()) < 1e-5
