"""What every peer runs, in its own environment: the same ids, lengths and clock; standard library.

    python benchmarks/peers/run_PEER.py WORK.json MODEL [VARIANT]

Prints `first token` when a prompt of 16 has its first token (the driver's clock runs from the
start of the process), then one line of JSON. A peer is a function that reads all prompts as one
batch and writes exactly so many tokens after each.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

Prompts = list[list[int]]
Generate = Callable[[Prompts, int, bool], list[int]]
"""Prompts, new tokens, whether sampled -> how many tokens each prompt got."""


class Engine:
    """A loaded peer."""

    def __init__(self, generate: Generate, version: str, path: str, pid: int | None = None) -> None:
        """`path`: bits of weights, activations and cache in words; `pid`: of a server."""
        self.generate, self.version, self.path = generate, version, path
        self.process = "self" if pid is None else str(pid)


def main(load: Callable[[str, int, str], Engine]) -> None:
    """`load(model, threads, variant)`; everything before the first token is in the clock."""
    work = json.loads(Path(sys.argv[1]).read_text())
    variant = sys.argv[3] if len(sys.argv) > 3 else ""
    engine = load(sys.argv[2], work["threads"], variant)
    timed(engine, work["cold"], 1)
    print("first token", flush=True)
    answer = work["answer_tokens"]
    for sampled in (False, True):  # shapes and buffers of the largest batch, before it is timed
        timed(engine, work["warm"], min(8, answer), sampled)
    seconds = timed(engine, work["prefill"], 1)
    rates = {"prefill_tok_s": len(work["prefill"][0]) / seconds}
    for name in ("decode", "sampled"):
        for users, (first, whole) in work[name].items():
            # Other prompts of the same length for the first token: none is found in a cache.
            before = timed(engine, first, 1, name == "sampled")
            seconds = timed(engine, whole, answer + 1, name == "sampled") - before
            rates[f"{name}_{users}_tok_s"] = len(whole) * answer / seconds
    told = {"version": engine.version, "path": engine.path, "peak_mib": peak_mib(engine.process)}
    print(json.dumps(rates | told), flush=True)


def timed(engine: Engine, prompts: Prompts, new_tokens: int, sampled: bool = False) -> float:
    start = time.perf_counter()
    written = engine.generate(prompts, new_tokens, sampled)
    seconds = time.perf_counter() - start
    assert written == [new_tokens] * len(prompts), f"asked for {new_tokens}, got {written}"
    return seconds


def peak_mib(process: str = "self") -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024
