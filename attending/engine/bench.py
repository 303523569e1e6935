"""How fast a model is on this machine, measured through the engine that serves it.

Prompts are random ids of the vocabulary: the same in every run, new in every repeat, so that no
page is found in the cache. Nothing ends an answer early. First token and peak memory are those of
a fresh interpreter, with its files in the system's cache. Imports no torch.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from attending import artifact, mesh
from attending.engine.sampler import Sampling
from attending.engine.scheduler import Request, Scheduler
from attending.errors import AttendingError, TokenizerError, UsageError
from attending.model.architecture import PAGE_TOKENS, Architecture

if TYPE_CHECKING:
    from attending.engine.local import Model
    from attending.sources import Progress

DECODE_PROMPT = 128  # tokens before the answers that are timed; less where `prompt_tokens` is
COLD_PROMPT = 16
STEP_TOKENS = 512  # as for one user alone
MATMUL_SIZE = 512  # 1 MiB a matrix: in a core's own cache
MATMUL_SECONDS = 0.5  # of passes, the best of which counts
NO_STOP = frozenset[int]()
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Work:
    """What is run; `validate` refuses what cannot be."""

    batch: tuple[int, ...] = (1, 8)
    """Users at once, one measurement each."""
    prompt_tokens: int = 512
    answer_tokens: int = 128
    repeats: int = 5

    @property
    def decode_prompt(self) -> int:
        """Tokens of each user's prompt before the answers that are timed."""
        return min(DECODE_PROMPT, self.prompt_tokens)

    def validate(self) -> None:
        """Raises UsageError for a number that is not 1 or more, or a batch named twice."""
        numbers = {"--prompt": self.prompt_tokens, "--tokens": self.answer_tokens}
        numbers |= {"--repeats": self.repeats, "--batch": min(self.batch, default=0)}
        for name, number in numbers.items():
            if number < 1:
                raise UsageError(f"{name} is {number}; expected 1 or more.")
        if len(set(self.batch)) < len(self.batch):
            raise UsageError(f"--batch {self.batch}: each size once, as 1,8.")

    def fit(self, context: int) -> None:
        """Raises UsageError where a model's context is too short."""
        longest = max(self.prompt_tokens + 1, self.decode_prompt + self.answer_tokens + 1)
        if longest > context:
            raise UsageError(
                f"--prompt {self.prompt_tokens:,} and --tokens {self.answer_tokens:,} need "
                f"{longest:,} tokens; this model's context is {context:,}. Give smaller ones."
            )

    def cache_tokens(self) -> int:
        """Room that no answer ever waits for."""
        each = self.decode_prompt + self.answer_tokens + 1
        whole = PAGE_TOKENS * math.ceil(each / PAGE_TOKENS)
        return max(max(self.batch) * whole, self.prompt_tokens + 1) + PAGE_TOKENS


