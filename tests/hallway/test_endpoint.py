"""The endpoint client against a real server of raw HTTP, on loopback and on a Unix socket."""

import asyncio
import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from attending import endpoint as endpoints
from attending.endpoint import Endpoint, EndpointOptions, Reply, parse_seconds
from attending.errors import EndpointError, ReplyError, UsageError
from tests.recording import JSON, Wire, record_to, replay_from

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]
PROMPT = "Mrs. Zwiebelkuchen, 71, reports chest pain"
ASK = [{"role": "user", "content": PROMPT}]
KEY = "sk-very-secret-0123456789"
NOWHERE = "http://127.0.0.1:9"
FAST = EndpointOptions(backoff_base_seconds=0.0, timeout_seconds=5.0)
SSE = {"content-type": "text/event-stream"}
USAGE: dict[str, Any] = {"prompt_tokens": 100, "completion_tokens": 10}
USAGE["prompt_tokens_details"] = {"cached_tokens": 64}
USAGE["completion_tokens_details"] = {"reasoning_tokens": 7}
MALFORMED = rb"""{"choices": []}
{"choices": [{}]}
{"choices": [{"message": {"content": [{"type": "text"}]}}]}
{"choices": [{"message": {"content": "a"}}, {"message": {"content": "b"}}]}""".splitlines()
WRITER = """
import asyncio, pathlib, sys
from attending.endpoint import Endpoint, EndpointOptions
async def main(url, cache, prompt, who):
    async with Endpoint(url, "m", options=EndpointOptions(cache=pathlib.Path(cache))) as endpoint:
        for number in range(30):
            await endpoint.derived(f"{prompt} {number}", lambda reply: who)
            await endpoint.derived(f"{prompt} {number} {who}", lambda reply: who)
asyncio.run(main(*sys.argv[1:]))
"""


@dataclass
class Call:
    number: int
    path: str
    headers: dict[str, str]
    body: Any
    writer: asyncio.StreamWriter

    async def start(self, status: int, headers: dict[str, str], data: bytes = b"") -> None:
        lines = [f"HTTP/1.1 {status} X", *(f"{k}: {v}" for k, v in headers.items())]
        self.writer.write("\r\n".join([*lines, "connection: close", "", ""]).encode() + data)

    async def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        length = {"content-length": str(len(data))}
        await self.start(status, JSON | length | (headers or {}), data)

    async def answer(self, text: str = "yes", usage: Any = USAGE, after: float = 0.0) -> None:
        await asyncio.sleep(after)
        message = {"content": text, "reasoning_content": "thought"}
        choices = [{"message": message, "finish_reason": "stop"}]
        await self.send(200, {"model": "served", "choices": choices, "usage": usage})

    def event(self, delta: dict[str, str] | None, finish: str | None = None) -> None:
        choices = [] if delta is None else [{"delta": delta, "finish_reason": finish}]
        value = {"choices": choices, "usage": USAGE if delta is None else None}
        self.writer.write(b"data: " + json.dumps(value).encode() + b"\n\n")

    async def stream(self) -> None:
        await self.start(200, SSE)
        for delta in ({"reasoning": "hm"}, {"content": "yes"}, {}, None):
            self.event(delta, None if delta else "stop")
        self.writer.write(b"data: [DONE]\n\n")


Behave = Callable[[Call], Awaitable[None]]


@dataclass
class Server:
    behave: Behave
    url: str = ""
    calls: list[Call] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    busy: int = 0
    peak: int = 0
    gone: int = 0  # clients that left before the answer ended

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or "{}")
        self.calls.append(Call(len(self.calls), head[0].split()[1], headers, body, writer))
        self.times.append(time.monotonic())
        self.busy += 1
        self.peak = max(self.peak, self.busy)
        work = asyncio.ensure_future(self.behave(self.calls[-1]))
        left = asyncio.ensure_future(reader.read(1))
        await asyncio.wait([work, left], return_when=asyncio.FIRST_COMPLETED)
        self.busy -= 1
        self.gone += not work.done()
        work.cancel()
        left.cancel()
        await asyncio.gather(work, left, return_exceptions=True)
        writer.close()


