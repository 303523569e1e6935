"""A stage on two ranks, for the tests that two equal one: `ranks.py VERB RECIPE.json OUT`."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from attending.logs import read_metrics


def require_two_equal_one(verb: str, config: Any, folder: Path, metrics: tuple[str, ...]) -> None:
    """Run a recipe here and under torchrun: weights and metrics at a relative 1e-9.

    Args:
        verb: Of the stage.
        config: Its recipe, in float64.
        folder: To write into.
        metrics: What their names begin with.
    """
    alone, two, file = folder / "alone", folder / "two", folder / "recipe.json"
    run(verb, config, alone)
    file.write_text(json.dumps(config.model_dump(mode="json")), "utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "tests.train.ranks", verb, str(file), str(two)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert not done.returncode, done.stderr[-3000:]
    one, other = (load_file(path / "model.safetensors") for path in (alone, two))
    assert all(torch.allclose(one[key], other[key], rtol=1e-9, atol=1e-12) for key in one)
    first, second = (told(path, metrics) for path in (alone, two))
    assert first and second == [pytest.approx(row, rel=1e-9, abs=1e-12) for row in first]


def told(out: Path, metrics: tuple[str, ...]) -> list[dict[str, float]]:
    """Rows of a run's metrics, of names that begin so."""
    rows = read_metrics(out / "metrics.jsonl")
    found = [{k: v for k, v in row.items() if k.startswith(metrics)} for row in rows]
    return [row for row in found if row]


def run(verb: str, config: Any, out: Path) -> None:
    """The stage's loop."""
    vars(import_module(f"attending.{verb}.loop"))[verb](config, out)


if __name__ == "__main__":
    stage = vars(import_module(f"attending.{sys.argv[1]}.recipe"))
    values = json.loads(Path(sys.argv[2]).read_text("utf-8"))
    run(sys.argv[1], stage[f"{sys.argv[1].capitalize()}Config"].build(values), Path(sys.argv[3]))
