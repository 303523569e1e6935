"""`attending bench`: rates by a clock that the runner moves, stable keys, clear errors."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from attending.engine import bench
from attending.engine.bench import Spread, Work
from attending.engine.runner import Span
from attending.engine.sampler import Sampling
from attending.engine.scheduler import Scheduler
from attending.errors import AttendingError, CheckpointError, UsageError
from attending.model.architecture import parse_config
from tests.engine.folders import CONFIG, write_model
from tests.engine.serving import Failing, Notebook, Watched, text

GREEDY = Sampling(temperature=0.0)
COMMAND = [sys.executable, "-m", "attending.cli", "bench"]
TORCH = ("--dtype", "float32")  # the reference, which needs no compiler
SMALL = (*TORCH, "--batch", "1,3", "--prompt", "70", "--tokens", "4", "--repeats", "2")
SPREAD = {"median", "min", "max", "values"}


class Ticking:
    """A step takes a second, and each of its tokens a hundredth."""

    def __init__(self, num_pages: int = 64) -> None:
        self._runner = Watched(Notebook(num_pages))
        self.arch, self.num_pages = self._runner.arch, self._runner.num_pages
        self.now = 0.0

    @property
    def steps(self) -> list[list[Span]]:
        return self._runner.steps

    def step(self, spans: Sequence[Span]) -> NDArray[np.float32]:
        self.now += 1 + 0.01 * sum(len(span.ids) for span in spans)
        return self._runner.step(spans)


def test_prefill_is_the_prompts_tokens_over_the_time_to_its_first_token() -> None:
    runner = Ticking()
    rate = bench.prefill_rate(Scheduler(runner, step_tokens=64), text(100), lambda: runner.now)
    assert rate == pytest.approx(100 / 3.0)  # two steps, of 64 and 36 tokens


def test_decode_leaves_the_prompts_out() -> None:
    runner = Ticking()
    rate = bench.decode_rate(Scheduler(runner), [text(10)], 4, GREEDY, lambda: runner.now)
    assert rate == pytest.approx(4 / 4.04)  # after a step of 10, four of one token


def test_decode_begins_when_the_last_user_has_a_first_token() -> None:
    runner = Ticking()
    scheduler = Scheduler(runner, step_tokens=12)
    prompts = [text(10, 1), text(10, 2)]
    rate = bench.decode_rate(scheduler, prompts, 4, GREEDY, lambda: runner.now)
    # Steps of 10 + 2 and 1 + 8 tokens are prompts; then 2, 2, 2 and, the first being done, 1.
    assert [sum(len(s.ids) for s in spans) for spans in runner.steps] == [12, 9, 2, 2, 2, 1]
    assert rate == pytest.approx(7 / 4.07)


@pytest.mark.parametrize("kind", [GREEDY, Sampling(temperature=0.7, top_p=0.9)])
def test_every_answer_is_as_long_as_asked_and_nothing_is_found_in_the_cache(kind: Sampling) -> None:
    runner, work = Ticking(256), Work((1, 4), 130, 9, 2)
    scheduler = Scheduler(runner, step_tokens=512)
    for repeat in range(work.repeats):
        bench.prefill_rate(scheduler, bench.token_ids(50, 130, repeat))
        for batch in work.batch:
            for name in ("decode", "sampled"):
                prompts = bench.decode_prompts(50, work, repeat, batch, name)
                assert len(prompts) == batch and {len(ids) for ids in prompts} == {128}
                bench.decode_rate(scheduler, prompts, 9, kind)
    counted = scheduler.counters
    assert counted.cached_tokens == counted.preempted == 0
    assert counted.output_tokens == 2 * (1 + 2 * (1 + 4) * 10)
    assert counted.prompt_tokens == 2 * (130 + 2 * (1 + 4) * 128)


def test_prompts_are_the_same_in_every_run_and_differ_between_measurements() -> None:
    work = Work()
    told = [
        ids
        for repeat in range(3)
        for batch in (1, 8)
        for kind in ("decode", "sampled")
        for ids in bench.decode_prompts(1000, work, repeat, batch, kind)
    ]
    assert len(set(told)) == len(told) == 3 * 2 * 9
    assert told[0] == bench.decode_prompts(1000, work, 0, 1, "decode")[0]
    assert all(0 <= token < 1000 for ids in told for token in ids)


def test_a_step_that_fails_ends_the_measurement_with_its_error() -> None:
    with pytest.raises(CheckpointError, match="not numbers"):
        bench.prefill_rate(Scheduler(Failing(Notebook(8), 7)), (1, 2, 7))


def test_a_spread_is_the_median_and_the_ends_in_four_digits() -> None:
    spread = Spread.of([3.000004, 1234.56, 2.0])
    assert spread == (3.0, 2.0, 1235.0, (3.0, 1235.0, 2.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch": (0, 8)}, "--batch is 0; expected 1 or more"),
        ({"batch": ()}, "--batch is 0"),
        ({"batch": (8, 8)}, "each size once"),
        ({"prompt_tokens": 0}, "--prompt is 0"),
        ({"answer_tokens": -1}, "--tokens is -1"),
        ({"repeats": 0}, "--repeats is 0"),
    ],
)
def test_impossible_work_is_refused_before_anything_is_read(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        bench.bench("nowhere", Work(**values))


def test_work_must_fit_the_context_to_the_token() -> None:
    Work(prompt_tokens=511, answer_tokens=383).fit(512)
    with pytest.raises(UsageError, match=r"--prompt 512 .* need 513 tokens; .* context is 512"):
        Work(prompt_tokens=512, answer_tokens=1).fit(512)
    with pytest.raises(UsageError, match="need 513 tokens"):
        Work(prompt_tokens=200, answer_tokens=384).fit(512)


def test_there_is_room_for_the_largest_batch_in_whole_pages() -> None:
    assert Work((1, 8)).cache_tokens() == 8 * 320 + 64  # 128 + 128 + 1 tokens are five pages
    assert Work((1,), 4000).cache_tokens() == 4001 + 64


def test_arithmetic_counts_the_blocks_for_each_token_and_the_head_once() -> None:
    arch = parse_config(CONFIG | {"vocab_size": 100, "tie_word_embeddings": True})
    # q and o 32 x 32, k and v 16 x 32, three of 48 x 32; two layers
    blocks = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
    rate = Spread.of([50.0])
    expected = 2 * (blocks * 10 + 100 * 32) * 50 / 10 / 1e9
    assert bench.prefill_gop_s(arch, 10, rate) == pytest.approx(expected)
    model: Any = SimpleNamespace(arch=arch, weight_bytes=4 * arch.num_parameters())
    assert bench.bytes_read(model) == model.weight_bytes
    model.arch = parse_config(CONFIG | {"vocab_size": 100, "tie_word_embeddings": False})
    model.weight_bytes = 4 * model.arch.num_parameters()
    assert bench.bytes_read(model) == model.weight_bytes - 4 * 100 * 32


def test_shares_are_of_the_ceiling_that_bounds_the_work() -> None:
    ceilings = {"read_gb_s": 20.0, "float32_gflop_s": 200.0, "int8_gop_s": 1000.0}
    assert bench.shares(ceilings, prefill_gop_s=100.0, decode_gb_s={1: 10.0, 8: 5.0}) == {
        "decode 1 / read_gb_s": 0.5,
        "decode 8 / read_gb_s": 0.25,
        "prefill / float32_gflop_s": 0.5,
        "prefill / int8_gop_s": 0.1,
    }


def test_the_kernel_librarys_ceilings_join_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "_matmul_gflop_s", lambda: 100.0)
    monkeypatch.setattr("attending.engine.doctor.measure_read", lambda buffer, _: buffer.nbytes)
    told = {"int8_gop_s": 900.0, "float32_gflop_s": 90.0}
    monkeypatch.setattr("attending.engine.native.build.ceilings", lambda threads: told)
    found = bench.measure_ceilings(1600, 2)
    assert (found["int8_gop_s"], found["float32_gflop_s"]) == (900.0, 100.0)
    assert found["read_gb_s"] == 512 * 2**20 and found["read_weights_gb_s"] == 1600
    told |= {"float32_gflop_s": 120.0}
    assert bench.measure_ceilings(8, 2)["float32_gflop_s"] == 120.0
    told.clear()
    assert bench.measure_ceilings(8, 2).keys() == {*found} - {"int8_gop_s"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("models") / "tiny"))


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *words], capture_output=True, text=True)


def test_json_is_all_of_standard_output_and_its_keys_are_stable(model: str) -> None:
    said = run(model, *SMALL, "--threads", "1", "--json")
    assert said.returncode == 0, said.stderr
    told = json.loads(said.stdout)
    assert " ".join(told) == (
        "model date path threads work prefill_tok_s decode_tok_s sampled_tok_s ttft_s peak_mib "
        "ceilings shares hardware versions commit accept_length speedup"
    )
    assert told["work"] == {
        "batch": [1, 3],
        "prompt_tokens": 70,
        "answer_tokens": 4,
        "repeats": 2,
    }
    assert told["path"]["activations"] == "float32" and told["threads"] == 1
    spreads = [told["prefill_tok_s"], told["ttft_s"], told["peak_mib"]]
    for name in ("decode_tok_s", "sampled_tok_s"):
        assert list(told[name]) == ["1", "3"]
        spreads += told[name].values()
    for spread in spreads:
        assert spread.keys() == SPREAD and len(spread["values"]) == 2
        assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert told["accept_length"] is None and told["speedup"] is None
    assert {"read_gb_s", "float32_gflop_s"} <= told["ceilings"].keys()
    assert told["peak_mib"]["min"] > 20  # an interpreter with numpy
    assert told["ttft_s"]["min"] > 0.05


def test_the_table_names_path_threads_model_and_date(model: str) -> None:
    words = (*TORCH, "--batch", "1", "--prompt", "8", "--tokens", "2", "--repeats", "1")
    said = run(model, *words)
    assert said.returncode == 0, said.stderr
    lines = said.stdout.splitlines()
    assert lines[0].split() == ["figure", "of", "median", "min", "max"]
    assert "1 x 8" in lines[1] and lines[1].startswith("prefill, tokens/s")
    assert lines[-1].startswith("tiny: weights float32, activations float32, kv float32")
    assert " threads; 20" in lines[-1]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("nowhere",), 1, "'nowhere' does not exist"),
        (("MODEL", "--batch", "0"), 2, "--batch is 0; expected 1 or more"),
        (("MODEL", "--batch", "one"), 2, "--batch 'one': expected sizes as 1 or 1,8"),
        (("MODEL", "--prompt", "256"), 2, "this model's context is 256"),
        (("MODEL", "--draft", "d", "--no-draft"), 2, "--draft d and --no-draft: give one of them"),
        (("MODEL", "--prompt", "8", "--dtype", "int3"), 2, "dtype 'int3'"),
    ],
)
def test_wrong_use_is_one_clear_error_without_a_traceback(
    model: str, words: tuple[str, ...], code: int, message: str
) -> None:
    said = run(*(model if word == "MODEL" else word for word in words))
    assert (said.returncode, said.stdout) == (code, "")
    assert message in said.stderr and "Traceback" not in said.stderr


def test_a_fresh_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(AttendingError, match=r"failed: .*nowhere' does not exist"):
        bench.cold_start(str(tmp_path / "nowhere"), {}, Work())


def test_ctrl_c_ends_it_and_the_process_that_it_began(model: str) -> None:
    words = (model, *TORCH, "--batch", "1", "--prompt", "200", "--tokens", "100")
    process = subprocess.Popen(
        [*COMMAND, *words, "--repeats", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    child, deadline = 0, time.monotonic() + 60
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("this system does not tell a process's children")
    while not child:
        assert process.poll() is None and time.monotonic() < deadline
        for pid in map(int, children.read_text().split()):
            with suppress(OSError):  # it may have ended
                told = Path(f"/proc/{pid}/cmdline").read_text()
                child = pid if "attending.engine.bench" in told else child
        time.sleep(0.02)
    time.sleep(0.2)  # by now it is waited for, and no longer being begun
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and said == "" and "Traceback" not in errors
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
