"""From verdicts to rewards: a rule's or a rubric's score in [0, 1], and a bonus for being short."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from attending.errors import ConfigError
from attending.rl.types import Case, Verdict
from attending.verifier.rubric.schema import Criterion
from attending.verifier.rubric.score import Verdicts, affine_score, score
from attending.verifier.rules.rule import Checked

QUANTILE = 0.2
AXES = ("axis:", "dimension:")  # tags of criteria that are told apart in the metrics


def by_rule(kind: str, checked: Checked) -> Verdict:
    """Of a rule, named in the metrics by its kind."""
    return Verdict(checked.score, checked.reason, {kind: checked.score})


def clipped_score(criteria: Sequence[Criterion], met: Verdicts) -> float | None:
    """HealthBench's score of one answer, clipped to [0, 1]; see `verifier.rubric.score`.

    Raises:
        ConfigError: No criterion is positive, so there is nothing to divide by.
    """
    if not any(one.points > 0 for one in criteria):
        raise ConfigError(
            f"none of its {len(criteria)} criteria has positive points, and HealthBench's score "
            'divides by their sum: add one, or take the "affine" form, where not to fail is 1.'
        )
    found = score(criteria, met)
    return None if found is None else min(max(found, 0.0), 1.0)


FORMS: dict[str, Callable[[Sequence[Criterion], Verdicts], float | None]] = {
    "affine": affine_score,
    "clipped": clipped_score,
}
"""Baichuan-M2 says that rubric scores are normalised to [0, 1], not how. Affine is what M3's report
prints for the same stack; clipped does not tell apart answers whose faults outweigh their merits.
"""


def worth_of_nothing(criteria: Sequence[Criterion], form: str = "affine") -> float:
    """What an answer that meets no criterion scores: 0 by rules and clipped, affine often more."""
    return FORMS[form](criteria, [False] * len(criteria)) or 0.0 if criteria else 0.0


def by_rubric(case: Case, met: Verdicts, form: str = "affine") -> Verdict:
    """Of a case's criteria, each met, not met or unscored; parts by axis or dimension, affine.

    Raises:
        ConfigError: The form cannot score this rubric; it names the case.
    """
    try:
        whole = FORMS[form](case.criteria, met)
    except ConfigError as error:
        raise ConfigError(f"case {case.id!r}: {error}") from None
    if whole is None:
        return Verdict(None, f"{list(met).count(None)} of {len(met)} criteria are unscored")
    parts: dict[str, list[int]] = {}
    for index, one in enumerate(case.criteria):
        for tag in one.tags:
            if tag.startswith(AXES):
                parts.setdefault(tag, []).append(index)
    scores = {
        tag: affine_score([case.criteria[i] for i in at], [met[i] for i in at])
        for tag, at in parts.items()
    }
    return Verdict(whole, f"{form} score", {k: v for k, v in scores.items() if v is not None})


def answer_length(ids: Sequence[int], close: Sequence[int], *, count_thinking: bool) -> int:
    """|o|, of a rollout's ids: all, or those behind the last `</think>`, whose ids are `close`.

    M2's report does not say which. Where the thinking does not end, all count.
    """
    if not count_thinking and close:
        for start in range(len(ids) - len(close), -1, -1):
            if tuple(ids[start : start + len(close)]) == tuple(close):
                return len(ids) - start - len(close)
    return len(ids)


def length_rewards(
    scores: Sequence[float | None], lengths: Sequence[int], threshold: float, scale: float = 4.0
) -> list[float]:
    """Baichuan-M2's reward for short answers (arXiv 2509.02208, eq. 3), of one group.

    4 / sqrt(|o_i|) if P80 > threshold and R_i >= P80, else 0, where P80 is the 0.2-quantile of the
    group's scores, between two of them linearly: of eight different ones six lie above it. The text
    calls it the 80th percentile; the formula is self-consistent and is what is done here. Unscored
    answers (None) have no part in the quantile, and neither they nor empty ones get a reward.
    `lengths` are in tokens; `scale` is the 4, which fits answers of thousands of them.
    """
    known = [one for one in scores if one is not None]
    least = float(np.quantile(known, QUANTILE)) if known else -math.inf
    if not least > threshold:
        return [0.0] * len(lengths)
    return [
        scale / math.sqrt(length) if one is not None and one >= least and length else 0.0
        for one, length in zip(scores, lengths, strict=True)
    ]


def combine(
    verdicts: Sequence[Verdict], lengths: Sequence[int], threshold: float | None, scale: float
) -> list[float | None]:
    """R = R_verdict + R_length of one group's answers; without a threshold, R_verdict alone."""
    scores = [verdict.score for verdict in verdicts]
    if threshold is None:
        return scores
    bonuses = length_rewards(scores, lengths, threshold, scale)
    return [one if one is None else one + more for one, more in zip(scores, bonuses, strict=True)]
