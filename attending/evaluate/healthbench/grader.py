"""The judge as HealthBench's reference asks it: one template, one criterion, `criteria_met`.

Prompt and parsing are those of openai/simple-evals (`healthbench_eval.py`, commit ee3b0318). The
template's text is ours unless another is named: for scores that are comparable with published
ones, the published text is read at run time from where the user has it. Three things differ: the
tries for a well-formed reply are bounded, after the last one a verdict is unscored; placeholders
inside a conversation stay as they are; and verdicts are cached.
"""

import ast
import hashlib
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from attending import sources
from attending.config import Config
from attending.endpoint import Endpoint
from attending.errors import ReplyError, UsageError
from attending.verifier.ask import THOUGHTS
from attending.verifier.judge.ask import EndpointJudge, JudgeOptions, Question
from attending.verifier.rubric.schema import Criterion, Rubric

OWN = "attending"
CONVERSATION, ITEM = "<<conversation>>", "<<rubric_item>>"
FENCES = re.compile(r"^```json\s*|\s*```$")


class Template(NamedTuple):
    """The grader's text."""

    text: str
    name: str  # where it comes from
    sha256: str


class Graded(Config):
    """A grader's reply."""

    criteria_met: bool
    """Whether the answer meets the criterion."""
    explanation: str = "No explanation provided"
    """Why."""


class Grader(EndpointJudge):
    """Of one model; see `EndpointJudge`."""

    def __init__(
        self,
        endpoints: Endpoint | Sequence[Endpoint],
        template: Template,
        options: JudgeOptions | None = None,
        **how: Any,
    ) -> None:
        super().__init__(endpoints, options, **how)
        self.template = template

    def question(self, rubric: Rubric, answer: str, criterion: Criterion) -> Question:
        """The template with the conversation, roles in front, and `[points] criterion`."""
        turns = [*rubric.conversation, {"role": "assistant", "content": answer}]
        shows_points = rubric.extra.get("shows_points", True)
        values = {
            CONVERSATION: "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns),
            ITEM: f"[{criterion.points}] {criterion.text}" if shows_points else criterion.text,
        }
        text = re.sub(f"{CONVERSATION}|{ITEM}", lambda m: values[m[0]], self.template.text)
        return Question(text, Graded, "criteria_met", "healthbench", read_reply)


def read_reply(text: str) -> Graded:
    """As the reference reads it: a fence with `json` is taken off, the rest is one JSON object.

    Thoughts before it are left out: with them the reference could read nothing.

    Raises:
        ReplyError: It is none, or `criteria_met` is neither true nor false.
    """
    try:
        told = json.loads(FENCES.sub("", THOUGHTS.sub("", text.strip())))
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict) or not isinstance(met := told.get("criteria_met"), bool):
        raise ReplyError("the reply is no JSON object with criteria_met true or false.")
    reason = {"explanation": str(told["explanation"])} if "explanation" in told else {}
    return Graded(criteria_met=met, **reason)


def read_template(source: str | None = None) -> Template:
    """Our own text; or a file's; or a string constant of a Python file, which is not run.

    Args:
        source: A path or another source, such as `pypi:inspect-evals==0.26.0/inspect_evals/
            healthbench/scorer.py`. After `#` the constant's name; without it, the only one that
            has both placeholders.

    Raises:
        UsageError: No text there has each placeholder once.
    """
    if source is None:
        text = (resources.files(__package__) / "grader.txt").read_text("utf-8")
        return _checked(text, OWN)
    place, _, name = source.partition("#")
    path = sources.resolve(place).path
    if path.suffix != ".py":
        return _checked(path.read_text("utf-8"), source)
    found = _constants(path)
    if name and name not in found:
        raise UsageError(f"{path.name} has no string constant {name!r}: it has {sorted(found)}.")
    fitting = {k: v for k, v in found.items() if k == name or (not name and CONVERSATION in v)}
    if len(fitting) != 1:
        raise UsageError(
            f"{path.name} has {len(fitting)} constants with {CONVERSATION} {sorted(fitting)}: name "
            "the one that is meant, as FILE.py#NAME."
        )
    return _checked(fitting.popitem()[1], source)


def _constants(path: Path) -> dict[str, str]:
    """The strings that a module assigns to a name, read without importing it."""
    try:
        module = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{path.name} is no Python file ({error}).") from None
    found: dict[str, str] = {}
    for node in module.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            value = node.value
            if isinstance(value, ast.Call) and not value.args and not value.keywords:
                made = value.func  # of "text".strip(), which the reference does anyway
                value = made.value if isinstance(made, ast.Attribute) else value
                value = value if getattr(made, "attr", "") == "strip" else node.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found |= {t.id: value.value for t in targets if isinstance(t, ast.Name)}
    return found


def _checked(text: str, name: str) -> Template:
    text = text.strip()  # as the reference does
    if any(text.count(mark) != 1 for mark in (CONVERSATION, ITEM)):
        raise UsageError(
            f"the grader's template {name} must hold {CONVERSATION} and {ITEM}, each once."
        )
    return Template(text, Path(name).name, hashlib.sha256(text.encode()).hexdigest())