class Spread(NamedTuple):
    """Repeats of one quantity."""

    median: float
    min: float
    max: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Four digits hold all that a repeat tells."""
        kept = tuple(float(f"{value:.4g}") for value in values)
        return cls(float(np.median(kept)), min(kept), max(kept), kept)


@dataclass(frozen=True, slots=True)
class Report:
    """All figures with what they are of; `to_json` has the keys that scripts may rely on."""

    model: str
    date: str
    path: dict[str, str]
    """What computed: weights, activations, cache, draft."""
    threads: int
    work: Work
    prefill_tok_s: Spread
    """One prompt of `work.prompt_tokens`: its tokens / the time to its first token."""
    decode_tok_s: dict[int, Spread]
    """By batch: tokens of all users a second at temperature 0, their prompts' time left out."""
    sampled_tok_s: dict[int, Spread]
    """The same at temperature 0.7 and top-p 0.9."""
    ttft_s: Spread
    """From the start of an interpreter to the first token of a prompt of 16."""
    peak_mib: Spread | None
    """Resident, of that interpreter after a prefill and the largest batch; None: not told here."""
    ceilings: dict[str, float]
    """Of this machine, measured: see `measure_ceilings`."""
    shares: dict[str, float]
    """Of those ceilings; a share above 1 means that a nearer cache served it."""
    hardware: dict[str, object]
    versions: dict[str, str]
    commit: str | None
    accept_length: Spread | None = None
    """With a draft: tokens of a round of the first batch, the model's own included. Answers to
    random tokens are not what a draft was trained on."""
    speedup: Spread | None = None
    """With a draft: of that batch, greedy, over the same without it."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; a batch's size is text there."""
        values = {name: _plain(getattr(self, name)) for name in self.__slots__}
        return values | {"work": asdict(self.work)}

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headers, and the figures as people read them."""
        rows = [("prefill, tokens/s", f"1 x {self.work.prompt_tokens}", self.prefill_tok_s)]
        for how, found in (("greedy", self.decode_tok_s), ("sampled", self.sampled_tok_s)):
            rows += [(f"decode {how}, tokens/s", f"{n} users", s) for n, s in found.items()]
        if self.speedup and self.accept_length:
            rows.append(("tokens of a round", f"{self.work.batch[0]} users", self.accept_length))
            rows.append(("over the same without a draft, x", "greedy", self.speedup))
        rows.append(("first token, cold, s", f"1 x {COLD_PROMPT}", self.ttft_s))
        if self.peak_mib:
            rows.append(("peak memory, MiB", f"{max(self.work.batch)} users", self.peak_mib))
        text = [[name, what, *(f"{v:,.4g}" for v in spread[:3])] for name, what, spread in rows]
        text += [[name, "ceiling", f"{v:,.4g}", "", ""] for name, v in self.ceilings.items()]
        text += [[name, "share", f"{v:.0%}", "", ""] for name, v in self.shares.items()]
        return ["figure", "of", "median", "min", "max"], text


def bench(
    source: str,
    work: Work,
    *,
    options: Mapping[str, Any] | None = None,
    progress: "Progress" = lambda done, total, what: None,
) -> Report:
    """Measure a model; repeats take turns over all that is measured.

    Args:
        source: As for `attending.engine.local.load`.
        work: Lengths, batches and repeats.
        options: Of `load`.
        progress: Told of each finished measurement.

    Raises:
        UsageError: A number that is not possible, or not for this model.
        SourceError, CheckpointError: As `load` does.
    """
    work.validate()
    options = dict(options or {})
    model = _load(source, options, work)
    threads = options.get("threads") or cast(int, mesh.hardware()["available_cores"])
    kinds = {"decode": Sampling(temperature=0.0), "sampled": Sampling(temperature=0.7, top_p=0.9)}
    found: dict[tuple[str, int], list[float]] = {}
    total, done = work.repeats * (2 + len(kinds) * len(work.batch)), 0

    def note(name: str, batch: int, value: float) -> None:
        nonlocal done
        found.setdefault((name, batch), []).append(value)
        done += 1
        progress(done, total, "measuring")

    progress(0, total, "measuring")
    _warm_up(model.scheduler, model.arch.vocab_size, work)
    for repeat in range(work.repeats):
        ids = token_ids(model.arch.vocab_size, work.prompt_tokens, repeat)
        note("prefill", 1, prefill_rate(model.scheduler, ids))
        for batch in work.batch:
            for name, sampling in kinds.items():
                prompts = decode_prompts(model.arch.vocab_size, work, repeat, batch, name)
                length, rate = _drafted_rate(model.scheduler, prompts, work, sampling)
                note(name, batch, rate)
                if length is not None and (name, batch) == ("decode", work.batch[0]):
                    other = decode_prompts(model.arch.vocab_size, work, repeat, batch, "plain")
                    plain = decode_rate(
                        model.scheduler, other, work.answer_tokens, sampling, speculate=False
                    )
                    found.setdefault(("length", 1), []).append(length)
                    found.setdefault(("speedup", 1), []).append(rate / plain)
        ttft, peak = cold_start(source, options, work)
        found.setdefault(("peak", 1), []).extend([peak] if peak else [])
        note("ttft", 1, ttft)
    spreads = {key: Spread.of(values) for key, values in found.items() if values}
    rates = {n: {b: spreads[n, b] for b in work.batch} for n in kinds}
    read = bytes_read(model)
    ceilings = measure_ceilings(read, threads)
    return Report(
        model=model.origin.name,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        path=model.path,
        threads=threads,
        work=work,
        prefill_tok_s=spreads["prefill", 1],
        decode_tok_s=rates["decode"],
        sampled_tok_s=rates["sampled"],
        ttft_s=spreads["ttft", 1],
        peak_mib=spreads.get(("peak", 1)),
        ceilings=ceilings,
        shares=shares(
            ceilings,
            prefill_gop_s=prefill_gop_s(model.arch, work.prompt_tokens, spreads["prefill", 1]),
            decode_gb_s={b: read * rates["decode"][b].median / b / 1e9 for b in work.batch},
        ),
        hardware=mesh.hardware(),
        versions=artifact.versions(),
        commit=artifact.commit(),
        accept_length=spreads.get(("length", 1)),
        speedup=spreads.get(("speedup", 1)),
    )


def token_ids(vocab_size: int, count: int, *seed: int) -> tuple[int, ...]:
    """Random ids that the same seed gives again."""
    return tuple(np.random.default_rng(seed).integers(vocab_size, size=count).tolist())


def decode_prompts(
    vocab_size: int, work: Work, repeat: int, batch: int, kind: str
) -> list[tuple[int, ...]]:
    """A prompt a user; no two measurements of a run share one."""
    number = 1 + ("decode", "sampled", "plain").index(kind)
    places = ((repeat, batch, number, user) for user in range(batch))
    return [token_ids(vocab_size, work.decode_prompt, *place) for place in places]


def prefill_rate(
    scheduler: Scheduler, ids: tuple[int, ...], clock: Clock = time.perf_counter
) -> float:
    """Tokens a second of one prompt, up to its first token."""
    start = clock()
    scheduler.submit(Request(ids, Sampling(temperature=0.0, max_tokens=1), NO_STOP))
    while scheduler.num_running or scheduler.num_waiting:
        _step(scheduler)
    return len(ids) / (clock() - start)


def decode_rate(
    scheduler: Scheduler,
    prompts: Sequence[tuple[int, ...]],
    answer_tokens: int,
    sampling: Sampling,
    clock: Clock = time.perf_counter,
    *,
    speculate: bool = True,
) -> float:
    """Tokens a second of all users, from the moment when each has its first token."""
    sampling = sampling.replace(max_tokens=answer_tokens + 1, seed=0)
    requests = [Request(ids, sampling, NO_STOP, speculate=speculate) for ids in prompts]
    unbegun = {scheduler.submit(request) for request in requests}
    tokens, start = 0, clock()
    while scheduler.num_running or scheduler.num_waiting:
        handles = _step(scheduler)
        if not unbegun:
            tokens += len(handles)
        elif not (unbegun := unbegun.difference(handles)):
            start = clock()
    return tokens / (clock() - start)


def _drafted_rate(
    scheduler: Scheduler, prompts: Sequence[tuple[int, ...]], work: Work, sampling: Sampling
) -> tuple[float | None, float]:
    """Tokens of a round, None without a draft, and tokens a second."""
    told = scheduler.speculation
    before = (told.rounds, told.accepted.sum()) if told else (0, 0)
    rate = decode_rate(scheduler, prompts, work.answer_tokens, sampling)
    if told is None:
        return None, rate
    if told.rounds == before[0]:  # it was left alone
        return 1.0, rate
    return 1 + float(told.accepted.sum() - before[1]) / (told.rounds - before[0]), rate


def cold_start(source: str, options: Mapping[str, Any], work: Work) -> tuple[float, float | None]:
    """Seconds to the first token of a fresh interpreter, and its peak memory in MiB.

    Raises:
        AttendingError: It ended before it had told both.
    """
    told = json.dumps([source, dict(options), asdict(work)])
    command = [sys.executable, "-m", "attending.engine.bench", told]
    start = time.perf_counter()
    pipe = subprocess.PIPE
    # A session of its own: Ctrl-C is for this process, which then ends the other.
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as (
        child
    ):
        try:
            assert child.stdout and child.stderr
            first = child.stdout.readline()
            seconds = time.perf_counter() - start
            peak, error = child.communicate()
        finally:
            child.kill()
    if child.returncode or not first:
        reason = error.strip().rpartition("\n")[2] or f"exit code {child.returncode}"
        raise AttendingError(f"the fresh process that is timed failed: {reason}.")
    return seconds, json.loads(peak)


def measure_ceilings(weight_bytes: int, threads: int) -> dict[str, float]:
    """What no engine passes here, measured.

    `read_gb_s`: reads from memory; `read_weights_gb_s`: of a buffer as large as the weights, which
    a cache may hold; `float32_gflop_s`: numpy's product of matrices in the cache, or the kernel
    library's if that is faster; `int8_gop_s`: the kernel library's, where there is one.
    """
    from attending.engine import doctor
    from attending.engine.native import build

    sizes = {"read_gb_s": doctor.BUFFER_BYTES, "read_weights_gb_s": weight_bytes}
    found = {}
    for name, size in sizes.items():
        found[name] = doctor.measure_read(np.ones(size // 8, dtype=np.uint64), threads)
    found["float32_gflop_s"] = _matmul_gflop_s()
    for name, value in build.ceilings(threads).items():
        found[name] = max(value, found.get(name, 0.0))
    return found


def shares(
    ceilings: Mapping[str, float], *, prefill_gop_s: float, decode_gb_s: Mapping[int, float]
) -> dict[str, float]:
    """Of each ceiling, what prefill (operations) and decode by batch (bytes) reach."""
    found = {}
    for name, ceiling in ceilings.items():
        if not ceiling:  # too little was read, too slowly, to tell
            continue
        if name.endswith("op_s"):
            found[f"prefill / {name}"] = prefill_gop_s / ceiling
        else:
            found |= {f"decode {n} / {name}": gb_s / ceiling for n, gb_s in decode_gb_s.items()}
    return {name: round(share, 4) for name, share in found.items()}


def prefill_gop_s(arch: Architecture, tokens: int, rate: Spread) -> float:
    """10^9 operations a second: 2 a weight of the blocks' products and token, the head once."""
    head = arch.vocab_size * arch.hidden_size
    return 2 * (_block_weights(arch) * tokens + head) * rate.median / tokens / 1e9


