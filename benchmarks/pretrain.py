"""Small pretraining runs side by side: parts of Baichuan-M1's block, and mixtures of text.

python benchmarks/pretrain.py DATA_DIR WORK_DIR

makes tokenizer and corpus in WORK_DIR once, then every run that is not there yet, two at a time on
one thread each, and writes pretrain.md. A run that was stopped is gone on with.
"""

import argparse
import json
import os
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from page import HERE

RECIPES = HERE / "pretrain"
SEEDS = (0, 1, 2)
LLAMA = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
# What each run changes in m1_block.toml.
BLOCKS: dict[str, dict[str, Any]] = {
    "M1 block": {},
    "no convolution": {"model": {"conv_window": 1}},
    "full attention only": {"model": {"sliding_window_layers": []}},
    "Llama block": {"model": LLAMA},
}
MIXTURES: dict[str, dict[str, float]] = {
    "mixed": {"general": 0.5, "medical": 0.5},
    "medical only": {"medical": 1.0},
    "general only": {"general": 1.0},
}
DOMAINS = ("medical", "general")


def runs() -> list[tuple[str, int, list[str]]]:
    """Name, seed and settings of every run; a seed's runs before the next seed's."""
    found = []
    for seed in SEEDS:
        for name, change in BLOCKS.items():
            pairs = change.get("model", {}).items()
            found.append((name, seed, [f"model.{k}={json.dumps(v)}" for k, v in pairs]))
        for name, mixture in MIXTURES.items():
            if name != "mixed":  # which is the M1 block's own run
                found.append((name, seed, [f"stages={stages(mixture)}"]))
    return found


def stages(mixture: dict[str, float]) -> str:
    """The recipe's stages with another mixture, as TOML."""
    recipe = tomllib.loads((RECIPES / "m1_block.toml").read_text("utf-8"))
    shares = ",".join(f"{k}={v}" for k, v in mixture.items())
    rows = []
    for stage in recipe["stages"]:
        plain = ",".join(f"{k}={json.dumps(v)}" for k, v in stage.items() if k != "mixture")
        rows.append(f"{{{plain},mixture={{{shares}}}}}")
    return f"[{','.join(rows)}]"


def attending(*words: str, threads: int = 2) -> None:
    """Run a verb of the command line; its progress goes to WORK_DIR's log."""
    command = [sys.executable, "-m", "attending.cli", *words]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words[:2])}: {done.stderr[-2000:]}")


def prepare(data: Path, work: Path) -> tuple[Path, Path]:
    """Tokenizer and corpus; the tokenizer is trained on a sample of the same training text."""
    recipe, first = str(RECIPES / "corpus.toml"), work / "corpus_for_tokenizer"
    tokenizer, corpus = work / "tokenizer", work / "corpus"
    if not tokenizer.exists():
        root, share = f"root={data}", "pack.sample_share=0.5"
        attending("corpus", recipe, "--set", root, "--set", share, "--out", str(first))
        attending("tokenizer", "tiny", "--set", f"root={first}", "--out", str(tokenizer))
    if not corpus.exists():
        own = f"pack.tokenizer={tokenizer}"
        attending("corpus", recipe, "--set", f"root={data}", "--set", own, "--out", str(corpus))
    return tokenizer, corpus


def train(work: Path, tokenizer: Path, corpus: Path, name: str, seed: int, sets: list[str]) -> Path:
    """One run, if it is not there."""
    out = work / f"{name.replace(' ', '_')}_{seed}"
    if not out.exists():
        sets = [*sets, f"seed={seed}", f"corpus={corpus}", f"tokenizer={tokenizer}"]
        words = [word for pair in sets for word in ("--set", pair)]
        states = out.with_name(out.name + ".tmp") / "state"
        resume = ["--resume"] if any(states.glob("step_*[0-9]")) else []
        recipe = str(RECIPES / "m1_block.toml")
        attending("pretrain", recipe, *words, *resume, "--out", str(out), threads=1)
        print(out.name, flush=True)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    told = parser.parse_args()
    told.work.mkdir(parents=True, exist_ok=True)
    tokenizer, corpus = prepare(told.data.resolve(), told.work.resolve())
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(train, told.work.resolve(), tokenizer, corpus, *run) for run in runs()]
        for job in jobs:
            job.result()
