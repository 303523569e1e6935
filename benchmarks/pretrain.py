"""Small pretraining runs side by side: parts of Baichuan-M1's block, and mixtures of text.

python benchmarks/pretrain.py DATA_DIR WORK_DIR

makes tokenizer and corpus in WORK_DIR once, then every run that is not there yet, two at a time on
one thread each, and writes pretrain.md. A run that was stopped is gone on with.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import pyplot
from numpy.typing import NDArray
from page import HERE, facts

from attending.logs import read_metrics
from attending.model.architecture import parse_config

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
    "no convolution": {"conv_window": 1},
    "full attention only": {"sliding_window_layers": []},
    "Llama block": LLAMA,
}
MIXTURES: dict[str, dict[str, float]] = {
    "mixed": {"general": 0.5, "medical": 0.5},  # the M1 block's own run
    "medical only": {"medical": 1.0},
    "general only": {"general": 1.0},
}
DOMAINS = ("medical", "general")


class Run(NamedTuple):
    """One training: its settings, its weights' seed."""

    name: str
    seed: int
    settings: list[str]

    @property
    def folder(self) -> str:
        """Below WORK_DIR."""
        return f"{re.sub('[^A-Za-z0-9]+', '_', self.name)}_{self.seed}"


def runs() -> list[Run]:
    """Every run; a seed's runs before the next seed's."""
    found = []
    for seed in SEEDS:
        for name, model in BLOCKS.items():
            found.append(Run(name, seed, of_model(model)))
        for name, mixture in MIXTURES.items():
            if name != "mixed":
                found.append(Run(name, seed, [f"stages={stages(mixture)}"]))
    return found


def of_model(values: dict[str, Any]) -> list[str]:
    """Settings."""
    return [f"model.{key}={json.dumps(value)}" for key, value in values.items()]


def stages(mixture: dict[str, float]) -> str:
    """The stages of m1_block.toml with another mixture, as TOML."""
    recipe = tomllib.loads((RECIPES / "m1_block.toml").read_text("utf-8"))
    shares = ",".join(f"{k}={v}" for k, v in mixture.items())
    rows = []
    for stage in recipe["stages"]:
        plain = ",".join(f"{k}={json.dumps(v)}" for k, v in stage.items() if k != "mixture")
        rows.append(f"{{{plain},mixture={{{shares}}}}}")
    return f"[{','.join(rows)}]"


def attending(*words: str, threads: int = 2) -> None:
    """Run a verb of the command line."""
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


def train(work: Path, tokenizer: Path, corpus: Path, run: Run) -> None:
    """One run, if it is not there."""
    out = work / run.folder
    if out.exists():
        return
    sets = [*run.settings, f"seed={run.seed}", f"corpus={corpus}", f"tokenizer={tokenizer}"]
    words = [word for pair in sets for word in ("--set", pair)]
    states = out.with_name(out.name + ".tmp") / "state"
    resume = ["--resume"] if any(states.glob("step_*[0-9]")) else []
    attending(
        "pretrain", str(RECIPES / "m1_block.toml"), *words, *resume, "--out", str(out), threads=1
    )
    print(run.folder, flush=True)


class Scores(NamedTuple):
    """Of all seeds of one kind of run, on one domain's held-out documents."""

    nats: NDArray[np.float64]  # [seeds, documents]
    num_bytes: NDArray[np.float64]  # [documents]

    @classmethod
    def read(cls, work: Path, runs: Sequence[Run], domain: str) -> "Scores":
        """The last measure of every run."""
        texts = [(work / r.folder / f"heldout_{domain}.jsonl").read_text("utf-8") for r in runs]
        rows = [[json.loads(line) for line in text.splitlines()] for text in texts]
        nats = [[row["nats"] for row in file] for file in rows]
        return cls(np.array(nats), np.array([row["num_bytes"] for row in rows[0]], float))

    @property
    def by_seed(self) -> NDArray[np.float64]:
        """Bits per byte."""
        return self.nats.sum(1) / self.num_bytes.sum() / math.log(2)

    def beyond(self, other: "Scores") -> tuple[float, float, float]:
        """Difference in bits per byte, seeds averaged, and its 95 % interval.

        Seeds and documents are both drawn anew, in pairs: the same ones of both sides.
        """
        random = np.random.default_rng(0)
        gap = (self.nats - other.nats) / math.log(2)
        seeds, documents = gap.shape
        draws = []
        for _ in range(2000):
            at = random.integers(documents, size=documents)
            chosen = random.integers(seeds, size=seeds)
            draws.append(gap[chosen][:, at].mean(0).sum() / self.num_bytes[at].sum())
        low, high = np.percentile(draws, (2.5, 97.5))
        return float(gap.mean(0).sum() / self.num_bytes.sum()), float(low), float(high)


