"""`attending consult`: a doctor model interviews a simulated patient."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from attending.cli.terminal import UNPRINTABLE, JsonFlag, err, escape, out, print_json, print_table
from attending.errors import AttendingError, SourceError, UsageError

if TYPE_CHECKING:
    from attending.verifier.consult import Trace
    from attending.verifier.judge.verdict import Judge
    from attending.verifier.rubric.schema import Rubric

IdOption = Annotated[str, typer.Option(help="One of several models at that address.")]
KeyOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Environment variable with its API key.")
]
PriceOption = Annotated[
    str | None,
    typer.Option(metavar="IN,OUT", help="Of a million of its tokens; a cost needs every price."),
]
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
    to: Annotated[Path, typer.Option("--out", help="Folder of the trace.")] = Path("out/consult"),
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
    from attending.verifier.consult import DISCLAIMER
    from attending.verifier.patient.find import find_case

    found, own = find_case(case, seed), _read_rubric(rubric) if rubric else None
    err.print(f"[dim]{escape(DISCLAIMER)}[/]")
    models = {
        "model": _Asked(model, model_id, model_key_variable, model_price),
        "patient": _Asked(patient, patient_id, patient_key_variable, patient_price),
        "judge": _Asked(judge, judge_id, judge_key_variable, judge_price, cache),
    }
    how = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}

    def heard(trace: "Trace") -> None:
        trace.write(to)  # so that an interruption loses nothing
        said = trace.said[-1]
        if not as_json:
            out.print(f"[bold]{said.speaker}[/] {escape(UNPRINTABLE.sub('', said.text))}\n")

    trace = asyncio.run(_consult(found, models, own, how, max_turns, allow_self, heard))
    trace.write(to)
    *_, result = trace.rows()
    if as_json:
        print_json(result)
    else:
        caution, _ = result.pop("caution"), result.pop("kind")  # a table's cell is cut
        shown = [[name, _show(value)] for name, value in result.items() if value not in (None, "")]
        print_table(["", ""], shown)
        out.print("\n".join(filter(None, (caution, str(to / "trace.html")))), markup=False)
    if trace.error:
        raise AttendingError(f"it broke off: {trace.error} What was said is in {to}.")


class _Asked(NamedTuple):
    """A model, or what stands in for one, and how it is asked."""

    source: str | None
    model_id: str
    api_key_variable: str | None
    price: str | None
    cache: Path | None = None

    def opening(self, name: str) -> dict[str, Any] | None:
        """What `endpoint.open` takes; None where no model is asked."""
        from attending.endpoint import EndpointOptions

        if not self.source or (name == "judge" and self.source in ("none", "embedded")):
            if any(self[1:]):
                raise UsageError(
                    f"no model is the {name}, but its id, key, price or cache is given: name one "
                    f"with --{name}."
                )
            return None
        try:
            price = [*map(float, self.price.split(","))] if self.price else None
            if price and len(price) != 2:
                raise ValueError
        except ValueError:
            raise UsageError(f"--{name}-price {self.price!r}: expected IN,OUT, as 0.5,2.") from None
        values = {"api_key_variable": self.api_key_variable, "price_per_million": price}
        options = EndpointOptions.build(values | {"cache": self.cache}, where=f"--{name}-...")
        if self.cache:
            self.cache.parent.mkdir(parents=True, exist_ok=True)
        return {"model": self.source, "model_id": self.model_id, "options": options}


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
    models: dict[str, _Asked],
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
        judged = _judge(models["judge"].source, opened, allow_self)
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


def _judge(name: str | None, opened: dict[str, Any], allow_self: bool) -> "Judge | None":
    if name == "none":
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
        return f"{value:.2f}"
    return ", ".join(map(_show, value)) if isinstance(value, (list, tuple)) else str(value)
