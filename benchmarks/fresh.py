"""From nothing to the assistant: the README's first command on a fresh clone with an empty home.

    python benchmarks/fresh.py

Installs into a temporary folder and throws it away. Budget: one run of about two minutes, and
about 500 MB of downloads.
"""

import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import httpx
from page import Measure, write

from attending.sources import CATALOGUE

ROOT = Path(__file__).parents[1]
QUESTION = "What is hypertension?"
NOTES = """
A fresh clone, an empty home, no cache: `make serve` makes `.venv`, installs the package with torch,
pulls the default model, checks it, starts the engine and prints the address that signs in; the time
ends when that address has answered with the chat page. Then the same command again, and
`make ask Q="{question}"` until its answer has ended. One run, since most of it is the network:
{packages:.0f} MB of Python packages (counted from pip's log) and {model:.0f} MB of model came over
it; `.venv` is {installed:.0f} MB afterwards.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home, clone, log = (Path(folder) / name for name in ("home", "clone", "pip.log"))
        home.mkdir()
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("ATTENDING", "XDG"))}
        environment = {**clean, "HOME": str(home), "PIP_LOG": str(log), "PIP_NO_CACHE_DIR": "1"}
        seconds = [page_seconds(clone, environment) for _ in range(2)]
        seconds.append(answer_seconds(clone, environment))
        notes = NOTES.format(
            question=QUESTION,
            packages=downloaded_megabytes(log.read_text(encoding="utf-8")),
            model=CATALOGUE["default"].size_bytes / 1e6,
            installed=sum(f.lstat().st_size for f in (clone / ".venv").rglob("*")) / 1e6,
        )
    names = ("make serve to the page, first time, s", "again, s", "make ask, then, s")
    rows = [Measure(name, "attending", [s]) for name, s in zip(names, seconds, strict=True)]
    print(write("fresh", "From a fresh clone to the assistant", notes, rows).read_text("utf-8"))


def page_seconds(clone: Path, environment: dict[str, str]) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = time.perf_counter()
    command = ["make", "-s", "serve", f"ARGS=--port {port}"]
    server = subprocess.Popen(
        command,
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert server.stdout is not None
        address = next(line.strip() for line in server.stdout if "/login?token=" in line)
        page = httpx.get(address, follow_redirects=True)
        seconds = time.perf_counter() - start
        assert page.status_code == 200 and "chat.js" in page.text
        return seconds
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def answer_seconds(clone: Path, environment: dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(
        ["make", "-s", "ask", f"Q={QUESTION}"],
        cwd=clone,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def downloaded_megabytes(log: str) -> float:
    """What pip says of each file that it fetched; a file on this disk is not named so."""
    units = {"kB": 1e-3, "MB": 1.0, "GB": 1e3}
    found = re.findall(r"Downloading \S+ \(([\d.]+) (kB|MB|GB)\)", log)
    return sum(float(size) * units[unit] for size, unit in found)


if __name__ == "__main__":
    main()
