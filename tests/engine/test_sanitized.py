"""The kernel's tests once more, with every access and every operation checked."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
ROOT = Path(__file__).parents[2]
CHOSEN = "product or company or overflow or read_back or activation or raw or chunks or crowd"


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ brings the sanitizers' libraries")
def test_the_kernel_tests_pass_under_the_sanitizers(tmp_path: Path) -> None:
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("this g++ has no sanitizer libraries")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "-k", CHOSEN),
            *("tests/engine/test_native.py", "tests/properties/test_native.py"),
        ],
        cwd=ROOT,
        env=os.environ
        | {
            "KERNEL_TEST_FLAGS": FLAGS,
            "LD_PRELOAD": ":".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it likes
            "CXX": "g++",
            "CI": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " passed" in done.stdout
