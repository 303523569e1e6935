"""From nothing to an answer: the README's first command on a fresh clone with an empty home.

    python benchmarks/fresh.py

Installs into a temporary folder and throws it away. Budget: one run of about two minutes, and
about 500 MB of downloads.
"""

import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

from page import Measure, write

from attending.sources import CATALOGUE

ROOT = Path(__file__).parents[1]
QUESTION = "What is hypertension?"
NOTES = """
A fresh clone, an empty home, no cache: `make ask` makes `.venv`, installs the package with torch,
pulls the default model, checks it and answers. The second line is the same command again. One run,
since most of it is the network: {packages:.0f} MB of Python packages (counted from pip's log) and
{model:.0f} MB of model came over it; `.venv` is {installed:.0f} MB afterwards.
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home, clone, log = (Path(folder) / name for name in ("home", "clone", "pip.log"))
        home.mkdir()
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("ATTENDING", "XDG"))}
        environment = {**clean, "HOME": str(home), "PIP_LOG": str(log), "PIP_NO_CACHE_DIR": "1"}
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            subprocess.run(
                ["make", "-s", "ask", f"Q={QUESTION}"],
                cwd=clone,
                env=environment,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            seconds.append(time.perf_counter() - start)
        notes = NOTES.format(
            packages=downloaded_megabytes(log.read_text(encoding="utf-8")),
            model=CATALOGUE["default"].size_bytes / 1e6,
            installed=sum(f.lstat().st_size for f in (clone / ".venv").rglob("*")) / 1e6,
        )
    names = (f'make ask Q="{QUESTION}", first time, s', "again, s")
    rows = [Measure(name, "attending", [s]) for name, s in zip(names, seconds, strict=True)]
    print(write("fresh", "From a fresh clone to an answer", notes, rows).read_text("utf-8"))


def downloaded_megabytes(log: str) -> float:
    """What pip says of each file that it fetched; a file on this disk is not named so."""
    units = {"kB": 1e-3, "MB": 1.0, "GB": 1e3}
    found = re.findall(r"Downloading \S+ \(([\d.]+) (kB|MB|GB)\)", log)
    return sum(float(size) * units[unit] for size, unit in found)


if __name__ == "__main__":
    main()
