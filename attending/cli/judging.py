"""`attending judge`: train the judge that needs no endpoint, and say how good it is."""

from pathlib import Path
from typing import Annotated, Any

import typer

from attending.cli.terminal import JsonFlag, err, escape, print_json, print_table, progress_bar

app = typer.Typer(help="The embedded judge: does an answer meet a criterion?")
KqaArgument = Annotated[Path, typer.Argument(help="K-QA's 201 questions with statements, .jsonl.")]


@app.command()
def train(
    kqa: KqaArgument,
    medquad: Annotated[Path, typer.Argument(help="MedQuAD's questions and answers, .jsonl.")],
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a TOML file.")] = "embedded",
    change: Annotated[list[str] | None, typer.Option("--set", help="A value: a.b=c.")] = None,
    to: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("out/judge"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a stopped run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe and end.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train on constructed labels, then measure on questions that were never seen."""
    from attending.verifier.judge.recipe import JudgeConfig

    config = JudgeConfig.load(recipe, "judge", change or [])
    if dry_run:
        print_json(config.model_dump(mode="json"))
        return
    from attending import sources
    from attending.verifier.judge import training
    from attending.verifier.judge.encoder import load_bert

    bert = load_bert(sources.resolve("judge").path)
    with progress_bar(of_bytes=False) as progress:
        result = training.run(config, bert, (kqa, medquad), to, progress, resume=resume)
    _show(result, as_json)


@app.command()
def report(kqa: KqaArgument, as_json: JsonFlag = False) -> None:
    """The shipped judge's agreement with constructed labels on K-QA's 60 report questions."""
    from attending.verifier.judge import training
    from attending.verifier.judge.embedded import EmbeddedJudge

    judge = EmbeddedJudge()
    _show(training.report(judge.bert, judge.weights, kqa), as_json)
    err.print(f"[dim]{escape(judge.caution)}[/]")


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    judges = [
        name for name, figures in result.items() if name not in ("labels", "questions", "pairs")
    ]
    rows = [
        [name, *(_cell(result[judge].get(name)) for judge in judges)] for name in result[judges[0]]
    ]
    print_table(["constructed labels", *judges], rows)


def _cell(figure: list[float] | None) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*figure) if figure else ""
