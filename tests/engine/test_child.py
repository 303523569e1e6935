"""The engine as a child process: opened, killed, orphaned, failing."""

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from attending import endpoint
from attending.errors import CheckpointError, ConfigError, EndpointError, SourceError
from tests.engine.folders import write_model
from tests.engine.served import ASK


def test_endpoint_open_runs_a_child_that_ends_with_the_block(folder: Path) -> None:
    model = write_model(folder / "child")

    async def use() -> tuple[str, int]:
        async with endpoint.open(str(model), engine={"max_running": 2, "threads": 1}) as opened:
            reply = await opened.chat(ASK, max_tokens=5, seed=1)
            assert reply.output_tokens and opened.model == "child"
            child = next(
                int(pid)
                for pid in (entry.name for entry in Path("/proc").iterdir())
                if pid.isdigit() and b"engine.server" in command(pid) and b"child" in command(pid)
            )
            return reply.text, child

    def command(pid: str) -> bytes:
        try:
            return (Path("/proc") / pid / "cmdline").read_bytes()
        except OSError:
            return b""

    _, child = asyncio.run(use())
    assert b"engine.server" not in command(str(child))


def test_a_child_ends_when_its_parent_is_killed(folder: Path) -> None:
    model = write_model(folder / "orphan")
    code = (
        "import asyncio, sys\nfrom attending import endpoint\n"
        "async def main():\n"
        "    child = endpoint.EngineProcess(sys.argv[1], {'threads': 1})\n"
        "    await child.start()\n"
        "    print(child._child.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(model)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_child_is_seen_and_can_be_started_again(folder: Path) -> None:
    model = write_model(folder / "killed")

    async def use() -> None:
        child = endpoint.EngineProcess(str(model), {"threads": 1})
        await child.start()
        assert child._child is not None
        child._child.kill()
        assert await child.wait() == -signal.SIGKILL
        async with endpoint.Endpoint(
            child.url, "killed", options=endpoint.EndpointOptions(max_tries=1)
        ) as broken:
            with pytest.raises(EndpointError):
                await broken.chat(ASK)
        await child.start()
        async with endpoint.Endpoint(child.url, "killed") as mended:
            assert (await mended.chat(ASK, max_tokens=2)).output_tokens
        await child.stop()

    asyncio.run(use())


@pytest.mark.parametrize(
    ("engine", "error", "says"),
    [
        (None, SourceError, "does not exist"),
        ({"colour": 1}, ConfigError, "colour: unknown"),
        ("empty", CheckpointError, "config.json"),
    ],
)
def test_a_child_that_cannot_load_says_why(
    tmp_path: Path, engine: Any, error: type[Exception], says: str
) -> None:
    (tmp_path / "empty").mkdir()
    name = str(tmp_path / "empty") if engine == "empty" else "no-such-model"

    async def use() -> None:
        options = engine if isinstance(engine, dict) else None
        async with endpoint.open(name, engine=options):
            pass

    with pytest.raises(error, match=says):
        asyncio.run(use())


def test_an_engine_that_fails_ends_its_process_and_says_where_not_what(folder: Path) -> None:
    model = write_model(folder / "fails")
    code = (
        "import sys\nfrom attending.engine import scheduler, server\n"
        "def fails(self):\n    raise IndexError('a secret of a patient')\n"
        "scheduler.Scheduler.step = fails\n"
        "sys.argv[0] = server.__file__\n"
        "import runpy; runpy.run_module('attending.engine.server', run_name='__main__')\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, str(folder / "fails.sock"), str(model), "{}"],
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert child.returncode == 1
    assert "IndexError" in child.stderr and "in fails" in child.stderr
    assert "secret" not in child.stderr
