"""How much better than its siblings an answer was: one number each, from a group's rewards.

Every method gets the rewards R [G] of a group's scored answers and factors [G] or [G, S], which
only SPAR reads, and gives advantages of the factors' shape. A group that says nothing (fewer than
two scored answers, or all worth the same) never reaches a method: its advantages are 0, by any
method. It still counts in the loss's normaliser, else the others would weigh more for it.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attending.errors import TrainingError

Floats = NDArray[np.float64]
Method = Callable[[Floats, Floats], Floats]

SPREAD = 1e-9  # rewards as far apart as this are the same
EPSILON = 1e-4  # TRL's; the papers print the letter


def group_mean(rewards: Floats, factors: Floats) -> Floats:
    """Baichuan-M2 (arXiv 2509.02208, section 3.3): R - mean(R).

    Without a deviation to divide by, a question that nearly all answers get right or wrong does
    not weigh more than another (Dr. GRPO, arXiv 2503.20783).
    """
    return np.broadcast_to(rewards - rewards.mean(), factors.T.shape).T


def group_std(rewards: Floats, factors: Floats) -> Floats:
    """GRPO (DeepSeekMath, arXiv 2402.03300): (R - mean(R)) / (std(R) + eps), std of a sample."""
    found: Floats = group_mean(rewards, factors) / (rewards.std(ddof=1) + EPSILON)
    return found


def spar(rewards: Floats, factors: Floats) -> Floats:
    """Baichuan-M3's step-penalised advantage (arXiv 2602.06570).

    (gamma_j R - mean(R)) / (std(R) + eps) for step j of a consultation worth R, with both moments
    of the raw rewards: so one step's penalty moves neither its siblings nor the other steps. For
    rewards of at least 0; of a negative one, gamma would make more. The report does not say what
    is to be done with a group of no spread, where this would be the penalty over eps.
    """
    mean, deviation = rewards.mean(), rewards.std(ddof=1)
    found: Floats = (factors.T * rewards - mean).T / (deviation + EPSILON)
    return found


METHODS: dict[str, Method] = {"group_mean": group_mean, "group_std": group_std, "spar": spar}


def step_factor(penalties: Sequence[float]) -> float:
    """gamma_j, the smallest lambda of a step's violations: 0.1 a severe one, 0.9 a mild one; 1."""
    return min(penalties, default=1.0)


class Advantages(NamedTuple):
    """Of all samples of a step."""

    values: Floats
    """[N], or [N, S] by steps."""
    num_groups: int
    num_lone: int
    """Groups of fewer than two scored answers."""
    num_flat: int
    """Groups of two or more, all worth the same."""
    num_unscored: int
    """Samples."""

    @property
    def zero_share(self) -> float:
        """Share of groups that teach nothing."""
        return (self.num_lone + self.num_flat) / max(self.num_groups, 1)


def advantages(
    cases: Sequence[str],
    rewards: Sequence[float | None],
    method: Method = group_mean,
    factors: Floats | None = None,
) -> Advantages:
    """Each sample's advantage among those of its case.

    Unscored ones (None) are neutral: their advantage is 0 and the others' mean is without them.

    Args:
        cases: [N], each sample's; those of one case are a group, wherever they stand.
        rewards: [N].
        method: See above.
        factors: gamma_j, [N] or [N, S], of an episode's steps; by default ones [N].

    Raises:
        TrainingError: A reward is NaN or infinite; it names the case.
    """
    groups: dict[str, list[int]] = {}
    for index, (case, reward) in enumerate(zip(cases, rewards, strict=True)):
        own = groups.setdefault(case, [])
        if reward is None:
            continue
        if not math.isfinite(reward):
            raise TrainingError(
                f"the reward of an answer to case {case!r} is {reward}: expected a number, or None "
                "for what could not be scored. Correct its rule or rubric, or leave the case out."
            )
        own.append(index)
    factors = np.ones(len(cases)) if factors is None else np.asarray(factors, np.float64)
    values, num_lone, num_flat = np.zeros_like(factors), 0, 0
    for scored in groups.values():
        worth = np.array([rewards[index] for index in scored], np.float64)
        if len(worth) < 2:
            num_lone += 1
        elif np.ptp(worth) <= SPREAD:
            num_flat += 1
        else:
            values[scored] = method(worth, factors[scored])
    unscored = sum(reward is None for reward in rewards)
    return Advantages(values, len(groups), num_lone, num_flat, unscored)
