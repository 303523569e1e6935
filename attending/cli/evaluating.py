"""`attending eval`: how good a model is, and how far to trust the number."""

import json
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from attending.cli.opening import IdOption, KeyOption, Opening, PriceOption
from attending.cli.terminal import JsonFlag, err, escape, out, print_json, print_table, progress_bar
from attending.errors import UsageError

if TYPE_CHECKING:
    from attending.evaluate.judging import JudgeSetup
    from attending.evaluate.recipe import EvalConfig
    from attending.evaluate.results import Report
    from attending.evaluate.run import ModelSetup, Run
    from attending.evaluate.sample import Task

SuiteArgument = Annotated[
    str,
    typer.Argument(
        help="A recipe (healthbench, medical, medqa, gsm8k, ifeval, kqa, safety, retention, table "
        "and others: docs/evaluate.md), or a TOML file."
    ),
]
ModelsArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Sources, or addresses as http://HOST/v1#ID; several are compared."),
]
RowsOption = Annotated[
    str | None, typer.Option(help="A source of HealthBench's rows, instead of the recipe's.")
]
GradedOption = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="Verdicts given elsewhere, to be scored without asking anybody.",
    ),
]
DataOption = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, help="Folder with the test sets.")
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        help="A source of the grader's text, FILE.py#CONSTANT too; `signed` asks as the verifier "
        "does. Default: our own text."
    ),
]
AgreementOption = Annotated[
    Path | None,
    typer.Option(exists=True, help="report.json of this judge's healthbench-meta."),
]
BeforeOption = Annotated[
    str | None, typer.Option(help="A source to compare with; for `retention` what run.json names.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Draw so many of each task.")]
AgainstOption = Annotated[
    list[Path] | None,
    typer.Option(exists=True, help="Training text or token shards: is a test in them?"),
]


def evaluate(
    suite: SuiteArgument,
    models: ModelsArgument = None,
    rows: RowsOption = None,
    graded: GradedOption = None,
    data: DataOption = None,
    judge: Annotated[str | None, typer.Option(help="A model that judges, or `embedded`.")] = None,
    template: TemplateOption = None,
    agreement: AgreementOption = None,
    allow_self: Annotated[
        bool, typer.Option("--allow-self", help="The judge may be a model that is judged.")
    ] = False,
    against: AgainstOption = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Of token shards given by --against.")
    ] = None,
    before: BeforeOption = None,
    limit: LimitOption = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="A value: a.b=c.")] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="Folder of the results; default: out/eval-SUITE.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the recipe and what it takes; end.")
    ] = False,
    model_key_variable: KeyOption = None,
    model_price: PriceOption = None,
    judge_id: IdOption = "",
    judge_key_variable: KeyOption = None,
    judge_price: PriceOption = None,
    cache: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="File of verdicts; default: the user's cache."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Score models on a suite: every score with n, interval, judge and what the judge is worth.

    Writes report.html, report.json and every answer with its grade; the tests' texts are in them.
    """
    from attending.evaluate import results
    from attending.evaluate.recipe import EvalConfig
    from attending.evaluate.run import takes
    from attending.evaluate.tasks import build

    config = _changed(EvalConfig.load(suite, "eval", change or []), rows, limit)
    tasks, name = [build(one, data) for one in config.tasks.values()], Path(suite).stem
    if dry_run:
        told = takes(config, tasks)
        print_json({"recipe": config.model_dump(mode="json"), "takes": told})
        return
    if graded:
        unused: dict[str, object] = {"MODEL": models, "--before": before, "--resume": resume}
        unused |= {"--agreement": agreement, "--allow-self": allow_self}
        unused |= {"--against": against, "--tokenizer": tokenizer}
        if given := [name for name, value in unused.items() if value]:
            raise UsageError(f"--graded asks nobody: {', '.join(given)} would mean nothing.")
        report = results.recorded(config, tasks, name, graded, judge, template, to)
    else:
        to = to or Path("out") / f"eval-{name}"
        if tokenizer and not against:
            raise UsageError("--tokenizer belongs to --against: name the token shards.")
        asked = Opening(judge, judge_id, judge_key_variable, judge_price, cache)
        setup = _judge(asked, config, template, agreement, allow_self)
        setups = _models(
            _with_parent(models or [], before, name), tasks, model_key_variable, model_price, config
        )
        text = results.TrainingText(tuple(against), tokenizer) if against else None
        with _run(config, tasks, setups, setup, to, resume) as run:
            report = results.evaluate(run, name, text)
    _show(report, to, as_json)
    results.check(report, 1.0 if graded else config.max_unanswered_share)


def rejection(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe, or a .toml file.")],
    models: Annotated[
        list[str], typer.Argument(help="The model that writes; others vote where no rule decides.")
    ],
    data: DataOption = None,
    judge: Annotated[str | None, typer.Option(help="A model that judges, or `embedded`.")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", help="A value: a.b=c.")] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="Folder; default: out/rejection-RECIPE.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the recipe and what it takes; end.")
    ] = False,
    model_key_variable: KeyOption = None,
    model_price: PriceOption = None,
    judge_id: IdOption = "",
    judge_key_variable: KeyOption = None,
    judge_price: PriceOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Let a model write, and keep what the verifier passes as dialogues for `attending sft`."""
    import asyncio

    from attending.evaluate.run import takes
    from attending.sft import rejection as own

    config = own.RejectionConfig.load(recipe, "rejection", change or [])
    tasks, to = own.build(config, data), to or Path("out") / f"rejection-{Path(recipe).stem}"
    if dry_run:
        told = takes(config, tasks)
        print_json({"recipe": config.model_dump(mode="json"), "takes": told})
        return
    asked = Opening(judge, judge_id, judge_key_variable, judge_price, None)
    setup = _judge(asked, config, None, None, False)
    setups = _models(models, tasks, model_key_variable, model_price, config)
    with _run(config, tasks, setups, setup, to, resume) as run:
        counts = asyncio.run(own.sample(run))
    if as_json:
        print_json(dict(counts))
        return
    err.print(escape(", ".join(f"{count:,} {name}" for name, count in counts.items())))
    out.print(str(to / "kept.jsonl"), markup=False)


