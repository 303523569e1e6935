"""The judge on trial: how often it agrees with physicians about one criterion of one answer.

HealthBench's meta-evaluation (openai/simple-evals, `healthbench_meta_eval.py`): every pair of the
judge's label and one physician's label counts, and the headline is the mean of F1 on the pairs'
two classes. Physicians beside each other on the same rows are the ceiling to compare it with.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attending.artifact import digest
from attending.endpoint import Endpoint
from attending.errors import ConfigError
from attending.evaluate.data import find, read_rows, take
from attending.evaluate.healthbench.task import canaries
from attending.evaluate.intervals import Sums, bootstrap
from attending.evaluate.recipe import MetaConfig
from attending.evaluate.sample import Answer, Example, Grade, Sample
from attending.verifier.judge.verdict import Verdict
from attending.verifier.rubric.schema import Criterion, Rubric

THEMES = (
    *("communication", "complex_responses", "context_seeking", "emergency_referrals"),
    *("global_health", "health_data_tasks", "hedging"),
)
LEVEL = "level:cluster"  # all published rows are of criteria that physicians agreed on
Counts = tuple[float, float, float, float]  # pairs: both met, only ours, only theirs, neither


class Meta:
    """Answers with labels; those to one answer are asked together, for the judge's prefix cache."""

    metric = "macro-F1 with physicians"
    chance: float | None = None
    is_loss = is_clipped = False
    repeats = requests = 1

    def __init__(self, config: MetaConfig, folder: Path | None) -> None:
        """ConfigError for a row that lacks something."""
        path = find(config.data, folder)
        self.name, self.sha256 = config.name, digest(path)
        rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for number, row in enumerate(read_rows(path), 1):
            rows[str(row.get("completion_id") or number)].append(_checked(row, path.name, number))
        self.canary = canaries(row for own in rows.values() for row in own)
        chosen = take(sorted(rows), config.limit)
        self.examples: Sequence[Example] = [
            Example(name, tuple(rows[name][0]["prompt"]), {"rows": rows[name]}) for name in chosen
        ]

    def given(self, example: Example, repeat: int) -> Answer:
        """The completion in the data."""
        return Answer(example.id, repeat, example.data["rows"][0]["completion"])

    async def ask(self, endpoint: Endpoint, example: Example, repeat: int) -> Answer:
        """The same: no model is asked."""
        return self.given(example, repeat)

    def rubric(self, example: Example) -> Rubric:
        """The criteria as the reference shows them here: without points."""
        criteria = tuple(Criterion(row["rubric"], 1) for row in example.data["rows"])
        return Rubric(example.id, example.messages, criteria, {"shows_points": False})

    def grade(self, example: Example, answer: Answer, verdicts: Sequence[Verdict] = ()) -> Grade:
        """The share of the physicians' labels that the judge's agree with."""
        rows, met = example.data["rows"], [one.met for one in verdicts]
        told = tuple(
            {"criterion": row["rubric"], "points": 1, "met": v.met, "explanation": v.explanation}
            for row, v in zip(rows, verdicts, strict=True)
        )
        if None in met:
            return Grade(None, "a criterion is unscored", (0.0, 1.0), verdicts=told)
        both = [m == label for row, m in zip(rows, met, strict=True) for label in row["labels"]]
        return Grade(float(np.mean(both)), verdicts=told)

    def headline(self, samples: Sequence[Sample], seed: int, resamples: int) -> dict[str, Any]:
        """Macro-F1 in all and by category, theme and level, instead of the share that agrees."""
        groups: dict[str, list[tuple[Counts, str]]] = defaultdict(list)
        for counts, row in self._pairs(samples):
            for group in ("", *row["groups"]):
                groups[group].append((counts, str(row["prompt_id"])))
        found = {}
        for name, own in groups.items():
            terms, prompts = zip(*own, strict=True)
            got = bootstrap(terms, prompts, macro_f1, seed=seed, resamples=resamples)
            found[name] = {"score": got.value, "interval": got.interval, "n": got.n}
            found[name]["bootstrap_std"] = got.std
        whole = found.pop("", {})
        return whole | {"parts": found, "unclipped": whole.get("score"), "bounds": None}

    def more(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Precision and recall of the judge; and physicians beside each other."""
        ours, theirs = np.zeros(4), np.zeros(4)
        for counts, row in self._pairs(samples):
            ours += counts
            theirs += _counts(permutations(row["labels"], 2))
        names = ("precision_met", "recall_met", "precision_not_met", "recall_not_met")
        shares = dict(zip(names, _precision_recall(ours), strict=True))
        physicians = {"physicians_macro_f1": float(macro_f1(theirs))} if theirs.any() else {}
        return {"pairs": int(ours.sum()), **shares, **physicians}

    def _pairs(self, samples: Sequence[Sample]) -> Iterator[tuple[Counts, dict[str, Any]]]:
        """Of each criterion with a verdict: the counts of its pairs, and its row."""
        for sample in samples:
            for row, told in zip(sample.example.data["rows"], sample.grade.verdicts, strict=False):
                if told["met"] is not None:
                    yield _counts((told["met"], label) for label in row["labels"]), row


def macro_f1(counts: Sums) -> NDArray[np.float64]:
    """The mean of both classes' F1, each 0 where nothing of it was right, [..., 4] -> [...]."""
    met, ours, theirs, neither = np.moveaxis(counts, -1, 0)
    wrong = ours + theirs
    f1 = [2 * right / np.maximum(2 * right + wrong, 1e-9) for right in (met, neither)]
    found: NDArray[np.float64] = (f1[0] + f1[1]) / 2
    return found


def _counts(pairs: Iterable[tuple[bool, bool]]) -> Counts:
    found = [0.0] * 4
    for ours, theirs in pairs:
        found[2 * (not ours) + (not theirs)] += 1
    return found[0], found[1], found[2], found[3]


def _precision_recall(counts: NDArray[np.float64]) -> list[float]:
    met, ours, theirs, neither = counts
    wholes = (met + ours, met + theirs, neither + theirs, neither + ours)
    return [
        float(a / b) if b else 0.0
        for a, b in zip((met, met, neither, neither), wholes, strict=True)
    ]


def _checked(row: dict[str, Any], name: str, number: int) -> dict[str, Any]:
    labels = row.get("binary_labels")
    keys = ("prompt", "completion", "rubric", "prompt_id")
    if not all(row.get(key) for key in keys) or not labels or {*map(type, labels)} != {bool}:
        raise ConfigError(
            f"{name}, row {number} is no row of {', '.join(keys)} and binary_labels (true or "
            "false, one a physician)."
        )
    category = str(row.get("category") or "")
    theme = [one for one in THEMES if category.removeprefix("cluster:").startswith(one)]
    levels = [tag for tag in row.get("tags") or () if tag.startswith("level:")] or [LEVEL]
    groups = [*([category] if category else []), *(f"theme:{one}" for one in theme), *levels]
    return row | {"labels": labels, "groups": groups}
