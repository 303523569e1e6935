"""Four bits by our methods and by others', at equal calibration: what is lost, time, memory.

python benchmarks/quantize.py DATA_DIR WORK_DIR [SECOND] [--peers PYTHON]

rounds the default model in groups of 64 and SECOND (a folder whose weights were never rounded)
in groups of 32 and 128 and, rotated, in QQQ's format; then serves the default model's folder beside
8 bits and floats, asks it the gate's tasks, and checks the arithmetic of `--dry-run` against
measured memory on three sizes.
PYTHON is an interpreter that has the peers and torch; a peer that is not there is said and left
out. --set changes every arm's recipe. An arm's figures are kept in quantize/NAME.json as they come,
with its date, commit and hardware: what was stopped is gone on with, also on another day. Writes
quantize.md and quantize.svg, as `python benchmarks/quantize_page.py` does of what is kept.

Budget, with one thread: the default model's arms took six and a half hours, the peers one and a
quarter, the second model's arms one, all else one.
"""

import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import quantize_page
import torch
from page import HERE, kept
from quantize_page import (
    FOLDER,
    GROUPS,
    GROWN,
    LIMIT,
    METHODS,
    ONCE,
    PEERS,
    SECOND,
    SERVED,
    SIZES,
    slug,
)

import attending
from attending.artifact import digest
from attending.logs import read_metrics
from attending.model.architecture import parse_config
from attending.model.checkpoint import open_checkpoint
from attending.model.decoder import Decoder
from attending.model.weights import read_tensor, save_model
from attending.quantize import calibration, gate
from attending.quantize.estimate import memory
from attending.quantize.recipe import QuantizeConfig
from attending.quantize.stream import Stream, matched
from attending.sources import resolve
from attending.train.start import open_start

FIRST = "default"
"""The model of the first table."""
Figures = dict[str, Any]


class Bench(NamedTuple):
    """Where everything is."""

    data: Path
    work: Path
    pairs: list[str]
    """`--set` of every arm."""


class Watched(NamedTuple):
    """A command that has ended well."""

    output: str
    peak_bytes: int
    """Of its own pages (RssAnon), looked at twenty times a second."""


def watched(words: Sequence[str]) -> Watched:
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    status, peak = Path(f"/proc/{process.pid}/status"), 0

    def look() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                told = re.search(r"RssAnon:\s+(\d+) kB", status.read_text("utf-8"))
            except OSError:  # it has just ended
                return
            peak = max(peak, 1024 * int(told[1]) if told else 0)
            time.sleep(0.05)

    thread = threading.Thread(target=look)
    thread.start()
    output = process.communicate()[0]
    thread.join()
    if process.returncode not in (0, 3):  # 3: the gate says no, and the folder is there
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}")
    return Watched(output, peak)


@cache
def identity(model: str) -> str:
    """Of its files."""
    return digest(resolve(model).path)


@cache
def text(data: Path, *pairs: str) -> list[dict[str, str]]:
    """Digests of what is calibrated and judged by."""
    config = QuantizeConfig.load("open", "quantize", [f"calibration.root={data}", *pairs])
    return calibration.digests(config.calibration)


def stamp(bench: Bench, model: str, *own: str) -> str:
    """Of all that decides a folder in WORK: what was made of something else is never taken."""
    told = json.dumps([identity(model), text(bench.data, *bench.pairs), bench.pairs, own])
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def noted(name: str, asked: Sequence[object], make: Callable[[], Figures]) -> None:
    """Keep an arm's figures, now or before, beside its recipe and its calibration's digest."""
    threads = torch.get_num_threads()
    told = lambda: {"threads": threads} | make()  # noqa: E731
    kept(FOLDER / f"{name}.json", list(asked), told)


def settings(bench: Bench, model: str, *own: str) -> list[str]:
    replies = bench.work / f"replies-{Path(model).name}.jsonl"
    fixed = [f"calibration.root={bench.data}", f"calibration.replies={replies}", f"model={model}"]
    fixed.append("distill.epochs=0")  # an arm that learns says so
    return [*fixed, *bench.pairs, *own]


