"""The command line: one function a verb, and the only place that prints.

Rooms are imported inside the verbs, so `--help` answers at once and needs no torch.
"""

import os
import sys
from typing import Annotated

import typer

from attending import __version__, logs
from attending.cli import (
    build,
    compress,
    evaluating,
    interview,
    judging,
    measure,
    practice,
    privacy,
    train,
    use,
)
from attending.cli.terminal import err, escape, out
from attending.errors import AttendingError, UsageError
from attending.mesh import SHORT_SPIN

EXTRAS = "pip install -e '.[train,corpus,verify]' in the clone"

app = typer.Typer(
    help="The open medical language model, from raw text to a private assistant.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (
    use.chat,
    use.serve,
    use.pull,
    use.plan,
    use.doctor,
    measure.bench,
    use.report,
    interview.consult,
    build.corpus,
    build.tokenizer,
    train.pretrain,
    train.midtrain,
    train.sft,
    train.prefer,
    practice.cases,
    train.rl,
    compress.quantize,
    train.draft,
):
    app.command()(verb)
app.command("eval")(evaluating.evaluate)
app.command()(evaluating.rejection)
app.add_typer(privacy.app, name="phi")
app.add_typer(judging.app, name="judge")


def main() -> None:
    """Run the command line; user errors print without a traceback."""
    os.environ.update(SHORT_SPIN | dict(os.environ))
    try:
        app()
    except AttendingError as error:
        if "--debug" in sys.argv:
            raise
        err.print(f"[bold red]error:[/] {escape(error)}")
        sys.exit(error.exit_code)
    except ModuleNotFoundError as error:
        if "--debug" in sys.argv or str(error.name).startswith(__package__.split(".")[0]):
            raise
        what = f"{error.name} is not installed: {EXTRAS} has what most verbs need"
        err.print(f"[bold red]error:[/] {escape(what)}")
        sys.exit(UsageError.exit_code)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show log lines and tracebacks.")] = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="Log lines as JSON.")] = False,
) -> None:
    """Options of every verb."""
    logs.setup(debug=debug, as_json=log_json)
    if version:
        out.print(__version__)
        raise typer.Exit
