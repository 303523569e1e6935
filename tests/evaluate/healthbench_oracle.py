"""HealthBench's formulas a second time, slow and obvious, to compare `attending.evaluate` with.

Nothing here imports `attending`. Rows, graded lines and verdicts are the dictionaries of the files.
What the reference does not define (verdicts that are null, one class missing) is said where it is
decided.
"""

import hashlib
import itertools
import json
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]
Met = Sequence[bool | None]
Pair = tuple[bool, bool]
FENCE, JSON_FENCE = "```", "```json"
NO_EXPLANATION = "No explanation provided"


class Results(NamedTuple):
    """All figures of a graded set."""

    overall: float | None
    """The headline: the clipped mean of all that were scored; None where nothing was."""
    unclipped: float | None
    metrics: dict[str, float]
    """`NAME` and `NAME:n_samples`, for `overall_score` and every tag."""
    worst_at_k: dict[int, float] | None
    """None where prompts have different numbers of scored responses."""
    n_unscored: int
    bounds: tuple[float, float]
    """Of the clipped mean over all lines, whatever the null verdicts were."""


# One call of the grader


def parse(reply: str) -> tuple[bool | None, str]:
    """The verdict and its explanation; None where the reference would ask again."""
    text = reply.strip()
    if text.startswith(JSON_FENCE):
        text = text[len(JSON_FENCE) :].lstrip()
    if text.endswith(FENCE):
        text = text[: -len(FENCE)].rstrip()
    try:
        said = json.loads(text)
    except json.JSONDecodeError:
        said = {}
    if not isinstance(said, dict):
        said = {}
    met = said.get("criteria_met")
    if met is not True and met is not False:
        met = None
    return met, said.get("explanation", NO_EXPLANATION)


def _filled(template: str, messages: Sequence[Row], response: str, item: str) -> str:
    turns = [*messages, {"role": "assistant", "content": response}]
    conversation = "\n\n".join(turn["role"] + ": " + turn["content"] for turn in turns)
    with_conversation = template.strip().replace("<<conversation>>", conversation)
    return with_conversation.replace("<<rubric_item>>", item)


def grader_prompt(template: str, messages: Sequence[Row], response: str, rubric: Row) -> str:
    """What the grader is asked about one criterion: it sees its points."""
    item = "[" + str(rubric["points"]) + "] " + rubric["criterion"]
    return _filled(template, messages, response, item)


def meta_prompt(template: str, row: Row) -> str:
    """What it is asked in the meta-evaluation: it sees no points."""
    return _filled(template, row["prompt"], row["completion"], row["rubric"])


def completion_id(prompt_id: str, response: str) -> str:
    return hashlib.sha256((prompt_id + response).encode("utf-8")).hexdigest()


# Scores of one response


def example_score(rubrics: Sequence[Row], met: Met) -> float | None:
    """Achieved by possible, never clipped; None with no positive item or with a null verdict."""
    if len(rubrics) != len(met):
        raise ValueError(f"{len(met)} verdicts for {len(rubrics)} criteria")
    if any(one is None for one in met):
        return None
    possible = achieved = 0
    for rubric, is_met in zip(rubrics, met, strict=True):
        if rubric["points"] > 0:
            possible += rubric["points"]
        if is_met:
            achieved += rubric["points"]
    return achieved / possible if possible else None


def tag_scores(row: Row, met: Met) -> dict[str, float]:
    """By tag; none at all for a response with a null verdict, as it has no score."""
    overall = example_score(row["rubrics"], met)
    if overall is None:
        return {}
    scores = {tag: overall for tag in row.get("example_tags") or []}
    for tag in {tag for rubric in row["rubrics"] for tag in rubric.get("tags") or []}:
        own = [
            (rubric, is_met)
            for rubric, is_met in zip(row["rubrics"], met, strict=True)
            if tag in (rubric.get("tags") or [])
        ]
        score = example_score([rubric for rubric, _ in own], [is_met for _, is_met in own])
        if score is not None:  # only negative items: the reference skips the tag
            scores[tag] = score
    return scores


def score_bounds(rubrics: Sequence[Row], met: Met) -> tuple[float, float]:
    """Least and greatest score over every way to fill in the null verdicts; not the reference's."""
    choices = [[True, False] if one is None else [one] for one in met]
    scores = [example_score(rubrics, filled) for filled in itertools.product(*choices)]
    known = [score for score in scores if score is not None]
    return min(known), max(known)


