"""The doctor: each finding follows from its fact, and nothing private is reported."""

import dataclasses
import getpass
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attending.engine.doctor import LOW_DISK_BYTES, Report, examine, measure_read, table
from attending.model.architecture import Architecture, parse_config

GIB = 2**30
BFLOAT16 = "No AMX or AVX512-BF16"
GOOD = Report(
    versions={"python": "3.12.1", "attending": "1.0", "torch": "2.13.0"},
    hardware={
        "platform": "Linux-6.1",
        "cpu": None,
        "physical_cores": 4,
        "available_cores": 8,
        "memory_bytes": 32 * GIB,
        "simd": ["amx_bf16", "avx2", "avx512_vnni"],
        "gpus": [],
    },
    native_path="avx512-vnni",
    native_reason="",
    thread_variables={},
    free_memory_bytes=30 * GIB,
    free_disk_bytes=100 * GIB,
    measured_read_gb_s={1: 10.0, 8: 40.0},
    weight_bytes={},
    read_bytes={},
)


def with_facts(**changes: Any) -> Report:
    simd = changes.pop("simd", GOOD.hardware["simd"])
    return dataclasses.replace(GOOD, hardware={**GOOD.hardware, "simd": simd}, **changes)


def trouble(report: Report) -> list[tuple[str, str]]:
    return [(item.level, item.text) for item in report.findings if item.level != "ok"]


def tiny() -> Architecture:
    return parse_config(
        {
            "model_type": "llama",
            "vocab_size": 1000,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        }
    )


def test_a_good_machine_has_no_trouble_and_its_measurement_is_named_so() -> None:
    assert trouble(GOOD) == []
    assert ("ok", "Memory reads, measured: 10.0 GB/s on 1 and 40.0 GB/s on 8 of 8 cores.") in list(
        GOOD.findings
    )


def test_a_missing_package_is_named_with_its_remedy() -> None:
    report = with_facts(versions={"torch": None, "gguf": None, "numpy": "2"})
    assert trouble(report) == [("missing", "gguf is not installed. Remedy: pip install gguf.")]
    torch = (
        "torch is not installed. Remedy: pip install -e '.[train]' in the clone, to train, score"
    )
    assert next(report.findings).text.startswith(torch)  # what serves needs none
    without = dataclasses.replace(report, native_path=None)
    assert trouble(without)[0] == ("missing", next(report.findings).text)


@pytest.mark.parametrize(
    ("simd", "words"),
    [
        ([], ["No AVX2 or NEON", BFLOAT16]),
        (["avx2"], [BFLOAT16]),
        (["avx2", "avx512_bf16"], []),
        (["neon"], []),
        (["avx2", "amx_bf16"], []),
    ],
)
def test_absent_instructions_are_slow_and_said_to_be_unmeasured(
    simd: list[str], words: list[str]
) -> None:
    """Products in bfloat16 are torch's: it says nothing of the native kernel."""
    found = trouble(with_facts(simd=simd, native_path=None, native_reason="no compiler."))
    (native,) = [text for _, text in found if "native" in text]
    assert re.fullmatch(r"No native kernel, so torch .* \d+ times slower: no compiler\.", native)
    found = [(level, text) for level, text in found if text != native]
    assert [text.split(":")[0] for _, text in found] == words
    assert all(level == "slow" and "(not measured)" in text for level, text in found)
    natively = trouble(with_facts(simd=simd))
    assert [text.split(":")[0] for _, text in natively] == [w for w in words if w != BFLOAT16]


def test_the_path_of_the_native_kernel_is_named() -> None:
    assert ("ok", "Native kernel: avx512-vnni.") in list(GOOD.findings)
    report = with_facts(native_path="portable")
    assert trouble(report) == [("slow", "Native kernel: portable.")]
    assert ["native_path", "portable"] in table(report)[1]


@pytest.mark.parametrize(
    ("value", "is_slow"), [("8", False), ("4", False), ("1", True), ("64", True), ("many", True)]
)
def test_a_thread_variable_must_fit_the_cores(value: str, is_slow: bool) -> None:
    found = trouble(with_facts(thread_variables={"OMP_NUM_THREADS": value}))
    assert bool(found) == is_slow
    if is_slow:
        assert found == [("slow", f"OMP_NUM_THREADS={value}, but 8 cores are available: unset it.")]


def test_a_full_disk_is_found() -> None:
    assert trouble(with_facts(free_disk_bytes=LOW_DISK_BYTES)) == []
    ((level, text),) = trouble(with_facts(free_disk_bytes=LOW_DISK_BYTES - 1))
    assert level == "slow" and "Free disk" in text


WEIGHTS = {"32 bits": 54 * GIB, "16 bits": 27 * GIB, "8 bits": 14 * GIB, "4 bits": 9 * GIB}
READS = {"32 bits": 10**10, "16 bits": 20 * 10**9, "8 bits": 10 * 10**9, "4 bits": 8 * 10**9}


