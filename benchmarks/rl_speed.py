"""Samples a second of the whole loop beside TRL's GRPOTrainer.

    python benchmarks/rl_speed.py WORK_DIR --trl PYTHON

PYTHON is that of an environment with trl, transformers, datasets and torch; without it TRL is left
out and the page says so. Same model, prompts, group, length, temperature and loss; the arms
alternate, several repeats. Budget, reckoned: a step takes 35 s as the product does it, 150 s at
equal arithmetic, 200 s by TRL: three repeats of three steps an hour of two cores. Writes
rl_speed.md and rl_speed.svg.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from page import HERE, Measure, write

from attending.logs import read_metrics
from attending.mesh import SHORT_SPIN
from attending.model.weights import save_model
from attending.train.start import open_start

ARMS = {"shared, 8 bits": ("w8", True), "equal arithmetic": ("float", False)}
TRL = "TRL"
NOTES = """
The whole loop: sampling, verifying, forward and backward, update, and the engine's copy of the
weights; seconds of a step are the median of a repeat's steps but the first. *Equal arithmetic*:
answers written in float32 with the weights in training, each trained on behind a prompt of its own,
as TRL does it; a group's prompt is read once while writing. *Shared, 8 bits*: as the product does
it. Doses of level 1, {prompts} prompts of {group} answers of at most {tokens} tokens, {threads}
threads. Groups whose answers all score the same are trained on by TRL and at equal arithmetic; the
product left out {flat:.0%} of the groups. Lengths differ as what is sampled does. {trl}
"""
PARTS = ("generation", "verification", "training")


def limited(threads: int) -> dict[str, str]:
    """An environment in which all parts of a run have so many threads."""
    return os.environ | SHORT_SPIN | {"OMP_NUM_THREADS": str(threads)}


def attending(threads: int, *words: object) -> None:
    command = [sys.executable, "-m", "attending.cli", *map(str, words)]
    done = subprocess.run(command, env=limited(threads))
    if done.returncode:
        raise SystemExit(done.returncode)


def as_folder(model: str, out: Path) -> Path:
    """The same float32 weights for all arms, in a form that TRL reads, too."""
    if not out.exists():
        start, weights = open_start(model), {}
        for name, shape in start.arch.tensor_shapes().items():
            weights[name] = torch.empty(shape)
            start.fill(name, weights[name])
        draft = out.with_name(out.name + ".tmp")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        save_model(draft, start.arch, weights, start.tokenizer, start.generation)
        draft.replace(out)
    return out


def ours(told: argparse.Namespace, arm: str, repeat: int) -> dict[str, float]:
    """Medians over a repeat's steps but the first."""
    weights, share = ARMS[arm]
    out = told.work / f"run-{weights}-{repeat}"
    for left in (out, out.with_name(out.name + ".tmp")):
        shutil.rmtree(left, ignore_errors=True)
    longest = told.max_prompt + told.group * told.tokens
    pairs = [f"model={told.model}", f"cases={told.work / 'train.jsonl'}", f"seed={repeat}"]
    pairs += [f"heldout={told.work / 'heldout.jsonl'}", f"steps={told.steps}"]
    pairs += [f"prompts={told.prompts}", f"group={told.group}", f"max_tokens={told.tokens}"]
    pairs += [f"max_prompt={told.max_prompt}", f"micro_tokens={max(2 * longest, 1024)}"]
    pairs += [f"sampler.weights={weights}", f"sampler.threads={told.threads}"]
    pairs += [f"share_prompts={str(share).lower()}", f"watch.every_steps={told.steps + 1}"]
    pairs += [
        "watch.heldout_cases=1",
        f"optimizer.peak={told.rate}",
        f"optimizer.final={told.rate}",
    ]
    pairs += ["state.every_tokens=1000000000"]
    attending(
        told.threads, "rl", "rules", *[w for pair in pairs for w in ("--set", pair)], "--out", out
    )
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "rl/reward" in row][1:]
    shutil.rmtree(out)
    packing, sampling, judging, training = (
        [row[f"time/{name}_seconds"] for row in rows]
        for name in ("packing", "sampling", "judging", "training")
    )
    steps = [sum(each) for each in zip(packing, sampling, judging, training, strict=True)]
    tokens = [row["rl/length_tokens"] * told.prompts * told.group for row in rows]
    generated = [a + b for a, b in zip(packing, sampling, strict=True)]
    found = rates(
        told, steps, tokens, dict(zip(PARTS, (generated, judging, training), strict=True))
    )
    return found | {"flat": statistics.mean(row["rl/zero_advantage_share"] for row in rows)}


