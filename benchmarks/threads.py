"""What OpenMP's waiting costs the engine: alone, beside another process, from a second thread.

    python benchmarks/threads.py

Budget: 3 repeats of five processes, about 4 minutes.
"""

import os
import statistics
import subprocess
import sys
import threading
import time

from page import Measure, write

from attending.mesh import SHORT_SPIN

REPEATS, STEPS, USERS = 3, 10, 8
NEIGHBOUR = """
import time
while True:
    start = time.perf_counter()
    while time.perf_counter() - start < 0.005:
        pass
    time.sleep(0.005)
"""
NOTES = f"""
Median milliseconds of a step that writes one token for each of {USERS} users, the default model in
float32, over {STEPS} steps in a process of its own. *Beside a neighbour*: another process computes
for 5 ms and sleeps for 5 ms, without end. *From a second thread*: the first one has loaded the
model, so OpenMP keeps threads for both. *Short spin* is `mesh.SHORT_SPIN` in the environment, as
`attending serve` sets it; the other is OpenMP's own default.
"""


def main() -> None:
    if len(sys.argv) > 1:
        print(step_milliseconds(sys.argv[1] == "second thread"))
        return
    default = {name: value for name, value in os.environ.items() if name not in SHORT_SPIN}
    spins = {"short spin": default | SHORT_SPIN, "OpenMP's default": default}
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(REPEATS):
        for spin, environment in spins.items():
            for place in ("alone", "beside a neighbour", "from a second thread"):
                ms = measured(environment, place)
                found.setdefault((f"step {place}, ms", spin), []).append(ms)
    rows = [Measure(quantity, spin, values) for (quantity, spin), values in found.items()]
    print(write("threads", "How OpenMP waits", NOTES, rows).read_text("utf-8"))


def measured(environment: dict[str, str], place: str) -> float:
    beside = place == "beside a neighbour"
    neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) if beside else None
    try:
        thread = "second thread" if place == "from a second thread" else "first thread"
        command = [sys.executable, __file__, thread]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(run.stdout)
    finally:
        if neighbour:
            neighbour.kill()
            neighbour.wait()


def step_milliseconds(in_second_thread: bool) -> float:
    import attending
    from attending.engine.sampler import Sampling
    from attending.engine.scheduler import Request, Scheduler
    from attending.engine.torch_runner import TorchRunner

    model = attending.load("default")
    ids = tuple(model.tokenizer.encode("The patient was admitted with chest pain. " * 6)[:48])
    times: list[float] = []

    def work() -> None:
        scheduler = Scheduler(TorchRunner(model.decoder, (64,)))
        for user in range(USERS):
            sampling = Sampling(temperature=0.0, max_tokens=STEPS + 4)
            scheduler.submit(Request((user + 500, *ids), sampling))
        while len(scheduler.step()) < USERS:
            pass
        for _ in range(STEPS):
            start = time.perf_counter()
            scheduler.step()
            times.append(time.perf_counter() - start)

    work()
    if in_second_thread:
        times.clear()
        second = threading.Thread(target=work)
        second.start()
        second.join()
    return statistics.median(times) * 1e3


if __name__ == "__main__":
    main()
