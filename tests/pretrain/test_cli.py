import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attending import report
from attending.cli import app
from attending.train.state import states
from tests.train.making import M1, make_corpus, make_tokenizer

RECIPE = """
corpus = "{corpus}"
tokenizer = "{tokenizer}"
batch = {{ tokens = 128, micro_tokens = 64 }}
optimizer = {{ peak = 1e-2, final = 1e-3, warmup_tokens = 256 }}
state = {{ every_tokens = 512 }}
heldout = {{ every_tokens = 640, prompts = ["aspirin may"], sample_tokens = 4 }}
model = {model}
[[stages]]
name = "only"
tokens = 1280
context = 32
rope_theta = 1e4
mixture = {{ general = 0.5, medical = 0.5 }}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    corpus = make_corpus(tmp_path / "corpus", tokenizer)
    model = "{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in M1.items()) + "}"
    file = tmp_path / "tiny.toml"
    file.write_text(RECIPE.format(corpus=corpus, tokenizer=tokenizer, model=model), "utf-8")
    return file


def test_the_verb_trains_and_prints_where(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "base"
    done = CliRunner().invoke(app, ["pretrain", str(recipe), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(out)
    assert "aspirin may [...]" in done.stderr and "bits per byte" in done.stderr
    told = (out / "run.json").read_text("utf-8")
    assert str(tmp_path) not in told and "base" in (out / "README.md").read_text("utf-8")
    page = report.write_report(out).read_text("utf-8")
    assert "heldout/medical_bits_per_byte" in page and "<th>aspirin may</th>" in page


def test_json_leaves_stdout_pure(recipe: Path, tmp_path: Path) -> None:
    words = ["pretrain", str(recipe), "--out", str(tmp_path / "base"), "--json"]
    done = CliRunner().invoke(app, words)
    assert json.loads(done.stdout)["heldout/medical_bits_per_byte"] > 0


def test_a_dry_run_reads_nothing_but_the_recipe() -> None:
    done = CliRunner().invoke(app, ["pretrain", "m1_14b", "--dry-run"])
    takes = json.loads(done.stdout)["takes"]
    assert takes["parameters"] == 14_470_764_320
    assert [stage["steps"] for stage in takes["stages"]] == [715_256, 357_628, 119_210]
    assert takes["warmup_steps"] == 2000
    assert takes["memory_per_rank"]["fits"] is True
    # By hand: 13.8e9 weights are multiplied; of a full layer's 8,192 tokens each sees 4,096.5.
    matrices = 14_470_764_320 - 133_120 * 5120 - 81 * 5120 - 800
    attention = 2 * 5120 * 40 * 4096.5
    assert takes["stages"][0]["flops_per_token"] == 6 * (matrices + attention)
    seconds = 6 * (matrices + attention) * 715_256 * 16_777_216 / (512 * 989e12 * 0.4)
    assert takes["stages"][0]["days"] == pytest.approx(seconds / 86_400, rel=1e-4)


def test_more_ranks_need_less_memory_and_time() -> None:
    found = []
    for devices in (256, 512):
        words = ["pretrain", "m1_14b", "--dry-run", "--set", f"assumed.devices={devices}"]
        found.append(json.loads(CliRunner().invoke(app, words).stdout)["takes"])
    assert found[0]["time"]["days"] == pytest.approx(2 * found[1]["time"]["days"], rel=1e-3)
    first, second = (takes["memory_per_rank"]["total_gib"] for takes in found)
    assert first > second


def test_the_same_verb_under_torchrun(recipe: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["-m", "attending.cli", "pretrain", str(recipe), "--out", str(tmp_path / "base")]
    words += ["--set", "compute.precision=bfloat16"]
    done = subprocess.run([*torchrun, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(tmp_path / "base")]  # once, and nothing else
    assert done.stderr.count("step 10: medical") == 1


def test_terminated_under_torchrun_all_ranks_save_and_go_on(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text("utf-8").replace("tokens = 1280", "tokens = 1_000_000")
    recipe.write_text(text, "utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["-m", "attending.cli", "pretrain", str(recipe), "--out", str(tmp_path / "base")]
    with subprocess.Popen([*torchrun, *words], stderr=subprocess.PIPE, text=True) as ranks:
        until = time.monotonic() + 60
        while not states(tmp_path / "base.tmp") and time.monotonic() < until:
            time.sleep(0.1)
        ranks.send_signal(signal.SIGTERM)
        said = ranks.communicate(timeout=60)[1]
    assert ranks.returncode != 0
    last = states(tmp_path / "base.tmp")[-1]
    assert f"stopped after step {int(last.name.removeprefix('step_'))}; --resume" in said
    told = json.loads((last / "progress.json").read_text("utf-8"))
    assert told["ranks"] == 2 and told["step"] == int(last.name.removeprefix("step_"))
