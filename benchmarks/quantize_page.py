"""The arms of benchmarks/quantize.py, and its page and figure out of what it kept in quantize/.

python benchmarks/quantize_page.py
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import page
from page import HERE, Measure

from attending.train.plan import GIB

FOLDER = HERE / "quantize"
TITLE = "Four bits: the default model in symmetric groups of 64"
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
SHORT = ["distill.epochs=1", "distill.rate=0.002"]
ONCE = {
    "GPTQ, then distilled once": ["method=gptq", *SHORT],
    "rotation + GPTQ, then distilled once": ["method=gptq", "rotate=true", *SHORT],
}
"""Of the default model alone: learning for half as long."""
PEERS = {
    "llm-compressor GPTQ": ("llmcompressor",),
    "HQQ": ("hqq",),
    "auto-round, 50 steps (light)": ("autoround", "50"),
}
SECOND = "m1-small"
"""Records of the second model, whatever its folder is called."""
GROUPS = (32, 128)
QQQ = "rotation + GPTQ, QQQ (W4A8)"
SERVED = "GPTQ, then distilled once"
SERVED_AS = ("4 bits, groups of 64", "8 bits", "float32 (torch)")
SIZES = (256, 512, 1024)
GROWN = {"gptq": "gptq", "signed": "signed", "plain": "distilled"}
LIMIT = 100
"""Examples of each task of the gate's suite."""
CLOSED = "gap closed, %"
Figures = Mapping[str, Any]


def slug(*words: object) -> str:
    """As a file is named."""
    return re.sub(r"[^a-z0-9]+", "-", " ".join(map(str, words)).lower()).strip("-")


def recorded(names: Mapping[str, str]) -> dict[str, Figures]:
    """By title, those of the files that are there."""
    files = {title: FOLDER / f"{slug(name)}.json" for title, name in names.items()}
    return {
        title: json.loads(file.read_text("utf-8"))
        for title, file in files.items()
        if file.is_file()
    }


def measures(arms: Mapping[str, Figures]) -> list[Measure]:
    """Of each arm, beside the first one, which is plain rounding."""
    first, found = next(iter(arms.values())), []
    rise = first["perplexity"] - first["before"]
    for name, one in arms.items():
        closed = (first["perplexity"] - one["perplexity"]) / rise
        columns = {
            "perplexity": one["perplexity"],
            CLOSED: 100 * closed,
            "KL, millinats": 1000 * one["divergence"],
            "KL's 99.9th percentile, nats": one["tail"],
            "top-1 flips, %": 100 * one["flips"],
            "minutes": one["seconds"] / 60,
        }
        if one["peak_bytes"] is not None:
            columns["peak memory, GiB"] = one["peak_bytes"] / GIB
        found += [Measure(quantity, name, [value]) for quantity, value in columns.items()]
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def rows(arms: Mapping[str, Figures], *without: str) -> list[str]:
    every = {(one.subject, one.quantity): one.text for one in measures(arms)}
    head = [one for one in dict.fromkeys(quantity for _, quantity in every) if one not in without]
    body = [[name, *(every.get((name, quantity), "") for quantity in head)] for name in arms]
    return table(["", *head], body)


def second() -> Iterator[str]:
    """The model that was never rounded."""
    for group in GROUPS:
        names = {name: f"{SECOND} {name} {group}" for name in METHODS}
        arms = recorded(names | ({QQQ: f"{SECOND} qqq"} if group == 128 else {}))
        if "plain" in arms:
            before = arms["plain"]["before"]
            yield from (f"{SECOND}, groups of {group}; float perplexity {before:.3f}:", "")
            yield from (*rows(arms, CLOSED), "")  # of next to nothing


def served(told: Mapping[str, Figures]) -> list[str]:
    """A folder in the engine, beside 8 bits and floats."""
    found = []
    for name, one in told.items():
        speed, peak = one["decode_tok_s"]["1"], one["peak_mib"]["median"]
        spread = f"({speed['min']:.1f} to {speed['max']:.1f})"
        found.append([name, f"{speed['median']:.1f} {spread}", f"{peak:,.0f}"])
    return table(["served", "tokens/s, one user", "peak memory, MiB"], found)


def suite(told: Figures) -> list[str]:
    """The gate's tasks before and after."""
    found = []
    for one in told["changes"]:
        flips = told["flips"].get(one["task"])
        spread = " to ".join(f"{value:+.3f}" for value in one["interval"] or ())
        gain = f"{one['gain']:+.3f}" + (f" ({spread})" if spread else "")
        cells = [f"{one['before']:.3f}", f"{one['after']:.3f}", gain]
        cells.append("" if flips is None else f"{100 * flips:.1f}")
        found.append([f"{one['task']}, {one['metric']}", *cells])
    head = [f"{LIMIT} examples of each", "8 bits", "4 bits", "gain", "answered otherwise, %"]
    return table(head, found)


def grown() -> list[list[str]]:
    names = {f"{size}, {to}": f"grown {size} {of}" for size in SIZES for of, to in GROWN.items()}
    found = []
    for name, one in recorded(names).items():
        planned, peak = one["planned_bytes"], one["peak_bytes"]
        cells = [f"{value / 2**20:,.0f}" for value in (planned, peak)]
        found.append([name, *cells, f"{peak / planned:.2f}"])
    return found


def origins() -> dict[str, list[str]]:
    """Date, commit, hardware and versions -> the records that are of it."""
    found: dict[str, list[str]] = {}
    for file in sorted(FOLDER.glob("*.json")):
        told = json.loads(file.read_text("utf-8"))
        found.setdefault(f"{told['about']}; threads: {told['threads']}", []).append(file.stem)
    return found


def write() -> None:
    """Both, of whatever was measured so far."""
    arms = recorded({name: f"default {name}" for name in METHODS | ONCE})
    arms |= recorded({name: f"default {name} 64" for name in PEERS})
    notes = (FOLDER / "notes.md").read_text("utf-8").strip()
    page.write("quantize", TITLE, notes, measures(arms), rows_are_subjects=True)  # for its figure
    text = [f"# {TITLE}", "", notes, "", *rows(arms), "", f"![{TITLE}](quantize.svg)", ""]
    text += [f"Float perplexity {arms['plain']['before']:.3f}.", "", *second()]
    if told := recorded({name: f"served {at}" for at, name in enumerate(SERVED_AS)}):
        text += [f"Served ({SERVED}):", "", *served(told), ""]
    if told := recorded({"": "suite"}):
        text += ["Tasks, by the engine:", "", *suite(told[""]), ""]
    if rows_of := grown():
        head = ["hidden size, method", "planned, MiB", "measured, MiB", "ratio"]
        text += ["Memory, beside `--dry-run`'s arithmetic:", "", *table(head, rows_of), ""]
    versions = ", ".join(sorted({arms[name]["version"] for name in PEERS if name in arms}))
    text += [f"Peers: {versions}. Seed 0.", ""]
    text += ["`python benchmarks/quantize.py DATA_DIR WORK_DIR M1_SMALL --peers PYTHON`", ""]
    text += [f"- {', '.join(names)}: {about}" for about, names in origins().items()]
    (HERE / "quantize.md").write_text("\n".join([*text, ""]), "utf-8")


if __name__ == "__main__":
    write()