@pytest.mark.parametrize(
    ("free", "path", "level", "remedy"),
    [
        (60 * GIB, None, "ok", "27.0 GiB in 16 bits."),
        (30 * GIB, None, "slow", "Give --dtype bfloat16"),
        (20 * GIB, None, "missing", "take a smaller model"),
        (20 * GIB, "avx2", "ok", "9.0 GiB in 4 bits."),
        (10 * GIB, "avx2", "slow", "Give --weights w4-64"),
        (5 * GIB, "avx2", "missing", "take a smaller model"),
    ],
)
def test_a_model_is_judged_by_what_of_it_fits(
    free: int, path: str | None, level: str, remedy: str
) -> None:
    report = with_facts(
        native_path=path,
        free_memory_bytes=free,
        free_disk_bytes=free,
        weight_bytes=WEIGHTS,
        read_bytes=READS,
    )
    (memory,) = (item for item in report.findings if item.text.startswith("Free memory"))
    sizes = "14.0 GiB in 8 bits, 9.0" if path else "54.0 GiB in 32 bits, 27.0 GiB in 16 bits"
    assert memory.level == level and remedy in memory.text and sizes in memory.text
    (disk,) = (item for item in report.findings if item.text.startswith("Free disk"))
    assert (disk.level == "ok") == (free > 27 * GIB)
    assert "weights: 27.0 GiB in 16 bits, 9.0 GiB in 4 bits." in disk.text
    last = list(report.findings)[-1]  # 40 GB/s over the bytes of a token
    assert ("4.0 in 8 bits, 5.0 in 4 bits" if path else "2.0 in 16 bits") in last.text


def test_unknown_free_memory_makes_no_claim() -> None:
    report = with_facts(free_memory_bytes=None, weight_bytes=WEIGHTS, read_bytes=READS)
    assert not any("memory:" in item.text for item in report.findings)
    assert not any(name == "free_memory_bytes" for name, _ in table(report)[1])


def test_an_examination_takes_under_three_seconds(tmp_path: Path) -> None:
    def seconds() -> float:
        start = time.monotonic()
        examine(None, tmp_path)
        return time.monotonic() - start

    assert any(seconds() < 3 for _ in range(3))  # a busy machine may need a second look


def test_this_machine_is_described(tmp_path: Path) -> None:
    report = examine(tiny(), tmp_path / "not" / "yet" / "there")
    cores = report.hardware["available_cores"]
    assert set(report.measured_read_gb_s) == {1, cores}
    assert all(speed > 0.1 for speed in report.measured_read_gb_s.values())
    assert report.versions["numpy"] == np.__version__ and report.versions["attending"]
    assert {"python", "torch", "pydantic", "huggingface-hub"} <= set(report.versions)
    assert not any(name in report.versions for name in ("pytest", "ruff"))  # extras are not needed
    assert report.free_disk_bytes > 0
    assert report.weight_bytes["16 bits"] == 2 * tiny().num_parameters()
    assert not (tmp_path / "not").exists()


def test_the_environment_is_read_for_thread_limits_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    report = examine(None, tmp_path)
    assert report.thread_variables["OMP_NUM_THREADS"] == "1"
    assert "secret-key" not in json.dumps(report.to_json())


def test_nothing_private_is_reported(tmp_path: Path) -> None:
    report = examine(tiny(), tmp_path / "cache")
    shown = json.dumps(report.to_json()) + str(table(report))
    words = set(re.findall(r"[\w.-]+", shown))
    assert socket.gethostname() not in words
    assert getpass.getuser() not in words
    assert str(tmp_path) not in shown and str(Path.home()) not in shown


def test_the_report_is_json_and_a_table() -> None:
    loaded = json.loads(json.dumps(GOOD.to_json()))
    assert loaded["findings"] and all(set(f) == {"level", "text"} for f in loaded["findings"])
    headers, rows = table(with_facts(thread_variables={"OMP_NUM_THREADS": "8"}))
    assert len(headers) == 2 and all(len(row) == 2 for row in rows)
    assert ["memory_bytes", "32.0 GiB"] in rows and ["OMP_NUM_THREADS", "8"] in rows


@pytest.mark.parametrize("threads", [1, 3])
def test_a_measured_speed_is_bytes_over_the_time_of_a_whole_pass(threads: int) -> None:
    """Never faster than the clock around it allows."""
    buffer = np.ones(2**20, dtype=np.uint64)
    start = time.perf_counter()
    speed = measure_read(buffer, threads)
    seconds = time.perf_counter() - start
    assert speed * 1e9 >= 3 * buffer.nbytes / seconds * 0.95
    assert 0 < speed < 2000
