"""The native engine: where its time goes, what each change brought, what 8 bits cost.

    python benchmarks/engine.py DATA [REPEATS] [--no-loss]

DATA is the folder with `train/general_openstax.jsonl`. Earlier kernels are taken from this
repository's history and compiled. Budget: the ladder, curves and memory some 6 minutes of two
cores, the losses (20,480 tokens on nine paths) some 10 more; nothing else should run.
"""

import ctypes
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from loss import NOTES as COST
from loss import losses, table
from matplotlib import pyplot
from page import HERE, facts

import attending
from attending.engine.doctor import measure_read
from attending.engine.native import build, compiler, pack
from attending.engine.native.runner import NativeOptions, NativeRunner
from attending.engine.runner import Runner, Span
from attending.model.architecture import PAGE_TOKENS

PROMPT, CACHED = 512, 128
NEIGHBOUR = "while True: pass"
# Kernels of this repository's history. The gain was predicted from the profile before it was built.
SPINNING = "78ef859"
FIRST, PANELS, WHOLE, SOFTMAX = "025f7be", "2574f48", "fd4e2f3", "b7d864f"


# Older kernels took numbers more, told of no failure, and knew no draft: their records as of today.
OLDER = (
    ("rope_sizes, page_groups;", "rope_sizes;"),
    ("int8_kv, is_m1;", "int8_kv;"),
    ("page_group, rope;", "page_group, rope, first; float eps;"),
    ("layers, hidden, inner, vocab", "layers, hidden, vocab"),
    ("int8_kv;\n    float norm_eps, rope_factor;", "int8_kv, kept_rows;\n    float norm_eps;"),
    ("const float* const* frequencies;", "const float *rope_factors, *const* frequencies;"),
    ("m_.rope_factor", "m_.rope_factors[i]"),
    ("m_.inner", "m_.layer[0].down.inputs"),
    ("m.inner", "m.layer[0].down.inputs"),
    ("*ids, *positions;", "*ids;"),
    ("b_->positions[row]", "places_[row].slot"),
)


class Rung(NamedTuple):
    """One step of the ladder: what changed, what was expected of it, and how to run it."""

    title: str
    predicted: str
    commit: str = ""
    """Of the kernel; empty is the present one."""
    path: str = ""


LADDER = (
    Rung("the kernel, AVX2: 32 products of bytes an instruction", "4 x, 1 user", FIRST, "avx2"),
    Rung("AVX512 with VNNI: 64, and twelve rows at once", "2 x, prefill", FIRST),
    Rung("rows in panels, read with one pointer", "1.09 x, prefill", PANELS),
    Rung("whole panels compiled in; last layer for wanted rows only", "1.04 x, prefill", WHOLE),
    Rung("a page's softmax in vectors", "1.05 x, prefill", SOFTMAX),
    Rung("few rows made ready by each thread for itself: half the barriers", "1.15 x, 1 user"),
)
NOTES = """
The default model (SmolLM2-135M-Instruct, Q4_1) on two threads; steps of the runner itself, without
scheduler and sampler; random token ids. Everything that is compared ran in turns, a step each, in
one process; medians with the middle half of the steps. Through the whole engine and beside other
engines: [peers.md](peers.md).
"""
DROPPED = """
Tried and dropped, measured the same way: unpacking a tile's 4 bits once for all rows of a prompt
(predicted 1.06 x, was 0.99: the shifts run beside the products); a page of keys and values widened
to float32 once for all queries (predicted 1.04 x, was 0.96); sixteen rows instead of eight in an
attention task (predicted 1.02 x, was 1.00); six rows by a pair of tiles that share the activations
they load (predicted 1.15 x, was 0.84).
"""


def runner_of(packed: pack.Packed, library: ctypes.CDLL | None = None, **options: Any) -> Runner:
    return NativeRunner(packed, [640], NativeOptions(**options), kernel=library)