def samples(bench: Bench, model: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """The file that peers read, and the held-out ids by domain that all are judged by."""
    config = QuantizeConfig.load("open", "quantize", settings(bench, model))
    folder = bench.work / f"samples-{stamp(bench, model)}"
    folder.mkdir(exist_ok=True)
    silent = (lambda *_: None, lambda line: print(line, file=sys.stderr))
    start = open_start(model)
    found = calibration.prepare(config.calibration, start, folder, config.seed, *silent)
    return folder / calibration.SAMPLES, found.evaluation


def judged(model: str, folder: Path, evaluation: dict[str, torch.Tensor]) -> list[gate.Domain]:
    """As the gate of our own arms does."""
    found = [open_checkpoint(path) for path in (resolve(model).path, folder)]
    before, after = (Stream(one.arch, partial(read_tensor, one)) for one in found)
    return gate.compare(before, after, evaluation)[0]


def over(domains: Sequence[gate.Domain]) -> Figures:
    """Over the tokens of all domains; of the 99.9th percentile, the worst domain's."""
    shares = [one.tokens / sum(other.tokens for other in domains) for one in domains]
    means = {
        name: sum(s * x for s, x in zip(shares, values, strict=True))
        for name, values in {
            "before": [math.log(one.before) for one in domains],
            "perplexity": [math.log(one.after) for one in domains],
            "divergence": [one.divergence for one in domains],
            "flips": [one.flips for one in domains],
        }.items()
    }
    means |= {name: math.exp(means[name]) for name in ("before", "perplexity")}
    return means | {"tail": max(one.tail for one in domains)}


def command(pairs: Sequence[str]) -> list[str]:
    """To quantise, or to go on with it; OUT is missing."""
    words = [word for pair in pairs for word in ("--set", pair)]
    return [sys.executable, "-m", "attending.cli", "quantize", "open", *words, "--resume"]


def ours(bench: Bench, model: str, name: str, *own: str) -> None:
    """An arm of ours, by the command that users have."""
    file, _ = samples(bench, model)

    def make() -> Figures:
        out = folder_of(bench, model, name, *own)
        found: Figures = {"peak_bytes": None, "version": "attending"}
        if out.exists():  # made before, and stopped before it was noted
            run = json.loads((out / "run.json").read_text("utf-8"))
            found["about"] = f"date: {run['started'][:10]}; commit: {run['commit']}"
        else:
            is_whole = not out.with_name(f"{out.name}.tmp").exists()
            done = watched([*command(settings(bench, model, *own)), "--out", str(out)])
            found["peak_bytes"] = done.peak_bytes if is_whole else None
        took = {"quantize/block_seconds", "distill/step_seconds"}
        log = read_metrics(out / "metrics.jsonl")  # a step that was made again counts once
        seconds = {(row["step"], key): row[key] for row in log for key in took & {*row}}
        told = json.loads((out / gate.REPORT).read_text("utf-8"))["domains"]
        domains = [gate.Domain(*(one[name] for name in gate.Domain._fields)) for one in told]
        return found | over(domains) | {"seconds": sum(seconds.values())}

    noted(slug(name), [*bench.pairs, *own, digest(file), identity(model)], make)


def folder_of(bench: Bench, model: str, name: str, *own: str) -> Path:
    """An arm's."""
    return bench.work / f"{slug(name)}-{stamp(bench, model, *own)}"


def theirs(bench: Bench, model: str, python: str | None, peer: str, group: int) -> None:
    """A peer's arm, or why it is left out."""
    name, *more = PEERS[peer]
    file, evaluation = samples(bench, model)
    arm = slug(Path(model).name, peer, group)
    module = {"autoround": "auto_round"}.get(name, name)
    probe = [python or "", "-c", f"import {module}"]
    is_there = (FOLDER / f"{arm}.json").is_file()
    if not is_there and (not python or subprocess.run(probe, capture_output=True).returncode):
        print(f"{peer} is left out: {python or 'no --peers PYTHON'} has no {module}.")
        return

    def make() -> Figures:
        source = bench.work / f"float-{identity(model)[:8]}"
        if not source.exists():
            attending.load(model, dtype="float32").save(source)
        out = bench.work / f"{slug(peer, group)}-{digest(file)[:8]}"
        script = HERE / "quantize" / f"run_{name}.py"
        words = [str(python), str(script), str(source), str(file), str(group), str(out), *more]
        done = watched(words)
        told: Figures = json.loads(done.output.strip().splitlines()[-1])
        domains = judged(model, out, evaluation)
        return over(domains) | told | {"peak_bytes": done.peak_bytes}

    noted(arm, [peer, digest(file), identity(model)], make)


def served(bench: Bench, out: Path) -> None:
    """A folder in the engine, beside 8 bits and floats."""
    arms = [[str(out)], [FIRST, "--weights", "w8"], [FIRST, "--dtype", "float32"]]
    for at, words in enumerate(arms):
        asked = [Path(words[0]).name, identity(words[0]), *words[1:]]
        line = [sys.executable, "-m", "attending.cli", "bench", *words, "--json"]
        line += ["--batch", "1", "--repeats", "3"]
        noted(f"served-{at}", asked, partial(lambda told: json.loads(watched(told).output), line))


def suite(bench: Bench, out: Path) -> None:
    """The gate's tasks before and after, by the engine that serves."""
    pairs = [f"gate.data={bench.data / 'eval'}", f"gate.limit={LIMIT}"]
    config = QuantizeConfig.load("open", "quantize", [*settings(bench, FIRST), *pairs]).gate
    place = bench.work / f"suite-{identity(str(out))[:8]}"  # what is asked is kept beside a model
    shutil.copytree(out, place, dirs_exist_ok=True)

    def make() -> Figures:
        silent = (lambda *_: None, lambda line: print(line, file=sys.stderr))
        changes, flips = gate.ask(config, FIRST, place, *silent)
        return {"changes": [one._asdict() for one in changes], "flips": flips}

    noted("suite", [LIMIT, identity(FIRST), identity(str(out))], make)


def grown(bench: Bench, hidden: int, method: str) -> None:
    """Measured growth of memory and `--dry-run`'s arithmetic, both without torch itself."""
    source = random_model(bench, hidden)
    own = [f"method={method}", "signed.steps=3", "calibration.samples=32"]
    own += [f"distill.epochs={0.2 if method == 'plain' else 0}", "distill.batch=8"]
    own += ["calibration.evaluation=3", "group=64", 'layers=".*"']
    pairs = settings(bench, str(source), *own)

    def make() -> Figures:
        config = QuantizeConfig.load("open", "quantize", pairs)
        arch = open_checkpoint(source).arch
        layers = matched(arch, ".*", False, config.scheme, config.form)
        out = folder_of(bench, str(source), f"grown {method}", *own)
        for left in (out, out.with_name(f"{out.name}.tmp")):
            shutil.rmtree(left, ignore_errors=True)  # made before, and never noted
        done = watched([*command(pairs), "--out", str(out)])
        idle = watched([sys.executable, "-c", "import attending.quantize.loop"]).peak_bytes
        planned = memory(arch, config, layers).total
        return {"peak_bytes": done.peak_bytes - idle, "planned_bytes": planned}

    noted(f"grown-{hidden}-{method}", [*bench.pairs, *own, identity(str(source))], make)


def random_model(bench: Bench, hidden: int) -> Path:
    """Two blocks of random weights with the default model's tokenizer."""
    folder = bench.work / f"random-{hidden}-{identity(FIRST)[:8]}"
    if not folder.exists():
        start = open_start(FIRST)
        values = dict(start.arch.to_config()) | {"hidden_size": hidden, "num_hidden_layers": 2}
        values |= {"intermediate_size": 3 * hidden, "num_attention_heads": hidden // 64}
        values |= {"num_key_value_heads": hidden // 64, "head_dim": 64, "torch_dtype": "float32"}
        arch = parse_config(values)
        decoder = Decoder(arch)
        decoder.init_weights(torch.Generator().manual_seed(0))
        draft = folder.with_suffix(".tmp")
        draft.mkdir(exist_ok=True)
        save_model(draft, arch, dict(decoder.named_parameters()), start.tokenizer, start.generation)
        draft.replace(folder)
    return folder


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("second", nargs="?")
    parser.add_argument("--peers")
    parser.add_argument("--set", action="append", default=[])
    told = parser.parse_args()
    bench = Bench(told.data.resolve(), told.work.resolve(), told.set)
    bench.work.mkdir(parents=True, exist_ok=True)
    for name, own in (METHODS | ONCE).items():
        ours(bench, FIRST, f"{FIRST} {name}", *own)
    for peer in PEERS:
        theirs(bench, FIRST, told.peers, peer, 64)
    if told.second:
        model = str(Path(told.second).resolve())
        for group in GROUPS:
            for name, own in METHODS.items():
                ours(bench, model, f"{SECOND} {name} {group}", *own, f"group={group}")
        qqq = ["method=gptq", "rotate=true", "form=qqq", "group=128"]
        ours(bench, model, f"{SECOND} qqq", *qqq)
    out = folder_of(bench, FIRST, f"{FIRST} {SERVED}", *(METHODS | ONCE)[SERVED])
    if out.exists():
        served(bench, out)
        if (bench.data / "eval").is_dir():
            suite(bench, out)
    else:  # its record is from another WORK_DIR
        print(f"Not served and asked: {out.name} is not in WORK_DIR. Remove its record to make it.")
    for hidden in SIZES:
        for method in GROWN:
            grown(bench, hidden, method)
    quantize_page.write()


if __name__ == "__main__":
    main()