@asynccontextmanager
async def asking(
    behave: Behave, *, unix: Path | None = None, key: str | None = None, **values: Any
) -> AsyncIterator[tuple[Server, Endpoint]]:
    server = Server(behave, f"unix:{unix}")
    if unix:
        listener = await asyncio.start_unix_server(server.serve, unix)
    else:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    endpoint = Endpoint(server.url, "judge", options=FAST.replace(**values), api_key=key)
    async with asyncio.timeout(10), listener, endpoint:
        yield server, endpoint


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(1):
        while not true():
            await asyncio.sleep(0.005)


def answer_after(status: int, headers: dict[str, str] | None = None) -> Behave:
    async def behave(call: Call) -> None:
        error = {"error": {"message": f"{PROMPT} {KEY}", "code": PROMPT, "type": KEY}}
        await (call.send(status, error, headers) if call.number == 0 else call.answer())

    return behave


async def hang_once(call: Call) -> None:
    if call.body["stream"]:
        await call.start(200, SSE)
        call.event({"content": "ye"})
    await (call.answer() if call.number else asyncio.sleep(60))


def verdict(reply: Reply) -> Any:
    if reply.text != "yes":
        raise ReplyError("no verdict")
    return {"met": True, "pair": (1, 2)}


async def test_a_reply_carries_text_reasoning_counts_and_provenance(tmp_path: Path) -> None:
    async with asking(Call.answer, unix=tmp_path / "socket") as (server, endpoint):
        reply = await endpoint.chat(ASK, min_p=0.1)
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("yes", "thought", "stop")
    assert (reply.input_tokens, reply.output_tokens, reply.cached_tokens) == (100, 10, 64)
    assert (reply.reasoning_tokens, reply.model, reply.tries) == (7, "served", 1)
    assert 0 < reply.latency_seconds <= endpoint.totals.seconds < 5
    sent = {"model": "judge", "messages": ASK, "min_p": 0.1, "stream": False}
    assert (server.calls[0].path, server.calls[0].body) == ("/v1/chat/completions", sent)


async def test_the_environment_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, NOWHERE)
    for name in ("API_KEY", "ADMIN_KEY", "ORG_ID", "PROJECT_ID", "CUSTOM_HEADERS"):
        monkeypatch.setenv(f"OPENAI_{name}", "X-Leak: leak\nAuthorization: Bearer leak")
    monkeypatch.setenv("SOME_KEY", KEY)
    async with asking(Call.answer, api_key_variable="SOME_KEY") as (server, endpoint):
        await endpoint.chat(ASK)
        async with Endpoint(server.url, "m") as keyless:
            await keyless.chat(ASK)
    headers = [call.headers for call in server.calls]
    assert [each.get("authorization") for each in headers] == [f"bearer {KEY}", None]
    assert not [word for word in ("leak", "stainless") if word in str(headers)]


async def test_a_completion_keeps_the_log_probs_of_its_prompt_as_they_came() -> None:
    raw = {"tokens": ["a", "b"], "token_logprobs": [None, -0.5], "top_logprobs": None}
    choice = {"text": "ab", "logprobs": raw, "finish_reason": "length"}
    async with asking(lambda call: call.send(200, {"choices": [choice]})) as (server, endpoint):
        reply = await endpoint.complete("ab", echo=True, logprobs=1, max_tokens=0)
    assert (reply.text, reply.logprobs, reply.input_tokens) == ("ab", raw, None)
    assert (server.calls[0].path, server.calls[0].body["echo"]) == ("/v1/completions", True)


