"""The verbs that prepare text: corpus and tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attending.cli.terminal import JsonFlag, err, escape, out, print_json, print_table, progress_bar
from attending.errors import UsageError

if TYPE_CHECKING:
    from attending.corpus.run import Progress

SetOption = Annotated[list[str] | None, typer.Option("--set", help="Change a value: a.b=value.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with a stopped run.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what it takes.")]


def corpus(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe, or a .toml file.")],
    set_: SetOption = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder to write.")] = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Leave the documents between the stages.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Turn raw text into clean, de-identified, deduplicated, packed token shards."""
    from attending.corpus.recipe import CorpusConfig

    config = CorpusConfig.load(recipe, "corpus", set_ or ())
    from attending.corpus import run

    if dry_run:
        print_json({"recipe": config.model_dump(mode="json"), "takes": run.estimate(config)})
        return
    target = out_dir or Path("out") / f"corpus-{Path(recipe).stem}"
    try:
        with _stage_bar() as progress:
            result = run.build(
                config, target, resume=resume, keep_work=keep_work, progress=progress
            )
    except KeyboardInterrupt:
        raise UsageError("stopped; the same command with --resume goes on.") from None
    if as_json:
        print_json({**result._asdict(), "out": str(result.out) if result.out else None})
        return
    if result.out is None:
        err.print("The jobs are submitted. When they have ended, --resume finishes the corpus.")
        return
    for part, tokens in result.tokens.items():
        err.print(f"{escape(part)}: {tokens:,} tokens, {result.documents[part]:,} documents")
    err.print(f"What was removed, and why: {escape(result.out / 'report.html')}")
    out.print(str(result.out), markup=False)


def tokenizer(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe, or a .toml file.")],
    set_: SetOption = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder to write.")] = None,
    dry_run: DryRunOption = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a vocabulary on clean text; measure it beside others."""
    from attending.tokenizer.recipe import TokenizerConfig

    config = TokenizerConfig.load(recipe, "tokenizer", set_ or ())
    from attending.tokenizer.train import estimate, train

    if dry_run:
        print_json({"recipe": config.model_dump(mode="json"), "takes": estimate(config)})
        return
    target = out_dir or Path("out") / f"tokenizer-{Path(recipe).stem}"
    with progress_bar() as progress:
        result = train(config, target, progress)
    if as_json:
        print_json({**result._asdict(), "out": str(result.out)})
        return
    for note in result.notes:
        err.print(f"note: {escape(note)}")
    head = ["sample", "tokenizer", *(f"tokens/{unit}" for unit in ("byte", "character", "word"))]
    rows = [list(row.values()) for row in result.fertility]
    shown = [[f"{v:.3f}" if isinstance(v, float) else str(v or "-") for v in row] for row in rows]
    print_table(head, shown, to=err)
    err.print(f"{config.vocab_size:,} tokens of {result.num_bytes:,} bytes of text")
    out.print(str(result.out), markup=False)


@contextmanager
def _stage_bar() -> Iterator["Progress"]:
    """A bar a stage: documents, their rate, time left."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[documents]:>11,} documents {task.fields[rate]:>8,.0f}/s"),
        TimeElapsedColumn(),
        TimeLeft(),
    )
    with Progress(*columns, console=err) as bar:
        tasks = {}

        def show(stage: str, done: float, documents: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=1.0, documents=0, rate=0.0)
            task = bar.tasks[tasks[stage]]
            rate = documents / task.elapsed if task.elapsed else 0.0
            bar.update(task.id, completed=done, documents=documents, rate=rate)

        yield show
