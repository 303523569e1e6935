"""`attending consult`: a doctor model interviews a simulated patient."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attending.cli.opening import IdOption, KeyOption, Opening, PriceOption
from attending.cli.terminal import UNPRINTABLE, JsonFlag, err, escape, out, print_json, print_table
from attending.errors import AttendingError, CheckFailed, SourceError, UsageError

if TYPE_CHECKING:
    from attending.verifier.consult import Trace
    from attending.verifier.judge.verdict import Judge
    from attending.verifier.rubric.schema import Rubric

RubricOption = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="Criteria of your own, one row as HealthBench's; else the case's.",
    ),
]


def consult(
    case: Annotated[
        str,
        typer.Argument(
            help="`appendicitis` or another shipped case, FILE.json, FILE.jsonl:ID of vignettes, "
            "or DDXPlus' folder, FOLDER or FOLDER:CONDITION."
        ),
    ],
    model: Annotated[str, typer.Argument(help="The doctor: a source, or an endpoint's address.")],
    patient: Annotated[
        str | None, typer.Option(help="A model that words the patient; else rules do.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="A model that judges, `embedded`, or `none`. Default: embedded, if here."
        ),
    ] = None,
    rubric: RubricOption = None,
    seed: Annotated[int, typer.Option(help="Of what a case's source leaves open.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of the doctor.")] = 0.6,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a doctor's message.")] = 512,
    max_turns: Annotated[int, typer.Option(min=1, help="Most replies of the patient.")] = 20,
    to: Annotated[
        Path | None, typer.Option("--out", help="Folder of the trace; default: a new one in out/.")
    ] = None,
    allow_self: Annotated[
        bool, typer.Option("--allow-self", help="One model may be doctor and judge, or patient.")
    ] = False,
    model_id: IdOption = "",
    model_key_variable: KeyOption = None,
    model_price: PriceOption = None,
    patient_id: IdOption = "",
    patient_key_variable: KeyOption = None,
    patient_price: PriceOption = None,
    judge_id: IdOption = "",
    judge_key_variable: KeyOption = None,
    judge_price: PriceOption = None,
    cache: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="File that keeps a model's verdicts. Default: none."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Let a doctor model interview a patient, and judge how it concludes.

    Writes trace.jsonl and trace.html. The texts of the consultation are in them, in clear.
    """
    from attending.verifier.consult import DISCLAIMER, case_rubric
    from attending.verifier.patient.find import find_case

    found, own = find_case(case, seed), _read_rubric(rubric) if rubric else None
    if judge != "none" and own is None:
        case_rubric(found, [{"role": "user", "content": found.complaint}])  # before it costs
    folder = to or _new_folder(found.id)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: give --out a folder.")
    err.print(f"[dim]{escape(DISCLAIMER)}[/]")
    models = {
        "model": Opening(model, model_id, model_key_variable, model_price),
        "patient": Opening(patient, patient_id, patient_key_variable, patient_price),
        "judge": Opening(judge, judge_id, judge_key_variable, judge_price, cache),
    }
    how = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}

    def heard(trace: "Trace") -> None:
        trace.write(folder)  # so that an interruption loses nothing
        said = trace.said[-1]
        if not as_json:
            out.print(f"[bold]{said.speaker}[/] {escape(UNPRINTABLE.sub('', said.text))}\n")

    import asyncio

    trace = asyncio.run(_consult(found, models, own, how, max_turns, allow_self, heard))
    trace.write(folder)
    _report(trace, folder, as_json)


def _report(trace: "Trace", folder: Path, as_json: bool) -> None:
    """Print the result; what broke it off, or left criteria unscored, is an error."""
    *_, result = trace.rows()
    if as_json:
        print_json(result)
    else:
        caution, _ = result.pop("caution"), result.pop("kind")  # a table's cell is cut
        shown = [[name, _show(value)] for name, value in result.items() if value not in (None, "")]
        print_table(["", ""], shown)
        told = (trace.unjudged(), caution, str(folder / "trace.html"))
        out.print("\n".join(filter(None, told)), markup=False)
    if trace.error:
        raise AttendingError(f"it broke off: {trace.error} What was said is in {folder}.")
    if any(verdict.met is None for verdict in trace.verdicts):
        raise CheckFailed(trace.unjudged())


def _new_folder(name: str) -> Path:
    """In out/, the first of its name that is not there."""
    names = (f"consult-{name}{f'-{n}' if n else ''}".replace("/", "_") for n in range(10_000))
    return next(path for path in map(Path("out").joinpath, names) if not path.exists())


def _read_rubric(path: Path) -> "Rubric":
    from attending.verifier.rubric.check import refuse
    from attending.verifier.rubric.schema import read_rubrics

    rows = [*read_rubrics(path)]
    if len(rows) != 1:
        raise UsageError(
            f"{path.name} has {len(rows)} rows: expected one of HealthBench's form. Give a file "
            "with the one row that is meant."
        )
    refuse(rows[0])
    return rows[0]


async def _consult(
    case: Any,
    models: dict[str, Opening],
    rubric: "Rubric | None",
    how: dict[str, Any],
    max_turns: int,
    allow_self: bool,
    heard: Callable[["Trace"], None],
) -> "Trace":
    from attending import endpoint
    from attending.verifier.consult import consult

    openings = {name: asked.opening(name) for name, asked in models.items()}
    async with AsyncExitStack() as stack:
        opened = {
            name: await stack.enter_async_context(endpoint.open(**opening))
            for name, opening in openings.items()
            if opening
        }
        judged = _judge(models["judge"].source, opened, allow_self, case.language)
        if judged:
            err.print(f"[dim]{escape(judged.caution)}[/]")
        return await consult(
            case,
            opened["model"],
            fluent=opened.get("patient"),
            judge=judged,
            rubric=rubric,
            allow_self_play=allow_self,
            max_turns=max_turns,
            heard=heard,
            **how,
        )


def _judge(
    name: str | None, opened: dict[str, Any], allow_self: bool, language: str
) -> "Judge | None":
    if name == "none":
        return None
    if language != "en" and "judge" not in opened:
        if name == "embedded":
            raise UsageError("the embedded judge reads English only: name a model with --judge.")
        err.print("[dim]Nothing is judged: the embedded judge reads English only.[/]")
        return None
    if "judge" in opened:
        from attending.verifier.judge.ask import EndpointJudge

        policy = opened["model"]
        return EndpointJudge(opened["judge"], policy=policy, allow_self_grading=allow_self)
    try:
        from attending.verifier.judge.embedded import EmbeddedJudge

        return EmbeddedJudge()
    except (SourceError, ModuleNotFoundError) as error:
        if name == "embedded":
            raise
        why = "torch is not installed" if isinstance(error, ModuleNotFoundError) else str(error)
        err.print(f"[dim]Nothing is judged: {escape(why)}[/]")
        return None


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(map(_show, value)) if isinstance(value, (list, tuple)) else str(value)