async def test_a_stream_gives_pieces_as_they_come_and_ends_with_the_counts() -> None:
    async with asking(Call.stream) as (server, endpoint):
        pieces = [piece async for piece in endpoint.stream(ASK)]
    said = [(piece.text, piece.reasoning, piece.finish_reason) for piece in pieces]
    assert said == [("", "hm", None), ("yes", "", None), ("", "", "stop"), ("", "", "stop")]
    assert pieces[-1].output_tokens == endpoint.totals.output_tokens == 10
    assert server.calls[0].body["stream_options"] == {"include_usage": True}


async def test_no_more_requests_than_allowed_are_under_way() -> None:
    async with asking(lambda call: call.answer(after=0.1), max_concurrency=3) as (server, endpoint):
        await asyncio.gather(*(endpoint.chat(ASK) for _ in range(9)))
    assert (server.peak, endpoint.totals.requests, endpoint.totals.tries) == (3, 9, 9)


async def test_a_caller_that_backs_off_leaves_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    slow: dict[str, Any] = {"max_concurrency": 1, "backoff_base_seconds": 0.3}
    async with asking(answer_after(500), **slow) as (server, endpoint):
        first = asyncio.create_task(endpoint.chat(ASK))
        await until(lambda: len(server.calls) == 1)
        await endpoint.chat(ASK)
        assert (first.done(), (await first).tries) == (False, 2)


async def test_the_wait_the_server_asks_for_is_kept() -> None:
    asked = time.time() + 2
    date = {"retry-after": formatdate(asked, usegmt=True)}
    for headers in ({"retry-after": "0.4"}, {"retry-after": "0", "retry-after-ms": "400"}, date):
        async with asking(answer_after(429, headers)) as (server, endpoint):
            assert (await endpoint.chat(ASK)).tries == 2
        wait = server.times[1] - server.times[0]
        assert time.time() > int(asked) if headers is date else 0.39 < wait < 1


@pytest.mark.parametrize(("reset", "cap"), [("300ms", 60.0), ("6m0s", 0.3)])
async def test_a_used_up_limit_holds_every_caller_until_its_reset(reset: str, cap: float) -> None:
    async def behave(call: Call) -> None:
        left = "9" if call.number else "0"
        limits = {"x-ratelimit-remaining-tokens": left, "x-ratelimit-reset-tokens": reset}
        await call.send(200, {"choices": [{"message": {"content": "yes"}}]}, limits)

    async with asking(behave, backoff_cap_seconds=cap, max_concurrency=1) as (server, endpoint):
        await asyncio.gather(*(endpoint.chat(ASK) for _ in range(4)))
    assert 0.29 < server.times[1] - server.times[0] < 1
    assert server.times[3] - server.times[1] < 0.29


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 529, 307, 400, 401, 403, 404, 422])
async def test_a_status_that_may_pass_is_tried_again_another_is_named(status: int) -> None:
    async with asking(answer_after(status, {"location": NOWHERE}), key=KEY) as (server, endpoint):
        if status in (408, 409, 425, 429) or status >= 500:
            assert (await endpoint.chat(ASK)).tries == 2
        else:
            what = f"^judge at {server.url[7:]} failed with status {status} in try 1 of 5: "
            with pytest.raises(EndpointError, match=what) as caught:
                await endpoint.chat(ASK)
            assert not [secret for secret in (KEY, "Zwiebel") if secret in str(caught.value)]
            assert caught.value.__context__ is None
            assert (endpoint.totals.failures, len(server.calls)) == (1, 1)


@pytest.mark.parametrize("body", [*MALFORMED, b"<html>\xff", b"{"])
async def test_an_answer_of_another_form_is_a_reply_error_and_not_tried_again(body: bytes) -> None:
    async with asking(lambda call: call.send(200, body)) as (server, endpoint):
        with pytest.raises(ReplyError, match="not of the OpenAI form"):
            await endpoint.chat(ASK)
    assert (endpoint.totals.failures, len(server.calls)) == (1, 1)


