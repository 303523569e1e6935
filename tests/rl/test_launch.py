"""What is placed on a Ray cluster: the processes, and a run of two ranks on a local one."""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from attending.errors import ConfigError, EndpointError, TrainingError
from attending.rl import launch
from attending.rl.launch import Job, jobs, run_job
from attending.rl.placement import Place, plan
from attending.rl.recipe import ClusterConfig, RlConfig
from tests.rl.test_loop import Made, recipe
from tests.rl.test_loop import made as made  # a fixture

HERE = Place("127.0.0.1", 0, 1024)
NEEDS_RAY = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="needs ray: pip install -e '.[scale]'"
)
VLLM = """#!{python}
import http.server, json, sys
from pathlib import Path
folder, port = sys.argv[2], int(sys.argv[sys.argv.index("--port") + 1])
assert (Path(folder) / "model.safetensors").is_file()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with open(f"{{folder}}.seen", "a") as seen:
            seen.write(f"{{port}} {{self.path}}\\n")
        ids = [body["seed"] % 5 + 3, 9] if "seed" in body else []
        choice = {{"token_ids": ids, "finish_reason": "length",
                   "logprobs": {{"token_logprobs": [-5.0] * len(ids)}}}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({{"choices": [choice]}}).encode())
{end}
http.server.ThreadingHTTPServer(("0.0.0.0", port), Handler).serve_forever()
"""


def test_each_role_has_its_command(tmp_path: Path) -> None:
    config = RlConfig.load("rubrics", "rl", ["judge=hf:some/judge"])
    cluster = ClusterConfig(trainers=2, generator_gpus=2, verifier_gpus=1, port=3000)
    found = jobs(config, ["rubrics", "--resume"], tmp_path / "run", plan(16, cluster, {"a": 7}))
    judge, first, second, *servers = found
    assert judge.command[:3] == ("vllm", "serve", "some/judge") and judge.waits_for is None
    assert judge.command[3:] == (
        *("--host", "0.0.0.0", "--port", "3001"),
        *("--tensor-parallel-size", "1"),
    )
    assert first.command == second.command and first.log is None
    assert first.command[3:6] == ("rl", "rubrics", "--resume")
    told = " ".join(first.command)
    assert 'sampler.address=["http://a:3002", "http://a:3003"]' in told
    assert "judge=http://a:3001" in told and f"--out {tmp_path / 'run'}" in told
    assert [one.environment["RANK"] for one in (first, second)] == ["0", "1"]
    assert [one.waits_for for one in servers] == [tmp_path / "run.served"] * 2
    assert all(one.environment == {"VLLM_SERVER_DEV_MODE": "1"} for one in servers)
    read = RlConfig.load("rubrics", "rl", [w for w in first.command[6:-2] if w != "--set"])
    assert read.sampler.address == ("http://a:3002", "http://a:3003")


def test_a_verifier_serves_a_model(tmp_path: Path) -> None:
    placed = plan(16, ClusterConfig(verifier_gpus=1), {"a": 3})
    with pytest.raises(ConfigError, match="name a model"):
        jobs(RlConfig.load("rules", "rl", []), ["rules"], tmp_path, placed)


def test_a_server_starts_when_its_model_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "LOOK_SECONDS", 0.01)
    model, log = tmp_path / "served", tmp_path / "logs" / "server.log"
    command = (sys.executable, "-c", "import os, sys; print(os.environ['A']); sys.exit(5)")
    (model / "next").mkdir(parents=True)
    (model / "config.json").touch()
    real, looks = time.sleep, list[bool]()

    def sleep(seconds: float) -> None:
        looks.append(log.exists())
        if (model / "next").exists():
            (model / "next").rmdir()
        real(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    assert run_job(Job("server", HERE, command, {"A": "told"}, log, model)) == 5
    assert looks[0] is False and log.read_text("utf-8") == "told\n"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A local one that says it has four GPUs, and a `vllm` that answers as vLLM documents it."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    binary = tmp_path / "bin" / "vllm"
    binary.parent.mkdir()
    end = "    def log_message(self, *_): pass"
    binary.write_text(VLLM.format(python=sys.executable, end=end), "utf-8")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", f"{binary.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    started = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_gpus": 4, "num_cpus": 2}
    )
    yield started
    started.shutdown()


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Lines of TOML."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{before}{name}.")
        elif value is not None:
            yield f"{before}{name} = {json.dumps(value)}"


@NEEDS_RAY
def test_two_trainers_and_two_servers_on_a_local_cluster(
    cluster: Any, made: Made, tmp_path: Path
) -> None:
    file, out = tmp_path / "own.toml", tmp_path / "run"
    told_to = recipe(made, cluster={"trainers": 2, "port": 31000}).model_dump(mode="json")
    file.write_text("\n".join(flat(told_to)), "utf-8")
    config = RlConfig.load(str(file), "rl", [])
    told = list[str]()
    launch.launch(config, [str(file)], out, cluster.address, told.append)
    assert load_file(out / "model.safetensors")
    seen = Path(f"{out}.served.seen").read_text("utf-8").splitlines()
    reloads = [line for line in seen if line.endswith("/collective_rpc")]
    assert {line.split()[0] for line in reloads} == {"31002", "31003"}
    assert len(reloads) == 2 * (config.steps + 1)
    assert [line.split(":")[0] for line in told] == [
        *("trainer 0", "trainer 1", "generator 0", "generator 1"),
    ]


@NEEDS_RAY
@pytest.mark.parametrize(("name", "error"), [("trainer 0", TrainingError), ("x", EndpointError)])
def test_what_fails_takes_the_rest_down(
    cluster: Any, tmp_path: Path, name: str, error: type[Exception]
) -> None:
    import ray

    pid = tmp_path / "pid"
    lasting = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    failing = f"import os, time\nwhile not os.path.exists({str(pid)!r}): time.sleep(0.1)\nexit(4)"
    node = cluster.head_node.node_ip_address
    found = [
        Job("trainer 1", Place(node, 1, 1), (sys.executable, "-c", lasting), {}, None),
        Job(name, Place(node, 1, 1), (sys.executable, "-c", failing), {}, None),
    ]
    ray.init(address=cluster.address)
    try:
        with pytest.raises(error, match=f"{name} on .* ended with 4"):
            launch._watch(ray, found, lambda _: None)
    finally:
        ray.shutdown()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text("utf-8")), 0)