def kernel(commit: str, path: str, folder: Path) -> ctypes.CDLL:
    """The library of some commit's source, as this commit's options compile it, with its names."""
    source = folder / f"{commit}.cpp"
    command = ["git", "show", f"{commit or 'HEAD'}:attending/engine/native/kernel.cpp"]
    text = subprocess.run(command, cwd=HERE, capture_output=True, check=True, text=True).stdout
    for old, new in OLDER if commit else ():
        text = text.replace(old, new)
    text += 'extern "C" int attending_propose() { return 1; }\n' if commit else ""
    source.write_text(text, encoding="utf-8")
    path = path or build.best_path()
    target = folder / f"kernel-{commit}-{path}.so"
    options = [*compiler.FLAGS, *compiler.PATHS[path]]
    subprocess.run(["c++", *options, str(source), "-o", str(target)], check=True)
    library = build.declared(ctypes.CDLL(str(target)))
    if commit:
        library.attending_step.restype = None
    return library


def prompt_step(runner: Runner, ids: Any, tokens: int = PROMPT) -> None:
    """A prompt in pieces of 512, as the scheduler cuts it."""
    pages = (np.arange(-(-tokens // PAGE_TOKENS)),)
    for at in range(0, tokens, PROMPT):
        runner.step([Span(ids[at : min(at + PROMPT, tokens)], at, pages, 1)])


def begin(runner: Runner, ids: Any, users: int, cached: int, shared: int = 0) -> list[Any]:
    """Pages of users who each have a prompt in the cache; `shared` of it is one and the same."""
    each = -(-(cached + 80) // PAGE_TOKENS)
    own = [np.arange(i * each, (i + 1) * each) for i in range(users)]
    for pages in own:
        pages[: shared // PAGE_TOKENS] = own[0][: shared // PAGE_TOKENS]
    for i, pages in enumerate(own):
        start = 0 if i == 0 else shared
        text = ids[i * 7 : i * 7 + cached - start]
        for at in range(0, len(text), PROMPT):
            piece = text[at : at + PROMPT]
            runner.step([Span(piece, start + at, (pages,), 1)])
    return own


def decode_step(runner: Runner, ids: Any, pages: Sequence[Any], cached: int, turn: int) -> None:
    turn %= 64
    runner.step([Span(ids[turn : turn + 1], cached + turn, (own,), 1) for own in pages])


def in_turns(works: Sequence[Callable[[int], None]], times: int) -> list[list[float]]:
    """Seconds of each, all of them again and again in changing order."""
    seconds: list[list[float]] = [[] for _ in works]
    rng = np.random.default_rng(0)
    for work in works:
        work(0)
    for turn in range(times):
        for at in rng.permutation(len(works)):
            start = time.perf_counter()
            works[at](turn)
            seconds[at].append(time.perf_counter() - start)
    return seconds


def told(values: Sequence[float]) -> str:
    """Median with the middle half: single steps have outliers that say nothing."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    digits = 2 if high < 10 else 0
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def ladder(packed: pack.Packed, torch_runner: Runner, ids: Any, times: int, folder: Path) -> Any:
    runners = [torch_runner]
    for rung in LADDER:
        library = kernel(rung.commit, rung.path, folder)
        runners.append(runner_of(packed, library, threads=2))
    titles = ["torch's runner, float32", *(rung.title for rung in LADDER)]
    expected = ["", *(rung.predicted for rung in LADDER)]
    rates: list[list[list[float]]] = []
    for users in (0, 1, 8):
        works: list[Callable[[int], None]] = []
        for runner in runners:
            if not users:
                works.append(lambda turn, r=runner: prompt_step(r, ids))
                continue
            pages = begin(runner, ids, users, CACHED)
            works.append(lambda turn, r=runner, p=pages: decode_step(r, ids, p, CACHED, turn))
        amount = users or PROMPT
        rates.append(
            [[amount / s for s in seen] for seen in in_turns(works, times * (8 if users else 2))]
        )
    rows = []
    for at, title in enumerate(titles):
        cells = [told(rate[at]) for rate in rates]
        before = [statistics.median(rate[at]) / statistics.median(rate[at - 1]) for rate in rates]
        gains = [f"{gain:.2f}" for gain in before] if at else ["", "", ""]
        rows.append(
            [
                title,
                expected[at],
                *(f"{c}; {g}" if g else c for c, g in zip(cells, gains, strict=True)),
            ]
        )
    head = ["", "predicted", "prefill of 512, tokens/s; x", "1 user; x", "8 users; x"]
    factor = statistics.median(rates[1][-1]) / statistics.median(rates[1][0])
    return table(head, rows), rates, titles, factor


def options_table(packed: dict[str, pack.Packed], ids: Any, times: int) -> list[str]:
    """What can be chosen, in turns on one kernel."""
    choices: list[tuple[str, str, dict[str, Any]]] = [
        ("as it is by default", "stored", {}),
        ("one thread", "stored", {"threads": 1}),
        ("activations in float32", "stored", {"activations": "float32"}),
        ("keys and values in 8 bits", "stored", {"kv": "int8"}),
        ("weights in 8 bits", "w8", {}),
        ("weights in 8 bits, activations in float32", "w8", {"activations": "float32"}),
        ("weights in 4 bits, groups of 64", "w4-64", {}),
    ]
    runners = [runner_of(packed[form], **{"threads": 2, **options}) for _, form, options in choices]
    columns = []
    for users in (0, 1, 8):
        works: list[Callable[[int], None]] = []
        for runner in runners:
            if users:
                pages = begin(runner, ids, users, CACHED)
                works.append(lambda turn, r=runner, p=pages: decode_step(r, ids, p, CACHED, turn))
            else:
                works.append(lambda turn, r=runner: prompt_step(r, ids))
        seen = in_turns(works, times * (8 if users else 2))
        columns.append([told([(users or PROMPT) / s for s in one]) for one in seen])
    rows = [[title, *(c[at] for c in columns)] for at, (title, _, _) in enumerate(choices)]
    return table(["", "prefill of 512, tokens/s", "1 user", "8 users"], rows)


@contextmanager
def neighbour() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", NEIGHBOUR])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def beside_a_neighbour(packed: pack.Packed, ids: Any, folder: Path) -> list[str]:
    """A step for one user while another program keeps a core busy: how a thread waits."""
    spinning = runner_of(packed, kernel(SPINNING, "", folder), threads=2)
    present = runner_of(packed, threads=2)
    works = []
    for runner in (spinning, present):
        pages = begin(runner, ids, 1, CACHED)
        works.append(lambda turn, r=runner, p=pages: decode_step(r, ids, p, CACHED, turn))
    with neighbour():
        before, after = (told([1e3 * s for s in seen]) for seen in in_turns(works, 24))
    rows = [
        ["20,000 turns of spinning, then asleep", before],
        ["100, then the core is offered", after],
    ]
    return table(["a thread that waits", "step for one user beside a busy neighbour, ms"], rows)


def curves(packed: pack.Packed, ids: Any) -> dict[str, dict[int, float]]:
    """Tokens/s by users, by prompt and by context; and of users who share a beginning."""
    runner = runner_of(packed, threads=2)
    found: dict[str, dict[int, float]] = {}

    def rate(work: Callable[[int], None], amount: int, times: int = 24) -> float:
        (seen,) = in_turns([work], times)
        return amount / statistics.median(seen)

    def users_rate(users: int, cached: int, shared: int = 0) -> float:
        pages = begin(runner, ids, users, cached, shared)
        return rate(lambda turn: decode_step(runner, ids, pages, cached, turn), users)

    found["prefill by tokens of the prompt"] = {
        n: rate(lambda turn, n=n: prompt_step(runner, ids, n), n, 8)
        for n in (32, 64, 128, 256, 512, 1024, 2048)
    }
    found["decode by users"] = {n: users_rate(n, CACHED) for n in (1, 2, 4, 8, 16, 32)}
    found["one user by tokens in the cache"] = {
        n: users_rate(1, n) for n in (128, 512, 1024, 2048, 4096)
    }
    found["8 users, 2,048 tokens each"] = {0: users_rate(8, 2048), 2048: users_rate(8, 2048, 2048)}
    return found


def profile() -> list[str]:
    """Shares of the samples by the kernel's function, where `perf` is there."""
    if shutil.which("perf") is None:
        return ["`perf` is not installed here: no profile.", ""]
    parts = {
        "multiply": "products",
        "product": "products",
        "attend": "attention",
        "mix": "attention",
        "set": "rounding of activations",
        "place": "rotation, writing the cache",
        "barrier": "waiting for the other thread",
        "read_row": "embedding",
    }
    shares = {}
    for mode in ("prefill", "1", "8"):
        with TemporaryDirectory() as folder:
            data = f"{folder}/data"
            run = [sys.executable, __file__, "--work", mode, folder]  # perf reads the library
            subprocess.run(
                ["perf", "record", "-q", "-e", "cpu-clock", "-F", "499", "-o", data, *run],
                check=True,
                capture_output=True,
            )
            text = subprocess.run(
                [
                    "perf",
                    "report",
                    "-i",
                    data,
                    "--stdio",
                    "--no-children",
                    "-F",
                    "overhead,dso,sym",
                ],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        share: Counter[str] = Counter()
        for line in text.splitlines():
            if "%" not in line or line.startswith("#") or "kernel-" not in line:
                continue
            value, name = float(line.split("%")[0]), line.split("]", 1)[1]
            # A function that was inlined counts to the one around it: the longest known name wins.
            part = next(
                (p for n, p in parts.items() if f"::{n}" in name),
                "sums into the residual, and the rest",
            )
            share[part] += value
        whole = sum(share.values())
        shares[mode] = {part: value / whole for part, value in share.items()}
    names = sorted(
        {p for s in shares.values() for p in s}, key=lambda p: -shares["prefill"].get(p, 0)
    )
    rows = [[name, *(f"{shares[m].get(name, 0):.0%}" for m in shares)] for name in names]
    return table(["share of the kernel's time", "prefill of 512", "1 user", "8 users"], rows)


def work(mode: str, folder: Path) -> None:
    """What is profiled: some seconds of one kind of step."""
    checkpoint = attending.load("default")._checkpoint
    packed = pack.open_packed(checkpoint, folder / "stored", "stored")
    run(runner_of(packed, kernel("", "", folder), threads=2), mode)


def run(runner: Runner, mode: str) -> None:
    ids = token_ids(runner)
    if mode == "prefill":
        for _ in range(24):
            prompt_step(runner, ids)
        return
    pages = begin(runner, ids, int(mode), CACHED)
    for turn in range(600):
        decode_step(runner, ids, pages, CACHED, turn)


def token_ids(runner: Runner) -> Any:
    return np.random.default_rng(0).integers(1000, runner.arch.vocab_size - 1000, 8192)


def arithmetic(packed: pack.Packed, rates: Any) -> list[str]:
    """What a token needs, what the machine can do, and the shares that are reached."""
    inside = [m for name, m in packed.matrices.items() if name != "embedding"]
    products = 2 * sum(m.outputs * m.inputs for m in inside)
    head = packed.matrices.get("head", packed.matrices["embedding"])
    size = sum(m.data.nbytes for m in inside) + (head.data.nbytes if packed.arch.tied else 0)
    peaks = build.ceilings(2)
    buffer = np.ones(size // 8, dtype=np.uint64)
    reads = {"as large as the weights": buffer, "of 512 MiB": np.ones(2**26, dtype=np.uint64)}
    speeds = {name: measure_read(array, 2) for name, array in reads.items()}
    prefill, one = (statistics.median(rates[i][-1]) for i in (0, 1))
    rows = [
        [
            "8-bit products with their sums, GOP/s",
            f"{peaks['int8_gop_s']:,.0f}",
            f"{products * prefill / 1e9:,.0f} (prefill)",
            f"{products * prefill / 1e9 / peaks['int8_gop_s']:.0%}",
        ],
        ["float32, GFLOP/s", f"{peaks['float32_gflop_s']:,.0f}", "", ""],
        *(
            [
                f"reads of a buffer {name}, GB/s",
                f"{speed:,.1f}",
                f"{size * one / 1e9:,.1f} (one user)",
                f"{size * one / 1e9 / speed:.0%}",
            ]
            for name, speed in speeds.items()
        ),
    ]
    text = (
        f"A token of a prompt needs {products / 1e6:,.0f} M operations in products (the head only "
        f"for the last); a written token reads {size / 1e6:,.1f} MB of packed weights, of them "
        f"{head.data.nbytes / 1e6:,.1f} MB the head in 8 bits. For each 8 instructions with 64 "
        "products, a group of 32 needs one conversion and three multiplications in float32 (its "
        "scales and its minimum), two of which share the unit: 8 of 11 slots, 73 %, is the most "
        "that exact groups of 32 leave."
    )
    return [text, "", *table(["ceiling, two threads, measured here", "", "reached", "share"], rows)]


def draw(found: dict[str, dict[int, float]], rates: Any, titles: Sequence[str]) -> None:
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    panel = axes[0][0]
    middles = [statistics.median(rate) for rate in rates[0]]
    panel.barh(range(len(titles)), middles, color="C0")
    panel.set_yticks(range(len(titles)), [title.split(";")[0][:34] for title in titles], fontsize=7)
    panel.invert_yaxis()
    panel.set_title("the ladder: prefill of 512, tokens/s", fontsize=9)
    for panel, (title, points) in zip(axes.flat[1:], found.items(), strict=False):
        panel.plot(list(points), list(points.values()), "o-")
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(points), [f"{x:,}" for x in points], fontsize=8)
        panel.set_ylim(bottom=0)
        panel.set_title(f"{title}, tokens/s", fontsize=9)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "engine.svg", metadata={"Date": None})


def main(data: Path, repeats: int, *, with_loss: bool) -> None:
    about = facts()
    model = attending.load("default", dtype="float32")
    with TemporaryDirectory() as place:
        folder = Path(place)
        packed = {
            form: pack.open_packed(model._checkpoint, folder / form, form)
            for form in ("stored", "w8", "w4-64")
        }
        model.make_room(640 * PAGE_TOKENS, 32, 512)
        ids = token_ids(model._runner)
        steps, rates, titles, factor = ladder(packed["stored"], model._runner, ids, repeats, folder)
        sums = arithmetic(packed["stored"], rates)
        chosen = options_table(packed, ids, repeats)
        waits = beside_a_neighbour(packed["stored"], ids, folder)
        found = curves(packed["stored"], ids)
        lost = losses(data, folder) if with_loss else ["Not measured in this run.", ""]
    draw(found, rates, titles)
    shared = found["8 users, 2,048 tokens each"]
    lines = [
        "# The native engine",
        "",
        NOTES.strip(),
        "",
        "## Where the time goes",
        "",
        *profile(),
        *sums,
        "## The ladder",
        "",
        "Each row beside the one before it (x).",
        "",
        *steps,
        DROPPED.strip(),
        "",
        *waits,
        f"One user gets {factor:.0f} times the tokens of torch's runner.",
        "",
        "## What can be chosen",
        "",
        *chosen,
        "## What it costs",
        "",
        COST.strip(),
        "",
        *lost,
        "## Curves",
        "",
        "![The native engine](engine.svg)",
        "",
        *(
            f"- {title}: " + ", ".join(f"{y:,.0f} at {x:,}" for x, y in points.items())
            for title, points in list(found.items())[:3]
        ),
        f"- 8 users with 2,048 tokens each in the cache: {shared[0]:,.0f} tokens/s, "
        f"{shared[2048]:,.0f} where the pages are the same ones, read once for all",
        "",
        *about,
        "",
    ]
    (HERE / "engine.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], Path(sys.argv[3]))
    else:
        given = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
        count = int(given[1]) if given[1:] else 4
        main(Path(given[0]), count, with_loss="--no-loss" not in sys.argv)
