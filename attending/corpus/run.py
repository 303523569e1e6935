"""The stages in order, each a datatrove executor with a barrier behind it.

Everything is written to `OUT.tmp/`, which becomes OUT when it is whole. A run that was killed goes
on where it stopped: a task that had ended is not done again, one that had not begins anew.
"""

import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from pathlib import Path
from traceback import clear_frames
from typing import Any, NamedTuple

import multiprocess  # type: ignore[import-untyped]
import numpy as np
from datatrove import executor
from datatrove.pipeline import dedup

from attending import artifact, logs, report
from attending.corpus import score, steps
from attending.corpus.clean import language_of
from attending.corpus.ledger import funnel, write_whole
from attending.corpus.pack import (
    DOMAINS,
    PARTS,
    Encoder,
    Pack,
    Rows,
    Tokenise,
    join_sample,
    read_rows,
    read_shards,
)
from attending.corpus.read import Piece, glob, plan, source_files
from attending.corpus.recipe import CorpusConfig
from attending.corpus.rewrite import Rewrite, template
from attending.errors import CheckFailed, ConfigError, UsageError
from attending.shards import Shards, write_index

# A trial of 23 MB on two cores took 61 s without private sources; benchmarks/corpus.py measures.
BYTES_PER_CORE_SECOND = 350_000
DISK_FACTOR = 4  # of the input: documents between stages, tokens, shards, what is removed

Progress = Callable[[str, float, int], object]  # stage, share done, documents


class Stage(NamedTuple):
    """A barrier's worth of work."""

    name: str
    executor: Any  # of datatrove


class Result(NamedTuple):
    """A corpus that was built, or (`out` is None) one whose jobs are still running."""

    out: Path | None
    tokens: dict[str, int]  # by part
    documents: dict[str, int]

    @classmethod
    def read(cls, out: Path) -> "Result":
        """Of a finished corpus."""
        shards = {part: Shards(out / part) for part in PARTS}
        tokens = {part: one.num_tokens for part, one in shards.items()}
        return cls(out, tokens, {part: one.num_documents for part, one in shards.items()})


