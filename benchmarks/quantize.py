"""Four bits by our methods and by others', at equal calibration: what is lost, time, memory.

python benchmarks/quantize.py DATA_DIR WORK_DIR [FLOAT_MODEL] [--peers PYTHON] [--first MODEL]

rounds the default model in groups of 64 and FLOAT_MODEL (a folder whose weights were never rounded)
in groups of 32 and 128 and, rotated, in QQQ's format; then serves the default model's folder beside
8 bits and floats, asks it the gate's tasks, and checks the arithmetic of `--dry-run` against
measured memory on three sizes.
PYTHON is an interpreter that has the peers and torch; a peer that is not there is said and left
out. --first names another model than the default one, --set changes every arm's recipe. An arm's
figures are kept in quantize/NAME.json as they come, with its date, commit and hardware: what was
stopped is gone on with, also on another day. Writes quantize.md and quantize.svg.

Budget, with one thread: the arms and peers of the default model that are in quantize/ took five
hours, signed rounding alone, rotation and tried ranges are reckoned to take two more, the second
model one.
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

import torch
from page import HERE, Measure, kept, write

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
from attending.train.plan import GIB
from attending.train.start import open_start

LEARNT = ["distill.epochs=2", "distill.rate=0.002"]
LIGHT = ["method=signed", "signed.steps=25", "signed.rate=0.01"]
METHODS: dict[str, list[str]] = {
    "plain": ["method=plain", "search=0"],
    "plain, ranges tried": ["method=plain"],
    "GPTQ": ["method=gptq"],
    "signed, 50 steps": ["method=signed", "signed.steps=50", "signed.rate=0.005"],
    "rotation + GPTQ": ["method=gptq", "rotate=true"],
    "plain, then distilled": ["method=plain", *LEARNT],
    "GPTQ, then distilled": ["method=gptq", *LEARNT],
    "signed, 25 steps, then distilled": [*LIGHT, *LEARNT],
}
SERVED = "signed, 25 steps, then distilled"
PEERS = {
    "llm-compressor GPTQ": ("llmcompressor",),
    "HQQ": ("hqq",),
    "auto-round, 50 steps (light)": ("autoround", "50"),
}
SIZES = (256, 512, 1024)
LIMIT = 100
"""Examples of each task of the gate's suite."""
Figures = dict[str, Any]


class Bench(NamedTuple):
    """Where everything is."""

    data: Path
    work: Path
    first: str
    """The model of the first table."""
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


def slug(*words: object) -> str:
    """As a file is named."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, words)).lower())


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


def noted(name: str, asked: Sequence[object], make: Callable[[], Figures]) -> Figures:
    """An arm's figures, now or before, beside its recipe and the digest of its calibration."""
    threads = torch.get_num_threads()
    told = lambda: {"threads": threads} | make()  # noqa: E731
    return kept(HERE / "quantize" / f"{name}.json", list(asked), told)


def settings(bench: Bench, model: str, *own: str) -> list[str]:
    replies = bench.work / f"replies-{Path(model).name}.jsonl"
    fixed = [f"calibration.root={bench.data}", f"calibration.replies={replies}", f"model={model}"]
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


def ours(bench: Bench, model: str, name: str, *own: str) -> Figures:
    """An arm of ours, by the command that users have."""
    arm = slug(Path(model).name, name)
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

    return noted(arm, [*bench.pairs, *own, digest(file), identity(model)], make)


def folder_of(bench: Bench, model: str, name: str, *own: str) -> Path:
    """An arm's."""
    return bench.work / f"{slug(Path(model).name, name)}-{stamp(bench, model, *own)}"


def theirs(bench: Bench, model: str, python: str | None, peer: str, group: int) -> Figures | None:
    """A peer's arm; None, and why, where it is not there."""
    name, *more = PEERS[peer]
    file, evaluation = samples(bench, model)
    source = bench.work / f"float-{identity(model)[:8]}"
    if not source.exists():
        attending.load(model, dtype="float32").save(source)
    module = {"autoround": "auto_round"}.get(name, name)
    probe = [python or "", "-c", f"import {module}"]
    if python is None or subprocess.run(probe, capture_output=True).returncode:
        print(f"{peer} is left out: {python or 'no --peers PYTHON'} has no {module}.")
        return None

    def make() -> Figures:
        out = bench.work / f"{slug(peer, group)}-{digest(file)[:8]}"
        script = HERE / "quantize" / f"run_{name}.py"
        done = watched([python, str(script), str(source), str(file), str(group), str(out), *more])
        told: Figures = json.loads(done.output.strip().splitlines()[-1])
        domains = judged(model, out, evaluation)
        return over(domains) | told | {"peak_bytes": done.peak_bytes}

    return noted(slug(Path(model).name, peer, group), [peer, digest(file), identity(model)], make)


