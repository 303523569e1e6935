"""Answers by vLLM's servers over HTTP, which are given the weights after every update.

The run makes a model folder that all see (`sampler.folder`) and waits for each server, which is to
be started on it with `VLLM_SERVER_DEV_MODE=1`. After an update the weights are written whole and
renamed; `POST /collective_rpc` asks the workers to `reload_weights`, and what was cached of the old
ones is dropped. Prompts go as ids and answers come back as ids (`return_token_ids`), each with its
log-probability; nothing is re-tokenised. Never run against a real server here: tested on a local
one that answers as vLLM documents it.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import httpx
from torch import Tensor

from attending.errors import EndpointError, ReplyError, UsageError
from attending.mesh import World
from attending.model.decoder import Decoder
from attending.model.weights import save_model
from attending.rl.recipe import SamplerConfig
from attending.rl.sampler import Asked
from attending.rl.types import Rollout
from attending.train.parallel import barrier
from attending.train.start import Start

SECONDS = 600.0  # for one answer, and for a reload
RETRIES, PAUSE_SECONDS = 3, 2.0
WAIT_SECONDS = 900.0  # for a server that loads a large model
MARK, ONE_FILE = ".attending", 1 << 62
GENERATION = {"do_sample": True}  # vLLM takes its defaults from there: none that bend the policy
PLAIN = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


class RemoteSampler:
    """See `sampler.Sampler`; every rank asks for its own answers, rank 0 pushes the weights."""

    def __init__(
        self,
        config: SamplerConfig,
        start: Start,
        stop_ids: frozenset[int],
        max_tokens: int,
        place: World,
    ) -> None:
        """Asks nothing yet."""
        assert config.address is not None and config.folder is not None
        key = os.environ.get(config.api_key_variable or "", "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        addresses = (config.address,) if isinstance(config.address, str) else config.address
        self._clients = [
            httpx.Client(
                base_url=one.rstrip("/").removesuffix("/v1"), headers=headers, timeout=SECONDS
            )
            for one in addresses
        ]
        self._met = set[httpx.Client]()
        self._folder, self._start, self._place = Path(config.folder), start, place
        self._stops, self._max_tokens, self._running = stop_ids, max_tokens, config.running

    def load(self, decoder: Decoder, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write the weights where the server reads them, and have it read them.

        Raises:
            UsageError: The folder holds a model that no run put there.
        """
        tensors = weights()
        if self._place.rank == 0:
            if not (self._folder / MARK).exists():
                if self._folder.is_dir() and any(self._folder.iterdir()):
                    raise UsageError(
                        f"{self._folder.name} is not empty, and would be overwritten: name a new "
                        "folder with sampler.folder, and serve that."
                    )
                self._folder.mkdir(parents=True, exist_ok=True)
                (self._folder / MARK).touch()
            draft = self._folder / "next"
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            own = self._start.tokenizer, GENERATION | {"eos_token_id": sorted(self._stops)}
            save_model(draft, decoder.arch, tensors, *own, max_shard_bytes=ONE_FILE)
            for file in draft.iterdir():
                file.replace(self._folder / file.name)
            draft.rmdir()
            for client in self._clients:
                self._post(client, "/collective_rpc", {"method": "reload_weights"})
                self._post(client, "/reset_prefix_cache", {})  # keys and values of those before
        barrier()

    def sample(self, asked: Sequence[Asked], version: int) -> Iterator[tuple[int, Rollout]]:
        """As many requests at once as `sampler.running` says, dealt to the servers in turn."""
        with ThreadPoolExecutor(max_workers=self._running) as threads:
            each = cycle(self._clients)
            waiting = {
                threads.submit(self._one, next(each), one, version): at
                for at, one in enumerate(asked)
            }
            try:
                for done in as_completed(waiting):
                    yield waiting[done], done.result()
            finally:
                for one in waiting:
                    one.cancel()

    def _one(self, client: httpx.Client, asked: Asked, version: int) -> Rollout:
        body = {
            "model": str(self._folder),
            "prompt": list(asked.prompt),
            "max_tokens": self._max_tokens,
            "temperature": asked.temperature,
            **PLAIN,
            "seed": asked.seed,
            "logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": sorted(self._stops),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
        }
        reply = self._post(client, "/v1/completions", body)
        try:
            (choice,) = reply["choices"]
            ids = tuple(int(token) for token in choice["token_ids"])
            logprobs = tuple(float(value) for value in choice["logprobs"]["token_logprobs"])
            stop: Literal["stop", "length"]
            stop = "stop" if choice["finish_reason"] == "stop" else "length"
        except (KeyError, TypeError, ValueError) as error:
            raise ReplyError(
                f"the server's answer has no token ids with log-probabilities ({error}): expected "
                "vLLM 0.10.2 or newer, which knows return_token_ids."
            ) from None
        return Rollout(asked.case, asked.prompt, ids, logprobs, stop, asked.seed, version)

    def _post(self, client: httpx.Client, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """EndpointError after some tries, or at once where trying again would not help."""
        tries, deadline = 0, time.monotonic() + WAIT_SECONDS
        while True:
            try:
                reply = client.post(path, json=body)
                self._met.add(client)
                if reply.status_code < 500:
                    break
                tries, told = tries + 1, str(reply.status_code)
            except httpx.ConnectError:  # not there yet, or not any more
                is_new = client not in self._met and time.monotonic() <= deadline
                tries, told = 0 if is_new else tries + 1, "no connection"
            except httpx.HTTPError as error:
                tries, told = tries + 1, type(error).__name__
            if tries >= RETRIES:
                raise EndpointError(
                    f"{path} of the sampling server failed ({told}): see that it runs on "
                    f"{self._folder.name}, with VLLM_SERVER_DEV_MODE=1. The last saved state is "
                    "whole; --resume goes on."
                )
            time.sleep(PAUSE_SECONDS)
        if reply.is_error:
            raise EndpointError(f"{path} was refused ({reply.status_code}): {reply.text[:200]}")
        found: dict[str, Any] = reply.json() if reply.content else {}
        return found