def build(
    config: CorpusConfig,
    out: Path,
    *,
    resume: bool = False,
    keep_work: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Raw text in, token shards out.

    Args:
        config: The recipe.
        out: Folder to write; must not exist.
        resume: Go on with what a killed run left in `OUT.tmp`.
        keep_work: Leave the documents between the stages in `OUT/work`.
        progress: Told of every task that ends.

    Raises:
        UsageError: `out` exists, or an unfinished run lies there and `resume` is not given.
        ConfigError: A source has no files, or the recipe is not the one that began the run.
        CheckpointError: The disk is full; make room and resume.
        CheckFailed: Documents are unaccounted for, none is left, or a worker was killed.
    """
    record = artifact.Record("corpus", config.model_dump(mode="json"), config.pack.seed, [])
    draft = out.absolute().with_name(out.name + ".tmp")
    if resume and (out / "run.json").is_file():
        told = json.loads((out / "run.json").read_text("utf-8"))["recipe"]
        if told != artifact.without_folders(config.model_dump(mode="json")):
            raise UsageError(f"{out.name} is finished, by another recipe: choose another --out.")
    else:
        _check(config, out, draft, resume)
        with artifact.disk_has_room(out):
            tasks = _plan(config, draft)
            _train_scores(config, draft)
            stages = build_executors(config, draft, tasks)
            seconds = {stage.name: _run(stage, draft, progress) for stage in stages}
            if any(stage.executor.get_incomplete_ranks(skip_completed=True) for stage in stages):
                return Result(None, {}, {})  # Slurm took the jobs; --resume finishes afterwards
            _finish(config, draft, record, seconds)
            artifact.settle(draft, out)
    if not keep_work:
        shutil.rmtree(out / "work", ignore_errors=True)
    return Result.read(out)


def build_executors(config: CorpusConfig, draft: Path, tasks: list[list[Piece]]) -> list[Stage]:
    """datatrove's executors in the order in which they must run.

    Raises:
        ConfigError: The executor does not take one of `executor.options`.
    """
    texts, ids, near = (str(draft / "work" / name) for name in ("texts", "ids", "near"))
    hashes, many = steps.minhash_config(config.duplicates), config.executor.tasks
    own: tuple[Path, CorpusConfig] = draft, config
    clean = [
        steps.ReadRecords(*own, tasks),
        steps.Clean(*own),
        steps.Language(*own),
        steps.Score(*own, _scorer(config, draft)),
        steps.Redact(*own),
        steps.Write(*own, "clean"),
        steps.Sign(*own),
    ]
    find = [
        dedup.ExactFindDedups(f"{texts}/signatures", f"{texts}/found", steps.TEXTS, True),
        dedup.ExactFindDedups(f"{ids}/signatures", f"{ids}/found", steps.IDS),
    ]
    sign = [
        steps.Read(*own, "clean", "sign"),
        steps.UniqueIds(*own),
        steps.DropExact(*own),
        steps.Write(*own, "exact"),
        steps.NearSign(f"{near}/signatures", config.duplicates),
    ]
    compare = [dedup.MinhashDedupBuckets(f"{near}/signatures", f"{near}/pairs", config=hashes)]
    cluster = [
        dedup.MinhashDedupCluster(f"{near}/pairs", f"{near}/clusters", hashes, True),
        steps.CountFound(*own),
    ]
    tokenise = [
        steps.Read(*own, "exact", "tokenise"),
        steps.DropNear(*own),
        *([Rewrite(*own)] if config.rewrite else []),
        steps.Decontaminate(*own),
        steps.Mix(*own),
        Tokenise(*own),
    ]
    table: list[tuple[str, list[Any], int]] = [
        ("clean", clean, many),
        ("find", find, 1),
        ("sign", sign, many),
        ("compare", compare, config.duplicates.bands),
        ("cluster", cluster, 1),
        ("tokenise", tokenise, many),
        ("pack", [Pack(*own)], many),
    ]
    kinds = {
        "local": executor.LocalPipelineExecutor,
        "slurm": executor.SlurmPipelineExecutor,
        "ray": executor.RayPipelineExecutor,
    }
    kind, stages, before = config.executor.kind, list[Stage](), None
    for name, pipeline, count in table:
        options: dict[str, Any] = {"logging_dir": str(draft / "work" / "stages" / name)}
        options |= {"job_name": f"corpus-{name}"} if kind == "slurm" else {}
        options |= {"tasks": count, "workers": min(count, config.executor.workers)}
        try:
            before = kinds[kind](pipeline, depends=before, **options, **config.executor.options)
        except TypeError as error:
            raise ConfigError(f"executor.options do not suit {kind}: {error}") from None
        stages.append(Stage(name, before))
    return stages


def estimate(config: CorpusConfig) -> dict[str, Any]:
    """What a run takes: input bytes by source, seconds and disk, from what was measured."""
    files = source_files(config)
    sizes = {name: sum(path.stat().st_size for path in paths) for name, paths in files.items()}
    total, workers = sum(sizes.values()), config.executor.workers
    return {
        "input_bytes": sizes,
        "seconds": round(total / BYTES_PER_CORE_SECOND / workers),
        "seconds_are": f"{total:,} bytes / {BYTES_PER_CORE_SECOND:,} a second and core (measured) "
        f"/ {workers} workers, without rewriting",
        "disk_bytes": total * DISK_FACTOR,
        "disk_bytes_are": f"{DISK_FACTOR} times the input while it runs",
    }


def _check(config: CorpusConfig, out: Path, draft: Path, resume: bool) -> None:
    """What would stop the run in its last stage stops it here."""
    for cached in (steps.scorer, steps.test_questions, Encoder.load, template):
        cached.cache_clear()  # a file may have changed
    if out.exists():
        raise UsageError(f"{out.name} exists; choose another name or remove it first.")
    if draft.exists() and not resume:
        raise UsageError(f"{draft.name} holds an unfinished run: add --resume, or remove it.")
    is_inside = draft.resolve().is_relative_to(Path(config.root).resolve())
    if is_inside and any("**" in source.path for source in config.sources.values()):
        raise UsageError(f"{out.name} lies below the root, which `**` reads: set --out elsewhere.")
    if config.executor.kind == "ray" and find_spec("ray") is None:
        raise ConfigError(
            "executor.kind is ray, which is not here: pip install -e '.[scale]' in the clone"
        )
    multiprocess.set_forkserver_preload(["attending.corpus.run"])  # not in every worker again
    language_of(config.quality.languages)
    Encoder.load(config.pack)
    if not config.samples:
        score.Scorer(_scorer(config, draft))
    if config.rewrite:
        template(config.rewrite.prompt)


def _plan(config: CorpusConfig, draft: Path) -> list[list[Piece]]:
    """Who reads what; the recipe and the input must be those that the run began with."""
    file = draft / "work" / "plan.json"
    recipe = config.model_dump(mode="json")
    recipe["executor"] = {"tasks": config.executor.tasks}  # the rest may change
    if config.rewrite:  # where it is asked, and how fast, may change
        recipe["rewrite"] |= {"url": "", "api_key_variable": None}
    sizes = [[str(path), path.stat().st_size] for _, paths in _inputs(config) for path in paths]
    now = {"recipe": recipe, "input files": sizes, "tokenizer": Encoder.load(config.pack).sha256}
    if file.is_file():
        known = json.loads(file.read_text("utf-8"))
        for what, value in now.items():
            if known[what] != value:
                raise ConfigError(
                    f"the {what} changed since this run began: restore what it was, or remove "
                    f"{draft.name} and begin again."
                )
        return [[Piece(*piece) for piece in task] for task in known["tasks"]]
    tasks = plan(config)
    write_whole(file, json.dumps(now | {"tasks": tasks}).encode())
    return tasks


def _inputs(config: CorpusConfig) -> list[tuple[str, list[Path]]]:
    """Every pattern of the recipe, and its files."""
    found = [(config.sources[name].path, paths) for name, paths in source_files(config).items()]
    samples = config.samples.model_dump().values() if config.samples else ()
    patterns = [*config.decontamination.paths, *(one for some in samples for one in some)]
    return found + [(pattern, glob(config.root, pattern)) for pattern in dict.fromkeys(patterns)]


def _scorer(config: CorpusConfig, draft: Path) -> Path:
    if config.samples:
        return draft / "scorer"
    return Path(config.quality.scorer).absolute() if config.quality.scorer else score.SHIPPED


def _train_scores(config: CorpusConfig, draft: Path) -> None:
    """The stage before all others, where the recipe has samples."""
    done = draft / "work" / "scores.json"
    if config.samples and not done.is_file():
        metrics = score.train(config.samples, config.root, draft / "scorer", config.pack.seed)
        write_whole(done, json.dumps(metrics).encode())


def _run(stage: Stage, draft: Path, progress: Progress | None) -> float:
    """Run a stage to its end, and tell how far it is; seconds.

    In a thread, as a pool waits for ever for what a killed worker did.
    """

    def work() -> None:
        try:
            stage.executor.run()
        except Exception as error:
            clear_frames(error.__traceback__)  # steps that are under way end in their own thread
            raise

    start, workers = time.perf_counter(), set[Any]()
    pool = ThreadPool(1)
    running = pool.apply_async(work)
    pool.close()
    while not running.ready():
        running.wait(0.3)
        files = sorted((draft / "work" / "ticks" / stage.name).glob("*.json"))
        ticks = [json.loads(file.read_text("utf-8")) for file in files]
        share = sum(share for share, _ in ticks) / stage.executor.world_size
        if progress:
            progress(stage.name, 1.0 if running.ready() else share, sum(n for _, n in ticks))
        workers.update(multiprocess.active_children())
        if killed := [
            w.exitcode for w in workers if w.exitcode in (-signal.SIGKILL, -signal.SIGSEGV)
        ]:
            raise CheckFailed(
                f"a worker of stage {stage.name} was killed by signal {-killed[0]}, as a machine "
                "without memory does: set fewer executor.workers; --resume goes on."
            )
    running.get()
    return time.perf_counter() - start


def _finish(
    config: CorpusConfig, draft: Path, record: artifact.Record, seconds: dict[str, float]
) -> None:
    """Add up, and write what describes the corpus."""
    account = funnel(draft)
    rows = read_rows(draft)
    account["tokens"] = token_rows(rows, list(config.sources))
    kept = sum(row["out"]["documents"] for row in account["rows"] if row["step"] == "mix")
    packed = sum(row["documents"] for row in account["tokens"])
    if kept != packed:
        raise CheckFailed(f"{kept} documents were left and {packed} are packed: a fault of ours.")
    if not (rows["part"] == 0).any():
        raise CheckFailed(
            "no document is left to train on; see what was removed and why in "
            f"{draft.name}/removed, and change the recipe."
        )
    artifact.write_json(draft / "funnel.json", account)
    encoder = Encoder.load(config.pack)
    facts: dict[str, Any] = {"sources": list(config.sources), "domains": list(DOMAINS)}
    facts |= {"begin_of_text": encoder.begin_of_text, "end_of_text": encoder.end_of_text}
    facts |= {"tokenizer_sha256": encoder.sha256}
    facts |= {"has_context": any(source.notes for source in config.sources.values())}
    if config.pack.sample_share:
        join_sample(draft)
    metrics: dict[str, float] = {}
    for part, shards in read_shards(draft):
        write_index(draft / part, shards, **facts)
        metrics[f"corpus/{part.replace('/', '_')}_tokens"] = sum(one.tokens for one in shards)
    scores = draft / "work" / "scores.json"
    metrics |= json.loads(scores.read_text("utf-8")) if scores.is_file() else {}
    rates = {f"corpus/{name}_stage_seconds": spent for name, spent in seconds.items()}
    for step, spent in account["seconds"].items():
        for unit in ("documents", "bytes") if spent else ():
            total = sum(row["in"][unit] for row in account["rows"] if row["step"] == step)
            rates[f"corpus/{step}_{unit}_per_second"] = total / spent  # of one core
    (draft / "metrics.jsonl").unlink(missing_ok=True)
    log = logs.MetricLog(draft / "metrics.jsonl")
    log.write(0, rates)
    log.close()
    parents = []
    for pattern, paths in _inputs(config):
        sums = b"".join(os.fsencode(p.name) + f" {artifact.digest(p)}\n".encode() for p in paths)
        parents.append({"uri": pattern, "sha256": hashlib.sha256(sums).hexdigest()})
    artifact.write_run(draft, replace(record, parents=parents), metrics)
    report.write_report(draft)


def token_rows(rows: Rows, sources: list[str]) -> list[dict[str, Any]]:
    """Documents once, tokens once, and tokens with all repeats, by part and source."""
    found = []
    for part, domain, source in np.unique(rows[["part", "domain", "source"]]).tolist():
        is_own = (rows["part"] == part) & (rows["domain"] == domain) & (rows["source"] == source)
        own, once = rows[is_own], rows[is_own & (rows["repeat"] == 0)]
        found.append(
            {
                "part": PARTS[part].partition("/")[0],
                "domain": DOMAINS[domain],
                "source": sources[source],
                "documents": len(once),
                "bytes": int(once["bytes"].sum()),
                "tokens": int(once["tokens"].sum()),
                "seen_tokens": int(own["tokens"].sum()),
            }
        )
    return found
