"""HealthBench: conversations with physicians' criteria (Arora et al., arXiv 2505.08775).

Scored as openai/simple-evals does (`healthbench_eval.py`, commit ee3b0318): an answer's points
over its positive points, unclipped; the same over the criteria of each tag that has a positive one;
means over answers, clipped. An answer with a criterion that no judge could decide is unscored.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import comb
from pathlib import Path
from statistics import fmean
from typing import Any

from attending.artifact import digest
from attending.endpoint import Endpoint
from attending.errors import ConfigError
from attending.evaluate.asking import chat
from attending.evaluate.data import find, refuse_repeats, take
from attending.evaluate.recipe import HealthBenchConfig
from attending.evaluate.sample import Answer, Example, Grade, Sample
from attending.verifier.judge.verdict import Verdict
from attending.verifier.rubric.schema import Rubric, read_lines, read_rubrics
from attending.verifier.rubric.score import bounds, score
from attending.verifier.rules.rule import answer_of

CONSENSUS = "level:cluster"
IDEAL, GROUP = "ideal_completion", "ideal_completions_group"
NOT_GRADED = "it is not in the file of verdicts"
REFERENCES, NUM_REFERENCES = "ideal_completions_ref_completions", 4


class HealthBench:
    """Its examples, or others of its form; with physicians' texts no model is asked."""

    metric = "rubric score"
    chance: float | None = None
    is_loss = False
    is_clipped = True
    requests = 1

    def __init__(self, config: HealthBenchConfig, folder: Path | None) -> None:
        """ConfigError for a row twice, without a positive criterion, or otherwise wrong."""
        path = find(config.data, folder)
        self.name, self.sampling, self.answers = config.name, config.sampling, config.answers
        self.sha256 = digest(path)
        self.is_given = config.answers != "model"
        self.repeats = NUM_REFERENCES if config.answers == "references" else config.repeats
        rubrics = [_of_subset(one, config.subset) for one in read_rubrics(path)]
        rubrics = [one for one in rubrics if one.criteria]
        refuse_repeats((one.name for one in rubrics), path.name)
        for one in rubrics:
            if not any(criterion.points > 0 for criterion in one.criteria):
                raise ConfigError(
                    f"{path.name}: {one.name!r} has no criterion with positive points, so its "
                    "score is not defined: give it one, or remove the row."
                )
        if self.is_given:
            rubrics = [one for one in rubrics if self._texts(one)]
        if not rubrics:
            what = f"criteria of {config.subset} and {config.answers} to answer"
            raise ConfigError(f"{path.name} has no rows with {what}.")
        rubrics = list(take(rubrics, config.limit))
        self.rubrics = {one.name: one for one in rubrics}
        self.examples: Sequence[Example] = [self._example(one) for one in rubrics]
        self.canary = canaries(one.extra for one in rubrics)

    def given(self, example: Example, repeat: int) -> Answer | None:
        """A physician's text, or of a model that physicians were shown."""
        if not self.is_given:
            return None
        return Answer(example.id, repeat, self._texts(self.rubrics[example.id])[repeat])

    async def ask(self, endpoint: Endpoint, example: Example, repeat: int) -> Answer:
        """The model's answer to the conversation."""
        return await chat(endpoint, self.sampling, example, repeat)

    def rubric(self, example: Example) -> Rubric:
        """What the judge sees: the system message too, where the model saw one."""
        own = self.rubrics[example.id]
        if self.is_given or not self.sampling.system:
            return own
        turns = ({"role": "system", "content": self.sampling.system}, *own.conversation)
        return Rubric(own.name, turns, own.criteria, own.extra)

    def grade(self, example: Example, answer: Answer, verdicts: Sequence[Verdict] = ()) -> Grade:
        """Scores of the answer and of each tag of its criteria, unclipped."""
        criteria = self.rubrics[example.id].criteria
        met = [one.met for one in verdicts]
        tagged: dict[str, list[int]] = defaultdict(list)
        for at, criterion in enumerate(criteria):
            for tag in dict.fromkeys(criterion.tags):
                tagged[tag].append(at)
        parts = {
            tag: part
            for tag, places in tagged.items()
            if (part := score([criteria[i] for i in places], [met[i] for i in places])) is not None
        }
        told = tuple(
            {"criterion": c.text, "points": c.points, "met": v.met, "explanation": v.explanation}
            for c, v in zip(criteria, verdicts, strict=True)
        )
        whole, lacking = score(criteria, met), met.count(None)
        reason = f"{lacking} of {len(met)} criteria are unscored" if lacking else ""
        return Grade(whole, reason, bounds(criteria, met), parts, told)

    def more(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Criteria unscored, answers without text, and of several answers worst-at-k."""
        verdicts = [told for sample in samples for told in sample.grade.verdicts]
        found: dict[str, Any] = {
            "criteria": len(verdicts),
            "criteria_unscored": sum(told["met"] is None for told in verdicts),
            "answers_empty": sum(not (answer_of(one.answer.text) or "") for one in samples),
        }
        repeated: dict[str, list[float]] = defaultdict(list)
        for sample in samples:
            if sample.grade.score is not None:
                repeated[sample.example.id].append(sample.grade.score)
        if max(map(len, repeated.values()), default=0) > 1:
            found["worst_at_k"] = worst_at_k(list(repeated.values()))
        return found

    def headline(self, samples: Sequence[Sample], seed: int, resamples: int) -> dict[str, Any]:
        """Nothing: the score is the mean."""
        return {}

    def _example(self, rubric: Rubric) -> Example:
        tags = list(rubric.extra.get("example_tags") or ())
        if self.is_given:
            tags.append(f"group:{rubric.extra['ideal_completions_data'].get(GROUP)}")
        return Example(rubric.name, rubric.conversation, {}, tuple(dict.fromkeys(tags)))

    def _texts(self, rubric: Rubric) -> list[str]:
        """Of the physicians, or of the models whose answers they were shown."""
        told = rubric.extra.get("ideal_completions_data") or {}
        if self.answers == "physicians":
            return [told[IDEAL]] * self.repeats if told.get(IDEAL) else []
        shown = list(told.get(REFERENCES) or ())
        if shown and len(shown) != NUM_REFERENCES:
            raise ConfigError(
                f"{rubric.name!r} has {len(shown)} reference completions, not {NUM_REFERENCES}."
            )
        return shown


def recorded(task: HealthBench, path: Path) -> list[Sample]:
    """Answers with verdicts that were given elsewhere, scored without any judge.

    A line is `{"prompt_id", "response", "verdicts": [{"criteria_met", "explanation"}]}`, a verdict
    for each criterion in the row's order; null is unscored. A further line of the same prompt is a
    further answer to it; one without any is unscored.

    Raises:
        ConfigError: With the line.
    """
    found, counts = list[Sample](), Counter[str]()
    examples = {one.id: one for one in task.examples}
    for where, row in read_lines(path):
        name = str(row.get("prompt_id"))
        where = f"{where} ({name})"
        if name not in examples:
            raise ConfigError(f"{where}: the rows of {task.name} have no such prompt_id.")
        verdicts = [_verdict(told, where) for told in row.get("verdicts") or ()]
        if len(verdicts) != (wanted := len(task.rubrics[name].criteria)):
            raise ConfigError(f"{where} has {len(verdicts)} verdicts for {wanted} criteria.")
        answer = Answer(name, counts[name], str(row.get("response") or ""))
        counts[name] += 1
        example = examples[name]
        found.append(Sample(example, answer, task.grade(example, answer, verdicts)))
    if not found:
        raise ConfigError(f"{path.name} has no graded answers.")
    for name in examples.keys() - counts.keys():
        met = [Verdict(None, NOT_GRADED)] * len(task.rubrics[name].criteria)
        answer = Answer(name, 0, "", "failed")
        lacking = replace(task.grade(examples[name], answer, met), verdicts=(), reason=NOT_GRADED)
        found.append(Sample(examples[name], answer, lacking))
    return found


def canaries(rows: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Every one that the rows hold."""
    return tuple(sorted({str(row["canary"]) for row in rows if row.get("canary")}))


def worst_at_k(scores: Sequence[Sequence[float]]) -> dict[int, float]:
    """For each k the expected worst of k answers, over prompts that have as many, clipped.

    In closed form: of scores in ascending order s_1 .. s_n the mean minimum over all subsets of k
    is the sum of s_i C(n - i, k - 1) / C(n, k).
    """
    found: dict[int, float] = {}
    for k in range(1, max(map(len, scores)) + 1):
        means = [
            sum(s * comb(len(own) - i, k - 1) for i, s in enumerate(sorted(own), 1))
            / comb(len(own), k)
            for own in scores
            if len(own) >= k
        ]
        found[k] = min(1.0, max(0.0, fmean(means)))
    return found


def _of_subset(rubric: Rubric, subset: str) -> Rubric:
    """All criteria; or those that many physicians agreed on, as the published subset has them."""
    if subset == "full":
        return rubric
    return replace(rubric, criteria=tuple(c for c in rubric.criteria if CONSENSUS in c.tags))


def _verdict(told: Any, where: str) -> Verdict:
    met = told.get("criteria_met") if isinstance(told, Mapping) else ""
    if met is not None and not isinstance(met, bool):
        raise ConfigError(f"{where}: a verdict is no object with criteria_met true, false or null.")
    return Verdict(met, str(told.get("explanation") or ""))
