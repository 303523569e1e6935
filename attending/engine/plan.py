"""What fits on a card: weights, activations and KV cache of any architecture, before a download.

Pure arithmetic on shapes; `explain` shows every step. One number is fitted, not derived: the
reserve, all that an engine holds beside the model (context, workspaces, graphs, slack). It comes
from one published row (`cards.toml`) and is the same for every model and card, so the farther
from a 24 GB card, the more it is a guess.
"""

import math
import re
import tomllib
from bisect import bisect_right
from collections import Counter
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any, cast

from attending import mesh
from attending.config import suggest
from attending.errors import UsageError
from attending.model.architecture import PAGE_TOKENS, Architecture

DATA = tomllib.loads((resources.files("attending.engine") / "cards.toml").read_text("utf-8"))
FIT = DATA["fit"]
UNITS = {"mib": 2**20, "gib": 2**30, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True, slots=True)
class Card:
    """A device; what is not known of it is None."""

    name: str
    title: str
    memory_bytes: int
    bandwidth_gb_s: float | None = None
    fp8: bool | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One scheme on one card."""

    scheme: str
    weight_bytes: int
    room_bytes: int
    """For KV; below 0: what the card lacks."""
    context: int
    """The longest single sequence, input and output; 0 where the model does not fit."""
    bound_by: str
    """What ends `context`: `memory`, or the `model`'s own maximum."""
    sequences: int
    """How many of `Plan.tokens` fit at once."""
    ceiling_tokens_s: float | None
    """Bandwidth / bytes read for a token after `Plan.tokens`: one sequence, no draft model."""
    published_tokens: int | None
    """The report's own `context`, where model and card are those of the fit."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The table, and what it was computed from."""

    architecture: Architecture
    card: Card
    tokens: int
    chunk: int
    activation_bytes: int
    reserve_bytes: int
    rows: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`; the architecture as its `config.json`."""
        return asdict(self) | {"architecture": self.architecture.to_config()}


def plan(architecture: Architecture, card: Card, *, tokens: int = 4096, chunk: int = 2048) -> Plan:
    """A row for every scheme, from the shapes alone.

    Concurrency and the decode ceiling are stated for sequences of `tokens`; a prompt is computed
    `chunk` tokens at once. Both are cut to the model's context; below 1 they are a UsageError.
    """
    if min(tokens, chunk) < 1:
        raise UsageError(f"tokens is {tokens} and chunk is {chunk}; expected 1 or more of each.")
    tokens, chunk = min(tokens, architecture.context), min(chunk, architecture.context)
    reserve = FIT["memory_bytes"] - FIT["weight_bytes"] - FIT["activation_bytes"] - FIT["kv_bytes"]
    active = 2 * chunk * live_values(architecture) + 4 * architecture.vocab_size
    left = card.memory_bytes - active - reserve
    rows = tuple(_row(architecture, card, scheme, tokens, left) for scheme in DATA["schemes"])
    return Plan(architecture, card, tokens, chunk, active, reserve, rows)


def load_card(name: str) -> Card:
    """A card by name, `cpu` for this machine, or a size such as `24GiB`; else a UsageError."""
    name = name.strip().lower()
    if name == "cpu":
        return Card(name, "this machine's memory", cast(int, mesh.hardware()["memory_bytes"]))
    if name in DATA["cards"]:
        values = dict(DATA["cards"][name])
        return Card(name, memory_bytes=values.pop("memory_mib") * 2**20, **values)
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?(mib|gib|mb|gb)", name)
    if size is None or float(size[1]) == 0:
        hint = suggest(name, card_names())
        raise UsageError(f"card {name!r} is neither a known card nor a size such as 24GiB.{hint}")
    return Card(name, name, int(float(size[1]) * UNITS[size[2]]))


def card_names() -> list[str]:
    """Every name that `load_card` knows."""
    return [*DATA["cards"], "cpu"]


def table(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Headers, and the rows as text; `published` only where something was."""
    headers = ["scheme", "weights", "longest sequence", f"x {plan.tokens:,}", "tok/s", "published"]
    rows = []
    for row in plan.rows:
        short = f"does not fit: {gib(max(0, -row.room_bytes))} short"
        longest = f"{row.context:,} ({row.bound_by})" if row.context else short
        speed = f"{row.ceiling_tokens_s:,.0f}" if row.ceiling_tokens_s else "-"
        note = "-"
        if told := row.published_tokens:
            error = "fitted" if row.scheme == FIT["scheme"] else f"{row.context / told - 1:+.1%}"
            note = f"{told:,} {error}"
        rows.append([row.scheme, gib(row.weight_bytes), longest, f"{row.sequences:,}", speed, note])
    width = len(headers) if any(row.published_tokens for row in plan.rows) else -1
    return headers[:width], [cells[:width] for cells in rows]


def explain(plan: Plan) -> str:
    """Every number's derivation, and which are published, fitted or predicted."""
    arch, weights = plan.architecture, []
    for layout in dict.fromkeys(layout for layout, _ in DATA["schemes"].values()):
        parts = weight_bytes(arch, layout)
        terms = "\n    + ".join(f"{size:,} {kind}" for kind, size in parts.items())
        weights.append(f"  {layout}: {parts.total():,} bytes\n    = {terms}")
    inputs = {arch.hidden_size, arch.intermediate_size}
    inputs |= {spec.num_heads * spec.head_dim for spec in arch.layers}
    groups = [f"{group_size(n) or 'none'} of {n:,}" for n in sorted(inputs)]
    kinds = Counter((s.num_kv_heads, s.head_dim, s.window or arch.context) for s in arch.layers)
    cache = [
        f"  {count} layers: 2 x {heads} x {size} x 2 = {4 * heads * size:,}, up to {most:,} tokens"
        for (heads, size, most), count in kinds.items()
    ]
    lists = {"weights": "\n".join(weights), "groups": ", ".join(groups), "cache": "\n".join(cache)}
    counts = {"parameters": arch.num_parameters(), "live": live_values(arch)}
    return str(DATA["explain"]).strip().format(arch=arch, plan=plan, fit=FIT, **lists, **counts)


def weight_bytes(arch: Architecture, layout: str) -> Counter[str]:
    """Bytes of a checkpoint by kind; only the linear layers of the blocks are quantised."""
    total: Counter[str] = Counter()
    for name, shape in arch.tensor_shapes().items():
        values, is_linear = math.prod(shape), name.startswith("model.layers.") and len(shape) == 2
        group = group_size(shape[-1]) if is_linear and layout != "16-bit" else None
        if group is None:
            total["in 16 bits"] += 2 * values
            continue
        total["in 4 bits"] += values // 2
        total["group scales"] += 2 * values // group
        if layout == "GPTQ":
            total["zero points and g_idx"] += values // group // 2 + 4 * shape[1]
        else:
            total["row scales"] += 4 * shape[0]
    return total


def read_bytes(arch: Architecture, layout: str) -> int:
    """Weights read for each token: all but an untied embedding, which is looked up by row."""
    lookup = 0 if arch.tied else 2 * arch.vocab_size * arch.hidden_size
    return weight_bytes(arch, layout).total() - lookup


def group_size(inputs: int) -> int | None:
    """How many inputs share a scale: 128, else 64 or 32 if that divides; None: stays 16-bit."""
    return group if (group := math.gcd(inputs, 128)) >= 32 else None


def kv_bytes(arch: Architecture, tokens: int, value_bytes: int = 2) -> int:
    """What one sequence keeps: K and V within each layer's window, and Baichuan-M1's raw rows."""
    total = 0
    for spec in arch.layers:
        kept = min(tokens, spec.window or tokens)
        raw_rows = math.ceil(kept / PAGE_TOKENS) if arch.is_m1 else 0
        total += 2 * spec.num_kv_heads * spec.head_dim * (kept * value_bytes + raw_rows * 2)
    return total


def live_values(arch: Architecture) -> int:
    """Values that a prompt token holds at the peak of a block; `explain` lists them."""
    attention = max(2 * s.head_dim * (s.num_heads + s.num_kv_heads) for s in arch.layers)
    return 2 * arch.hidden_size + max(attention, 2 * arch.intermediate_size)


def gib(size: int) -> str:
    """Bytes as text."""
    return f"{size / 2**30:,.1f} GiB"


def _row(arch: Architecture, card: Card, scheme: str, tokens: int, left: int) -> Row:
    layout, size = DATA["schemes"][scheme]
    weights = weight_bytes(arch, layout).total()
    kv, room = kv_bytes(arch, tokens, size), left - weights
    context = bisect_right(range(1, arch.context + 1), room, key=lambda n: kv_bytes(arch, n, size))
    read = read_bytes(arch, layout) + kv
    speed = card.bandwidth_gb_s * 1e9 / read if card.bandwidth_gb_s and context >= tokens else None
    fitted = arch.num_parameters() == FIT["parameters"] and card.name == FIT["card"]
    published = FIT["published_tokens"].get(scheme) if fitted else None
    bound = "model" if context == arch.context else "memory"
    return Row(scheme, weights, room, context, bound, max(0, room // kv), speed, published)
