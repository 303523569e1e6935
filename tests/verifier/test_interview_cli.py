"""`attending consult` and `attending judge` as commands, with a doctor on loopback."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attending import cli
from attending.errors import AttendingError, ConfigError, UsageError

SCRIPT = ["Where does it hurt?", "You have acute appendicitis. Go to the hospital today."]


@contextmanager
def doctor(script: list[str]) -> Iterator[str]:
    """An endpoint that says these, one after another, and then fails."""
    left = list(script)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": "scripted"}]})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if not left:
                self.reply(400, {"error": {"message": "no more"}})
                return
            choice = {"message": {"content": left.pop(0)}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 20, "completion_tokens": 5}
            self.reply(200, {"model": "scripted", "choices": [choice], "usage": usage})

        def reply(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def test_consult_writes_a_trace_and_pure_json(tmp_path: Path) -> None:
    with doctor(SCRIPT) as url:
        to = str(tmp_path / "out")
        done = run("consult", "appendicitis", url, "--judge", "none", "--json", "--out", to)
    assert done.exit_code == 0, done.exception
    result = json.loads(done.stdout)
    assert (result["turns"], result["output_tokens"], result["error"]) == (2, 10, "")
    rows = [json.loads(line) for line in (tmp_path / "out/trace.jsonl").read_text().splitlines()]
    assert rows[0]["models"] == {"doctor": "scripted", "patient": "embedded", "judge": ""}
    assert [row["text"] for row in rows if row.get("speaker") == "doctor"] == SCRIPT
    assert (tmp_path / "out/trace.html").is_file()
    assert "no person" in done.stderr


def test_without_json_the_conversation_is_shown(tmp_path: Path) -> None:
    with doctor([SCRIPT[1] + " [bold]x[/]"]) as url:
        done = run("consult", "appendicitis", url, "--judge", "none", "--out", str(tmp_path))
    assert done.exit_code == 0
    assert "doctor You have acute appendicitis" in done.stdout and "[bold]x[/]" in done.stdout
    assert "trace.html" in done.stdout


def test_a_doctor_that_fails_leaves_what_was_said(tmp_path: Path) -> None:
    with doctor(SCRIPT[:1]) as url:
        done = run("consult", "appendicitis", url, "--judge", "none", "--out", str(tmp_path))
    assert isinstance(done.exception, AttendingError) and "status 400" in str(done.exception)
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 5
    assert "It broke off" in (tmp_path / "trace.html").read_text()


def test_what_is_wrong_is_said_before_anything_is_asked(tmp_path: Path) -> None:
    criterion = {"criterion": "Names appendicitis.", "points": 5, "tags": []}
    row = {"prompt_id": "r", "prompt": [{"role": "user", "content": "x"}]}
    twice = tmp_path / "twice.jsonl"
    twice.write_text(json.dumps(row | {"rubrics": [criterion, criterion]}))
    zero = tmp_path / "zero.jsonl"
    zero.write_text(json.dumps(row | {"rubrics": [criterion | {"points": 11}]}))
    with doctor([]) as url:
        for options, error, text in (
            (["--rubric", str(twice)], ConfigError, "Each statement counts once"),
            (["--rubric", str(zero)], ConfigError, "zero.jsonl:1: criterion .* has 11 points"),
            (["--judge", url], UsageError, "it would grade itself"),
            (["--patient", url], UsageError, "would be doctor and patient"),
        ):
            done = run("consult", "appendicitis", url, "--out", str(tmp_path / "out"), *options)
            assert isinstance(done.exception, error)
            with pytest.raises(error, match=text):
                raise done.exception
    done = run("consult", "apendicitis", "default")
    assert isinstance(done.exception, UsageError) and "appendicitis" in str(done.exception)


def test_without_the_judges_base_nothing_is_judged_and_it_is_said(tmp_path: Path) -> None:
    with doctor(SCRIPT[1:]) as url:
        done = run("consult", "appendicitis", url, "--json", "--out", str(tmp_path))
        assert done.exit_code == 0 and "Nothing is judged" in done.stderr
        assert "score" not in json.loads(done.stdout)
        done = run("consult", "appendicitis", url, "--judge", "embedded", "--out", str(tmp_path))
        assert isinstance(done.exception, AttendingError) and "pull judge" in str(done.exception)
