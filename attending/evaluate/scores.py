"""From samples to a report's rows: means, intervals, parts, what unscored answers could change."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from attending.evaluate.intervals import (
    Estimate,
    beside_chance,
    bootstrap,
    clipped,
    paired,
    ratio,
)
from attending.evaluate.sample import Grade, Sample, Task

Groups = dict[str, list[tuple[float, float]]]  # of each conversation, its answers' terms


def row(task: Task, samples: Sequence[Sample], *, seed: int, resamples: int) -> dict[str, Any]:
    """What the report says about one model on one task.

    Args:
        task: What was asked.
        samples: All of it, also what has no answer or no score.
        seed: Of the intervals.
        resamples: Of the bootstrap.
    """
    how = {"seed": seed, "resamples": resamples}
    mean = clipped if task.is_clipped else ratio
    scored = [one for one in samples if one.grade.score is not None]
    found: dict[str, Any] = {
        "task": task.name,
        "metric": task.metric,
        "score": None,
        "interval": None,
        "n": len({one.example.id for one in scored}),
        "n_answers": len(scored),
        "unscored": 1 - len(scored) / len(samples),
        "bounds": _bounds(samples, task.is_clipped),
        "chance": task.chance,
        "says": "",
        "is_loss": task.is_loss,
        "is_clipped": task.is_clipped,
        "parts": _parts(scored, mean, how),
        "more": task.more(samples) if samples else {},
        "contamination": None,
        "cut": sum(
            one.answer.finish_reason == "length" and one.answer.logprobs is None for one in samples
        ),
        "why_unscored": next((s.grade.reason for s in samples if s.grade.score is None), ""),
        "data_sha256": task.sha256,
        "input_tokens": sum(one.answer.input_tokens or 0 for one in samples),
        "output_tokens": sum(one.answer.output_tokens or 0 for one in samples),
    }
    if scored:
        terms = [_terms(one) for one in scored]
        whole, std = _estimate(terms, [one.example.id for one in scored], mean, how)
        found |= {
            "score": whole.value,
            "interval": whole.interval,
            "unclipped": float(ratio(np.sum(terms, axis=0))),
            "bootstrap_std": std,
            "says": beside_chance(whole, task.chance),
        }
    return found | task.headline(samples, seed, resamples)


def pair(
    about: Mapping[str, Any], a: Groups, b: Groups, *, seed: int, resamples: int
) -> dict[str, Any] | None:
    """The difference of two models on the conversations that both have a score for: b minus a.

    Args:
        about: A row of the task.
        a: The one model's terms by conversation, as `grouped` makes them.
        b: The other's.
        seed: Of the interval.
        resamples: Of the bootstrap.
    """
    mean = clipped if about["is_clipped"] else ratio
    found = paired(a, b, mean, seed=seed, resamples=resamples)
    if found is None:
        return None
    told = {"difference": found.value, "interval": found.interval, "n": found.n}
    if about["is_clipped"]:  # two means below 0 are both shown as 0
        plain = paired(a, b, ratio, seed=seed, resamples=resamples)
        told["unclipped"] = plain and plain.value
    return {"task": about["task"], "is_loss": about["is_loss"], **told}


def grouped(grades: Iterable[tuple[str, Grade]]) -> Groups:
    """The terms of what has a score, by the example's id."""
    found: Groups = defaultdict(list)
    for name, grade in grades:
        if grade.score is not None:
            found[name].append((grade.score * grade.weight, grade.weight))
    return found


def overall(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """The mean of one model's scores, losses aside; None where one is missing or there is none."""
    scores = [one["score"] for one in rows if not one["is_loss"]]
    return None if not scores or None in scores else float(np.mean(scores))


def _terms(sample: Sample) -> tuple[float, float]:
    assert sample.grade.score is not None
    return sample.grade.score * sample.grade.weight, sample.grade.weight


def _parts(scored: Sequence[Sample], mean: Any, how: Mapping[str, int]) -> dict[str, Any]:
    """Of each tag: an example's counts with its whole score, a criterion's with its part of it."""
    terms: dict[str, list[tuple[tuple[float, float], str]]] = defaultdict(list)
    for one in scored:
        tags = dict.fromkeys(one.example.tags, _terms(one))
        tags |= {tag: (part, 1.0) for tag, part in one.grade.parts.items()}
        for tag, value in tags.items():
            terms[tag].append((value, one.example.id))
    found = {}
    for tag, own in sorted(terms.items()):
        values, names = [pair[0] for pair in own], [pair[1] for pair in own]
        whole, std = _estimate(values, names, mean, how)
        found[tag] = {
            "score": whole.value,
            "interval": whole.interval,
            "n": whole.n,
            "n_answers": len(own),
            "bootstrap_std": std,
        }
    return found


def _estimate(
    terms: Sequence[tuple[float, float]], names: Sequence[str], mean: Any, how: Mapping[str, int]
) -> tuple[Estimate, float]:
    """Over conversations; and the reference's deviation, for which every answer is one (seeded)."""
    whole = bootstrap(terms, names, mean, **how)
    is_one_each = whole.n == len(terms)
    return whole, (whole if is_one_each else bootstrap(terms, range(len(terms)), mean, **how)).std


def _bounds(samples: Sequence[Sample], is_clipped: bool) -> tuple[float, float] | None:
    """The least and the greatest mean that unscored answers still allow, where that is known."""
    ends = [
        (one.grade.score, one.grade.score) if one.grade.score is not None else one.grade.bounds
        for one in samples
    ]
    if None in ends or any(one.grade.weight != 1 for one in samples):
        return None
    low, high = np.mean(np.array(ends, float), axis=0)
    if is_clipped:
        low, high = np.clip([low, high], 0, 1)
    return float(low), float(high)
