"""Who may come in: API keys in a file, sign-in tokens and sessions in memory; of each the SHA-256.

A running server reads the file again when it changes, so a revoked key stops at once.
"""

import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from attending.config import Config, suggest
from attending.errors import UsageError

TOKEN_SECONDS, SESSION_SECONDS = 15 * 60, 12 * 3600
log = logging.getLogger(__name__)


class KeyRecord(Config):
    """What is kept of a key."""

    name: str
    """Says whose it is, or what uses it."""
    sha256: str
    """Of the whole key."""
    created: str
    """Time in ISO 8601."""


class KeyFile(Config):
    """`keys.json`."""

    keys: tuple[KeyRecord, ...]
    """In order of creation."""


class Keys:
    """The API keys of `keys.json`."""

    def __init__(self, folder: Path | None = None) -> None:
        """In a folder of the user's configuration, unless given.

        Raises:
            UsageError: The file is damaged, or others may write to it.
        """
        self._file = (folder or config_folder()) / "keys.json"
        self._seen = self._stamp()
        self._records = self._read()

    def __iter__(self) -> Iterator[KeyRecord]:
        """What is kept of each key."""
        return iter(self._records)

    def add(self, name: str) -> str:
        """Make a key and return it, the only time that it is to be seen."""
        if not name.strip() or not name.isprintable() or len(name) > 100:
            raise UsageError(f"{name!r} cannot name a key: give at most 100 printable characters.")
        self._records = self._read()
        if any(record.name == name for record in self._records):
            raise UsageError(f"a key {name!r} exists; choose another name or revoke it first.")
        key = f"atd-{secrets.token_urlsafe(32)}"
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._write((*self._records, KeyRecord(name=name, sha256=_sha256(key), created=now)))
        return key

    def revoke(self, name: str) -> None:
        """Make a key useless, and the sessions that began with it."""
        self._records = self._read()
        kept = tuple(record for record in self._records if record.name != name)
        if len(kept) == len(self._records):
            known = suggest(name, [record.name for record in self._records])
            raise UsageError(f"no key is named {name!r}.{known}")
        self._write(kept)

    def holder(self, key: str) -> str | None:
        """The hash of a key if it is one of ours; the time it takes tells nothing."""
        asked, found = _sha256(key), None
        for record in self._current():
            if hmac.compare_digest(record.sha256, asked):
                found = record.sha256
        return found

    def holds(self, sha256: str) -> bool:
        """Whether a key that was good when a session began still is."""
        return any(record.sha256 == sha256 for record in self._current())

    def _current(self) -> tuple[KeyRecord, ...]:
        stamp = self._stamp()
        if stamp != self._seen:
            self._seen = stamp
            try:
                self._records = self._read()
            except UsageError as error:
                self._records = ()  # closed, not open
                log.error("every key is refused: %s", error)
        return self._records

    def _stamp(self) -> tuple[int, int] | None:
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino

    def _read(self) -> tuple[KeyRecord, ...]:
        try:
            if self._file.stat().st_mode & 0o022:
                raise UsageError("keys.json may be written by others: run chmod 600 on it.")
            return KeyFile.model_validate_json(self._file.read_bytes()).keys
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise UsageError(f"keys.json cannot be read: {error.strerror}.") from None
        except ValidationError as error:
            raise UsageError(
                f"keys.json is damaged ({error.error_count()} errors) and was left as it is. "
                "Restore it, or remove it to begin with a new key."
            ) from None

    def _write(self, records: tuple[KeyRecord, ...]) -> None:
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = json.dumps(KeyFile(keys=records).model_dump(), indent=2) + "\n"
        handle, draft = tempfile.mkstemp(dir=self._file.parent, prefix="keys.")  # mode 0600
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(draft).replace(self._file)
        self._records, self._seen = records, self._stamp()


class Tickets:
    """Secrets that end by themselves: sign-in tokens, sessions. The oldest make room."""

    def __init__(
        self, seconds: float, most: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Each is good for some seconds, and at most some number of them at a time."""
        self._seconds, self._most, self._clock = seconds, most, clock
        self._known: dict[str, tuple[float, str]] = {}

    def issue(self, holder: str = "") -> str:
        """A new one; `holder` is the hash of the key it was given for."""
        while len(self._known) >= self._most:
            del self._known[next(iter(self._known))]
        ticket = secrets.token_urlsafe(32)
        self._known[_sha256(ticket)] = (self._clock() + self._seconds, holder)
        return ticket

    def holder(self, ticket: str) -> str | None:
        """For which key a good one was given ("": for none); None for any other."""
        end, holder = self._known.get(_sha256(ticket), (0.0, ""))
        return holder if self._clock() < end else None

    def end(self, ticket: str) -> bool:
        """Make one useless; whether it was good."""
        end, _ = self._known.pop(_sha256(ticket), (0.0, ""))
        return self._clock() < end


def config_folder() -> Path:
    """`$ATTENDING_CONFIG`, else `attending` below `$XDG_CONFIG_HOME` or `~/.config`."""
    if named := os.environ.get("ATTENDING_CONFIG"):
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "attending"


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