def measures(arms: dict[str, Figures]) -> list[Measure]:
    """Of each arm, beside the first one, which is plain rounding."""
    first, found = next(iter(arms.values())), []
    rise = first["perplexity"] - first["before"]
    for name, one in arms.items():
        closed = (first["perplexity"] - one["perplexity"]) / rise
        columns = {
            "perplexity": one["perplexity"],
            "gap closed, %": 100 * closed,
            "KL, nats": one["divergence"],
            "KL, 99.9th percentile": one["tail"],
            "top-1 flips, %": 100 * one["flips"],
            "minutes": one["seconds"] / 60,
        }
        if one["peak_bytes"] is not None:
            columns["peak memory, GiB"] = one["peak_bytes"] / GIB
        found += [Measure(quantity, name, [value]) for quantity, value in columns.items()]
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def rows(arms: dict[str, Figures]) -> list[str]:
    every = {(one.subject, one.quantity): one.text for one in measures(arms)}
    head = [*dict.fromkeys(quantity for _, quantity in every)]
    body = [[name, *(every.get((name, quantity), "") for quantity in head)] for name in arms]
    return table(["", *head], body)


def served(bench: Bench) -> list[str]:
    """A folder in the engine, beside 8 bits and floats."""
    arms = {
        "4 bits, groups of 64": [str(folder_of(bench, bench.first, SERVED, *METHODS[SERVED]))],
        "8 bits": [bench.first, "--weights", "w8"],
        "float32 (torch)": [bench.first, "--dtype", "float32"],
    }
    found = []
    for at, (name, words) in enumerate(arms.items()):
        bench_of = [sys.executable, "-m", "attending.cli", "bench", *words, "--json"]
        bench_of += ["--batch", "1", "--repeats", "3"]
        make = partial(lambda words: json.loads(watched(words).output), bench_of)
        asked = [Path(words[0]).name, identity(words[0]), *words[1:]]
        told = noted(f"served-{at}", asked, make)
        speed, peak = told["decode_tok_s"]["1"]["median"], told["peak_mib"]["median"]
        found.append([name, f"{speed:.1f}", f"{peak:,.0f}"])
    return table(["served", "tokens/s, one user", "peak memory, MiB"], found)


def suite(bench: Bench) -> list[str]:
    """The gate's tasks before and after, by the engine that serves."""
    out = folder_of(bench, bench.first, SERVED, *METHODS[SERVED])
    pairs = [f"gate.data={bench.data / 'eval'}", f"gate.limit={LIMIT}"]
    config = QuantizeConfig.load("open", "quantize", [*settings(bench, bench.first), *pairs]).gate
    place = bench.work / f"suite-{identity(str(out))[:8]}"  # what is asked is kept beside a model
    shutil.copytree(out, place, dirs_exist_ok=True)

    def make() -> Figures:
        silent = (lambda *_: None, lambda line: print(line, file=sys.stderr))
        changes, flips = gate.ask(config, bench.first, place, *silent)
        return {"changes": [one._asdict() for one in changes], "flips": flips}

    asked = [LIMIT, identity(bench.first), identity(str(out))]
    told = noted("suite", asked, make)
    found = []
    for one in told["changes"]:
        flips = told["flips"].get(one["task"])
        spread = " to ".join(f"{value:+.3f}" for value in one["interval"] or ())
        cells = [f"{one['before']:.3f}", f"{one['after']:.3f}", f"{one['gain']:+.3f} ({spread})"]
        cells.append("" if flips is None else f"{100 * flips:.1f}")
        found.append([f"{one['task']}, {one['metric']}", *cells])
    head = [f"{LIMIT} examples of each", "8 bits", "4 bits", "gain", "answered otherwise, %"]
    return table(head, found)


