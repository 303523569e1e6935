"""Rejection sampling: a model's own answers, kept to train on where the verifier passes them.

Baichuan-M2 (arXiv 2509.02208, section 3.2) samples prompts whose answers can be verified, decides
ambiguous ones by the consensus of several models, and of the prompts that stay hard trains on
those of knowledge and leaves those of reasoning to reinforcement learning.

So it is an evaluation with several answers to each example, of any task that a model writes
answers to; `evaluate` asks, judges, resumes and stops at limits. What follows is pure: which
answers are kept. All answers of a run are in memory: give a large pool in several files.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, PositiveInt

from attending.artifact import disk_has_room
from attending.errors import ConfigError, UsageError
from attending.evaluate import recipe, tasks
from attending.evaluate.run import ModelSetup, Run, carry_out
from attending.evaluate.sample import Answer, Example, Grade, Sample, Task
from attending.evaluate.store import PLAN, Store
from attending.evaluate.tasks.base import Base, Row
from attending.overlap import normalise
from attending.verifier.rules import check
from attending.verifier.rules.answer import commitment
from attending.verifier.rules.rule import answer_of

Line = dict[str, Any]


class PromptsConfig(recipe.TaskConfig):
    """Conversations of one's own."""

    kind: Literal["prompts"]
    """Rows of `id`, `messages` and a `rule`; without a rule the consensus of models decides, which
    compares letters where there are `options`."""


Written = (
    recipe.ChoiceConfig
    | recipe.MathsConfig
    | recipe.InstructionsConfig
    | recipe.RefusalConfig
    | recipe.StatementsConfig
    | recipe.HealthBenchConfig
    | PromptsConfig
)


class RejectionConfig(recipe.EvalConfig):
    """What is asked, and which answers are kept."""

    tasks: dict[str, Annotated[Written, Field(discriminator="kind")]] = Field(min_length=1)  # type: ignore[assignment]
    """By name; each prompt is asked `repeats` times."""
    keep: PositiveInt = 1
    """Of a prompt's answers that pass, the best so many, no two of the same words."""
    threshold: float = Field(1.0, gt=0, le=1)
    """Score from which an answer passes: 1 is all of a rule's checks or a rubric's points."""
    reasoning: tuple[str, ...] = ()
    """Tasks whose hard prompts take reasoning, so that they are for `rl`, those of others `sft`."""


class Prompts(Base[PromptsConfig]):
    """Rows with a rule, and rows without one, which have no score of their own."""

    metric = "passed"

    def read(self, row: Row) -> Example:
        """ConfigError where no answer could follow, or for a rule that is none."""
        turns = row.cell("messages", list)
        roles = [
            turn.get("role")
            for turn in turns
            if isinstance(turn, dict) and isinstance(turn.get("content"), str)
        ]
        if len(roles) < len(turns) or roles[-1:] != ["user"]:
            raise ConfigError(f"{row.where}: its messages are no texts that end with the user's.")
        told = {key: row.cell(key, dict) for key in ("rule", "options") if key in row.cells}
        try:
            _ = check(told["rule"], "") if "rule" in told else None
        except ConfigError as error:
            raise ConfigError(f"{row.where}: {error}") from None
        return Example(str(row.cell("id")), tuple(turns), told)

    def worth(self, example: Example, answer: Answer) -> Grade:
        """By the rule: all of it or nothing."""
        if "rule" not in example.data:
            return Grade(None, "models must agree")
        checked = check(example.data["rule"], answer.text)
        return Grade(float(checked.passed), checked.reason)


class Outcome(NamedTuple):
    """What became of a prompt."""

    fate: str  # kept, hard, defective (all agree on one wrong answer), or unscored
    pass_rate: float | None  # of the answers that have a score
    unscored: int
    kept: list[Sample]


def build(config: RejectionConfig, folder: Path | None) -> list[Task]:
    """The tasks of a recipe; their data lies in the folder.

    Raises:
        UsageError: One holds a test's canary, or its model writes no answer.
    """
    found: list[Task] = []
    for told in config.tasks.values():
        if isinstance(told, recipe.ChoiceConfig) and told.method == "likelihood":
            raise UsageError(
                f"{told.name} is asked by likelihood, which writes no answer: "
                f"--set tasks.{told.name}.method=generation."
            )
        if isinstance(told, PromptsConfig):
            found.append(Prompts(told, folder))
        else:
            found.append(tasks.build(told, folder))
        if found[-1].canary:
            raise UsageError(f"{told.name} holds a test's canary: it is not to be trained on.")
    return found


async def sample(run: Run) -> Counter[str]:
    """Ask the first model and keep what passes; the others vote on what has no rule.

    Written beside the answers: `kept.jsonl` (`messages`, `score`, `pass_rate`), `hard.jsonl` (the
    prompts of which nothing was kept, with their `route`), `prompts.jsonl` (what became of each).

    Returns:
        Prompts by fate, `answers` kept, and answers that are `unscored_answers`.

    Raises:
        UsageError: There are prompts without a rule and no other models; or as `carry_out`.
        CheckFailed, EndpointError: As `carry_out`: what was answered is kept, --resume goes on.
    """
    config, (first, *others) = run.config, run.models
    assert isinstance(config, RejectionConfig)
    votes = [vote for task in run.tasks if (vote := _open(task)).examples]
    if votes and not others:
        raise UsageError(
            f"{votes[0].name} has prompts without a rule: name two or more models, whose consensus "
            "decides."
        )
    run.store.hold("sampled model", first.name)
    samples = await carry_out(replace(run, models=[first]))
    said = await _votes(run, others, votes) if votes else {}
    rows: dict[str, list[Line]] = {"kept": [], "hard": [], "prompts": []}
    counts = Counter[str]()
    for task in run.tasks:
        for _, group in groupby(samples[first.name, task.name], lambda one: one.example.id):
            own = list(group)
            if (name := (task.name, own[0].example.id)) in said:
                own = by_consensus(own, said[name])
            outcome = outcome_of(own, config)
            route = "rl" if task.name in config.reasoning else "sft"
            for kind, line in lines_of(task, own[0].example, outcome, route):
                rows[kind].append(line)
            counts.update({outcome.fate: 1, "answers": len(outcome.kept)})
            counts["unscored_answers"] += outcome.unscored
    for kind, lines in rows.items():
        _write(run.store.folder / f"{kind}.jsonl", lines)
    return counts


