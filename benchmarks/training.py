"""Training tokens a second and peak memory beside a plain transformers step of the same shape.

python benchmarks/training.py [REPEATS]

Each arm is a process of its own: eight random rows of 512 tokens a step, float32, two threads,
AdamW over all weights. attending makes the step in two passes (batch.micro_tokens = 2048), which
gives the same update and fits the cache better. The arms alternate, so that a slow minute of the
machine meets all of them. No rows are packed, which only attending could do.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from page import Measure, write

SHAPES = {
    "10M": {"hidden_size": 320, "intermediate_size": 864, "num_hidden_layers": 6},
    "30M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8},
}
ROWS, CONTEXT, VOCABULARY = 8, 512, 8192
MICRO = 2048  # batch.micro_tokens: two passes a step, of the same result
ARMS = ("attending", "attending, compiled", "transformers")
STEPS = 4


def config(shape: str) -> dict[str, Any]:
    """A Llama with tied head."""
    values = SHAPES[shape]
    return {
        **values,
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "num_attention_heads": values["hidden_size"] // 64,
        "num_key_value_heads": values["hidden_size"] // 64,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
    }


def ours(shape: str, is_compiled: bool) -> Callable[[torch.Tensor], None]:
    """A step of attending's training."""
    from attending.mesh import world
    from attending.model.architecture import parse_config
    from attending.model.decoder import init_weight
    from attending.train.optimizer import adamw
    from attending.train.parallel import build
    from attending.train.reader import Batch
    from attending.train.recipe import ComputeConfig, OptimizerConfig
    from attending.train.step import accumulate, clip, next_token_loss

    arch = parse_config(config(shape))
    compute = ComputeConfig(compile=is_compiled)
    decoder = build(
        arch, lambda name, w: init_weight(arch, name, w), world(), torch.device("cpu"), compute
    )
    optimizer = adamw(
        decoder.named_parameters(), OptimizerConfig(peak=1e-3, final=1e-4, warmup_tokens=0)
    )

    def step(ids: torch.Tensor) -> None:
        targets, ones, kinds = ids.roll(-1), torch.ones(len(ids)), torch.zeros_like(ids)
        batches = [
            Batch(ids[at], targets[at], ones[at], [CONTEXT] * (MICRO // CONTEXT), kinds[at])
            for at in (slice(i, i + MICRO) for i in range(0, len(ids), MICRO))
        ]
        found = accumulate(decoder, batches, next_token_loss, 1, ["text"])
        clip(decoder.parameters(), 1.0, found.norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def theirs(shape: str, is_compiled: bool) -> Callable[[torch.Tensor], None]:
    """A plain step of a transformers model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = config(shape)
    family = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(family, attn_implementation="sdpa")
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    if is_compiled:
        model.compile()

    def step(ids: torch.Tensor) -> None:
        rows = ids.view(ROWS, CONTEXT)
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def arm(shape: str, name: str) -> None:
    """Print what one process measures."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    make = ours if name.startswith("attending") else theirs
    step = make(shape, name.endswith("compiled"))
    ids = torch.randint(VOCABULARY, (ROWS * CONTEXT,))
    step(ids)
    times = []
    for _ in range(STEPS):
        began = time.perf_counter()
        step(ids)
        times.append(time.perf_counter() - began)
    speed = ROWS * CONTEXT / sorted(times)[len(times) // 2]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"speed": speed, "peak": peak}))


def main(repeats: int) -> None:
    """Run all arms in turn and write the page."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(repeats):
        for shape in SHAPES:
            for name in ARMS:
                command = [sys.executable, __file__, "--arm", shape, name]
                line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                told = json.loads(line.splitlines()[-1])
                found.setdefault((shape, "tokens/s", name), []).append(told["speed"])
                found.setdefault((shape, "peak MiB", name), []).append(told["peak"])
                print(shape, name, told, flush=True)
    measures = [
        Measure(f"{shape}: {what}", name, values)
        for (shape, what, name), values in sorted(found.items(), key=lambda one: one[0][:2])
    ]
    write("training", "Training beside a plain transformers step", (__doc__ or ""), measures)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--arm"]:
        arm(*sys.argv[2:])
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 3)
