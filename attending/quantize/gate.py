"""The gate: what quantising cost, measured on the folder that was written.

By domain of the held-out text: perplexity of both models, the divergence KL(float || quantised) of
each token's prediction (its mean, and the 99.9th percentile, where a mean hides what breaks), and
how often the likeliest token is another. Then a suite of `attending eval`, asked of both through
the engine that serves: scores, and how many multiple-choice answers changed, right or wrong.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the field's name for it)

from attending.artifact import write_json
from attending.errors import CheckFailed, ConfigError
from attending.evaluate import forgetting
from attending.evaluate.page import Change
from attending.evaluate.recipe import ChoiceConfig, EvalConfig
from attending.model.scoring import cross_entropy, measured
from attending.quantize.recipe import GateConfig
from attending.quantize.stream import Stream
from attending.sources import Progress

REPORT, FIGURE = "gate.json", "gate.svg"
TAIL = 99.9  # percentile


class Domain(NamedTuple):
    """A domain's tokens under both models."""

    name: str
    tokens: int
    before: float
    """Perplexity."""
    after: float
    divergence: float
    """Mean KL(float || quantised), nats a token."""
    tail: float
    """Its 99.9th percentile."""
    flips: float
    """Share of tokens whose likeliest successor is another."""

    @property
    def rise(self) -> float:
        """Of perplexity, as a share."""
        return self.after / self.before - 1


class Gate(NamedTuple):
    """What was measured."""

    domains: list[Domain]
    """Of the held-out text."""
    changes: list[Change]
    """Of the suite's tasks."""
    choice_flips: Mapping[str, float]
    """By multiple-choice task."""

    def lines(self) -> list[str]:
        """The table."""
        found = [
            f"{one.name}: perplexity {one.before:.3f} -> {one.after:.3f} ({one.rise:+.2%}), KL "
            f"{one.divergence:.4f} nats, 99.9th percentile {one.tail:.3f}, top-1 flips "
            f"{one.flips:.2%} of {one.tokens:,} tokens"
            for one in self.domains
        ]
        found += forgetting.Forgetting(self.changes, frozenset()).lines()
        flips = self.choice_flips.items()
        return found + [f"{name}: {share:.1%} answered otherwise" for name, share in flips]

    def figures(self) -> dict[str, float]:
        """For `run.json`."""
        found: dict[str, float] = {}
        for one in self.domains:
            at = f"gate/{one.name}"
            found |= {f"{at}_perplexity_before": one.before, f"{at}_perplexity": one.after}
            found |= {f"{at}_divergence_nats": one.divergence, f"{at}_tail_nats": one.tail}
            found[f"{at}_flips_share"] = one.flips
        found |= {f"gate/{one.task}_gain": one.gain for one in self.changes}
        shares = self.choice_flips.items()
        return found | {f"gate/{name}_choice_flips_share": share for name, share in shares}

    def faults(self, config: GateConfig) -> list[str]:
        """What is above its limit, in words."""
        worst = {
            "max_perplexity_rise": [(one.rise, one.name) for one in self.domains],
            "max_divergence": [(one.divergence, one.name) for one in self.domains],
            "max_tail_divergence": [(one.tail, one.name) for one in self.domains],
            "max_flips": [(one.flips, one.name) for one in self.domains],
            "max_choice_flips": [(share, name) for name, share in self.choice_flips.items()],
        }
        lost = forgetting.Forgetting(self.changes, frozenset(one.task for one in self.changes))
        worst["max_forgetting"] = [(share, name) for name, share in filter(None, [lost.worst()])]
        return [
            f"{name}: {share:.4g}, above {limit}={most:g}"
            for limit, values in worst.items()
            if (most := getattr(config, limit)) is not None
            for share, name in values
            if not share <= most  # what is no number is above it, too
        ]


def require_measured(config: GateConfig) -> None:
    """Before anything is computed: as `forgetting.require_measured`, of the gate's limits, too."""
    asked = [n for n in ("max_choice_flips", "max_forgetting") if getattr(config, n) is not None]
    if asked and config.data is None:
        raise ConfigError(
            f"gate.{asked[0]} would compare nothing: name the folder with the data of the suite "
            f"{config.suite} (--set gate.data=DIR)."
        )
    forgetting.require_measured(config, frozenset())
    if config.max_choice_flips is not None and not _choices(config.suite):
        raise ConfigError(
            f"gate.max_choice_flips would compare nothing: the suite {config.suite} has no "
            "multiple-choice task. Name one that has (gate.suite=quantization), or leave it out."
        )


