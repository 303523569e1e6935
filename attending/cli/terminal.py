"""What every verb shares: two consoles, tables, JSON, a progress bar, the answer to an error.

Standard output carries the result alone; notes, progress and errors go to standard error.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

if TYPE_CHECKING:
    from attending.sources import Progress

# What a model writes must not move the cursor or rewrite the screen.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@contextmanager
def progress_bar(*, of_bytes: bool = True) -> Iterator["Progress"]:
    """A bar with time left, and for bytes the rate, on standard error."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        *([DownloadColumn(), TransferSpeedColumn()] if of_bytes else [MofNCompleteColumn()]),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as bar:
        tasks: dict[str, Any] = {}

        def show(done: int, total: int | None, what: str) -> None:
            if not done and total is None:
                bar.console.print(f"[dim]{escape(what)}[/]")
                return
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show


def print_table(headers: list[str], rows: list[list[str]], to: Console = out) -> None:
    """Columns without a frame; numbers stand to the right where there are several."""
    table = Table(box=None, pad_edge=False)
    for index, header in enumerate(headers):
        table.add_column(
            header, justify="right" if index and len(headers) > 2 else "left", no_wrap=True
        )
    for row in rows:
        table.add_row(*row)
    to.print(table)


def print_json(values: object) -> None:
    """As people read it."""
    out.out(json.dumps(values, indent=2, ensure_ascii=False), highlight=False)


def escape(text: object) -> str:
    """As plain text of rich's markup."""
    return escape_markup(str(text))
