"""From the port to the end: starting, announcing, draining, and an engine that dies."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
import uvicorn

from attending.errors import AttendingError, CheckpointError, EndpointError, UsageError
from attending.gateway.serve import Announcement, ServeOptions, serve
from tests.gateway import fake
from tests.gateway.fake import MODEL, Script
from tests.running import running

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
Story = Callable[[Announcement, httpx.AsyncClient], Awaitable[bool | None]]


class FakeEngine:
    """A child on a socket that lives in this process; `die` is what a crash does to it."""

    alive: ClassVar[list["FakeEngine"]] = []
    script = Script()
    fails_with: Exception | None = None
    before: Callable[[], Awaitable[None]] | None = None

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        self.model, self.options = model, options
        self.url = ""
        self.upstream = fake.app(script=self.script)
        self.code: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.is_stopped = False

    async def start(self) -> None:
        if before := type(self).before:
            await before()
        if self.fails_with:
            raise self.fails_with
        path = Path(os.environ["ENGINE_SOCKETS"]) / f"{len(self.alive)}.sock"
        config = uvicorn.Config(
            self.upstream, uds=str(path), log_config=None, timeout_graceful_shutdown=0
        )
        self.server = uvicorn.Server(config)
        self.server.capture_signals = suppress  # type: ignore[method-assign, assignment]
        self.task = asyncio.create_task(self.server.serve())
        while not self.server.started:
            await asyncio.sleep(0.01)
        self.url = f"unix:{path}"
        self.alive.append(self)

    async def wait(self) -> int:
        return await self.code

    async def die(self, code: int) -> None:
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()
        self.server.should_exit = self.server.force_exit = True
        await self.task
        self.code.set_result(code)

    async def stop(self) -> None:
        self.is_stopped = True
        if self.url and not self.task.done():
            self.server.should_exit = self.server.force_exit = True
            await self.task


@pytest.fixture(autouse=True)
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "list[FakeEngine]":
    monkeypatch.setenv("ENGINE_SOCKETS", str(tmp_path))
    monkeypatch.setenv("ATTENDING_CONFIG", str(tmp_path / "config"))
    monkeypatch.setattr(FakeEngine, "alive", [])
    monkeypatch.setattr(FakeEngine, "script", Script())
    monkeypatch.setattr(FakeEngine, "fails_with", None)
    monkeypatch.setattr(FakeEngine, "before", None)
    return FakeEngine.alive


def play(story: Story, **options: object) -> None:
    """Serve, and tell the story once the server is ready; a signal ends it unless the story did."""

    async def both() -> None:
        told: asyncio.Future[Announcement] = asyncio.get_running_loop().create_future()
        built = ServeOptions.build({"port": 0, **options})
        server = asyncio.create_task(serve(built, told.set_result, FakeEngine))
        await asyncio.wait((server, told), return_when=asyncio.FIRST_COMPLETED)
        if told.done():
            headers = {"authorization": f"Bearer {told.result().new_key}"}
            url = told.result().url
            verify = not url.startswith("https")
            async with httpx.AsyncClient(base_url=url, headers=headers, verify=verify) as client:
                async with asyncio.timeout(20):
                    if not await story(told.result(), client):
                        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(20):
            await server

    asyncio.run(both())


def test_it_announces_what_a_person_needs(engines: list[FakeEngine]) -> None:
    async def story(told: Announcement, client: httpx.AsyncClient) -> None:
        assert told.url.startswith("http://127.0.0.1:")
        assert told.model == MODEL
        assert told.note == "A script, not a model."
        assert told.warnings == ()
        assert (await client.get("/health")).status_code == 200
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        async with httpx.AsyncClient() as browser:
            assert (await browser.get(told.sign_in_url)).status_code == 303

    play(story, model="a-model", engine={"threads": 2})
    assert [(one.model, one.options) for one in engines] == [("a-model", {"threads": 2})]
    assert engines[0].is_stopped
    known: list[str | None] = []

    async def second(told: Announcement, client: httpx.AsyncClient) -> None:
        known.append(told.new_key)

    play(second)
    assert known == [None]  # made and shown at the first start alone


def test_a_port_that_is_taken_is_said_before_any_model_is_loaded(engines: list[FakeEngine]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        options = ServeOptions(port=port)
        with pytest.raises(UsageError, match=rf"port {port} .*--port"):
            asyncio.run(serve(options, lambda _: None, FakeEngine))
    assert not engines


def test_while_the_engine_loads_the_port_answers_that_it_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    seen: list[object] = []

    async def look() -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            for path in ("/health", "/healthz"):
                answer = await client.get(path)
                seen.extend((answer.status_code, answer.json()["status"]))

    async def story(told: Announcement, client: httpx.AsyncClient) -> None:
        assert told.url.endswith(f":{port}")

    FakeEngine.before = staticmethod(look)
    play(story, port=port)
    assert seen == [503, "starting", 200, "alive"]


def test_a_first_key_that_could_not_be_shown_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "fails_with", CheckpointError("no such file"))
    with pytest.raises(CheckpointError):
        asyncio.run(serve(ServeOptions(port=0), lambda _: None, FakeEngine))
    assert not (Path(os.environ["ATTENDING_CONFIG"]) / "keys.json").exists()


def test_a_model_that_cannot_be_loaded_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "fails_with", CheckpointError("no such file"))
    with pytest.raises(CheckpointError, match="no such file"):
        asyncio.run(serve(ServeOptions(port=0), lambda _: None, FakeEngine))


def test_an_engine_that_dies_is_restarted_once(
    engines: list[FakeEngine], caplog: pytest.LogCaptureFixture
) -> None:
    FakeEngine.script = Script(seconds_before=3)

    async def story(_: Announcement, client: httpx.AsyncClient) -> bool:
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        while not engines[0].upstream.started:
            await asyncio.sleep(0.01)
        FakeEngine.script = Script()
        await engines[0].die(9)
        answer = await asked
        assert answer.status_code == 502
        assert "restarted" in answer.json()["error"]["message"]
        while (await client.get("/health")).status_code != 200:
            await asyncio.sleep(0.02)
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200
        assert "attending_engine_restarts_total 1.0" in (await client.get("/metrics")).text
        await engines[1].die(11)
        return True

    with pytest.raises(AttendingError, match="code 11, the second time within ten minutes") as last:
        play(story)
    assert last.value.exit_code == 1
    assert "the engine ended with code 9; restarted" in caplog.text
    assert len(engines) == 2


def test_a_signal_lets_those_under_way_finish_and_refuses_others(
    engines: list[FakeEngine],
) -> None:
    FakeEngine.script = Script(pieces=("w ",) * 10, seconds_between=0.1)

    async def story(_: Announcement, client: httpx.AsyncClient) -> bool:
        body = CHAT | {"stream": True}
        streamed = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        whole = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
        while engines[0].upstream.started < 2:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.1)
        health = await client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "draining"})
        refused = await client.post("/v1/chat/completions", json=CHAT)
        assert refused.status_code == 503
        assert refused.headers["connection"] == "close"
        assert "[DONE]" in (await streamed).text
        assert (await whole).status_code == 200
        return True

    play(story)


@pytest.mark.parametrize(("signals", "drain_seconds"), [(2, 60.0), (1, 0.3)])
def test_draining_has_an_end_and_a_second_signal_ends_at_once(
    engines: list[FakeEngine], signals: int, drain_seconds: float
) -> None:
    FakeEngine.script = Script(pieces=("w ",) * 1000, seconds_between=0.1)

    async def story(_: Announcement, client: httpx.AsyncClient) -> bool:
        body = CHAT | {"stream": True}
        asked = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        while not engines[0].upstream.started:
            await asyncio.sleep(0.01)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.1)
        with suppress(httpx.HTTPError):
            await asyncio.wait_for(asked, 8)
        return True

    play(story, drain_seconds=drain_seconds)


def test_what_outlives_the_draining_ends_in_an_error_that_says_so(
    engines: list[FakeEngine],
) -> None:
    FakeEngine.script = Script(pieces=("w ",) * 1000, seconds_between=0.1)

    async def story(_: Announcement, client: httpx.AsyncClient) -> bool:
        asked = [
            asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"stream": stream}))
            for stream in (True, False)
        ]
        while engines[0].upstream.started < 2:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        streamed, whole = await asyncio.wait_for(asyncio.gather(*asked), 8)
        assert "the server is ending" in streamed.text.split("data: ")[-1]
        assert "[DONE]" not in streamed.text
        assert whole.status_code == 503
        assert "the server is ending" in whole.json()["error"]["message"]
        return True

    play(story, drain_seconds=0.3)


def test_another_server_stands_in_for_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSTREAM_KEY", "sk-up")
    upstream = fake.app()

    async def story(told: Announcement, client: httpx.AsyncClient) -> None:
        assert told.model == MODEL
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200

    with running(upstream) as address:
        for url in (address, f"{address}/v1", f"{address}/v1/"):
            config = Path(os.environ["ATTENDING_CONFIG"])
            (config / "keys.json").unlink(missing_ok=True)
            play(story, upstream=url, upstream_key_variable="UPSTREAM_KEY")
    assert upstream.headers[-1]["authorization"] == "Bearer sk-up"
    with pytest.raises(EndpointError, match="cannot be reached"):
        play(story, upstream="http://127.0.0.1:9/v1")
    with pytest.raises(UsageError, match="NO_SUCH must hold"):
        play(story, upstream=address, upstream_key_variable="NO_SUCH")


def test_a_server_on_the_network_without_tls_warns() -> None:
    async def story(told: Announcement, client: httpx.AsyncClient) -> None:
        assert "without encryption" in told.warnings[0]
        assert told.url.startswith("http://127.0.0.1:")
        assert (await client.get("/health", headers={"host": "ward.example"})).status_code == 200

    play(story, host="0.0.0.0", allow_hosts=["ward.example"])


def test_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -out"
    if subprocess.run([*make.split(), certificate, "-keyout", key], capture_output=True).returncode:
        pytest.skip("openssl makes no certificate here")

    async def story(told: Announcement, client: httpx.AsyncClient) -> None:
        assert told.url.startswith("https://")
        assert told.warnings == ()
        answer = await client.get(told.sign_in_url.removeprefix(told.url))
        assert "Secure" in answer.headers["set-cookie"]

    play(story, tls_certificate=str(certificate), tls_key=str(key))
    with pytest.raises(UsageError, match="both a certificate and its key"):
        play(story, tls_certificate=str(certificate))
    key.write_text("no key")
    with pytest.raises(UsageError, match="cannot be used"):
        play(story, tls_certificate=str(certificate), tls_key=str(key))


def test_the_gateway_imports_no_torch() -> None:
    code = "import sys, attending.gateway.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_connection_without_a_request_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attending.gateway.serve.HEAD_SECONDS", 0.2)

    async def story(told: Announcement, client: httpx.AsyncClient) -> None:
        address = (httpx.URL(told.url).host, httpx.URL(told.url).port)
        for begun in (b"", b"GET /health HTT"):
            reader, writer = await asyncio.open_connection(*address)
            writer.write(begun)
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()

    play(story)
