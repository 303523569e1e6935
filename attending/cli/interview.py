"""`attending consult`: a doctor model interviews a simulated patient."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attending.cli.terminal import UNPRINTABLE, JsonFlag, err, escape, out, print_json, print_table
from attending.errors import AttendingError, SourceError, UsageError

if TYPE_CHECKING:
    from attending.verifier.consult import Trace
    from attending.verifier.judge.verdict import Judge


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
    rubric: Annotated[
        Path | None,
        typer.Option(help="Criteria of your own, a row as HealthBench's; else the case's."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what a case's source leaves open.")] = 0,
    temperature: Annotated[float, typer.Option(help="Of the doctor.")] = 0.6,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of a doctor's message.")] = 512,
    max_turns: Annotated[int, typer.Option(help="Most replies of the patient.")] = 20,
    to: Annotated[Path, typer.Option("--out", help="Folder of the trace.")] = Path("out/consult"),
    allow_self: Annotated[
        bool, typer.Option("--allow-self", help="One model may be doctor and judge, or patient.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Let a doctor model interview a patient, and judge how it concludes.

    Writes trace.jsonl and trace.html. The texts of the consultation are in them, in clear.
    """
    from attending.verifier.consult import DISCLAIMER
    from attending.verifier.patient.find import find_case

    found = find_case(case, seed)
    err.print(f"[dim]{escape(DISCLAIMER)}[/]")
    models = {"doctor": model, "patient": patient, "judge": judge}
    how = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}

    def heard(trace: "Trace") -> None:
        trace.write(to)  # so that an interruption loses nothing
        said = trace.said[-1]
        if not as_json:
            out.print(f"[bold]{said.speaker}[/] {escape(UNPRINTABLE.sub('', said.text))}\n")

    trace = asyncio.run(_consult(found, models, rubric, how, max_turns, allow_self, heard))
    trace.write(to)
    *_, result = trace.rows()
    if as_json:
        print_json(result)
    else:
        shown = {name: value for name, value in result.items() if value not in (None, "")}
        print_table(
            ["", ""], [[name, _show(value)] for name, value in shown.items() if name != "kind"]
        )
        out.print(str(to / "trace.html"), markup=False)
    if trace.error:
        raise AttendingError(f"it broke off: {trace.error} What was said is in {to}.")


async def _consult(
    case: Any,
    models: dict[str, str | None],
    rubric: Path | None,
    how: dict[str, Any],
    max_turns: int,
    allow_self: bool,
    heard: Callable[["Trace"], None],
) -> "Trace":
    from attending import endpoint
    from attending.verifier.consult import consult
    from attending.verifier.rubric.check import refuse
    from attending.verifier.rubric.schema import read_rubrics

    own = next(iter(read_rubrics(rubric)), None) if rubric else None
    if own:
        refuse(own)
    elif rubric:
        raise UsageError(f"{rubric.name} has no row: expected one of HealthBench's form.")

    async with AsyncExitStack() as stack:
        opened = {
            name: await stack.enter_async_context(endpoint.open(source))
            for name, source in models.items()
            if source and not (name == "judge" and source in ("none", "embedded"))
        }
        judged = _judge(models["judge"], opened, allow_self)
        return await consult(
            case,
            opened["doctor"],
            fluent=opened.get("patient"),
            judge=judged,
            rubric=own,
            allow_self_play=allow_self,
            max_turns=max_turns,
            heard=heard,
            **how,
        )


def _judge(name: str | None, opened: dict[str, Any], allow_self: bool) -> "Judge | None":
    if name == "none":
        return None
    if "judge" in opened:
        from attending.verifier.judge.ask import EndpointJudge

        policy = opened["doctor"]
        return EndpointJudge(opened["judge"], policy=policy, allow_self_grading=allow_self)
    try:
        from attending.verifier.judge.embedded import EmbeddedJudge

        judge = EmbeddedJudge()
    except (SourceError, ModuleNotFoundError) as error:
        if name == "embedded":
            raise
        why = "torch is not installed" if isinstance(error, ModuleNotFoundError) else str(error)
        err.print(f"[dim]Nothing is judged: {escape(why)}[/]")
        return None
    err.print(f"[dim]{escape(judge.caution)}[/]")
    return judge


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return ", ".join(map(_show, value)) if isinstance(value, (list, tuple)) else str(value)