async def test_refusal_silence_and_a_cut_reply_are_tried_again() -> None:
    cut = {"content-length": "999"}
    async with Endpoint(NOWHERE, "m", options=FAST.replace(max_tries=2)) as endpoint:
        with pytest.raises(EndpointError, match="ConnectError in try 2 of 2"):
            await endpoint.chat(ASK)
    async with asking(lambda call: call.start(200, cut, b"{"), max_tries=2) as (_, endpoint):
        with pytest.raises(EndpointError, match="RemoteProtocolError in try 2 of 2"):
            await endpoint.chat(ASK)
    async with asking(hang_once, timeout_seconds=0.1) as (server, endpoint):
        assert (await endpoint.chat(ASK)).tries == 2
        await until(lambda: server.gone == 1)


@pytest.mark.parametrize("how", ["cut", "closed", "error", "not json", "before"])
async def test_a_stream_that_breaks_is_tried_again_only_before_its_first_piece(how: str) -> None:
    async def behave(call: Call) -> None:
        if how == "before":
            return await (call.stream() if call.number else call.start(200, SSE))
        await call.start(200, SSE | ({"content-length": "9999"} if how == "cut" else {}))
        call.event({"content": "yes"})
        last = {"error": b'data: {"error": {"message": "no"}}\n\n', "not json": b"data: {\n\n"}
        return call.writer.write(last.get(how, b""))

    text, failed = "", False
    async with asking(behave) as (server, endpoint):
        try:
            async for piece in endpoint.stream(ASK):
                text += piece.text
        except (EndpointError, ReplyError) as error:
            failed = isinstance(error, ReplyError if how == "not json" else EndpointError)
    assert (text, len(server.calls)) == ("yes", 2 if how == "before" else 1)
    assert endpoint.totals.failures == failed == (how != "before")


@pytest.mark.parametrize("how", ["cancel a call", "leave a stream"])
async def test_giving_up_closes_the_connection_and_frees_the_place(how: str) -> None:
    async with asking(hang_once, max_concurrency=1) as (server, endpoint):
        if how == "cancel a call":
            task = asyncio.create_task(endpoint.chat(ASK))
            await until(lambda: len(server.calls) == 1)
            task.cancel()
        else:
            async with aclosing(endpoint.stream(ASK)) as pieces:
                assert (await anext(pieces)).text == "ye"
        await until(lambda: server.gone == 1)
        assert (await endpoint.chat(ASK)).text == "yes"
    assert (endpoint.totals.cancelled, endpoint.totals.failures) == (1, 0)


async def test_closing_an_endpoint_ends_what_is_under_way_and_what_waits() -> None:
    async with asking(hang_once, max_concurrency=1) as (server, endpoint):
        same = [endpoint.derived(ASK, verdict), endpoint.derived(ASK, verdict)]
        asks = asyncio.gather(endpoint.chat(ASK), *same, endpoint.chat(ASK), return_exceptions=True)
        await until(lambda: len(server.calls) == 1)
        await endpoint.__aexit__()
        results = await asks
        await until(lambda: server.gone == 1)
    assert {type(result) for result in results} == {EndpointError}
    assert (endpoint.totals.failures, endpoint.totals.requests, len(server.calls)) == (4, 4, 1)


async def test_identical_calls_at_once_make_one_request_and_outlive_a_cancelled_one() -> None:
    async with asking(lambda call: call.answer(after=0.05)) as (server, endpoint):
        results = await asyncio.gather(*(endpoint.derived(ASK, verdict) for _ in range(5)))
        assert [result.value for result in results] == [{"met": True, "pair": [1, 2]}] * 5
        assert (sum(result.cached for result in results), len(server.calls)) == (4, 1)
        tasks = [asyncio.create_task(endpoint.derived("a", verdict)) for _ in range(3)]
        await until(lambda: len(server.calls) == 2)
        tasks[0].cancel()
        assert [(await task).value["met"] for task in tasks[1:]] == [True, True]


