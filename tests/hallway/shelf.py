"""A file server that misbehaves as a test wants: for downloads, a package index, a Hub."""

import hashlib
import io
import json
import re
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(files: dict[str, bytes]) -> bytes:
    info = "tiny_model-1.0.dist-info"
    files = files | {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny_model\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return packed.getvalue()


@dataclass
class Request:
    method: str
    path: str
    start: int | None
    token: str
    sent: int = 0


@dataclass
class Shelf:
    """A file server that a test can make misbehave."""

    address: str = ""
    stand_in: Path = Path()
    files: dict[str, bytes] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    has_ranges: bool = True
    seconds_per_chunk: float = 0.0
    break_after: int | None = None  # bytes of a body, at every request
    claimed_bytes: int | None = None  # a length that is not true

    def offer(self, wheel: bytes, digest: str) -> None:
        """Serve a wheel, with a stand-in for pip that tells its address and this hash."""
        self.files["/tiny.whl"] = wheel
        archive = {"hashes": {"sha256": digest} if digest else {}}
        info = {"url": f"{self.address}/tiny.whl", "archive_info": archive}
        report = json.dumps({"install": [{"download_info": info}]})
        self.stand_in.write_text(f"print({report!r})")

    def gets(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET"]

    def starts(self) -> list[int | None]:
        return [request.start for request in self.gets()]

    def sent(self) -> int:
        return sum(request.sent for request in self.gets())


def handler(shelf: Shelf) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def do_HEAD(self) -> None:
            self.head()

        def do_GET(self) -> None:
            body, request = self.head()
            for at in range(0, len(body), 65536):
                broken = None if self.path.endswith("/") else shelf.break_after
                if broken is not None and at >= broken:
                    return
                time.sleep(shelf.seconds_per_chunk)
                try:
                    self.wfile.write(body[at : at + 65536])
                except OSError:
                    return  # the client has gone
                request.sent += len(body[at : at + 65536])

        def head(self) -> tuple[bytes, Request]:
            path, token = self.path.partition("?")[0], self.headers.get("Authorization", "")
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start = int(asked[1]) if asked else None
            shelf.requests.append(request := Request(self.command, path, start, token))
            body, status, headers = shelf.files.get(path, b""), 200, {}
            if path in shelf.redirects:
                status, headers["Location"] = 302, shelf.redirects[path]
            elif path not in shelf.files:
                status = 404
            elif shelf.has_ranges:
                headers["Accept-Ranges"] = "bytes"
                if asked and int(asked[1]) >= len(body):
                    body, status = b"", 416
                elif asked:
                    end = min(int(asked[2] or len(body)), len(body) - 1)
                    headers["Content-Range"] = f"bytes {asked[1]}-{end}/{len(body)}"
                    body, status = body[int(asked[1]) : end + 1], 206
            is_json = path.startswith("/api/")
            headers["Content-Type"] = "application/json" if is_json else "text/html"
            headers["Content-Length"] = str(shelf.claimed_bytes or len(body))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            return body, request

    return Handler


def publish(hub: Shelf, commit: str, files: dict[str, bytes], kind: str = "models") -> None:
    """Make a shelf the Hub of org/tiny, at its main branch and at v1."""
    prefix = "" if kind == "models" else f"/{kind}"
    siblings: list[dict[str, object]] = []
    for name, data in files.items():
        hub.files[f"{prefix}/org/tiny/resolve/{commit}/{quote(name)}"] = data
        siblings.append({"rfilename": name, "size": len(data)})
        if name.endswith((".safetensors", ".bin", ".parquet")):
            siblings[-1]["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 9}
    info = json.dumps({"id": "org/tiny", "sha": commit, "siblings": siblings}).encode()
    for revision in ("", "/revision/v1", "/revision/refs%2Fconvert%2Fparquet"):
        hub.files[f"/api/{kind}/org/tiny{revision}"] = info


def start(shelf: Shelf) -> Callable[[], None]:
    """Serve a shelf on a free port; what is returned stops it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(shelf))
    shelf.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def stop() -> None:
        server.shutdown()
        server.server_close()

    return stop
