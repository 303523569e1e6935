"""A run: ask each model, judge the answers, score them, write the report.

The order of events: every task's answers of one model after another (one is open at a time), then
all verdicts, then scores, `report.json`, the page, `run.json`. What stopped goes on with --resume.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attending import endpoint as endpoints
from attending.endpoint import Endpoint, is_address
from attending.errors import CheckFailed, ContextError, EndpointError, ReplyError, UsageError
from attending.evaluate.estimate import Meter, Work, answering, grading, probe, total
from attending.evaluate.identity import path_of
from attending.evaluate.judging import JudgeSetup, check_judge, open_judge
from attending.evaluate.recipe import EvalConfig
from attending.evaluate.sample import Answer, Example, Grade, Key, Sample, Task
from attending.evaluate.store import Store
from attending.sources import Progress
from attending.verifier.ask import together
from attending.verifier.judge.ask import EndpointJudge, judge_all
from attending.verifier.judge.verdict import Judge, Verdict
from attending.verifier.rules.rule import answer_of

HELD = ("tasks", "judge")  # of the recipe: what a run that goes on must share
JUDGE_IDENTITY = ("version", "template_sha256")  # scores under others are no comparison
Samples = dict[tuple[str, str], list[Sample]]  # by model and task


@dataclass(frozen=True, slots=True)
class ModelSetup:
    """A model under test, and how it is opened."""

    name: str
    """In the report."""
    source: str | None
    """A source or an address; None where the answers stand in the data."""
    how: Mapping[str, Any] = field(default_factory=dict)
    """What `endpoint.open` takes besides."""

    @property
    def folder(self) -> str:
        """Of its files."""
        return re.sub(r"[^\w.-]+", "_", self.name).strip("_.") or "model"


@dataclass(slots=True)
class Run:
    """What a run is given, and what it learns while it goes."""

    config: EvalConfig
    tasks: Sequence[Task]
    models: Sequence[ModelSetup]
    judge: JudgeSetup | None
    store: Store
    progress: Progress
    note: Callable[[str], object]
    """Told what people should know, such as the estimate."""
    paths: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of each model: what computed its answers."""
    facts: dict[str, Any] | None = None
    """About the judge."""
    failed: dict[tuple[str, str], dict[Key, str]] = field(default_factory=dict)
    """By model and task: what has no answer, and why."""
    meter: Meter = field(init=False)

    def __post_init__(self) -> None:
        """Refuse what could not end well before anything is asked."""
        self.meter = Meter(self.config.limits, self.store.spent())
        if len({one.folder for one in self.models}) < len(self.models):
            names = [one.name for one in self.models]
            raise UsageError(f"two models would share files, {names}: name each once.")
        for name, told in self.config.tasks.items():
            if told.repeats > 1 and not told.sampling.temperature:
                raise UsageError(
                    f"{name} asks {told.repeats} times at temperature 0, where all answers are "
                    f"one: --set tasks.{name}.sampling.temperature=0.6, or no repeats."
                )
        lacking = [task.name for task in self.tasks if is_judged(task)]
        if lacking and self.judge is None:
            raise UsageError(
                f"{', '.join(lacking)} must be judged: name a model with --judge, or `embedded`."
            )
        asked = [one.how for one in (*self.models, self.judge) if one]
        prices = [how["options"].price_per_million for how in asked if "options" in how]
        if self.config.limits.max_cost and None in prices:
            raise UsageError(
                "limits.max_cost needs the price of every model that is asked: give --model-price "
                "and --judge-price (0,0 where it costs nothing)."
            )

    @property
    def parents(self) -> list[dict[str, str]]:
        """For `run.json`: the models and the data."""
        told = [(one.get("source", ""), one.get("sha256", "")) for one in self.paths.values()]
        told += [(task.name, task.sha256) for task in self.tasks]
        return [{"uri": uri, "sha256": sha256} for uri, sha256 in told]


async def carry_out(run: Run) -> Samples:
    """Ask and judge all that is missing; all samples by model and task.

    Raises:
        UsageError: The folder was begun with other settings.
        CheckFailed: A limit is reached, or too much is unscored. What was done is kept.
        EndpointError: The endpoint is gone. What was done is kept.
    """
    with run.store.alone():
        begin(run)
        try:
            if run.judge and any(map(is_judged, run.tasks)):
                await _meet_judge(run, run.judge)
            for model in run.models if len(run.models) > 1 else ():
                await _meet_model(run, model)
            for model in run.models:
                await _ask_model(run, model)
            if any(map(is_judged, run.tasks)):
                await _judge(run)
        finally:
            run.store.keep_spent(run.meter.sums)
        return {(m.name, t.name): _samples(run, m, t) for m in run.models for t in run.tasks}