async def test_the_cache_tells_samples_parameters_models_and_kinds_apart(tmp_path: Path) -> None:
    kept = tmp_path / "verdicts.sqlite"
    async with asking(lambda call: call.answer(), cache=kept) as (server, _):
        for model in ("m", "m", "other"):
            async with Endpoint(server.url, model, options=FAST.replace(cache=kept)) as endpoint:
                one = await endpoint.derived(ASK, verdict, temperature=1.0)
                assert one.cached == (model == "m" and len(server.calls) > 1)
                await endpoint.derived(ASK, verdict, temperature=1.0, sample=1)
                await endpoint.derived(ASK, verdict, temperature=1.0, kind="v2")
                await endpoint.derived(ASK, verdict, temperature=0.0)
                await endpoint.derived(PROMPT, verdict, temperature=1.0)
    assert len(server.calls) == 10
    assert not {"sample", "kind"} & (server.calls[1].body | server.calls[2].body).keys()


async def test_a_malformed_answer_is_asked_for_again_then_raised_and_never_kept() -> None:
    texts = iter(["maybe"] * 6 + ["yes"])
    async with asking(lambda call: call.answer(next(texts)), max_tries=3) as (server, endpoint):
        for _ in range(2):
            with pytest.raises(ReplyError, match="no verdict"):
                await endpoint.derived(ASK, verdict)
        assert len(server.calls) == 6
        assert (await endpoint.derived(ASK, verdict)).value["met"]


async def test_many_processes_share_one_cache_that_holds_no_texts(tmp_path: Path) -> None:
    path = tmp_path / "verdicts.sqlite"
    async with asking(Call.answer) as (server, _):
        program = [sys.executable, "-c", WRITER, server.url, str(path), PROMPT]
        writers = [subprocess.Popen([*program, who]) for who in "012"]
        assert [await asyncio.to_thread(writer.wait, 9) for writer in writers] == [0, 0, 0]
        calls = len(server.calls)
        async with Endpoint(
            server.url, "m", options=FAST.replace(cache=path), api_key=KEY
        ) as endpoint:
            for each in range(30):
                assert (await endpoint.derived(f"{PROMPT} {each}", verdict)).value in "012"
                for who in "012":
                    assert (await endpoint.derived(f"{PROMPT} {each} {who}", verdict)).value == who
            assert len(server.calls) == calls
            await endpoint.derived(PROMPT, verdict)
            files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert b"met" in files["verdicts.sqlite-wal"]
    for secret in ("Zwiebel", "chest", "yes", "thought", KEY):
        assert secret.encode() not in b"".join(files.values())
    assert path.stat().st_mode & 0o077 == 0


async def test_a_file_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no database, and long enough to be seen as none " * 20)
    with pytest.raises(UsageError, match=r"notes\.txt cannot be a cache"):
        Endpoint(NOWHERE, "m", options=FAST.replace(cache=str(path)))


async def test_a_cache_that_another_is_preparing_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "new.sqlite"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("CREATE TABLE other (x)")
    other.execute("BEGIN IMMEDIATE")  # here SQLite's own waiting does not help: it fails at once
    threading.Timer(0.3, other.execute, ["COMMIT"]).start()
    async with Endpoint(NOWHERE, "m", options=FAST.replace(cache=str(path))):
        assert path.stat().st_size
    other.close()


async def test_neither_key_nor_texts_are_shown_or_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with asking(answer_after(500), key=KEY) as (_, endpoint):
        shown = repr([await endpoint.chat(ASK), endpoint, vars(endpoint), endpoint.totals])
    for secret in (KEY, "Zwiebel", "thought", "in clear"):
        assert secret not in shown + caplog.text
    for url in ("http://localhost.example.org/v1", "https://example.org", "http://localhost:1"):
        async with Endpoint(url, "m", api_key=KEY), Endpoint(url, "m"):
            pass
    assert caplog.text.count("localhost.example.org in clear") == caplog.text.count("clear") == 1


