"""The remote sampler, against a local server that answers as vLLM documents it."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from attending.errors import EndpointError, ReplyError, UsageError
from attending.mesh import World
from attending.rl import vllm
from attending.rl.recipe import SamplerConfig
from attending.rl.sampler import Asked
from attending.rl.vllm import RemoteSampler
from attending.train.parallel import build
from attending.train.recipe import ComputeConfig
from attending.train.start import Start, open_start
from tests.train.making import make_model, make_tokenizer

ALONE = World(0, 0, 1)


class Server(ThreadingHTTPServer):
    """Writes back the prompt's first ids, or if it `varies` the next ones to odd seeds.

    `fails` answers are errors, those that it `spoils` lack their ids.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, dict[str, Any], str]] = []
        self.fails, self.spoils, self.status, self.varies = 0, False, 500, False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        assert self.headers["Content-Type"] == "application/json"  # as vLLM demands
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, self.headers.get("Authorization", "")))
        if self.server.fails:
            self.server.fails -= 1
            self.send_response(self.server.status)
            self.end_headers()
            return
        reply: dict[str, Any] = {}
        if self.path == "/v1/completions":
            at = 2 * (self.server.varies and body["seed"] % 2)
            ids = body["prompt"][at : at + 2]
            choice = {
                "token_ids": None if self.server.spoils else ids,
                "logprobs": {"token_logprobs": [-0.5] * len(ids)},
                "finish_reason": "stop" if body["prompt"][0] == 7 else "length",
            }
            reply = {"choices": [choice]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


@pytest.fixture
def start(tmp_path: Path) -> Start:
    return open_start(str(make_model(tmp_path / "model", make_tokenizer(tmp_path / "tokenizer"))))


def sampler(server: Server, start: Start, folder: Path) -> RemoteSampler:
    told = {"address": server.address, "folder": str(folder), "api_key_variable": "SAMPLER_KEY"}
    return RemoteSampler(SamplerConfig.build(told), start, frozenset({1}), 5, ALONE)


def test_ids_go_out_and_ids_come_back(
    server: Server, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMPLER_KEY", "secret")
    asked = [Asked("a", (7, 8, 9), 3), Asked("b", (4, 5), 4, 0.0)]
    found = dict(sampler(server, start, tmp_path / "served").sample(asked, version=6))
    assert found[0].ids == (7, 8) and found[0].logprobs == (-0.5, -0.5)
    assert [found[i].stop for i in (0, 1)] == ["stop", "length"]
    assert all(one.version == 6 for one in found.values()) and found[1].prompt == (4, 5)
    bodies = {body["seed"]: body for _, body, _ in server.seen}
    assert bodies[3]["prompt"] == [7, 8, 9] and bodies[3]["stop_token_ids"] == [1]
    assert bodies[3]["temperature"] == 1.0 and bodies[4]["temperature"] == 0.0
    assert {k: bodies[3][k] for k in vllm.PLAIN} == vllm.PLAIN
    assert bodies[3]["return_token_ids"] is True and bodies[3]["max_tokens"] == 5
    assert {key for _, _, key in server.seen} == {"Bearer secret"}


def test_weights_are_written_whole_and_reloaded(
    server: Server, start: Start, tmp_path: Path
) -> None:
    folder = tmp_path / "served"
    own = sampler(server, start, folder)
    decoder = build(start.arch, start.fill, ALONE, torch.device("cpu"), ComputeConfig())
    weights = {name: one.detach() for name, one in decoder.named_parameters()}
    own.load(decoder, lambda: weights)
    assert (folder / "tokenizer.json").is_file()
    changed = {name: one + 1 for name, one in weights.items()}
    own.load(decoder, lambda: changed)
    read = load_file(folder / "model.safetensors")
    assert all(torch.equal(read[name], changed[name]) for name in changed)
    assert not (folder / "next").exists()
    asked = [(path, body) for path, body, _ in server.seen]
    assert asked == 2 * [
        ("/collective_rpc", {"method": "reload_weights"}),
        ("/reset_prefix_cache", {}),
    ]
    foreign = make_model(tmp_path / "foreign", tmp_path / "tokenizer")
    with pytest.raises(UsageError, match="foreign is not empty, and would be overwritten"):
        sampler(server, start, foreign).load(decoder, lambda: weights)


def test_a_server_that_falters_is_asked_again_and_one_that_is_gone_ends_the_run(
    server: Server, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "PAUSE_SECONDS", 0.0)
    own = sampler(server, start, tmp_path / "served")
    server.fails = vllm.RETRIES - 1
    assert len(list(own.sample([Asked("a", (7,), 0)], 0))) == 1
    server.fails = vllm.RETRIES
    with pytest.raises(EndpointError, match=r"failed \(500\).*--resume"):
        list(own.sample([Asked("a", (7,), 0)], 0))
    server.fails, server.status = 1, 404
    with pytest.raises(EndpointError, match=r"was refused \(404\)"):
        list(own.sample([Asked("a", (7,), 0)], 0))
    server.spoils = True
    with pytest.raises(ReplyError, match="has no token ids"):
        list(own.sample([Asked("a", (7,), 0)], 0))
    server.shutdown()
    server.server_close()
    monkeypatch.setattr(vllm, "WAIT_SECONDS", 0.0)
    with pytest.raises(EndpointError, match=r"no connection.*runs on served"):
        list(own.sample([Asked("a", (7,), 0)], 0))