def begin(run: Run) -> None:
    """Keep what the run is made with, and what is asked."""
    config = run.config.model_dump(mode="json")
    data = {task.name: task.sha256 for task in run.tasks}
    run.store.hold("recipe", {name: config[name] for name in HELD} | {"data": data})
    for task in run.tasks:
        run.store.write_examples(task)


def takes(config: EvalConfig, tasks: Sequence[Task]) -> dict[str, dict[str, Any]]:
    """What each task takes of one model, and of the judge: requests, tokens at most."""
    found = {}
    for task, told in zip(tasks, config.tasks.values(), strict=True):
        every = [(one, repeat) for one in task.examples for repeat in range(task.repeats)]
        found[task.name] = {"model": answering(task, every, told)._asdict()}
        if is_judged(task):
            judged = grading(task, every, told, config.judge.max_tokens)
            found[task.name]["judge"] = judged._asdict()
    return found


def is_judged(task: Task) -> bool:
    """Whether its grades need verdicts."""
    return task.rubric(task.examples[0]) is not None


async def _meet_judge(run: Run, judge: JudgeSetup) -> None:
    """Before any answer is paid for: is it there, with its template, and what will it cost?"""
    if not is_address(judge.source):
        check_judge(judge)  # opened later, when no other model is in memory
    else:
        judged = [str(model.how.get("model_id") or "") for model in run.models]
        async with open_judge(judge, run.config.judge, judged) as (_, run.facts):
            run.store.hold("judge", {key: run.facts[key] for key in JUDGE_IDENTITY})
    if judge.is_embedded:
        return
    parts = [
        grading(task, _missing(run, model, task, graded=True), told, run.config.judge.max_tokens)
        for model in run.models
        for task, told in zip(run.tasks, run.config.tasks.values(), strict=True)
        if is_judged(task)
    ]
    run.note(f"judge: {_price(judge.how, total(parts))}")


async def _meet_model(run: Run, model: ModelSetup) -> None:
    """Of several the last is asked late: is it there at all?"""
    if model.source and is_address(model.source):
        async with endpoints.open(model.source, **model.how) as endpoint:
            run.store.hold(f"model {model.name}", await path_of(model.source, endpoint))


async def _ask_model(run: Run, model: ModelSetup) -> None:
    """All tasks' missing answers of one model."""
    if model.source is None:
        run.paths[model.name] = {"source": "answers in the data"}
        for task in run.tasks:
            with run.store.adding_answers(model.folder, task) as add:
                for example, repeat in _missing(run, model, task):
                    answer = task.given(example, repeat)
                    assert answer is not None
                    add(answer)
        return
    async with endpoints.open(model.source, **model.how) as endpoint:
        run.meter.endpoints.append(endpoint)
        path = run.paths[model.name] = await path_of(model.source, endpoint)
        run.store.hold(f"model {model.name}", path)
        _check_lengths(run, path)
        parts = [
            answering(task, _missing(run, model, task), told)
            for task, told in zip(run.tasks, run.config.tasks.values(), strict=True)
        ]
        if (work := total(parts)).requests:
            speed = await probe(endpoint, min(run.config.concurrency, work.requests))
            time = f"; at most {speed.minutes(work):,.0f} minutes" if speed else ""
            run.note(f"{model.name}: {_price(model.how, work)}{time}")
            _hold_version(run, model, endpoint)
        for task in run.tasks:
            await _ask(run, model, task, endpoint)
        _hold_version(run, model, endpoint)


def _hold_version(run: Run, model: ModelSetup, endpoint: Endpoint) -> None:
    """What answers under the name; another one does not go on with the run."""
    if names := sorted(endpoint.versions - {""}):
        run.store.hold(f"version of {model.name}", names[0])
        run.paths[model.name]["answered_by"] = names[0]


def _check_lengths(run: Run, path: Mapping[str, str]) -> None:
    context = int(path.get("context", 0))
    for name, told in run.config.tasks.items():
        if 0 < context <= told.most_tokens:
            raise UsageError(
                f"{name} allows answers of {told.most_tokens:,} tokens, and the context of "
                f"{path['model']} has {context:,}: --set tasks.{name}.sampling.max_tokens=N."
            )


