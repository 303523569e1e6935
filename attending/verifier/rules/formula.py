"""math_verify in a process of its own, which the kernel ends when a formula takes for ever.

A line of JSON goes each way. The process's own seconds count, not the clock's: no verdict depends
on what else is running, and no signal is needed, which a thread could not have.
"""

import json
import logging
import os
import resource
import sys
import time
from importlib import import_module
from subprocess import PIPE, Popen
from threading import Lock

SECONDS, GIGABYTES = 3, 2
ASKED = Lock()
CHILDREN: dict[int, Popen[str]] = {}  # by the asking process: a fork has its parent's pipes


def compared(answer: str, text: str) -> tuple[bool, str]:
    """Whether a text's formula equals the reference, and what was found; in any thread."""
    with ASKED:
        child = CHILDREN.get(os.getpid())
        if child is None or child.poll() is not None:
            run = [sys.executable, "-Pu", __file__]  # unbuffered, and nothing of this folder's
            child = Popen(run, bufsize=1, stdin=PIPE, stdout=PIPE, text=True)
        CHILDREN[os.getpid()] = child
        assert child.stdin and child.stdout
        child.stdin.write(json.dumps([answer, text]) + "\n")
        if line := child.stdout.readline():
            passed, reason = json.loads(line)
            return passed, reason
        if (code := child.wait()) > 0:
            raise ChildProcessError(f"math_verify's process ended with {code}, expected a verdict.")
        return False, f"no verdict within {SECONDS} s of computing and {GIGABYTES} GB"


def _serve() -> None:
    library = import_module("math_verify")
    logging.disable()
    replies, sys.stdout = sys.stdout, sys.stderr  # what the library prints is no reply
    if sys.platform == "linux":  # elsewhere this is not enforced
        resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30, GIGABYTES << 30))
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for line in sys.stdin:
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + SECONDS, most))
        gold, found = (library.parse(text, parsing_timeout=None) for text in json.loads(line))
        passed = bool(found) and library.verify(gold, found, timeout_seconds=None)
        told = f"answers {str(found[-1])[:200]}" if found else "no formula"
        replies.write(json.dumps([passed, told]) + "\n")


if __name__ == "__main__":
    _serve()
