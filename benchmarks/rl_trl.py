"""One repeat of benchmarks/rl_speed.py by TRL, in TRL's own environment: `rl_trl.py TOLD.json`.

Nothing of this project is imported. The reward is right where the answer holds the number, so that
both sides verify as cheaply. Prints a JSON line: seconds of each step, of generation in it, tokens.
"""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

told = json.loads(Path(sys.argv[1]).read_text("utf-8"))
torch.set_num_threads(told["threads"])
steps: list[dict[str, float]] = []
spent = {"generation": 0.0, "verification": 0.0, "tokens": 0.0}


def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    began = time.monotonic()
    texts = [one[0]["content"] for one in completions]
    found = [re.findall(r"-?\d+(?:\.\d+)?", text) for text in texts]
    scores = [float(bool(f) and f[-1] == a) for f, a in zip(found, answer, strict=True)]
    spent["verification"] += time.monotonic() - began
    return scores


class Timed(GRPOTrainer):
    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        found = super()._generate(*args, **kwargs)
        spent["generation"] += time.monotonic() - began
        spent["tokens"] += sum(len(ids) for ids in found[1])
        return found


class Clock(TrainerCallback):
    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.monotonic()
        for key in spent:
            spent[key] = 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        steps.append({"seconds": time.monotonic() - self.began, **spent})


rows = [json.loads(line) for line in Path(told["cases"]).read_text("utf-8").splitlines()]
data = Dataset.from_list(
    [{"prompt": row["messages"], "answer": str(row["rule"]["answer"])} for row in rows]
)
samples = told["prompts"] * told["group"]
config = GRPOConfig(
    output_dir=told["out"],
    max_steps=told["steps"],
    per_device_train_batch_size=told["micro"],
    gradient_accumulation_steps=samples // told["micro"],
    num_generations=told["group"],
    max_completion_length=told["tokens"],
    temperature=1.0,
    top_p=1.0,
    learning_rate=told["rate"],
    lr_scheduler_type="constant",
    beta=0.0,
    epsilon=0.2,
    epsilon_high=0.28,
    loss_type="dr_grpo",
    scale_rewards="none",
    bf16=False,
    use_cpu=not torch.cuda.is_available(),
    gradient_checkpointing=False,
    report_to=[],
    logging_steps=10**6,
    save_strategy="no",
    disable_tqdm=True,
    seed=told["seed"],
)
Timed(told["model"], reward, config, data, callbacks=[Clock()]).train()
sys.stdout.write("\n" + json.dumps(steps) + "\n")