def bytes_read(model: "Model") -> int:
    """Bytes of weights that a step reads: all but an embedding that is not the head too."""
    arch = model.arch
    looked_up = 0 if arch.tied else arch.vocab_size * arch.hidden_size
    return round(model.weight_bytes * (1 - looked_up / arch.num_parameters()))


def _block_weights(arch: Architecture) -> int:
    shapes = arch.tensor_shapes().items()
    return sum(math.prod(s) for n, s in shapes if n.startswith("model.layers.") and len(s) == 2)


def _matmul_gflop_s() -> float:
    square = np.ones((MATMUL_SIZE, MATMUL_SIZE), dtype=np.float32)
    out, seconds = np.empty_like(square), [math.inf]
    end = time.perf_counter() + MATMUL_SECONDS
    while (start := time.perf_counter()) < end:
        np.matmul(square, square, out=out)
        seconds.append(time.perf_counter() - start)
    return round(2 * MATMUL_SIZE**3 / min(seconds) / 1e9, 1)


def _load(source: str, options: Mapping[str, Any], work: Work) -> "Model":
    from attending.engine import local

    model = local.load(source, **options)
    work.fit(model.arch.context)
    model.make_room(work.cache_tokens(), max(work.batch), STEP_TOKENS)
    return model


def _warm_up(scheduler: Scheduler, vocab: int, work: Work) -> None:
    """Threads, buffers and the clock of the processor settle before anything is timed."""
    prefill_rate(scheduler, token_ids(vocab, work.prompt_tokens, 1 << 20))
    prompts = [token_ids(vocab, 1, 1 << 20, user) for user in range(max(work.batch))]
    decode_rate(scheduler, prompts, min(8, work.answer_tokens), Sampling(temperature=0.0))


