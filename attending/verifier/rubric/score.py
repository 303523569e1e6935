"""From verdicts to one number: pure, and the same for evaluation and reinforcement learning."""

from collections.abc import Sequence

from attending.errors import UsageError
from attending.verifier.rubric.schema import Criterion

Verdicts = Sequence[bool | None]  # a criterion each: met, not met, or unscored


def score(criteria: Sequence[Criterion], verdicts: Verdicts) -> float | None:
    """HealthBench's: points of what is met over all positive points; at most 1, may be negative.

    Only means over many answers are clipped to [0, 1] (openai/simple-evals, `healthbench_eval`).

    Returns:
        None where no criterion is positive, or where one is unscored: see `bounds`.
    """
    _same_length(criteria, verdicts)
    possible = sum(one.points for one in criteria if one.points > 0)
    if not possible or None in verdicts:
        return None
    met = zip(criteria, verdicts, strict=True)
    return sum(one.points for one, is_met in met if is_met) / possible


def affine_score(criteria: Sequence[Criterion], verdicts: Verdicts) -> float | None:
    """Baichuan-M3's R_task = (sum_i w_i a_i - sum_{w_i<0} w_i) / sum_i |w_i|: always in [0, 1].

    It is 1 when every positive criterion is met and no negative one (arXiv 2602.06570).

    Returns:
        None without criteria, or where one is unscored.
    """
    _same_length(criteria, verdicts)
    if not criteria or None in verdicts:
        return None
    met = sum(one.points for one, is_met in zip(criteria, verdicts, strict=True) if is_met)
    lowest = sum(one.points for one in criteria if one.points < 0)
    return (met - lowest) / sum(abs(one.points) for one in criteria)


def bounds(criteria: Sequence[Criterion], verdicts: Verdicts) -> tuple[float, float] | None:
    """The least and the greatest `score` that the unscored criteria still allow."""
    _same_length(criteria, verdicts)
    told = list(zip(criteria, verdicts, strict=True))
    worst, best = ([s * one.points > 0 if v is None else v for one, v in told] for s in (-1, 1))
    least, most = score(criteria, worst), score(criteria, best)
    return None if least is None or most is None else (least, most)


def _same_length(criteria: Sequence[Criterion], verdicts: Verdicts) -> None:
    if len(criteria) != len(verdicts):
        raise UsageError(f"{len(verdicts)} verdicts for {len(criteria)} criteria: one each.")
