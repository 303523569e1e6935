"""The place in a torchrun world, and the machine's facts from fake system folders."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attending.errors import UsageError
from attending.mesh import World, free_memory, hardware, multiplies_bfloat16, world

linux_only = pytest.mark.skipif(sys.platform == "darwin", reason="reads Linux's folders")


def system(root: Path, **files: str) -> Path:
    """A fake / : `proc__cpuinfo="..."` becomes proc/cpuinfo."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("cpu_", "cpu.").replace("memory_", "memory.")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return root


def test_without_torchrun_the_process_is_a_world_of_one() -> None:
    assert world({}) == World(rank=0, local_rank=0, size=1)
    assert world({"PATH": "x"}) == (0, 0, 1)


def test_torchruns_variables_are_read_in_their_own_places() -> None:
    told = world({"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"})
    assert told == World(rank=9, local_rank=1, size=16)


@pytest.mark.parametrize(
    ("rank", "local_rank", "size"),
    [
        ("0", None, None),
        (None, "0", None),
        (None, None, "1"),
        ("0", "0", None),
        ("0", None, "1"),
        (None, "0", "1"),
        ("1", "0", "1"),  # rank beyond the world
        ("0", "1", "2"),  # a node cannot hold more ranks before this one than the world does
        ("-1", "0", "2"),
        ("0", "-1", "2"),
        ("0", "0", "0"),
        ("0", "0", "-2"),
        ("0.0", "0", "1"),
        ("zero", "0", "1"),
        ("", "", ""),
        ("0", "", "1"),
        ("0 ", "0", "1"),
        ("²", "0", "3"),  # a digit to isdigit(), not a number
    ],
)
def test_a_partly_set_or_impossible_world_is_a_usage_error(
    rank: str | None, local_rank: str | None, size: str | None
) -> None:
    told = {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": size}
    environ = {name: value for name, value in told.items() if value is not None}
    with pytest.raises(UsageError, match="torchrun") as caught:
        world(environ)
    assert all(f"{name!r}: {value!r}" in str(caught.value) for name, value in told.items())


def test_the_facts_of_this_machine_fit_into_run_json() -> None:
    facts = hardware()
    assert json.loads(json.dumps(facts)) == facts
    available, memory = facts["available_cores"], facts["memory_bytes"]
    assert isinstance(available, int) and available >= 1
    assert isinstance(memory, int) and memory > 2**20


def test_asking_for_the_facts_does_not_import_torch() -> None:
    code = "import sys, attending.mesh as m; m.hardware(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@linux_only
def test_threads_of_one_core_count_as_one_physical_core(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(["5", "a", "5", "a"]):
        system(tmp_path / f"sys/devices/system/cpu/cpu{cpu}", topology__thread_siblings=siblings)
    (tmp_path / "sys/devices/system/cpu/cpuidle").mkdir()
    assert hardware(tmp_path)["physical_cores"] == 2


@linux_only
def test_affinity_limits_the_available_cores(tmp_path: Path) -> None:
    system(
        tmp_path, proc__self__status="Name:\tx\nCpus_allowed:\t3,0000000f\nCpus_allowed_list:\t0"
    )
    assert hardware(tmp_path)["available_cores"] == 6


@linux_only
def test_a_version_2_group_and_those_above_it_limit_the_process(tmp_path: Path) -> None:
    status = "Cpus_allowed:\tff"
    system(tmp_path, proc__self__cgroup="0::/job/step", proc__self__status=status)
    group = tmp_path / "sys/fs/cgroup"
    system(group / "job/step", cpu_max="max 100000", memory_max="max")
    assert hardware(tmp_path)["available_cores"] == 8
    system(group / "job", cpu_max="350000 100000", memory_max="1048576")
    assert hardware(tmp_path)["available_cores"] == 3
    assert hardware(tmp_path)["memory_bytes"] == 2**20
    system(group / "job/step", cpu_max="50000 100000", memory_max="4096")
    assert hardware(tmp_path)["available_cores"] == 1  # half a core is still one thread
    assert hardware(tmp_path)["memory_bytes"] == 4096


@linux_only
def test_a_version_1_group_limits_the_process_by_controller(tmp_path: Path) -> None:
    system(tmp_path, proc__self__cgroup="9:cpuset:/a\n5:cpu,cpuacct:/a\n4:memory:/b\n0::/")
    system(tmp_path, proc__self__status="Cpus_allowed:\tff")
    group = tmp_path / "sys/fs/cgroup"
    system(group / "cpu/a", cpu_cfs_quota_us="200000", cpu_cfs_period_us="100000")
    system(group / "memory/a", memory_limit_in_bytes="1")  # another process's group
    system(group / "memory/b", memory_limit_in_bytes="8192")
    assert hardware(tmp_path)["available_cores"] == 2
    assert hardware(tmp_path)["memory_bytes"] == 8192
    system(group / "cpu/a", cpu_cfs_quota_us="-1", cpu_cfs_period_us="100000")
    system(group / "memory/b", memory_limit_in_bytes=str(2**63 - 4096))
    assert hardware(tmp_path)["available_cores"] == 8
    assert hardware(tmp_path)["memory_bytes"] == hardware(tmp_path / "empty")["memory_bytes"]


@linux_only
def test_simd_flags_are_whole_words_and_arm_is_neon(tmp_path: Path) -> None:
    x86 = "model name\t: A CPU\nflags\t\t: sse avx2 avx512f xneon avx512_vnni amx_int8 avx512_bf16x"
    facts = hardware(system(tmp_path, proc__cpuinfo=x86))
    assert facts["cpu"] == "A CPU"
    assert facts["simd"] == ["amx_int8", "avx2", "avx512_vnni", "avx512f"]
    arm = hardware(system(tmp_path, proc__cpuinfo="Features\t: fp asimd asimdhp"))
    assert (arm["simd"], arm["cpu"]) == (["neon"], None)


@linux_only
@pytest.mark.parametrize(
    ("flags", "has"), [("avx2 avx512f", False), ("avx512_bf16", True), ("amx_int8 amx_bf16", True)]
)
def test_bfloat16_is_multiplied_where_there_are_instructions_for_it(
    tmp_path: Path, flags: str, has: bool
) -> None:
    assert multiplies_bfloat16(system(tmp_path, proc__cpuinfo=f"flags\t: sse {flags}")) is has


@linux_only
def test_free_memory_is_what_the_system_has_left_within_the_groups_limit(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    system(tmp_path, proc__meminfo="MemFree:   1 kB\nMemAvailable:    4096 kB")
    assert free_memory(tmp_path) == 4 * 2**20
    system(tmp_path, proc__self__cgroup="0::/job")
    system(tmp_path / "sys/fs/cgroup/job", memory_max="8192")
    assert free_memory(tmp_path) == 8192


@linux_only
def test_what_the_system_does_not_tell_is_none(tmp_path: Path) -> None:
    facts = hardware(tmp_path)
    assert facts["cpu"] is None
    assert facts["physical_cores"] is None
    assert facts["simd"] == []