def grown(bench: Bench) -> list[str]:
    """Measured growth of memory beside `--dry-run`'s arithmetic, without torch itself."""
    idle = watched([sys.executable, "-c", "import attending.quantize.loop"]).peak_bytes
    found = []
    for hidden in SIZES:
        source = random_model(bench, hidden)
        for method, more in (("gptq", "0"), ("signed", "0"), ("plain", "0.2")):
            own = [f"method={method}", "signed.steps=3", "calibration.samples=32"]
            own += [f"distill.epochs={more}", "distill.batch=8"]
            own += ["calibration.evaluation=3", "group=64", 'layers=".*"']
            pairs = settings(bench, str(source), *own)
            config = QuantizeConfig.load("open", "quantize", pairs)
            arch = open_checkpoint(source).arch
            layers = matched(arch, ".*", False, config.scheme, config.form)
            out = folder_of(bench, str(source), f"grown {method}", *own)
            planned = memory(arch, config, layers).total

            def make(pairs: list[str] = pairs, out: Path = out) -> Figures:
                for left in (out, out.with_name(f"{out.name}.tmp")):
                    shutil.rmtree(left, ignore_errors=True)  # made before, and never noted
                done = watched([*command(pairs), "--out", str(out)])
                return {"peak_bytes": done.peak_bytes - idle}

            asked = [*bench.pairs, *own, identity(str(source))]
            peak = noted(f"grown-{hidden}-{method}", asked, make)["peak_bytes"]
            cells = [f"{value / 2**20:,.0f}" for value in (planned, peak)]
            name = "distilled" if method == "plain" else method
            found.append([f"{hidden}, {name}", *cells, f"{peak / planned:.2f}"])
    return table(["hidden size, method", "planned, MiB", "measured, MiB", "ratio"], found)


def random_model(bench: Bench, hidden: int) -> Path:
    """Two blocks of random weights with the default model's tokenizer."""
    folder = bench.work / f"random-{hidden}-{identity(bench.first)[:8]}"
    if not folder.exists():
        start = open_start(bench.first)
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
    parser.add_argument("model", nargs="?")
    parser.add_argument("--first", default="default")
    parser.add_argument("--peers")
    parser.add_argument("--set", action="append", default=[])
    told = parser.parse_args()
    bench = Bench(told.data.resolve(), told.work.resolve(), told.first, told.set)
    bench.work.mkdir(parents=True, exist_ok=True)
    arms = {name: ours(bench, bench.first, name, *own) for name, own in METHODS.items()}
    for peer in PEERS:
        if found := theirs(bench, bench.first, told.peers, peer, 64):
            arms[peer] = found
    more = [f"Float perplexity {arms['plain']['before']:.3f}.", ""]
    if told.model:
        model = str(Path(told.model).resolve())
        for group in (32, 128):
            own = {
                name: ours(bench, model, f"{name} {group}", *pairs, f"group={group}")
                for name, pairs in METHODS.items()
            }
            if group == 128:
                qqq = ["method=gptq", "rotate=true", "form=qqq", "group=128"]
                own["rotation + GPTQ, QQQ (W4A8)"] = ours(bench, model, "qqq", *qqq)
            before = own["plain"]["before"]
            more += [f"{Path(model).name}, groups of {group}; float perplexity {before:.3f}:", ""]
            more += [*rows(own), ""]
    more += ["Served:", "", *served(bench), ""]
    if (bench.data / "eval").is_dir():
        more += ["Tasks, by the engine:", "", *suite(bench), ""]
    more += ["Memory, beside `--dry-run`'s arithmetic:", "", *grown(bench), ""]
    versions = ", ".join(sorted({str(one["version"]) for one in arms.values()}))
    more += [f"Peers: {versions}. Seed 0.", ""]
    notes = (HERE / "quantize" / "notes.md").read_text("utf-8")
    title = f"Four bits: {Path(bench.first).name} in symmetric groups of 64"
    write("quantize", title, notes, measures(arms), rows_are_subjects=True)  # for its figure
    head = [f"# {title}", "", notes.strip(), "", *rows(arms), "", f"![{title}](quantize.svg)", ""]
    more += ["`python benchmarks/quantize.py DATA_DIR WORK_DIR M1_SMALL --peers PYTHON`", ""]
    more += [f"- {name}: {one['about']}; threads: {one['threads']}" for name, one in arms.items()]
    (HERE / "quantize.md").write_text("\n".join([*head, *more, ""]), "utf-8")


if __name__ == "__main__":
    main()
