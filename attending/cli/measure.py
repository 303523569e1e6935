"""The verb that measures: bench."""

from typing import Annotated, Any

import typer

from attending.cli.terminal import JsonFlag, out, print_json, print_table, progress_bar
from attending.cli.use import (
    ActivationsOption,
    DraftOption,
    KvOption,
    NoDraftFlag,
    ThreadsOption,
    WeightsOption,
    chosen_draft,
)
from attending.errors import UsageError


def bench(
    model: Annotated[str, typer.Argument(help="A source that has been pulled.")] = "default",
    batch: Annotated[str, typer.Option(help="Users at once; several sizes as 1,8.")] = "1,8",
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt that is read.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    repeats: Annotated[int, typer.Option(help="Of every measurement, taking turns.")] = 5,
    draft: DraftOption = None,
    no_draft: NoDraftFlag = False,
    threads: ThreadsOption = None,
    weights: WeightsOption = None,
    activations: ActivationsOption = None,
    kv: KvOption = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Measure a model here: prefill, decode, cold start, memory, beside the machine's ceilings.

    Medians with the spread. Prompts are random tokens and nothing ends an answer early.
    """
    try:
        sizes = tuple(int(size) for size in batch.split(","))
    except ValueError:
        raise UsageError(f"--batch {batch!r}: expected sizes as 1 or 1,8.") from None
    from attending.engine import bench as benching

    work = benching.Work(sizes, prompt, tokens, repeats)
    given: dict[str, Any] = {"weights": weights, "activations": activations, "kv": kv}
    given |= {"dtype": dtype, "device": device, "threads": threads}
    given["draft"] = chosen_draft(draft, no_draft=no_draft)
    options = {name: value for name, value in given.items() if value is not None}
    with progress_bar(of_bytes=False) as progress:
        report = benching.bench(model, work, options=options, progress=progress)
    if as_json:
        print_json(report.to_json())
        return
    print_table(*report.table())
    computed = ", ".join(f"{name} {what}" for name, what in report.path.items())
    out.print(f"{report.model}: {computed}; {report.threads} threads; {report.date}", markup=False)