def table(work: Path, names: dict[str, str], found: Sequence[Run]) -> list[str]:
    """Markdown: bits per byte of each, and how far it is from the first."""
    heads = [f"{domain}, bits per byte | from the first" for domain in DOMAINS]
    lines = [f"| | parameters | {' | '.join(heads)} |", "|---" * (2 + 2 * len(DOMAINS)) + "|"]
    reference = next(iter(names.values()))
    for label, name in names.items():
        own, first = ([run for run in found if run.name == n] for n in (name, reference))
        config = json.loads((work / own[0].folder / "config.json").read_text("utf-8"))
        cells = [label, f"{parse_config(config).num_parameters():,}"]
        for domain in DOMAINS:
            scores = Scores.read(work, own, domain)
            seeds = scores.by_seed
            spread = f" ({seeds.min():.3f} to {seeds.max():.3f})" if len(seeds) > 1 else ""
            gap = scores.beyond(Scores.read(work, first, domain))
            cells.append(f"{seeds.mean():.3f}{spread}")
            cells.append("" if name == reference else "{:+.3f} ({:+.3f} to {:+.3f})".format(*gap))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def curve(folder: Path, domain: str) -> tuple[list[float], list[float]]:
    """Millions of tokens, bits per byte; the last point is of all documents, the others of some."""
    tokens, values, at = [], [], 0.0
    for row in read_metrics(folder / "metrics.jsonl"):
        at = row.get("train/consumed_tokens", at)
        if (key := f"heldout/{domain}_bits_per_byte") in row:
            tokens.append(at / 1e6)
            values.append(row[key])
    return tokens[1:], values[1:]


def draw(work: Path, groups: dict[str, dict[str, str]], found: Sequence[Run]) -> None:
    """A row of panels a group, a panel a domain: mean and range over seeds as training goes on."""
    size = (9, 3.2 * len(groups))
    figure, axes = pyplot.subplots(len(groups), len(DOMAINS), figsize=size, layout="constrained")
    for row, (title, names) in zip(axes, groups.items(), strict=True):
        for panel, domain in zip(row, DOMAINS, strict=True):
            for label, name in names.items():
                folders = [work / run.folder for run in found if run.name == name]
                tokens, seeds = zip(*(curve(folder, domain) for folder in folders), strict=True)
                values = np.array(seeds)
                panel.plot(tokens[0], values.mean(0), marker=".", label=label)
                panel.fill_between(tokens[0], values.min(0), values.max(0), alpha=0.15)
            panel.set_title(f"{title}: {domain}", fontsize=10)
            panel.set_xlabel("M tokens")
            panel.spines[["top", "right"]].set_visible(False)
            panel.legend(frameon=False, fontsize=8)
        row[0].set_ylabel("held-out bits per byte")
    figure.savefig(HERE / "pretrain.svg", metadata={"Date": None})


def page(work: Path) -> None:
    """Write pretrain.md and its figure."""
    found = runs()
    groups = {
        "block": {name: name for name in BLOCKS},
        "text": {name: "M1 block" if name == "mixed" else name for name in MIXTURES},
    }
    draw(work, groups, found)
    counts = {d: len(Scores.read(work, found[:1], d).num_bytes) for d in DOMAINS}
    recipe = tomllib.loads((RECIPES / "m1_block.toml").read_text("utf-8"))
    tokens = sum(stage["tokens"] for stage in recipe["stages"])
    text = [
        "# Pretraining: parts of Baichuan-M1's block, mixtures of text",
        "",
        (RECIPES / "notes.md").read_text("utf-8").strip(),
        "",
        f"Every run saw {tokens / 1e6:g} M tokens, those of a seed the same text in the same order "
        f"where the mixture is the same. Held out: {counts['medical']} medical and "
        f"{counts['general']} general documents. In brackets the range over {len(SEEDS)} seeds, "
        "and of differences the 95 % interval over seeds and documents, drawn in pairs.",
        "",
    ]
    for title, names in groups.items():
        text += [f"## The {title}", "", *table(work, names, found), ""]
    text += ["![held-out bits per byte](pretrain.svg)", "", *facts(), ""]
    (HERE / "pretrain.md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    told = parser.parse_args()
    work = told.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    paths = prepare(told.data.resolve(), work)
    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(train, work, *paths, run) for run in runs()]:
            job.result()
    page(work)