# Aggregates


def clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def mean(values: Iterable[float]) -> float:
    some = list(values)
    return math.fsum(some) / len(some)


def aggregate(examples: Iterable[dict[str, float]]) -> dict[str, float]:
    """The clipped mean and the number of values of every name, over the examples that have it."""
    values = defaultdict(list)
    for example in examples:
        for name, value in example.items():
            values[name].append(value)
    figures: dict[str, float] = {}
    for name, some in values.items():
        figures[name] = clip(mean(some))
        figures[name + ":n_samples"] = len(some)
    return figures


def bootstrap_std(
    values: Sequence[float], generator: np.random.Generator, resamples: int = 1000
) -> float:
    """The reference's deviation (ddof 0) of clipped means of resamples, from a given generator."""
    means = []
    for _ in range(resamples):
        drawn = generator.choice(np.asarray(values), len(values))
        means.append(clip(mean(drawn.tolist())))
    centre = mean(means)
    return math.sqrt(mean((value - centre) ** 2 for value in means))


def exact_bootstrap_std(values: Sequence[float], resamples: int = 1000) -> tuple[float, float]:
    """Its limit, over all n^n resamples, and how far `resamples` of them may lie from it.

    The second is six standard errors of a deviation (delta method) and a term of second order.
    For at most six values.
    """
    means = [clip(mean(some)) for some in itertools.product(values, repeat=len(values))]
    centre = mean(means)
    second = mean((value - centre) ** 2 for value in means)
    fourth = mean((value - centre) ** 4 for value in means)
    if second == 0:
        return 0.0, 1e-12
    std = math.sqrt(second)
    error = math.sqrt(max(fourth - second**2, 0) / resamples) / (2 * std)
    return std, 6 * error + 36 * (second + fourth / second) / (std * resamples)


def worst_at_k(replicates: Mapping[str, Sequence[float]]) -> dict[int, float]:
    """By k: the minimum of k responses, over all subsets, over prompts, and only then clipped."""
    counts = {len(scores) for scores in replicates.values()}
    if len(counts) != 1:
        raise ValueError(f"prompts have {sorted(counts)} responses")
    worst = {}
    for k in range(1, counts.pop() + 1):
        of_prompts = []
        for scores in replicates.values():
            minima = [min(subset) for subset in itertools.combinations(scores, k)]
            of_prompts.append(mean(minima))
        worst[k] = clip(mean(of_prompts))
    return worst


def results(rows: Sequence[Row], graded: Sequence[Row]) -> Results:
    """Everything about recorded grades; each line of `graded` is a sample, repeats too."""
    by_id = {row["prompt_id"]: row for row in rows}
    examples, scores, bounds = [], [], []
    replicates: dict[str, list[float]] = {line["prompt_id"]: [] for line in graded}
    for line in graded:
        row = by_id[line["prompt_id"]]
        met = [verdict["criteria_met"] for verdict in line["verdicts"]]
        bounds.append(score_bounds(row["rubrics"], met))
        score = example_score(row["rubrics"], met)
        if score is not None:
            scores.append(score)
            replicates[line["prompt_id"]].append(score)
            examples.append({"overall_score": score, **tag_scores(row, met)})
    is_even = len({len(some) for some in replicates.values()}) == 1
    return Results(
        clip(mean(scores)) if scores else None,
        mean(scores) if scores else None,
        aggregate(examples),
        worst_at_k(replicates) if is_even and scores else None,
        len(graded) - len(scores),
        (
            clip(mean(low for low, _ in bounds)),
            clip(mean(high for _, high in bounds)),
        ),
    )


# Which rows, and which texts


def chosen(rows: Sequence[Row], limit: int | None = None, repeats: int = 1) -> list[Row]:
    """The sample, in the order that it was drawn in, and the whole of it again for each repeat."""
    some = list(rows)
    if limit is not None and limit < len(some):
        some = random.Random(0).sample(some, limit)
    return some * repeats


def consensus(rows: Sequence[Row], graded: Sequence[Row] = ()) -> tuple[list[Row], list[Row]]:
    """Main rows with their `level:cluster` items only, and graded lines with those verdicts."""
    kept_rows, places = [], {}
    for row in rows:
        own = [
            place
            for place, rubric in enumerate(row["rubrics"])
            if "level:cluster" in (rubric.get("tags") or [])
        ]
        if own:
            places[row["prompt_id"]] = own
            kept_rows.append({**row, "rubrics": [row["rubrics"][place] for place in own]})
    kept_lines = [
        {**line, "verdicts": [line["verdicts"][place] for place in places[line["prompt_id"]]]}
        for line in graded
        if line["prompt_id"] in places
    ]
    return kept_rows, kept_lines


