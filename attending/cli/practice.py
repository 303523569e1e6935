"""`attending cases`: what reinforcement learning practises on."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from attending.cli.terminal import err, escape, out, progress_bar
from attending.errors import UsageError

if TYPE_CHECKING:
    from attending.rl.recipe import RlConfig
    from attending.rl.types import Case


def cases(
    kind: Annotated[
        str, typer.Argument(help="dosage, format, options, rubric, patient or interview.")
    ],
    to: Annotated[Path, typer.Option("--out", help="JSONL file to write.")],
    count: Annotated[int, typer.Option(min=1, help="Of cases.")] = 200,
    level: Annotated[int, typer.Option(min=1, help="From 1, the easiest.")] = 1,
    part: Annotated[
        Literal["train", "held_out"],
        typer.Option(help="They share no subject, numbers or wording."),
    ] = "train",
    seed: Annotated[int, typer.Option(help="The same one gives the same cases.")] = 0,
    medquad: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="MedQuAD's JSONL file.")
    ] = None,
    patients: Annotated[
        Path | None, typer.Option(exists=True, help="DDXPlus' folder, or vignettes' JSONL file.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Keep cases that this model passes sometimes: a source or an address."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Of answers to rubrics; else the recipe's.")
    ] = None,
    answers: Annotated[int, typer.Option(min=2, help="Of the model to each case.")] = 8,
    low: Annotated[float, typer.Option(min=0, max=1, help="Least pass rate.")] = 0.2,
    high: Annotated[float, typer.Option(min=0, max=1, help="Greatest pass rate.")] = 0.8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 48,
    recipe: Annotated[
        str | None, typer.Option(help="The run's recipe: its template, and how it judges.")
    ] = None,
) -> None:
    """Make cases with exact answers, criteria or patients for `attending rl`.

    `interview` makes dialogues for `attending sft` instead: a scripted doctor interviews patients.
    """
    import asyncio

    from attending.rl import cases as own
    from attending.rl import interviews
    from attending.rl.recipe import RlConfig
    from attending.rl.tasks import make

    if to.exists():
        raise UsageError(f"{to.name} exists; choose another name or remove it first.")
    if kind == "interview":
        own.write_rows(to, asyncio.run(interviews.interviews(patients, count, seed, part)))
        out.print(str(to), markup=False)
        return
    run = RlConfig.load(recipe, "rl", ()) if recipe else None
    if kind == "patient":
        made = list(interviews.patients(patients, count, seed, part))
    else:
        made = list(make(kind, count, seed, level, medquad, part))
    if model is not None:
        judge = judge or (run.judge if run else None)
        if kind == "rubric" and judge is None:
            raise UsageError("--model chooses rubrics by what a judge says: add --judge.")
        rates = asyncio.run(_rates(made, model, judge, (answers, max_tokens), run))
        chosen = own.choose(made, rates, low, high)
        mean = sum(rates.values()) / max(len(rates), 1)
        err.print(
            escape(
                f"{model} passes {mean:.0%} of its answers; kept {len(chosen.cases)}, too hard "
                f"{chosen.too_hard}, too easy {chosen.too_easy}, unmeasured {chosen.unmeasured}"
            )
        )
        made = chosen.cases
    if not made:
        raise UsageError("no case is left: take another level, or a wider band.")
    own.write_rows(to, map(own.line_of, made))
    out.print(str(to), markup=False)


async def _rates(
    made: "Sequence[Case]",
    model: str,
    judge: str | None,
    sizes: tuple[int, int],
    run: "RlConfig | None",
) -> dict[str, float]:
    """How often the model passes each case; `sizes`: answers to it, tokens of one at most."""
    from attending import endpoint
    from attending.rl import cases as own
    from attending.rl.setup import judge_of
    from attending.verifier.judge.ask import JudgeOptions

    template, options = (run.template, run.judging) if run else ({}, JudgeOptions())
    async with judge_of(judge, model, options) as judges:
        async with endpoint.open(model) as opened:
            with progress_bar(of_bytes=False) as progress:
                found = await own.measure(opened, made, *sizes, progress, template)
        return await own.pass_rates(made, found, judges)