async def _ask(run: Run, model: ModelSetup, task: Task, endpoint: Endpoint) -> None:
    """Workers take what is missing one by one; an answer is written as soon as it is there."""
    todo = _missing(run, model, task)
    failed = run.failed[model.name, task.name] = {}
    pending, done, in_a_row = iter(todo), 0, 0

    async def work() -> None:
        nonlocal done, in_a_row
        for example, repeat in pending:
            run.meter.check()
            try:
                answer = await task.ask(endpoint, example, repeat)
                _check_version(endpoint)
                add(answer)
                in_a_row = 0
            except ContextError as error:
                failed[example.id, repeat] = str(error)  # this one, not the endpoint
            except (EndpointError, ReplyError) as error:
                failed[example.id, repeat] = str(error)
                in_a_row += 1
                if in_a_row > run.config.limits.max_failures:
                    raise EndpointError(
                        f"{in_a_row} requests in a row had no answer, the last because {error} "
                        "What was answered is kept: run again with --resume."
                    ) from None
            done += 1
            run.progress(done, len(todo), f"{model.name}: {task.name}")

    with run.store.adding_answers(model.folder, task) as add:
        await together([work() for _ in range(min(run.config.concurrency, len(todo)))])


def _check_version(endpoint: Endpoint) -> None:
    names = sorted(endpoint.versions - {""})
    if len(names) > 1:
        raise CheckFailed(
            f"{endpoint.model} was {names[0]} and {names[1]} while it was asked: answers of both "
            "are no score. Name one version, and give another --out."
        )


def _missing(
    run: Run, model: ModelSetup, task: Task, *, graded: bool = False
) -> list[tuple[Example, int]]:
    """What has no answer, or no grade that a judge has decided on."""
    answers = run.store.answers(model.folder, task)
    known = _decided(run, model, task, answers) if graded else answers.keys()
    every = [(one, repeat) for repeat in range(task.repeats) for one in task.examples]
    return [(one, repeat) for one, repeat in every if (one.id, repeat) not in known]


def _decided(run: Run, model: ModelSetup, task: Task, answers: Mapping[Key, Answer]) -> set[Key]:
    grades = run.store.grades(model.folder, task, answers)
    return {k for k, own in grades.items() if all(v["met"] is not None for v in own.verdicts)}


async def _judge(run: Run) -> None:
    """All answers of all models that no judge has decided on."""
    assert run.judge is not None
    judged = [path.get("model", "") for path in run.paths.values()]
    async with open_judge(run.judge, run.config.judge, judged) as (judge, run.facts):
        run.meter.endpoints.extend(judge.endpoints)
        if isinstance(judge, EndpointJudge):
            judge.check = run.meter.check
        run.store.hold("judge", {key: run.facts[key] for key in JUDGE_IDENTITY})
        for model in run.models:
            for task in filter(is_judged, run.tasks):
                await _judge_task(run, model, task, judge)


async def _judge_task(run: Run, model: ModelSetup, task: Task, judge: Judge) -> None:
    answers = run.store.answers(model.folder, task)
    decided = _decided(run, model, task, answers)
    examples = {one.id: one for one in task.examples}
    todo = [answer for key, answer in answers.items() if key not in decided]
    asked = []
    for answer in todo:
        rubric = task.rubric(examples[answer.id])
        assert rubric is not None
        asked.append((rubric, answer_of(answer.text) or ""))
    with run.store.adding_grades(model.folder, task) as add:
        done = 0
        async for found in judge_all(judge, asked):
            answer = todo[found.at]
            add(answer, task.grade(examples[answer.id], answer, found.verdicts))
            done += 1
            run.progress(done, len(todo), f"{judge.name} judges {model.name}: {task.name}")
            run.meter.check()


def _samples(run: Run, model: ModelSetup, task: Task) -> list[Sample]:
    """All of a task; what has no answer has no score, and no grade of its own."""
    answers = run.store.answers(model.folder, task)
    grades = run.store.grades(model.folder, task, answers) if is_judged(task) else {}
    failed = run.failed.get((model.name, task.name), {})
    found = []
    for example in task.examples:
        for key in ((example.id, repeat) for repeat in range(task.repeats)):
            answer = answers.get(key, Answer(*key, "", "failed"))
            if key in grades:
                grade = grades[key]
            elif key in answers:
                grade = task.grade(example, answer)
            else:
                grade = _unanswered(task, example, answer, failed.get(key, ""))
            found.append(Sample(example, answer, grade))
    if not is_judged(task):
        run.store.write_grades(model.folder, task, found)
    return found


def _unanswered(task: Task, example: Example, answer: Answer, reason: str) -> Grade:
    """Unscored, with the least and the most that it could have been."""
    rubric, reason = task.rubric(example), f"no answer: {reason}"
    if rubric is None:
        return Grade(None, reason, None if task.is_loss else (0.0, 1.0))
    unknown = [Verdict(None, reason)] * len(rubric.criteria)
    return Grade(None, reason, task.grade(example, answer, unknown).bounds)


def _price(how: Mapping[str, Any], work: Work) -> str:
    """The work, and what it costs at most."""
    cost = how["options"].price(work.input_tokens, work.output_tokens)
    if cost is None:
        return f"{work}; cost unknown (no price given)"
    return f"{work}; some {cost:,.4g} at most, in the prices' currency" if cost else str(work)