def physician_completions(rows: Sequence[Row], group: str) -> list[tuple[str, str]]:
    """(prompt_id, what the physician wrote) of "Group 1", 2 or 3, in the rows' order."""
    found = []
    for row in rows:
        ideal = row.get("ideal_completions_data")
        if ideal is not None and ideal["ideal_completions_group"] == group:
            found.append((row["prompt_id"], ideal["ideal_completion"]))
    return found


def references(rows: Sequence[Row], group: str) -> list[tuple[str, str]]:
    """(prompt_id, what a model wrote for the physician to improve), four a row; groups 2 and 3."""
    if group == "Group 1":
        raise ValueError("Group 1 saw no references")
    found = []
    for row in rows:
        ideal = row.get("ideal_completions_data")
        if ideal is not None and ideal["ideal_completions_group"] == group:
            texts = ideal["ideal_completions_ref_completions"]
            if len(texts) != 4:
                raise ValueError(f"{len(texts)} references of {row['prompt_id']}, not 4")
            found += [(row["prompt_id"], text) for text in texts]
    return found


# Meta-evaluation


def _share(truths: Sequence[bool]) -> float | None:
    return sum(truths) / len(truths) if truths else None


def pairwise(pairs: Sequence[Pair], rater: str = "model") -> dict[str, float | None]:
    """Precision, recall and F1 of (own label, other's label), by class and balanced.

    A share of no pairs is None, and so is the F1 of a class that nobody named and every mean with
    a None in it. The F1 of a class that only one side named is 0: they agree nowhere on it.
    """
    figures: dict[str, float | None] = {}
    for name, label in (("pos", True), ("neg", False)):
        precision = _share([other == label for own, other in pairs if own == label])
        recall = _share([own == label for own, other in pairs if other == label])
        f1: float | None = 0.0
        if precision is None and recall is None:
            f1 = None
        elif precision and recall:
            f1 = statistics.harmonic_mean([precision, recall])
        for metric, value in (("precision", precision), ("recall", recall), ("f1", f1)):
            figures[f"pairwise_{rater}_{metric}_{name}"] = value
    for metric in ("precision", "recall", "f1"):
        pos, neg = (figures[f"pairwise_{rater}_{metric}_{name}"] for name in ("pos", "neg"))
        balanced = None if pos is None or neg is None else (pos + neg) / 2
        figures[f"pairwise_{rater}_{metric}_balanced"] = balanced
    return figures


def _by_category(pairs: Sequence[tuple[str, Pair]], rater: str) -> dict[str, float | None]:
    figures = pairwise([pair for _, pair in pairs], rater)
    for category in {category for category, _ in pairs}:
        own = pairwise([pair for name, pair in pairs if name == category], rater)
        figures |= {f"{category}: {key}": value for key, value in own.items()}
    return figures


def meta(rows: Sequence[Row], labels: Sequence[bool]) -> dict[str, float | None]:
    """The grader's labels, one a row, against every single label of a physician."""
    pairs = []
    for row, label in zip(rows, labels, strict=True):
        pairs += [(row["category"], (label, other)) for other in row["binary_labels"]]
    return _by_category(pairs, "model")


def _physician_pairs(rows: Sequence[Row]) -> list[tuple[str, str, Pair]]:
    found = []
    for row in rows:
        ids, labels = row["anonymized_physician_ids"], row["binary_labels"]
        for one, two in itertools.permutations(range(len(labels)), 2):
            found.append((ids[one], row["category"], (labels[one], labels[two])))
    return found


def physicians(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """By physician: theirs against the others' labels of the same rows; those with any others."""
    pairs = _physician_pairs(rows)
    return {
        physician: _by_category([(c, pair) for p, c, pair in pairs if p == physician], "physician")
        for physician in {p for p, _, _ in pairs}
    }


def physicians_pooled(rows: Sequence[Row]) -> dict[str, float | None]:
    """The same with the pairs of all physicians together (each pair both ways)."""
    return _by_category([(c, pair) for _, c, pair in _physician_pairs(rows)], "physician")