def _step(scheduler: Scheduler) -> list[int]:
    """Whose tokens a step brought."""
    outputs = scheduler.step()
    for output in outputs:
        if output.error:
            raise output.error
    return [output.handle for output in outputs]


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        return value._asdict()
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    return value


def _cold(source: str, options: Mapping[str, Any], work: Work) -> None:
    """The fresh interpreter: a line at the first token, then its peak memory."""
    model = _load(source, options, work)
    vocab, greedy = model.arch.vocab_size, Sampling(temperature=0.0, max_tokens=1)
    model.scheduler.submit(Request(token_ids(vocab, COLD_PROMPT, 0), greedy, NO_STOP))
    tokens = [output.token for output in model.scheduler.step() if output.token is not None]
    with suppress(TokenizerError):  # a person waits for text; a model may have no tokenizer
        model.tokenizer.decode(tokens)
    sys.stdout.write("first token\n")
    sys.stdout.flush()
    prefill_rate(model.scheduler, token_ids(vocab, work.prompt_tokens, 1))
    prompts = decode_prompts(vocab, work, 2, max(work.batch), "decode")
    decode_rate(model.scheduler, prompts, work.answer_tokens, greedy)
    sys.stdout.write(json.dumps(_peak_mib()))


def _peak_mib() -> float | None:
    """VmHWM, of this program alone; getrusage would count its parent's too."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    return None


if __name__ == "__main__":
    source, options, work = json.loads(sys.argv[1])
    _cold(source, options, Work(**work | {"batch": tuple(work["batch"])}))