def compare(
    before: Stream,
    after: Stream,
    evaluation: Mapping[str, Tensor],
    done: Callable[[int], object] = lambda _: None,
) -> tuple[list[Domain], dict[str, Tensor]]:
    """Both models on held-out samples [S, L] by domain; also every token's divergence.

    The two run one after the other, a block at a time; the logits of a few tokens at a time.
    """
    ids = torch.cat([*evaluation.values()])
    layers = len(before.arch.layers)
    hidden = [
        before.hidden(ids, done),
        after.hidden(ids, lambda number: done(layers + number)),
    ]
    heads, rows = [before.head(), after.head()], 0
    domains, divergences = [], {}
    for name, own in evaluation.items():
        chosen = [part[rows : rows + len(own), :-1].flatten(0, 1) for part in hidden]
        read, other = (part.to(before.device) for part in chosen)
        targets = own[:, 1:].flatten().to(before.device)
        values = measured(read, heads[0], _beside(heads[1]), other, targets).cpu()
        domains.append(of_tokens(name, values))
        divergences[name] = values[:, 2]
        rows += len(own)
    return domains, divergences


def _beside(head: Tensor) -> Callable[..., Tensor]:
    """A measure of two models' logits: both losses, KL, whether the likeliest token differs."""

    def measure(logits: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
        others = F.linear(hidden, head)
        p, q = logits.log_softmax(-1), others.log_softmax(-1)
        divergence = (p.exp() * (p - q)).sum(-1).clamp_min(0)
        flips = (logits.argmax(-1) != others.argmax(-1)).to(logits.dtype)
        losses = cross_entropy(logits, targets), cross_entropy(others, targets)
        return torch.stack([*losses, divergence, flips], 1)

    return measure


def of_tokens(name: str, values: Tensor) -> Domain:
    """Of [T, 4]: nats before and after, divergence, flips."""
    before, after, divergence, flips = values.double().mean(0).tolist()
    tail = float(np.percentile(values[:, 2].numpy(), TAIL))
    return Domain(name, len(values), math.exp(before), math.exp(after), divergence, tail, flips)


def ask(
    config: GateConfig,
    start: str,
    folder: Path,
    progress: Progress,
    note: Callable[[str], object],
) -> tuple[list[Change], dict[str, float]]:
    """The suite of both models, and the share of each multiple-choice task answered otherwise."""
    if config.data is None:
        note("gate: tasks are not compared, since gate.data names no folder.")
        return [], {}
    changes = forgetting.of_suite(config, start, folder, progress, note)
    place = folder / "forgetting"
    return changes, {name: _flipped(place, name) for name in _choices(config.suite)}


def _choices(suite: str) -> list[str]:
    tasks = EvalConfig.load(suite, "eval").tasks
    return [name for name, task in tasks.items() if isinstance(task, ChoiceConfig)]


def _flipped(place: Path, task: str) -> float:
    files = [place / side / f"{task}.answers.jsonl" for side in forgetting.SIDES]
    rows = [map(json.loads, file.read_text("utf-8").splitlines()) for file in files]
    before, after = ({(row["id"], row["repeat"]): row["text"] for row in own} for own in rows)
    both = before.keys() & after.keys()
    return float(np.mean([before[key] != after[key] for key in both]))


def write(folder: Path, found: Gate, divergences: Mapping[str, Tensor]) -> None:
    """`gate.json` and its figure."""
    rows = [one._asdict() | {"rise": one.rise} for one in found.domains]
    tasks = [one._asdict() | {"says": one.says} for one in found.changes]
    report: dict[str, Any] = {"domains": rows, "tasks": tasks, "choice_flips": found.choice_flips}
    write_json(folder / REPORT, report)
    draw(found.domains, divergences).savefig(folder / FIGURE)


def draw(domains: Sequence[Domain], divergences: Mapping[str, Tensor]) -> Any:
    """A matplotlib figure: perplexity by domain, and the share of tokens above each divergence."""
    from matplotlib.figure import Figure

    figure = Figure((8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, one in enumerate(domains):
        left.bar(place - 0.2, one.before, 0.38, color="#a9b4bf", label="float" * (not place))
        left.bar(place + 0.2, one.after, 0.38, color="#3b6ea5", label="quantised" * (not place))
        left.text(place + 0.2, one.after, f"{one.rise:+.1%}", ha="center", va="bottom", fontsize=8)
        values = np.sort(divergences[one.name].numpy())[::-1]
        right.plot(values, (1 + np.arange(len(values))) / len(values), lw=1, label=one.name)
    left.set_xticks(range(len(domains)), [one.name for one in domains])
    left.set_title("perplexity", fontsize=9)
    right.set(xscale="log", yscale="log", xlabel="KL(float || quantised), nats")
    right.set_title("share of tokens above", fontsize=9)
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def check(found: Gate, config: GateConfig) -> None:
    """CheckFailed where a limit is passed; the folder is written all the same."""
    if faults := found.faults(config):
        raise CheckFailed(
            f"quantising cost too much: {'; '.join(faults)}. The folder is written all the same. "
            "Take more bits, smaller groups, method = gptq or signed, or more signed.steps."
        )
