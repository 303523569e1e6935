"""Learning rates and the update rule: pure functions of how far a run has come."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

Shape = Literal["constant", "cosine"]


class Phase(NamedTuple):
    """A stretch of steps with one shape of the learning rate."""

    steps: int
    shape: Shape


class Rates(NamedTuple):
    """Of learning."""

    peak: float
    final: float


def learning_rate(step: int, phases: Sequence[Phase], warmup_steps: int, rates: Rates) -> float:
    """Warm-up, stable, decay (Baichuan-M1 section 4.2) of the step that is about to be made.

    Step 0 is made at peak / warmup_steps and step `warmup_steps - 1` at the peak. A constant phase
    stays there. A cosine phase goes from the peak, which its first step after the warm-up still
    has, towards `final`, which the step after its last would have.
    """
    peak, final = rates
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    begin, rate = 0, peak
    for phase in phases:
        end = begin + phase.steps
        if phase.shape == "cosine" and step < end:
            start = max(begin, warmup_steps)
            turn = math.pi * (step - start) / (end - start)
            return final + (peak - final) * (1 + math.cos(turn)) / 2
        rate = final if phase.shape == "cosine" else peak
        if step < end:
            return rate
        begin = end
    return rate


class SkipRule(NamedTuple):
    """When a step's update is not made."""

    length: int = 100
    """Norms that are looked back on; 0 turns the rule off."""
    factor: float = 1.2
    margin: float = 0.1
    max_skips: int = 1
    """In a row."""


class Norms(NamedTuple):
    """What the adaptive gradient update remembers."""

    window: tuple[float, ...] = ()
    """Gradient norms of the last updates that were made, oldest first."""
    num_skipped: int = 0
    """Updates in a row that were not made."""


def adaptive_update(norms: Norms, norm: float, rule: SkipRule) -> tuple[bool, Norms]:
    """Whether to make the update, and what to remember (Baichuan-M1, algorithm 1).

    An update is skipped if its gradient's norm exceeds factor * mean(window) + margin, at most
    `max_skips` times in a row: one spike is the batch's fault, two are the landscape. Nothing is
    skipped before the window is full. A skipped norm is not remembered; its data is consumed and
    its step counted. The paper does not say whether the norm is taken before clipping; ours is,
    since after clipping to 1.0 hardly any norm could exceed the bound.

    Args:
        norms: So far.
        norm: Of this step's whole gradient before clipping; finite.
        rule: Its numbers.
    """
    window, skipped = norms
    is_full = 0 < rule.length <= len(window)
    is_spike = is_full and norm > rule.factor * sum(window) / len(window) + rule.margin
    if is_spike and skipped < rule.max_skips:
        return False, Norms(window, skipped + 1)
    return True, Norms((*window, norm)[-rule.length :] if rule.length else ())


def due(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return after // every > before // every