def _changed(config: "EvalConfig", rows: str | None, limit: int | None) -> "EvalConfig":
    """With the rows and the limit of the command line."""
    tasks = config.model_dump(mode="json")["tasks"]
    kinds = {name: task["kind"] for name, task in tasks.items()}
    if rows and not {"healthbench", "meta"} & {*kinds.values()}:
        raise UsageError(f"--rows is for HealthBench; this suite has {', '.join(kinds)}.")
    for name, task in tasks.items():
        if rows and kinds[name] in ("healthbench", "meta"):
            task["data"] = rows
        task["limit"] = limit or task["limit"]
    return config.replace(tasks=tasks)


def _with_parent(models: list[str], before: str | None, suite: str) -> list[str]:
    """What was there before training first: as given, or of `retention` as its run.json says."""
    from attending import sources
    from attending.errors import SourceError
    from attending.evaluate.identity import weights_sha256

    if before is None and suite == "retention" and len(models) == 1:
        try:
            run = json.loads((sources.resolve(models[0]).path / "run.json").read_text("utf-8"))
            before, sha256 = str(run["parents"][0]["uri"]), run["parents"][0]["sha256"]
            is_same = weights_sha256(before) == sha256
        except (SourceError, OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(
                "retention compares two models: name the one before training with --before "
                f"({type(error).__name__}: no run.json of {models[0]} leads to it)."
            ) from None
        if not is_same:
            raise UsageError(
                f"{before} is not what {models[0]} was trained from: its sha256 is another. Name "
                "it with --before."
            )
    return models if before is None else [before, *models]


def _models(
    named: list[str],
    tasks: "Sequence[Task]",
    key_variable: str | None,
    price: str | None,
    config: "EvalConfig",
) -> "list[ModelSetup]":
    """How each is opened; where the answers stand in the data, the one that gave them."""
    from attending.endpoint import is_address
    from attending.evaluate.run import ModelSetup
    from attending.sources import resolve

    are_given = {task.given(task.examples[0], 0) is not None for task in tasks}
    if are_given == {True, False} or (True in are_given) == bool(named):
        given = [task.name for task in tasks if task.given(task.examples[0], 0)]
        raise UsageError(
            f"the answers to {', '.join(given)} stand in the data: name no MODEL, and take other "
            "tasks out of the suite."
            if given
            else "name a MODEL: a source such as `default`, or an endpoint's address."
        )
    if not named:
        return [ModelSetup("the data's answers", None)]
    far = filter(is_address, named)
    if (key_variable or price) and len({urlsplit(one).netloc for one in far}) > 1:
        raise UsageError(
            "the models are at several hosts, and one --model-key-variable and --model-price "
            "belong to one: run them apart, and compare with `attending report A B`."
        )
    found: list[ModelSetup] = []
    for source in dict.fromkeys(named):
        asked, host = Opening(source, "", key_variable, price), urlsplit(source).netloc
        if not is_address(source):
            resolve(source)  # or it is not here, which is said before a judge is met
            asked = Opening(source, "", None, "0,0")  # a key and a price are an address's
        how = asked.opening("model", max_concurrency=config.concurrency)
        assert how is not None
        name = how["model_id"] or host or Path(source).name
        name = f"{name} at {host}" if name in [one.name for one in found] else name
        found.append(ModelSetup(name, how.pop("model"), how | {"engine": config.engine}))
    return found


def _judge(
    asked: Opening,
    config: "EvalConfig",
    template: str | None,
    agreement: Path | None,
    allow_self: bool,
) -> "JudgeSetup | None":
    """How it is opened; its verdicts are kept in the user's cache unless a file is named."""
    from attending.endpoint import is_address
    from attending.evaluate.judging import JudgeSetup
    from attending.sources import cache_dir

    if not asked.source or asked.source in ("none", "embedded"):
        asked.opening("judge")  # refuses a key or a price of nobody
        if asked.source != "embedded":
            return None
        return JudgeSetup("embedded", {}, template, agreement, allow_self)
    asked = asked._replace(
        cache=asked.cache or cache_dir() / "verdicts.sqlite",
        price=asked.price or (None if is_address(asked.source) else "0,0"),
    )
    how = {**(asked.opening("judge", max_concurrency=config.concurrency) or {})}
    place = how.pop("model")
    return JudgeSetup(place, how | {"engine": config.engine}, template, agreement, allow_self)


@contextmanager
def _run(
    config: "EvalConfig",
    tasks: "Sequence[Task]",
    models: "list[ModelSetup]",
    judge: "JudgeSetup | None",
    folder: Path,
    resume: bool,
) -> "Iterator[Run]":
    """With a bar a task; an interruption says how to go on."""
    from attending.evaluate.run import Run
    from attending.evaluate.store import Store

    def note(told: str) -> None:
        err.print(f"[dim]{escape(told)}[/]")

    store = Store(folder, resume=resume)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # of batch systems
    try:
        with progress_bar(of_bytes=False) as progress:
            yield Run(config, tasks, models, judge, store, progress, note)
    except KeyboardInterrupt:
        err.print("interrupted; what is done is kept: run again with --resume.")
        raise typer.Exit(130) from None


def _show(report: "Report", folder: Path | None, as_json: bool) -> None:
    """The judge's worth before any score of it, then a row a score."""
    if as_json:
        only = report["rows"][0] if len(report["rows"]) == 1 else {}
        print_json({"overall": report["overall"], **only, **report})
        return
    judge = report["judge"]
    if judge:
        out.print(f"judge: {escape(judge['version'])}; {escape(_worth(judge['agreement']))}")
        if judge["caution"]:
            err.print(f"[dim]{escape(judge['caution'])}[/]")
    head = ["task", "score is", "model", "score", "95 % interval", "n", "unscored", ""]
    rows = [
        [
            one["task"],
            f"{one['metric']} (less is better)" if one["is_loss"] else one["metric"],
            escape(one["model"]),
            _number(one["score"]),
            " to ".join(map(_number, one["interval"] or ())),
            f"{one['n']:,}",
            f"{one['unscored']:.1%}" if one["unscored"] else "",
            one["says"],
        ]
        for one in report["rows"]
    ]
    print_table(head, rows)
    print_pairs(report)
    for told in report["warnings"]:
        err.print(f"[dim]{escape(told)}[/]")
    if folder:
        out.print(str(folder / "report.html"), markup=False)


def print_pairs(report: "Report") -> None:
    """The differences of the models, task by task."""
    for one in report["pairs"]:
        span = " to ".join(map(_number, one["interval"] or ()))
        both = f"{one['b']} - {one['a']}"
        out.print(f"{one['task']}: {both} = {_number(one['difference'])} ({span})", markup=False)


def _worth(agreement: "dict[str, Any] | None") -> str:
    if agreement is None:
        return "its agreement with physicians is not measured"
    span = " to ".join(map(_number, agreement["interval"] or ()))
    value = f"{agreement['metric']} {_number(agreement['value'])} ({span})"
    return f"{value} with {agreement['against']}, n = {agreement['n']:,}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
