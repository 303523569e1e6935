"""How a draft was trained, for `draft.py`'s page: of `run.json` and `metrics.jsonl`."""

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot

from attending.logs import read_metrics


def curves(*drafts: Path) -> dict[str, list[tuple[float, float]]]:
    """Of their `metrics.jsonl` each figure's course over the tokens seen, one after another."""
    found: dict[str, list[tuple[float, float]]] = {}
    before = 0.0
    for draft in drafts:
        tokens = before
        for row in read_metrics(draft / "metrics.jsonl"):
            tokens = before + row.get("train/consumed_tokens", tokens - before)
            for key, value in row.items():
                found.setdefault(key, []).append((tokens, value))
        before = tokens
    return found


def accepted(found: dict[str, list[tuple[float, float]]]) -> dict[str, list[tuple[float, float]]]:
    """The course of the first proposal's acceptance, by source."""
    of = {re.fullmatch(r"heldout/(\w+)_acceptance@1", key): found[key] for key in sorted(found)}
    return {match[1]: course for match, course in of.items() if match}


def trained(drafts: Sequence[Path], gated: str | None, file: Path) -> str:
    """What the training took, in a sentence each; its curves, in a figure."""
    found = curves(*drafts)
    figure, panels = pyplot.subplots(1, 3 if gated else 2, figsize=(9, 3.2), layout="constrained")
    panels[0].plot(*zip(*found["train/loss_nats"], strict=True), linewidth=0.6)
    panels[0].set_title("loss of all steps, nats", fontsize=9)
    for name, course in accepted(found).items():
        panels[1].plot(*zip(*course, strict=True), label=name)
    panels[1].set_title("first proposal accepted,\nheld-out answers", fontsize=9)
    for name, folder in (("plain", drafts[0]), ("gated", Path(gated))) if gated else ():
        courses = [*accepted(curves(folder)).values()]
        means = [statistics.mean(value for _, value in at) for at in zip(*courses, strict=True)]
        panels[2].plot([tokens for tokens, _ in courses[0]], means, label=name)
        panels[2].set_title("the same, mean of the kinds,\nat equal steps", fontsize=9)
    for place, panel in enumerate(panels):
        panel.set_xlabel("tokens seen", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
        if place:
            panel.legend(fontsize=7)
    figure.savefig(file, metadata={"Date": None})
    sentences = []
    for draft in drafts:
        run = json.loads((draft / "run.json").read_text("utf-8"))
        tokens = curves(draft)["train/consumed_tokens"][-1][1]
        hours = run["wall_seconds"] / 3600
        told = {k: v for k, v in run["metrics"].items() if re.fullmatch(r"data/\w+_tokens", k)}
        wrote = sum(v for k, v in told.items() if not k.endswith("_heldout_tokens"))
        sentences.append(
            f"`{run['command']}` read {tokens:,.0f} tokens, prompts among them, in "
            f"{run['recipe']['epochs']:g} epochs over {wrote:,.0f} that the target wrote; it took "
            f"{hours:.1f} hours, with what had still to be written or read of the target."
        )
    return " Then ".join(sentences)


def compared(plain: Path, gated: Path) -> str:
    """Tokens a round of both at equal steps, of the same held-out answers."""
    both = [curves(one) for one in (plain, gated)]
    cells = []
    for key in sorted(both[0]):
        if match := re.fullmatch(r"heldout/(\w+)_tokens_per_round@(\d+)", key):
            ends = [[one[f"{key}{end}"][-1][1] for end in ("", "_low", "_high")] for one in both]
            told = ("{:.3f} ({:.3f} to {:.3f})".format(*end) for end in ends)
            cells.append([f"{match[1]}, k = {match[2]}", *told])
    lines = [f"| {' | '.join(row)} |" for row in (["", "plain", "gated"], ["---"] * 3, *cells)]
    return (
        "\nWith the gate (our reading; no formula is published), trained by the first recipe for "
        "as many steps: tokens of a round, on held-out answers, with 95 % intervals; one "
        "seed each.\n\n" + "\n".join(lines) + "\n"
    )
