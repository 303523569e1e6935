"""A run is what its recipe says: however it is interrupted, cut into passes or dealt to ranks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from attending.logs import read_metrics
from attending.pretrain.loop import pretrain
from attending.pretrain.recipe import PretrainConfig
from attending.train.state import states
from attending.train.watch import Notes, Progress
from tests.pretrain.conftest import one_thread  # noqa: F401  (a fixture)
from tests.train.making import HaltedError, halt_at, make_corpus, make_tokenizer, recipe

CLOCKS = ("run/elapsed_seconds", "train/tokens_per_second", "train/ceiling_share")
CLOCKS += ("train/peak_memory_bytes",)
# Steps are skipped often, so that a stop falls into the middle of the rule's window.
SKIPPING = {
    "optimizer": {
        "peak": 1e-2,
        "final": 1e-3,
        "warmup_tokens": 256,
        "skip_window": 3,
        "skip_factor": 0.9,
        "skip_margin": 0.0,
    }
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("text")
    tokenizer = make_tokenizer(folder / "tokenizer")
    return make_corpus(folder / "corpus", tokenizer), tokenizer


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def told(out: Path) -> list[dict[str, Any]]:
    rows = read_metrics(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]


@pytest.mark.parametrize("compute", [{}, {"recompute": True}])
def test_resume_is_bitwise(
    text: tuple[Path, Path], tmp_path: Path, compute: dict[str, Any]
) -> None:
    config = recipe(*text, state={"every_tokens": 128}, compute=compute, **SKIPPING)
    whole = pretrain(config, tmp_path / "whole")
    rows = told(whole)
    skipped = [row["train/skipped_steps"] for row in rows if "train/skipped_steps" in row]
    steps = [n + 1 for n, (a, b) in enumerate(zip([0, *skipped], skipped, strict=False)) if b > a]
    assert len(steps) > 2, "the rule must have skipped for this test to say anything"
    out = tmp_path / "stopped"
    for number, step in enumerate((*steps[:2], config.num_steps - 2)):  # right after a skipped one
        # Halted within step + 1, whose state is not saved yet; so it is made again.
        with pytest.raises(HaltedError):
            pretrain(config, out, resume=number > 0, show=halt_at(step + 1))
    pretrain(config, out, resume=True)
    found, wanted = weights(out), weights(whole)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert told(out) == rows
    assert (out / "heldout_medical.jsonl").read_bytes() == (
        whole / "heldout_medical.jsonl"
    ).read_bytes()


def test_a_stop_saves_and_says_so(text: tuple[Path, Path], tmp_path: Path) -> None:
    config = recipe(*text)

    def interrupt(told: Progress | Notes) -> None:
        if isinstance(told, Progress) and told.step == 5:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Exception, match=r"stopped after step 5; --resume goes on"):
        pretrain(config, tmp_path / "out", show=interrupt)
    assert (tmp_path / "out.tmp" / "state" / "step_000000005" / "progress.json").is_file()
    pretrain(config, tmp_path / "out", resume=True)
    whole = pretrain(config, tmp_path / "whole")
    assert told(tmp_path / "out") == told(whole)


def test_accumulated_equals_whole(text: tuple[Path, Path], tmp_path: Path) -> None:
    exact = {"precision": "float64"}
    small = recipe(*text, compute=exact)
    large = recipe(*text, compute=exact, batch={"tokens": 128, "micro_tokens": 128})
    close(pretrain(small, tmp_path / "small"), pretrain(large, tmp_path / "large"))


def test_recomputed_equals_kept(text: tuple[Path, Path], tmp_path: Path) -> None:
    exact = {"precision": "float64"}
    kept = pretrain(recipe(*text, compute=exact), tmp_path / "kept")
    again = recipe(*text, compute={**exact, "recompute": True})
    close(kept, pretrain(again, tmp_path / "again"))


def test_two_ranks_equal_one(text: tuple[Path, Path], tmp_path: Path) -> None:
    config = recipe(*text, compute={"precision": "float64"}, **SKIPPING)
    alone = pretrain(config, tmp_path / "alone")
    two = recipe(*text, compute={"precision": "float64", "recompute": True}, **SKIPPING)
    launch(two, tmp_path / "two")
    close(alone, tmp_path / "two")


def test_killed_ranks_go_on_as_more_and_as_fewer(text: tuple[Path, Path], tmp_path: Path) -> None:
    config = recipe(*text, compute={"precision": "float64"}, **SKIPPING)
    alone, out = pretrain(config, tmp_path / "alone"), tmp_path / "killed"
    with pytest.raises(HaltedError):
        pretrain(config, out, show=halt_at(6))
    assert states(tmp_path / "killed.tmp")[-1].name == "step_000000005"  # from here, two
    launch(config, out, "resume", kill_after=8)
    assert not out.exists()
    pretrain(config, out, resume=True)
    close(alone, out)


def launch(config: PretrainConfig, out: Path, *words: str, kill_after: int | None = None) -> None:
    """Two ranks under torchrun; one kills itself once a state of `kill_after` or more is there."""
    file = out.with_suffix(".json")
    file.write_text(json.dumps(config.model_dump(mode="json")), "utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, "-m", "tests.properties.ranks", str(file), str(out), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "KILL_AFTER": str(kill_after or "")}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert (done.returncode != 0) == bool(kill_after), done.stderr[-3000:]


def close(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    for name, wanted in first.items():
        assert wanted.dtype == torch.float64
        assert torch.allclose(second[name], wanted, rtol=1e-9, atol=1e-12), name
    rows = [[row for row in told(out) if row["step"]] for out in (one, other)]
    for first_row, second_row in zip(*rows, strict=True):
        assert second_row == pytest.approx(first_row, rel=1e-9)
    for domain in ("general", "medical"):
        scores = [(out / f"heldout_{domain}.jsonl").read_text("utf-8") for out in (one, other)]
        pairs = zip(*map(str.splitlines, scores), strict=True)
        assert all(json.loads(b) == pytest.approx(json.loads(a), rel=1e-9) for a, b in pairs)
