"""HealthBench as a task of `inspect-ai` 0.3, which must be installed.

    inspect eval attending/healthbench --model MODEL -T rows=healthbench -T judge=http://HOST/v1

`score` is the mean, clipped to [0, 1], of answers with all verdicts, `unscored` the share of the
others (`inspect_evals` takes a missing verdict for "not met"). Whatever the missing ones are, the
mean of all lies between `least` and `most`.
"""

import asyncio
import math
from typing import Any

from attending import endpoint as endpoints
from attending.endpoint import EndpointOptions
from attending.errors import UsageError
from attending.evaluate.data import find
from attending.evaluate.healthbench.grader import Grader, read_template
from attending.verifier.judge.verdict import Judge
from attending.verifier.rubric.schema import parse_rubric, read_rubrics
from attending.verifier.rubric.score import bounds, score
from attending.verifier.rules.rule import answer_of

try:
    from inspect_ai import Task, task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.scorer import SampleScore, Score, Scorer, Target, metric, scorer
    from inspect_ai.solver import TaskState, generate
except ModuleNotFoundError as error:
    raise UsageError(
        f"{error.name} is not installed: pip install -e '.[harness]' in the clone"
    ) from None


@task
def healthbench(
    rows: str,
    judge: str = "embedded",
    judge_id: str = "",
    judge_key_var: str | None = None,
    template: str | None = None,
) -> Task:
    """HealthBench's rows, or rubrics of its form, from a file or a source that was pulled.

    The judge is `embedded`, a model on this machine or an address: there `judge_id` names one of
    several models, `judge_key_var` the environment variable with its key, and `template` a source
    of the grader's text, as `attending eval --template` takes it.
    """
    rubrics: Any = read_rubrics(find(rows, None))  # Any: Inspect takes its messages as mappings too
    made = [Sample([*one.conversation], id=one.name, metadata=one.row()) for one in rubrics]
    judged = by_judge(judge, judge_id, judge_key_var, template)
    return Task(MemoryDataset(made, "healthbench"), solver=generate(), scorer=judged)


@metric
def clipped_mean() -> Any:
    """As HealthBench's reference: only the mean is clipped."""

    def mean(scores: list[SampleScore]) -> float:  # Inspect reads these types
        values = [one.score.as_float() for one in scores]
        return min(max(math.fsum(values) / len(values), 0.0), 1.0) if values else math.nan

    return mean


@scorer(metrics={"*": [clipped_mean()]})
def by_judge(
    judge: str, judge_id: str = "", key_var: str | None = None, template: str | None = None
) -> Scorer:
    """A verdict for each criterion, and the score of them all."""
    opened: dict[Any, asyncio.Task[tuple[Judge, Any]]] = {}  # by event loop: a run has its own

    async def connect() -> tuple[Judge, Any]:
        if judge == "embedded":
            from attending.verifier.judge.embedded import EmbeddedJudge

            return EmbeddedJudge(), None
        how = EndpointOptions(api_key_variable=key_var)
        line = endpoints.open(judge, model_id=judge_id, options=how)  # the loop's end closes it
        return Grader(await line.__aenter__(), read_template(template)), line

    async def judged(state: TaskState, target: Target) -> Score:
        if (loop := asyncio.get_running_loop()) not in opened:
            opened[loop] = loop.create_task(connect())
        asked, _ = await asyncio.shield(opened[loop])
        if asked.name == state.model.name:
            raise UsageError(f"{asked.name} would grade itself: name another judge.")
        rubric, answer = parse_rubric(state.metadata), answer_of(state.output.completion) or ""
        verdicts = await asked(rubric, answer)
        met = [verdict.met for verdict in verdicts]
        least, most = bounds(rubric.criteria, met) or (math.nan, math.nan)
        found = score(rubric.criteria, met)
        value = {"score": math.nan if found is None else found, "unscored": float(found is None)}
        value |= {"least": least, "most": most}
        told = {"judge": asked.name, "caution": asked.caution}
        listed = [verdict._asdict() for verdict in verdicts]
        return Score(value=value, answer=answer, metadata={**told, "verdicts": listed})

    return judged
