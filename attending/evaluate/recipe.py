"""What an evaluation is told: the record behind `recipes/eval/NAME.toml`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from attending.config import Config
from attending.verifier.judge.ask import JudgeOptions


class SamplingConfig(Config):
    """How the model under test writes."""

    temperature: NonNegativeFloat = 0.0
    """0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample from the likeliest tokens with this much probability."""
    max_tokens: PositiveInt = 512
    """Most tokens of an answer, thinking included."""
    seed: NonNegativeInt = 0
    """Of the first answer to an example; further ones count up."""
    system: str | None = None
    """A system message before every conversation."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """More of the request, such as `chat_template_kwargs`."""


class LimitsConfig(Config):
    """Where a run stops by itself; it can be resumed with higher ones."""

    max_cost: PositiveFloat | None = None
    """Of model and judge, in the unit of the prices given."""
    max_seconds: PositiveFloat | None = None
    """Of the whole run, all its parts."""
    max_tokens: PositiveInt | None = None
    """Read and written, model and judge together."""
    max_failures: NonNegativeInt = 10
    """Examples in a row that may stay without an answer; one more, and the run stops."""


class TaskConfig(Config):
    """What every kind of task is told."""

    name: str = Field(pattern=r"^[a-z0-9_.-]+$")
    """Its key in the suite: in the report, and of its files."""
    data: str
    """A file in the folder given by --data, or a source: a path, https:, hf:datasets/, pypi:."""
    limit: PositiveInt | None = None
    """Take so many examples, drawn as `random.Random(0).sample` does; None takes all."""
    repeats: PositiveInt = 1
    """Answers to each example."""
    sampling: SamplingConfig = SamplingConfig()
    """How the model writes."""

    @property
    def most_tokens(self) -> int:
        """That an answer can have."""
        return self.sampling.max_tokens


class Columns(Config):
    """Which keys of a row hold what; lists of options come in their order."""

    id: str | None = None
    """Of the example; None counts the rows."""
    question: str = "question"
    """The question."""
    context: str | None = None
    """What is read before it: a text, or a list of texts."""
    options: str | tuple[str, ...] = "options"
    """One key with a mapping from letters or a list; or a key an option."""
    answer: str = "answer_idx"
    """A letter, an option's text, or a place in the options."""
    first: NonNegativeInt = 0
    """The place of the first option, where the answer is a place."""
    group: str | None = None
    """A group that the example counts in, such as a subject."""


class ChoiceConfig(TaskConfig):
    """Questions with options."""

    kind: Literal["choice"]
    """Multiple choice."""
    method: Literal["likelihood", "generation"] = "likelihood"
    """The likeliest option after the prompt, or the one that the model writes."""
    columns: Columns = Columns()
    """Of the data."""
    fixed: tuple[str, ...] = ()
    """The same options for every question, such as yes, no, maybe; then no letters are shown."""

    @property
    def most_tokens(self) -> int:
        """By likelihood nothing is written but what the endpoint insists on."""
        return 1 if self.method == "likelihood" else super().most_tokens

    prompt: str = ""
    """Of `likelihood`: medqa, medmcqa, mmlu, pubmedqa, as lm-evaluation-harness has them, or Jinja.
    Default: pubmedqa where the options are fixed, else medqa."""


class MathsConfig(TaskConfig):
    """Questions whose answer is a number."""

    kind: Literal["maths"]
    """As GSM8K."""
    columns: Columns = Columns(answer="answer")
    """Of the data; what follows `####` is the answer."""


class InstructionsConfig(TaskConfig):
    """Prompts with instructions that a program can check."""

    kind: Literal["instructions"]
    """As IFEval."""


class StatementsConfig(TaskConfig):
    """Questions whose answers must hold a physician's statements; a judge reads them."""

    kind: Literal["statements"]
    """As K-QA."""


class RefusalConfig(TaskConfig):
    """Requests that a model must not fulfil."""

    kind: Literal["refusal"]
    """As MedSafetyBench."""
    columns: Columns = Columns(question="harmful_medical_request", group="file")
    """Of the data."""


class TextConfig(TaskConfig):
    """Texts that a model should find likely: bits per byte."""

    kind: Literal["text"]
    """Of held-out documents."""
    text: str = "text"
    """The key of the text."""
    max_bytes: PositiveInt = 4096
    """Taken of each document."""

    @property
    def most_tokens(self) -> int:
        """Nothing is written but what the endpoint insists on."""
        return 1


class HealthBenchConfig(TaskConfig):
    """Conversations with physicians' criteria; a judge says which are met."""

    kind: Literal["healthbench"]
    """HealthBench, or rubrics of its form."""
    subset: Literal["full", "consensus"] = "full"
    """All criteria, or those on which physicians agreed (`level:cluster`)."""
    answers: Literal["model", "physicians", "references"] = "model"
    """Who answers: a model, the physicians in the data, or the models that they were shown."""


class MetaConfig(TaskConfig):
    """Answers with physicians' labels: the judge is what is tested."""

    kind: Literal["meta"]
    """HealthBench's meta-evaluation."""


AnyTask = Annotated[
    ChoiceConfig
    | MathsConfig
    | InstructionsConfig
    | StatementsConfig
    | RefusalConfig
    | TextConfig
    | HealthBenchConfig
    | MetaConfig,
    Field(discriminator="kind"),
]


class EvalConfig(Config):
    """A suite: tasks, and how their scores are made."""

    tasks: dict[str, AnyTask] = Field(min_length=1)
    """By name, in order."""
    seed: NonNegativeInt = 0
    """Of the intervals."""
    resamples: PositiveInt = 1000
    """Of the bootstrap."""
    concurrency: PositiveInt = 32
    """Requests under way at once, to a model under test or to the judge."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """Of models on this machine: what the engine takes, such as `device` or `threads`."""
    judge: JudgeOptions = JudgeOptions()
    """How a model is asked for its verdicts."""
    limits: LimitsConfig = LimitsConfig()
    """Where the run stops by itself."""
    max_unanswered_share: NonNegativeFloat = 0.0
    """Share of a task without a score above which the run ends with exit code 3."""

    @classmethod
    def build(cls, values: Mapping[str, Any], where: str = "") -> Self:
        """As every record; a task's name is its key."""
        tasks = values.get("tasks")
        if isinstance(tasks, Mapping):
            named = {k: v | {"name": k} if isinstance(v, dict) else v for k, v in tasks.items()}
            values = {**values, "tasks": named}
        return super().build(values, where)
