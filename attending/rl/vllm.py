"""Answers by a vLLM server over HTTP, which is given the weights after every update.

The server runs from a model folder that both see (`sampler.folder`) with `VLLM_SERVER_DEV_MODE=1`;
the weights are written there whole and renamed, then `POST /collective_rpc` asks its workers to
`reload_weights`. Prompts go as ids and answers come back as ids (`return_token_ids`), each with its
log-probability; nothing is re-tokenised. Never run against a real server here: tested on a local
one that answers as vLLM documents it.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Literal

import httpx
from torch import Tensor

from attending.errors import EndpointError, ReplyError
from attending.mesh import World
from attending.model.decoder import Decoder
from attending.model.files import SINGLE
from attending.model.weights import save_model, save_weights
from attending.rl.recipe import SamplerConfig
from attending.rl.sampler import Asked
from attending.rl.types import Rollout
from attending.train.parallel import barrier
from attending.train.start import Start

SECONDS = 600.0  # for one answer, and for a reload
RETRIES = 3


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
        address = config.address.rstrip("/").removesuffix("/v1")
        self._client = httpx.Client(base_url=address, headers=headers, timeout=SECONDS)
        self._folder, self._start, self._place = Path(config.folder), start, place
        self._stops, self._max_tokens, self._running = stop_ids, max_tokens, config.running

    def load(self, decoder: Decoder, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write the weights where the server reads them, and have it read them."""
        tensors = weights()
        if self._place.rank == 0:
            if not (self._folder / "config.json").is_file():
                self._folder.mkdir(parents=True, exist_ok=True)
                save_model(
                    self._folder,
                    decoder.arch,
                    tensors,
                    self._start.tokenizer,
                    self._start.generation,
                )
            else:
                draft = self._folder / "next"
                draft.mkdir(exist_ok=True)
                save_weights(tensors, draft, max_shard_bytes=1 << 62)
                (draft / SINGLE).rename(self._folder / SINGLE)
                draft.rmdir()
            self._post("/collective_rpc", {"method": "reload_weights"})
        barrier()

    def sample(self, asked: Sequence[Asked], version: int) -> Iterator[tuple[int, Rollout]]:
        """As many requests at once as `sampler.running` says."""
        with ThreadPoolExecutor(max_workers=self._running) as threads:
            waiting = {threads.submit(self._one, one, version): at for at, one in enumerate(asked)}
            try:
                for done in as_completed(waiting):
                    yield waiting[done], done.result()
            finally:
                for one in waiting:
                    one.cancel()

    def _one(self, asked: Asked, version: int) -> Rollout:
        body = {
            "model": str(self._folder),
            "prompt": list(asked.prompt),
            "max_tokens": self._max_tokens,
            "temperature": asked.temperature,
            "seed": asked.seed,
            "logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": sorted(self._stops),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
        }
        reply = self._post("/v1/completions", body)
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

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """EndpointError after some tries, or at once where trying again would not help."""
        for attempt in range(1, RETRIES + 1):
            try:
                reply = self._client.post(path, content=json.dumps(body))
                if reply.status_code < 500:
                    break
                told = f"{reply.status_code}"
            except httpx.HTTPError as error:
                told = type(error).__name__
            if attempt == RETRIES:
                raise EndpointError(
                    f"{path} of the sampling server failed {RETRIES} times ({told}): see that it "
                    "runs, with VLLM_SERVER_DEV_MODE=1. The last saved state is whole; --resume "
                    "goes on."
                )
        if reply.is_error:
            raise EndpointError(f"{path} was refused ({reply.status_code}): {reply.text[:200]}")
        found: dict[str, Any] = reply.json() if reply.content else {}
        return found
