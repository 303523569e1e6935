"""`attending serve` under 1, 8 and 32 users, beside transformers' own server on the same weights.

    python benchmarks/serve.py [PYTHON_OF_THE_PEER]

The peer needs an environment of its own: pip install torch 'transformers[serving]'; name its
python, else only our server is measured. Both servers run in turn, never at the same time. Budget:
3 repeats of about 3 minutes, then a minute of 32 clients.
"""

import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from page import Measure, write

import attending

REPEATS = 3
ANSWER_TOKENS = 64
USERS = (1, 8)
BATCHING = "--continuous-batching"
TOPICS = ("fever", "asthma", "sleep", "vaccines", "diabetes", "back pain", "anaemia", "gout")
NOTES = """
SmolLM2-135M-Instruct, the default model, in float32 in both servers (saved to a folder by
`model.save`). Every user streams {answer} tokens at temperature 0, one request after another, two
each, after a warm-up; prompts are 40 to 50 tokens and differ between users and repeats, so nothing
is found in a cache. *Tokens/s* is of all users together, *first token* is the median wait from
sending the request. transformers' server is measured as it starts by default and with
`--continuous-batching`. The servers are started anew for every repeat and take turns.

**{clients} clients for {seconds:.0f} s** against our server, each streaming answers of 16 tokens
without a pause: {answered:,} requests answered whole, {lost} lost, {refused} refused; {rate:.0f}
tokens/s; first token after {median:.2f} s (median), {worst:.2f} s (95th percentile).
"""


def main() -> None:
    peer = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory() as folder:
        model = attending.load("default").save(Path(folder) / "model")
        servers: dict[str, Callable[[Path], Any]] = {"attending": ours}
        if peer:
            servers["transformers serve"] = lambda path: theirs(path, peer)
            servers["with its continuous batching"] = lambda path: theirs(path, peer, BATCHING)
        found: dict[tuple[str, str], list[float]] = {}
        for repeat in range(REPEATS):
            for name, start in servers.items():
                with start(model) as (url, key, model_id):
                    asyncio.run(load(url, key, model_id, 1, repeat=-1))
                    for users in USERS:
                        rate, first = asyncio.run(load(url, key, model_id, users, repeat))
                        count = "1 user" if users == 1 else f"{users} users"
                        found.setdefault((f"tokens/s, {count}", name), []).append(rate)
                        found.setdefault((f"first token, s, {count}", name), []).append(first)
        with ours(model) as (url, key, model_id):
            crowd = asyncio.run(hold_out(url, key, model_id, clients=32, seconds=60.0))
    notes = NOTES.format(answer=ANSWER_TOKENS, **crowd)
    rows = [Measure(quantity, subject, values) for (quantity, subject), values in found.items()]
    print(write("serve", "The server under users", notes, rows).read_text("utf-8"))


@contextmanager
def ours(model: Path) -> Iterator[tuple[str, str, str]]:
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"ATTENDING_CONFIG": home}
        command = [sys.executable, "-m", "attending.cli", "serve", str(model), "--json"]
        server = subprocess.Popen(
            [*command, "--port", "0"], env=environment, stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            text = ""
            while "}" not in text:
                text += server.stdout.readline()
            told = json.loads(text)
            yield f"{told['url']}/v1", told["new_key"], told["model"]
        finally:
            server.terminate()
            server.wait()


@contextmanager
def theirs(model: Path, python: str, *options: str) -> Iterator[tuple[str, str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(python).parent / "transformers"), "serve", "--port", str(port)]
    command += [
        "--host",
        "127.0.0.1",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        *options,
        str(model),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 120
        while time.monotonic() < until:
            try:
                httpx.get(f"{url}/health", timeout=1)
                break
            except httpx.HTTPError:
                assert server.poll() is None, "transformers serve did not start"
                time.sleep(0.2)
        yield f"{url}/v1", "-", str(model)
    finally:
        server.terminate()
        server.wait()


async def load(url: str, key: str, model: str, users: int, repeat: int) -> tuple[float, float]:
    """Tokens per second of all users, and the median wait for a first token."""
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=300) as web:

        async def one(user: int) -> list[tuple[int, float]]:
            done = []
            for turn in range(2):
                question = f"Explain {TOPICS[user]} to a student ({repeat}.{turn}.{users}) briefly."
                done.append(await answer(web, url, model, question, ANSWER_TOKENS))
            return done

        start = time.perf_counter()
        each = await asyncio.gather(*(one(user) for user in range(users)))
        seconds = time.perf_counter() - start
    several = [item for items in each for item in items]
    return sum(n for n, _ in several) / seconds, statistics.median(first for _, first in several)


async def answer(
    web: httpx.AsyncClient, url: str, model: str, question: str, tokens: int
) -> tuple[int, float]:
    """Pieces of text received, one a token, and seconds until the first."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "temperature": 0.0,
        "stream": True,
    }
    start, first, count = time.perf_counter(), 0.0, 0
    async with web.stream("POST", f"{url}/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise httpx.HTTPStatusError(
                (await response.aread()).decode(), request=response.request, response=response
            )
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise httpx.RemoteProtocolError(str(event["error"]))
                text = event["choices"][0]["delta"].get("content") if event["choices"] else None
                if text:
                    first = first or time.perf_counter() - start
                    count += 1
    if not count:
        raise httpx.RemoteProtocolError("an empty answer")
    return count, first


async def hold_out(
    url: str, key: str, model: str, *, clients: int, seconds: float
) -> dict[str, float]:
    """Many clients at once, without a pause: what was answered, lost and refused."""
    end = time.perf_counter() + seconds
    answered, lost, refused, tokens, waits = 0, 0, 0, 0, []

    async def one(user: int) -> None:
        nonlocal answered, lost, refused, tokens
        turn = 0
        while time.perf_counter() < end:
            question = f"Name a symptom of {TOPICS[user % len(TOPICS)]} ({user}.{turn})."
            turn += 1
            try:
                count, first = await answer(web, url, model, question, 16)
            except httpx.HTTPStatusError as error:
                refused += error.response.status_code == 429
                lost += error.response.status_code != 429
            except httpx.HTTPError:
                lost += 1
            else:
                answered, tokens = answered + 1, tokens + count
                waits.append(first)

    limits = httpx.Limits(max_connections=clients)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(headers=headers, timeout=300, limits=limits) as web:
        start = time.perf_counter()
        await asyncio.gather(*(one(user) for user in range(clients)))
        spent = time.perf_counter() - start
    return {
        "clients": clients,
        "seconds": spent,
        "answered": answered,
        "lost": lost,
        "refused": refused,
        "rate": tokens / spent,
        "median": statistics.median(waits),
        "worst": statistics.quantiles(waits, n=20)[-1],
    }


if __name__ == "__main__":
    main()
