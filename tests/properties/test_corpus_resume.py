"""A corpus does not depend on how its run went: killed, resumed, spread, or run on itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from attending.chat import Tokenizer
from attending.corpus import pack, steps
from attending.corpus.recipe import CorpusConfig
from attending.shards import Shards
from tests.corpus.making import Found, build, prose, recipe, write_jsonl

RUN = """
import json, sys
from pathlib import Path
from attending.corpus import run
from attending.corpus.recipe import CorpusConfig
config = CorpusConfig.build(json.loads(Path(sys.argv[1]).read_text()))
run.build(config, Path(sys.argv[2]), resume=True)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CorpusConfig:
    """Several files with copies, near copies, test questions and damage, over five tasks."""
    root = tmp_path_factory.mktemp("input")
    for number in range(4):
        rows: list[Any] = [{"text": prose(n)} for n in range(10 * number, 10 * number + 25)]
        rows += [{"text": prose(3).replace("case", f"ward{number}")}, {"text": "short"}, b"\xff"]
        write_jsonl(root / f"{number}.jsonl", rows)
    write_jsonl(root / "z.jsonl.gz", [{"text": prose(n)} for n in range(60, 80)])
    write_jsonl(root / "eval" / "q.jsonl", [{"q": prose(7)}])
    pack = recipe(root).pack.replace(sample_share=0.5)
    return recipe(
        root,
        pack=pack.model_dump(),
        decontamination={"paths": ["eval/*.jsonl"]},
        weights={"general": 1.5},
        executor={"tasks": 5, "workers": 1},
    )


@pytest.fixture(scope="module")
def whole(config: CorpusConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """An uninterrupted run's bytes."""
    found = build(config, tmp_path_factory.mktemp("whole") / "out")
    assert {"exact_duplicate", "near_duplicate", "test_question"} <= found.reasons().keys()
    assert found.bytes()["sample.jsonl"]
    return found.bytes()


class StoppedError(RuntimeError):
    pass


@pytest.mark.parametrize(
    ("kind", "method", "call"),
    [
        (steps.Score, "apply", 40),
        (steps.Sign, "run", 2),
        (steps.NearSign, "get_signature", 30),
        (steps.CountFound, "run", 1),
        (pack.Tokenise, "run", 4),
        (pack.Pack, "run", 2),
    ],
)
def test_a_run_that_fails_anywhere_and_is_resumed_gives_the_same_bytes(
    config: CorpusConfig,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type,
    method: str,
    call: int,
) -> None:
    real, calls = getattr(kind, method), [0]

    def failing(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise StoppedError
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(kind, method, failing)
        with pytest.raises(StoppedError):
            build(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert build(config, tmp_path / "out", resume=True).bytes() == whole


def test_a_killed_process_is_resumed_by_another_with_the_same_bytes(
    config: CorpusConfig, whole: dict[str, bytes], tmp_path: Path
) -> None:
    values = config.model_dump(mode="json")
    values["executor"]["workers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    mark = tmp_path / "out.tmp" / "work" / "stages" / "sign" / "completions"
    process, deadline = start(tmp_path, seed=1), time.monotonic() + 60
    while process.poll() is None and not (mark.is_dir() and any(mark.iterdir())):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert start(tmp_path, seed=9).wait(120) == 0
    assert Found(tmp_path / "out").bytes() == whole


DYING = """
import os, signal, time
from attending.corpus import steps
class Dying(steps.Clean):
    def apply(self, document, ledger):
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_that_is_killed_ends_the_run_with_an_error(
    config: CorpusConfig, tmp_path: Path
) -> None:
    values = config.model_dump(mode="json")
    values["executor"]["workers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    (tmp_path / "dying.py").write_text(DYING, encoding="utf-8")
    command = "import dying; from attending.corpus import steps; steps.Clean = dying.Dying\n" + RUN
    done = subprocess.run(
        [sys.executable, "-c", command, str(tmp_path / "config.json"), str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"},
        capture_output=True,
        text=True,
        timeout=40,
    )
    assert done.returncode == 1 and "was killed by signal 9" in done.stderr


def start(folder: Path, seed: int) -> subprocess.Popen[bytes]:
    """A process of its own, with its workers in its group, and another order of hashes."""
    command = [sys.executable, "-c", RUN, str(folder / "config.json"), str(folder / "out")]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    return subprocess.Popen(command, env=environment, start_new_session=True)


def test_the_output_run_again_changes_nothing(
    config: CorpusConfig, whole: dict[str, bytes], tmp_path: Path
) -> None:
    found = build(config, tmp_path / "first")
    tokenizer = Tokenizer.from_folder(Path(config.pack.tokenizer))
    shards = Shards(found.out / "train")
    texts = {tokenizer.decode(shards.document(n)) for n in range(shards.num_documents)}
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": text} for text in sorted(texts)])
    again = build(recipe(tmp_path / "in"), tmp_path / "second")
    assert again.removed() == [] and again.documents() == len(texts)
    assert again.funnel["notes"] == {}
    parts = [Shards(again.out / part) for part in ("train", "heldout/general", "heldout/medical")]
    back = {tokenizer.decode(s.document(n)) for s in parts for n in range(s.num_documents)}
    assert back == texts