async def test_cost_follows_the_counts_and_is_none_rather_than_a_guess() -> None:
    usages = iter([USAGE, USAGE, None])
    priced: dict[str, Any] = {"price_per_million": (3.0, 15.0)}
    async with asking(lambda call: call.answer(usage=next(usages)), **priced) as (_, endpoint):
        totals = endpoint.totals
        await endpoint.chat(ASK)
        await endpoint.chat(ASK)
        assert totals.cost == pytest.approx(2 * (100 * 3 + 10 * 15) / 1e6)
        assert (totals.input_tokens, totals.output_tokens, totals.cached_tokens) == (200, 20, 128)
        await endpoint.chat(ASK)
        assert totals.cost is None


async def test_a_recording_replays_the_same_answers_without_a_network(tmp_path: Path) -> None:
    async def behave(call: Call) -> None:
        await (call.stream() if call.body["stream"] else call.answer(str(call.number)))

    async def talk(url: str, wire: Wire) -> list[Any]:
        async with Endpoint(url, "m", options=FAST, api_key=KEY, wire=wire) as endpoint:
            replies = [await endpoint.chat(ASK), await endpoint.chat(ASK)]
            replies += [piece async for piece in endpoint.stream(ASK)]
            return [(r.text, r.reasoning, r.finish_reason, r.output_tokens) for r in replies]

    tape = tmp_path / "tape.jsonl"
    async with asking(behave) as (server, _):
        said = await talk(server.url, record_to(tape))
    assert [said[0][0], said[1][0]] == ["0", "1"]
    assert tape.read_text().startswith('"For tests only: ')
    wire = replay_from(tape)
    assert await talk(NOWHERE, wire) == said
    with pytest.raises(EndpointError, match=r"tape\.jsonl holds no answer to this request"):
        await talk(NOWHERE, wire)


async def test_open_takes_the_only_model_served_and_else_lists_them() -> None:
    served: list[dict[str, str]] = []
    async with asking(lambda call: call.send(200, {"data": served})) as (server, _):
        async with endpoints.open(server.url, model_id="named") as endpoint:
            assert (endpoint.model, server.calls) == ("named", [])
        with pytest.raises(UsageError, match=r"serves \[\]"):
            await endpoints.open(server.url).__aenter__()
        served.append({"id": "one"})
        async with endpoints.open(server.url) as endpoint:
            assert (endpoint.model, server.calls[-1].path) == ("one", "/v1/models")
        served.append({"id": "two"})
        with pytest.raises(UsageError, match="'one', 'two'"):
            await endpoints.open(server.url).__aenter__()


async def test_what_cannot_be_meant_is_the_callers_error() -> None:
    for url in ("ftp://x", "http://me:hunter2@x/v1", "http://x:y", "http://x?k=v"):
        with pytest.raises(UsageError, match=r"opened with endpoint\.open") as caught:
            await endpoints.open(url).__aenter__()
        assert "hunter2" not in str(caught.value)
    with pytest.raises(UsageError, match=r"opened with endpoint\.open"):
        Endpoint("out/model", "m")
    with pytest.raises(UsageError, match="NO_SUCH_KEY is not set"):
        Endpoint(NOWHERE, "m", options=FAST.replace(api_key_variable="NO_SUCH_KEY"))
    with pytest.raises(UsageError, match=r"^api_key holds no ASCII key"):
        Endpoint(NOWHERE, "m", api_key=f"{KEY}\n")
    async with Endpoint(NOWHERE, "m") as endpoint:
        with pytest.raises(TypeError, match="'stream'"):
            await endpoint.chat(ASK, stream=True)
        with pytest.raises(ValueError, match="not JSON compliant"):
            await endpoint.chat(ASK, temperature=float("nan"))
    assert (endpoint.totals.requests, endpoint.totals.cost) == (0, None)


async def test_waits_are_read_in_every_form_servers_use() -> None:
    forms = {"1.5": 1.5, "20": 20, "1s": 1, "6m0s": 360, "250ms": 0.25, "1h2m3.5s": 3723.5}
    assert {text: parse_seconds(text) for text in forms} == forms
    assert not any(map(parse_seconds, ("", "ms", "soon", "-5", "1x", "1.2.3", "1" * 50_000 + "x")))