def by_consensus(samples: Sequence[Sample], votes: Sequence[str | None]) -> list[Sample]:
    """Right is what most models say, the one that was sampled too: by what it says most often.

    Unscored where no answer has more than half of the votes, or a vote (None) is missing.
    """
    agreed = majority([majority([answer_to(one) for one in samples]), *(v or "" for v in votes)])
    if not agreed or None in votes:
        return list(samples)
    scored = [Grade(float(answer_to(one) == agreed), "by consensus") for one in samples]
    failed = [one.answer.finish_reason == "failed" for one in samples]
    told = zip(samples, scored, failed, strict=True)
    return [one if is_out else one._replace(grade=grade) for one, grade, is_out in told]


def majority(votes: Sequence[str]) -> str:
    """What more than half say; empty if there is none, or if they say nothing."""
    return next((vote for vote, n in Counter(votes).items() if 2 * n > len(votes)), "")


def answer_to(one: Sample) -> str:
    """What an answer commits itself to, so that equal ones are equal; empty if to nothing."""
    data, text = one.example.data, answer_of(one.answer.text) or ""
    options = data.get("options") or data.get("rule", {}).get("options")
    if one.answer.finish_reason == "length" or not options:
        return "" if one.answer.finish_reason == "length" else commitment(text)
    rules = [{"kind": "choice", "options": options, "answer": letter} for letter in options]
    return next((str(rule["answer"]) for rule in rules if check(rule, text).passed), "")


def outcome_of(samples: Sequence[Sample], config: RejectionConfig) -> Outcome:
    """Of a prompt's answers, the best that pass, of equal words once; one that was cut is wrong."""
    scored = [one for one in samples if one.grade.score is not None]
    whole = [one for one in scored if one.answer.finish_reason != "length"]
    passed = [one for one in whole if (one.grade.score or 0.0) >= config.threshold]
    passed.sort(key=lambda one: -(one.grade.score or 0.0))
    words = [tuple(normalise(answer_of(one.answer.text) or "")) for one in passed]
    kept = [one for at, one in enumerate(passed) if words[at] not in words[:at]]
    unscored = len(samples) - len(scored)
    if not scored:
        return Outcome("unscored", None, unscored, [])
    fate = "kept" if passed else "hard"
    if not passed and len(whole) == len(scored) > 1 and whole[0].example.data.get("rule"):
        answers = {answer_to(one) for one in whole}
        fate = "defective" if len(answers) == 1 and answers != {""} else "hard"
    return Outcome(fate, len(passed) / len(scored), unscored, kept[: config.keep])


def lines_of(task: Task, example: Example, outcome: Outcome, route: str) -> list[tuple[str, Line]]:
    """For each file the lines of a prompt; a defective one is to be reviewed."""
    head: Line = {"id": f"{task.name}/{example.id}", "pass_rate": outcome.pass_rate}
    asked = [dict(turn) for turn in example.messages]
    found: list[tuple[str, Line]] = []
    for _, answer, grade in outcome.kept:
        thoughts = answer.text.rpartition("</think>")[0].removeprefix("<think>").strip()
        turn = {"role": "assistant", "content": answer_of(answer.text)}
        turn |= {"reasoning_content": thoughts} if thoughts else {}
        found.append(("kept", head | {"messages": [*asked, turn], "score": grade.score}))
    told = head | {"fate": outcome.fate, "kept": len(found), "unscored": outcome.unscored}
    if outcome.fate in ("hard", "defective"):
        route = route if outcome.fate == "hard" else "review"
        rubric = task.rubric(example)
        graded = {"rubrics": rubric.row()["rubrics"]} if rubric else example.data
        found.append(("hard", head | {"messages": asked, **graded, "route": route}))
    return [*found, ("prompts", told)]


def _open(task: Task) -> Task:
    """The prompts of a task that no rule decides, to be asked once."""
    own = copy(task)
    is_open = isinstance(task, Prompts)
    own.examples = [one for one in task.examples if is_open and "rule" not in one.data]
    own.repeats = 1
    return own


async def _votes(
    run: Run, others: Sequence[ModelSetup], votes: Sequence[Task]
) -> Mapping[tuple[str, str], list[str | None]]:
    """Each other model's answer to each open prompt; None where it gave none."""
    told = {task.name: run.config.tasks[task.name].replace(repeats=1) for task in votes}
    folder = run.store.folder / "votes"
    store = Store(folder, resume=(folder / PLAN).exists())
    config = run.config.replace(tasks=told)
    asked = replace(run, config=config, tasks=votes, models=others, judge=None, store=store)
    found: dict[tuple[str, str], list[str | None]] = {}
    for (_, task), samples in (await carry_out(asked)).items():
        for one in samples:
            vote = None if one.answer.finish_reason == "failed" else answer_to(one)
            found.setdefault((task, one.example.id), []).append(vote)
    return found


def _write(path: Path, rows: Iterable[Line]) -> None:
    draft = path.with_suffix(".tmp")
    with disk_has_room(path), draft.open("w", encoding="utf-8", errors="replace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    draft.replace(path)
