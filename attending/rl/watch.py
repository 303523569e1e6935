"""What a run is watched by: figures of a step, held-out scores, alarms, reasons to stop, a page."""

import json
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from attending.errors import CheckFailed
from attending.logs import cut, read_metrics
from attending.rl.advantage import Advantages
from attending.rl.fragments import Fragment
from attending.rl.recipe import RlConfig, WatchConfig
from attending.rl.types import Case, Sample
from attending.rl.verify import Judged
from attending.train.parallel import gathered
from attending.train.watch import METRICS

ROLLOUTS, PAGE = "rollouts.jsonl", "rollouts.html"
CUT_SHARE, LENGTH_FACTOR = 0.9, 2.0  # of an alarm


def figures(
    judged: Sequence[Sequence[Judged]],
    groups: Sequence[Sequence[Sample]],
    cases: Mapping[str, Case],
    found: Advantages,
    played: Sequence[Fragment] = (),
) -> dict[str, float]:
    """Of all ranks' answers: scores by kind and part, lengths, stops, what taught nothing."""
    answers = [one for group in judged for one in group]
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(name: str, value: float, weight: float = 1.0) -> None:
        sums[name][0] += value
        sums[name][1] += weight

    for group in groups:
        for sample in group:
            if sample.reward is not None:
                add("rl/reward", sample.reward)
    for one in answers:
        add("rl/length_tokens", len(one.rollout.ids))
        add("rl/cut_share", one.rollout.stop == "length")
        add("rl/unscored_share", one.verdict.score is None)
        if one.verdict.score is not None:
            add("rl/score", one.verdict.score)
            add(f"rl/score_{metric_name(cases[one.rollout.case].kind)}", one.verdict.score)
        for part, value in one.verdict.parts.items():
            add(f"rl/part_{metric_name(part)}", value)
    for fragment in played:
        add("rl/fragment_turns", len(fragment.said))
        add("rl/cut_fragment_share", fragment.is_cut)
    for name, count in (("flat", found.num_flat), ("lone", found.num_lone)):
        add(f"rl/{name}_group_share", count, found.num_groups)
    add("rl/zero_advantage_share", found.num_flat + found.num_lone, found.num_groups)
    merged: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for own in gathered(dict(sums)):
        for name, (value, weight) in own.items():
            merged[name][0] += value
            merged[name][1] += weight
    return {name: value / weight for name, (value, weight) in merged.items() if weight}


def require_sound(config: WatchConfig, step: int, watched: Mapping[str, float]) -> None:
    """CheckFailed where going on would waste or spoil; the last saved state is whole."""
    limits = (
        ("rl/mismatch_kl_nats", config.max_mismatch, 1, "the engine and the trainer disagree by"),
        ("rl/entropy_nats", config.min_entropy, -1, "the answers have become alike: entropy"),
        ("rl/unscored_share", config.max_unscored, 1, "answers without a verdict are a share of"),
        ("heldout/unscored_share", config.max_unscored, 1, "held-out ones without a verdict are"),
    )
    for name, limit, sign, words in limits:
        if name in watched and sign * (watched[name] - limit) > 0:
            raise CheckFailed(
                f"stopped at step {step}: {words} {watched[name]:.4f} ({name}), the limit is "
                f"{limit}. The last saved state is whole: change the recipe and go on with "
                "--resume --accept-changes, or begin anew."
            )


def look(
    config: WatchConfig,
    step: int,
    held: Mapping[str, float],
    draft: Path,
    note: Callable[[str], object],
) -> None:
    """Say what held-out cases score and what that speaks against; CheckFailed without verdicts."""
    score = held.get("heldout/score")
    told = "without a verdict" if score is None else f"score {score:.3f}"
    note(f"step {step}: held-out {told}")
    if reason := alarm(list(read_metrics(draft / METRICS)), config.alarm_steps):
        note(f"ALARM at step {step}: {reason}.")
    require_sound(config, step, held)


def alarm(rows: Sequence[Mapping[str, float]], steps: int) -> str:
    """Why a reward that rises is not to be trusted; empty if it does not, or nothing speaks so.

    Compared are the first and the second half of the last `steps` rows of `metrics.jsonl`, and the
    held-out scores from before them to behind them.
    """
    recent = [row for row in rows if "rl/reward" in row][-steps:]
    if len(recent) < steps or steps < 2:
        return ""
    first, second = recent[: steps // 2], recent[steps // 2 :]

    def mean(part: Sequence[Mapping[str, float]], name: str) -> float:
        return sum(row[name] for row in part) / len(part)

    if mean(second, "rl/reward") <= mean(first, "rl/reward"):
        return ""
    begin = recent[0]["step"] - 1
    held = [r["heldout/score"] for r in rows if "heldout/score" in r and r["step"] >= begin]
    if len(held) > 1 and held[-1] < held[0]:
        return f"the reward rises and the held-out score falls ({held[0]:.3f} -> {held[-1]:.3f})"
    lengths = mean(first, "rl/length_tokens"), mean(second, "rl/length_tokens")
    if lengths[1] > LENGTH_FACTOR * lengths[0]:
        return f"the reward rises with the length ({lengths[0]:.0f} -> {lengths[1]:.0f} tokens)"
    if (share := mean(second, "rl/cut_share")) > CUT_SHARE:
        return f"the reward rises and {share:.0%} of the answers are cut"
    return ""


class Rollouts:
    """`rollouts.jsonl`: whole groups of answers to read, and their page."""

    def __init__(self, draft: Path, keep_bytes: int, rank: int) -> None:
        """Cuts off what was written after the state that is gone on from; rank 0 does."""
        self._file = draft / ROLLOUTS
        if rank == 0:
            cut(self._file, keep_bytes)

    def add(self, step: int, judged: Sequence[Sequence[Judged]], cases: Mapping[str, Case]) -> None:
        """Keep some groups of a step."""
        with self._file.open("a", encoding="utf-8", errors="replace") as file:
            for group in judged:
                case = cases[group[0].rollout.case]
                answers = [
                    {
                        "text": one.text,
                        "score": one.verdict.score,
                        "reason": one.verdict.reason,
                        "tokens": len(one.rollout.ids),
                        "stop": one.rollout.stop,
                    }
                    for one in group
                ]
                row = {"step": step, "case": case.id, "kind": case.kind}
                row |= {"messages": [dict(turn) for turn in case.messages], "answers": answers}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def sizes(self) -> dict[str, int]:
        """For a state."""
        return {ROLLOUTS: self._file.stat().st_size} if self._file.exists() else {}


def write_page(folder: Path, config: RlConfig) -> None:
    """`rollouts.html`: what was asked, answered and said of it, step by step; loads nothing."""
    file = folder / ROLLOUTS
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = (Path(__file__).parent / "rollouts.html.jinja").read_text("utf-8")
    steps = sorted({row["step"] for row in rows})
    metrics: dict[int, dict[str, float]] = {}
    for row in read_metrics(folder / METRICS):
        metrics.setdefault(int(row["step"]), {}).update(row)
    page = environment.from_string(source).render(
        title=folder.name.removesuffix(".tmp"),
        rows=rows,
        steps=steps,
        metrics=metrics,
        model=config.model,
    )
    (folder / PAGE).write_text(page, encoding="utf-8", errors="replace")


def metric_name(text: str) -> str:
    """A text as a metric's name may have it; a sum tells apart what other letters told apart."""
    name = re.sub("[^a-z0-9]", "_", text.lower()).strip("_")
    return name if text.isascii() and name else f"{name}_{zlib.crc32(text.encode()):08x}".strip("_")
