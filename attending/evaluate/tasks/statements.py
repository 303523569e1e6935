"""Answers that must hold a physician's statements and contradict none, as K-QA."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from attending.evaluate.recipe import StatementsConfig
from attending.evaluate.sample import Answer, Example, Grade, Sample
from attending.evaluate.tasks.base import Base, Row
from attending.verifier.contradict import contradict
from attending.verifier.judge.verdict import Verdict
from attending.verifier.rubric.reference import WORDS
from attending.verifier.rubric.schema import Criterion, Rubric
from attending.verifier.rubric.score import bounds
from attending.verifier.rules.rule import answer_of

STATES = WORDS["wording"]["fact"]
PARTS = {"must": "must_have", "nice": "nice_to_have", "contradiction": "contradicted"}


class Statements(Base[StatementsConfig]):
    """K-QA's comprehensiveness: the share of must-haves that an answer states (arXiv 2401.14493).

    `contradicted` stands for its hallucination rate, but is not it: K-QA asks whether an answer
    contradicts a statement; here a judge looks for one constructed contradiction of each statement
    of which a rule can make one, so that other contradictions go unseen. A question without
    must-haves has no comprehensiveness and is left out.
    """

    metric = "must-haves stated"

    def read(self, row: Row) -> Example | None:
        """The question; a criterion for each statement and for each contradiction."""
        told = [(row.cell("Must_have", list), "must"), (row.cell("Nice_to_have", list), "nice")]
        pairs = [(text, tag) for texts, tag in told for text in texts if text.strip()]
        made = [contradict(text) for text, _ in pairs]
        pairs += [(found[0][0], "contradiction") for found in made if found]
        points = {"contradiction": -1}
        criteria = tuple(
            Criterion(STATES.format(text.strip(" .")), points.get(tag, 1), (tag,))
            for text, tag in pairs
        )
        question, answer = row.cell("Question", str), row.cells.get("Free_form_answer", "")
        has_must = any(tag == "must" for _, tag in pairs)
        return row.example(question, criteria=criteria, reference=answer) if has_must else None

    def rubric(self, example: Example) -> Rubric:
        return Rubric(example.id, example.messages, example.data["criteria"])

    def grade(self, example: Example, answer: Answer, verdicts: Sequence[Verdict] = ()) -> Grade:
        """Nothing said is nothing stated, and needs no verdicts."""
        criteria: Sequence[Criterion] = example.data["criteria"]
        if not (answer_of(answer.text) or "").strip():
            verdicts = [Verdict(False, "no answer")] * len(criteria)
        pairs = [*zip(criteria, verdicts, strict=True)]
        told = {tag: [v.met for c, v in pairs if tag in c.tags] for tag in PARTS}
        must, rest = [c for c in criteria if "must" in c.tags], told["must"]
        parts = {
            name: fmean(map(bool, told[tag]))
            for tag, name in PARTS.items()
            if told[tag] and None not in told[tag]
        }
        rows = tuple({"criterion": c.text, "points": c.points, **v._asdict()} for c, v in pairs)
        score, reason = parts.get("must_have"), f"{rest.count(True)} of {len(rest)} must-haves"
        return Grade(score, reason, bounds(must, rest) if score is None else None, parts, rows)

    def more(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """What the criteria rest on."""
        tags = [one.tags[0] for example in self.examples for one in example.data["criteria"]]
        found = tags.count("contradiction")
        told = {"statements": len(tags) - found, "with_contradiction": found}
        return super().more(samples) | told | {"without_must_have": self.num_left_out}
