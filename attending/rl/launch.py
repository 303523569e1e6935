"""`attending rl RECIPE --ray ADDRESS`: trainers, vLLM's servers and a judge on a Ray cluster.

Ray only places processes and takes them away again; they talk as they would without it: trainers
through torch.distributed, all others over HTTP. The run's folder must be seen by every node.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attending.endpoint import is_address
from attending.errors import CheckFailed, ConfigError, EndpointError, TrainingError, UsageError
from attending.evaluate.judging import EMBEDDED
from attending.rl.placement import Place, Placement, plan
from attending.rl.recipe import RlConfig

GRACE_SECONDS = 900  # for a trainer that is told to stop, and saves its state
LOOK_SECONDS = 2.0


class Job(NamedTuple):
    """A process on a node."""

    name: str
    place: Place
    command: tuple[str, ...]
    environment: Mapping[str, str]
    log: Path | None
    """None writes to the launching terminal."""
    waits_for: Path | None = None
    """A model folder that a trainer writes first."""


def jobs(config: RlConfig, words: Sequence[str], out: Path, found: Placement) -> list[Job]:
    """The processes of a run.

    Args:
        config: The recipe.
        words: Of the command line: the recipe, its `--set`, `--resume`.
        out: Of the run.
        found: Where each goes.

    Raises:
        ConfigError: A verifier is placed and the recipe names no model to judge with.
    """
    out = out.absolute()
    served, logs = out.with_name(f"{out.name}.served"), out.with_name(f"{out.name}.logs")
    addresses = ", ".join(f'"{one.address}"' for one in found.generators)
    told = [f"sampler.address=[{addresses}]", f"sampler.folder={served}"]
    made = list[Job]()
    if found.verifier:
        judge = config.judge or EMBEDDED
        if is_address(judge) or judge.partition(":")[0] == EMBEDDED:
            raise ConfigError(
                f"cluster.verifier_gpus={found.verifier.gpus} serve the model that judge names, "
                f"and it is {config.judge!r}: name a model, or set verifier_gpus to 0."
            )
        told.append(f"judge={found.verifier.address}")
        command = _serve(judge.removeprefix("hf:"), found.verifier)
        made.append(Job("verifier", found.verifier, command, {}, logs / "verifier.log"))
    pairs = [word for one in told for word in ("--set", one)]
    train = (sys.executable, "-m", "attending.cli", "rl", *words, *pairs, "--out", str(out))
    for rank, place in enumerate(found.trainers):
        log = logs / f"trainer_{rank}.log" if rank else None
        made.append(Job(f"trainer {rank}", place, train, found.environment(rank), log))
    for number, place in enumerate(found.generators):
        own = {"VLLM_SERVER_DEV_MODE": "1"}
        log = logs / f"generator_{number}.log"
        command = _serve(str(served), place, *_sizes(config))
        made.append(Job(f"generator {number}", place, command, own, log, served))
    return made


def _sizes(config: RlConfig) -> tuple[str, ...]:
    dtype = "float32" if config.compute.precision == "float64" else config.compute.precision
    return "--max-model-len", str(config.max_prompt + config.max_tokens), "--dtype", dtype


def _serve(model: str, place: Place, *more: str) -> tuple[str, ...]:
    where = "--host", "0.0.0.0", "--port", str(place.port)  # other nodes ask it
    return "vllm", "serve", model, *where, "--tensor-parallel-size", str(place.gpus), *more


def launch(
    config: RlConfig,
    words: Sequence[str],
    out: Path,
    address: str,
    note: Callable[[str], object] = lambda _: None,
) -> Path:
    """Run a recipe on the cluster at `address` ("auto": the one of this machine).

    Raises:
        UsageError: Ray is not installed, or answers nowhere.
        ConfigError: The roles do not fit the cluster; see `plan` and `jobs`.
        EndpointError: A server ended before the trainers; the last saved state is whole.
        TrainingError: A trainer failed.
        CheckFailed: A trainer says so.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise UsageError("--ray needs Ray: pip install -e '.[scale]' in the clone") from None
    try:
        ray.init(address=address)
    except (ConnectionError, RuntimeError) as error:
        raise UsageError(f"no Ray cluster at {address} ({error}): `ray start` makes one.") from None
    try:
        nodes = {
            one["NodeManagerAddress"]: int(one["Resources"].get("GPU", 0))
            for one in ray.nodes()
            if one["Alive"]
        }
        found = jobs(config, words, out, plan(config.prompts, config.cluster, nodes))
        _watch(ray, found, note)
    finally:
        ray.shutdown()
    return out


def _watch(ray: Any, found: Sequence[Job], note: Callable[[str], object]) -> None:
    """Until all trainers have ended, or anything has failed; then nothing is left running."""
    remote = ray.remote(max_retries=0)(run_job)
    running = dict[Any, Job]()
    try:
        for job in found:
            own = {"num_gpus": job.place.gpus, "resources": {f"node:{job.place.node}": 0.001}}
            running[remote.options(name=job.name, num_cpus=0, **own).remote(job)] = job
            note(f"{job.name}: {job.place.gpus} GPUs of {job.place.node}")
        while any(job.name.startswith("trainer") for job in running.values()):
            done, _ = ray.wait([*running], num_returns=1)
            job = running.pop(done[0])
            try:
                code = ray.get(done[0])
            except ray.exceptions.RayError as error:
                reason = str(error).strip().splitlines()[-1]
                raise EndpointError(
                    f"{job.name} cannot run on {job.place.node} ({reason}): see that what it needs "
                    "is installed there. The last saved state is whole; --resume goes on."
                ) from None
            told = f"{job.name} on {job.place.node} ended with {code}; see {job.log or 'above'}."
            if not job.name.startswith("trainer"):
                raise EndpointError(f"{told} The last saved state is whole; --resume goes on.")
            if code:
                raise CheckFailed(told) if code == CheckFailed.exit_code else TrainingError(told)
    finally:  # servers last: a trainer that is to save its state may be waiting for an answer
        for is_trainer in (True, False):
            tasks = [
                t for t, job in running.items() if job.name.startswith("trainer") == is_trainer
            ]
            for task in tasks:
                ray.cancel(task)
            if tasks:  # longer than `run_job` waits before it kills
                ray.wait(tasks, num_returns=len(tasks), timeout=GRACE_SECONDS + 60)


def run_job(job: Job) -> int:
    """Run a process on this node to its end; its exit code. An interrupt ends it softly."""
    while job.waits_for and not _is_written(job.waits_for):
        time.sleep(LOOK_SECONDS)
    if job.log:
        job.log.parent.mkdir(parents=True, exist_ok=True)
    with (job.log or Path(os.devnull)).open("a", encoding="utf-8") as log:
        where = log if job.log else None
        environment = {**os.environ, **job.environment}
        process = subprocess.Popen(
            job.command, env=environment, stdout=where, stderr=where, start_new_session=True
        )
        try:
            while process.poll() is None:
                time.sleep(LOOK_SECONDS)  # Ray's interrupt does not end a wait for a process
            return process.returncode
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)


def _is_written(folder: Path) -> bool:
    """A model is there, and no newer one is being moved over it."""
    return (folder / "config.json").is_file() and not (folder / "next").exists()