def trl(told: argparse.Namespace, repeat: int) -> dict[str, float]:
    """The same of TRL's trainer, in its own process."""
    keys = ("prompts", "group", "tokens", "steps", "threads", "rate")
    values: dict[str, Any] = {key: getattr(told, key) for key in keys}
    values |= {"cases": str(told.work / "train.jsonl"), "seed": repeat, "micro": told.group}
    values |= {"model": str(told.model), "out": str(told.work / "trl")}
    file = told.work / "trl.json"
    file.write_text(json.dumps(values), "utf-8")
    done = subprocess.run(
        [told.trl, str(HERE / "rl_trl.py"), str(file)],
        stdout=subprocess.PIPE,
        text=True,
        env=limited(told.threads) | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    rows = json.loads(done.stdout.strip().splitlines()[-1])[1:]
    steps = [row["seconds"] for row in rows]
    parts = {name: [row[name] for row in rows] for name in PARTS[:2]}
    others = zip(steps, *parts.values(), strict=True)
    parts["training"] = [whole - first - second for whole, first, second in others]
    return rates(told, steps, [row["tokens"] for row in rows], parts)


def rates(
    told: argparse.Namespace,
    steps: Sequence[float],
    tokens: Sequence[float],
    parts: Mapping[str, Sequence[float]],
) -> dict[str, float]:
    whole = sum(steps)
    return {
        "samples a second": told.prompts * told.group / statistics.median(steps),
        "tokens sampled a second": statistics.median(
            count / seconds for count, seconds in zip(tokens, steps, strict=True)
        ),
        "tokens of an answer": sum(tokens) / len(tokens) / (told.prompts * told.group),
        **{f"{name}, share of the time": sum(parts[name]) / whole for name in PARTS},
    }


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=lambda text: Path(text).absolute())
    parser.add_argument("--trl", default="", help="python of an environment with TRL")
    parser.add_argument("--model", default="default")
    for name, value in (
        ("repeats", 3),
        ("steps", 3),
        ("prompts", 8),
        ("group", 8),
        ("tokens", 48),
        ("max_prompt", 512),
        ("threads", os.cpu_count() or 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"({value})")
    parser.add_argument("--rate", type=float, default=5e-6, help="of learning (5e-6)")
    told = parser.parse_args(words)
    told.work.mkdir(parents=True, exist_ok=True)
    told.model = as_folder(told.model, told.work / "model")
    for name, part in (("train", "train"), ("heldout", "held_out")):
        out = told.work / f"{name}.jsonl"
        if not out.exists():
            how = ("dosage", "--count", 64, "--part", part)
            attending(told.threads, "cases", *how, "--out", out)
    is_there = bool(told.trl) and not subprocess.run([told.trl, "-c", "import trl"]).returncode
    reason = "" if is_there else "TRL was not measured: --trl names no Python that has it."
    print(reason or f"TRL by {Path(told.trl).name}", flush=True)
    found: dict[str, list[dict[str, float]]] = {}
    for repeat in range(told.repeats):
        for arm in ARMS:
            found.setdefault(arm, []).append(ours(told, arm, repeat))
        if is_there:
            found.setdefault(TRL, []).append(trl(told, repeat))
    flat = statistics.mean(one["flat"] for one in found[next(iter(ARMS))])
    for arm in ARMS if is_there else ():
        pairs = zip(found[arm], found[TRL], strict=True)
        ratios = [one["samples a second"] / other["samples a second"] for one, other in pairs]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        reason += f"Samples a second, {arm} / TRL, repeat by repeat: {spread}. "
    quantities = [key for key in found[next(iter(ARMS))][0] if key != "flat"]
    measures = [
        Measure(quantity, arm, [one[quantity] for one in runs])
        for quantity in quantities
        for arm, runs in found.items()
    ]
    values = {key: getattr(told, key) for key in ("prompts", "group", "tokens", "threads")}
    notes = NOTES.format(**values, flat=flat, trl=reason)
    write("rl_speed", "Reinforcement learning: speed of the whole loop", notes, measures)


if __name__ == "__main__":
    main(sys.argv[1:])
