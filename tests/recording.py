"""An endpoint's answers on tape, so that a test can ask a real model once and run without it after.

A tape holds prompts' hashes and answers in clear: for tests, never for patients' texts.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import httpx

from attending.errors import EndpointError

Wire = Callable[[httpx.AsyncBaseTransport], httpx.AsyncBaseTransport]
JSON = {"content-type": "application/json"}


def record_to(path: Path) -> Wire:
    """A `wire` that writes every answer to a JSONL file, in clear: for tests only."""
    path.write_text('"For tests only: this file holds texts in clear."\n')

    def wire(line: httpx.AsyncBaseTransport) -> httpx.AsyncBaseTransport:
        async def keep(request: httpx.Request) -> httpx.Response:
            response = await line.handle_async_request(request)
            key = hashlib.sha256(request.content).hexdigest()
            row = [key, response.status_code, (await response.aread()).decode()]
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            return response

        tape = httpx.MockTransport(keep)
        tape.aclose = line.aclose  # type: ignore[method-assign]
        return tape

    return wire


def replay_from(path: Path) -> Wire:
    """A `wire` that serves a recording, each answer once and in order, and nothing else."""
    rows = [json.loads(row) for row in path.read_text().splitlines()[1:]]

    def serve(request: httpx.Request) -> httpx.Response:
        for row in rows:
            if row[0] == hashlib.sha256(request.content).hexdigest():
                rows.remove(row)
                return httpx.Response(row[1], text=row[2], headers=JSON)
        raise EndpointError(f"{path.name} holds no answer to this request: record it again.")

    return lambda _: httpx.MockTransport(serve)
