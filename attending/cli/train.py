"""The verbs that train; each is the same under torchrun."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attending.cli.build import DryRunOption, ResumeOption, SetOption
from attending.cli.terminal import JsonFlag, err, escape, out, print_json
from attending.mesh import world

if TYPE_CHECKING:
    from attending.train.watch import Progress as Told
    from attending.train.watch import Show

AcceptOption = Annotated[
    bool, typer.Option("--accept-changes", help="Resume although the recipe has changed.")
]


def pretrain(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe, or a .toml file.")],
    set_: SetOption = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Folder to write.")] = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    accept_changes: AcceptOption = False,
    as_json: JsonFlag = False,
) -> None:
    """Train a base model from token shards; the same under torchrun."""
    from attending.pretrain.recipe import PretrainConfig

    config = PretrainConfig.load(recipe, "pretrain", set_ or ())
    if dry_run:
        from attending.pretrain.estimate import estimate

        print_json({"recipe": config.model_dump(mode="json"), "takes": estimate(config)})
        return
    from attending.pretrain.loop import pretrain as run

    target = out_dir or Path("out") / f"pretrain-{Path(recipe).stem}"
    with _training_bar() as show:
        made = run(config, target, resume=resume, accept_changes=accept_changes, show=show)
    if world().rank:
        return
    if as_json:
        print_json(json.loads((made / "run.json").read_text("utf-8"))["metrics"])
        return
    out.print(str(made), markup=False)


@contextmanager
def _training_bar() -> Iterator["Show"]:
    """Steps, loss, tokens a second, share of the matrix ceiling, time left; rank 0 draws them."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from attending.train.watch import Notes

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
        TextColumn("{task.fields[share]:.0%} of the matrix ceiling, {task.fields[left]} left"),
    )
    bar = Progress(*columns, console=err, disable=world().rank > 0)
    try:
        task = bar.add_task("", total=None, loss=0.0, speed=0.0, share=0.0, left="?")

        def show(told: "Told | Notes") -> None:
            if isinstance(told, Notes):
                for line in told.lines:
                    bar.console.print(f"[dim]step {told.step}: {escape(line)}[/]")
                return
            left = str(timedelta(seconds=round(told.seconds_left)))
            bar.start()  # not before there is something to show: an error may come first
            bar.update(
                task,
                completed=told.step,
                total=told.num_steps,
                loss=told.loss,
                speed=told.tokens_per_second,
                share=told.ceiling_share,
                left=left,
            )

        yield show
    finally:
        bar.stop()
