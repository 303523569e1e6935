"""The verbs that use and operate: chat, serve, pull, plan, doctor, report."""

import dataclasses
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attending import load
from attending.cli.terminal import (
    UNPRINTABLE,
    JsonFlag,
    err,
    escape,
    out,
    print_json,
    print_table,
    progress_bar,
)
from attending.errors import AttendingError, UsageError

if TYPE_CHECKING:
    from attending.engine.local import Answer, Model, Stream
    from attending.gateway.serve import Announcement
    from attending.model.architecture import Architecture

ThreadsOption = Annotated[int | None, typer.Option(help="Of the CPU; all by default.")]
WeightsOption = Annotated[
    str | None,
    typer.Option(help="stored, w8, w4-32, w4-64, w4-128; w8s, w4s-32 ... for symmetric."),
]
ActivationsOption = Annotated[str | None, typer.Option(help="int8 or float32.")]
KvOption = Annotated[str | None, typer.Option("--kv", help="Of the cache: float16 or int8.")]
DraftOption = Annotated[
    str | None, typer.Option(help="A draft's source; by default one that is shipped for the model.")
]
NoDraftFlag = Annotated[bool, typer.Option("--no-draft", help="Write token by token.")]
DtypeOption = Annotated[str | None, typer.Option(help="By torch: float32, bfloat16 or float16.")]
CAUTION = "Its answers may be wrong. It is not a medical device and must not guide care."


def chat(
    message: Annotated[
        str | None, typer.Argument(help="Ask once; `-` reads it from a pipe.")
    ] = None,
    model: Annotated[str, typer.Option("-m", "--model", help="A source.")] = "default",
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0: the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep tokens up to this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep this many tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop below this share of the top.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: repeat less.")] = None,
    seed: Annotated[int | None, typer.Option(help="For the same answer again.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A text that ends the answer.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Most tokens of an answer: 1024, or all for one that reasons."),
    ] = None,
    context: Annotated[int | None, typer.Option(help="Room for fewer tokens in all.")] = None,
    weights: WeightsOption = None,
    activations: ActivationsOption = None,
    kv: KvOption = None,
    threads: ThreadsOption = None,
    dtype: DtypeOption = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    draft: DraftOption = None,
    no_draft: NoDraftFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Ask a question, or talk: without a message, a conversation begins.

    Tokens are chosen by the model's own generation settings where it has them, else at
    Baichuan-M2's temperature of 0.6; the options override both.
    """
    given: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop,
        "max_tokens": max_tokens,
    }
    sampling = {name: value for name, value in given.items() if value is not None}
    if message == "-":
        message = sys.stdin.read()
    if message is None and as_json:
        raise UsageError("--json needs a message: attending chat --json 'question'")
    if message is not None and not message.strip():
        raise UsageError("the message is empty; give a question.")
    from attending.engine.sampler import Sampling

    Sampling.build(sampling)  # a wrong option should not wait for the model to load
    native = {"weights": weights, "activations": activations, "kv": kv}
    native |= {"draft": chosen_draft(draft, no_draft=no_draft)}
    assistant = load(model, dtype=dtype, device=device, threads=threads, **native)
    if context is not None:
        assistant.limit_context(context)
    if not assistant.tokenizer.reasons:  # thoughts that are cut off leave no answer
        sampling.setdefault("max_tokens", 1024)
    err.print(
        f"[dim]{escape(assistant.origin.name)}: {escape(assistant.origin.note or CAUTION)}[/]"
    )
    history = [{"role": "system", "content": system}] if system else []
    if message is None:
        _converse(assistant, history, sampling)
        return
    history.append({"role": "user", "content": message})
    if as_json:
        answer = assistant.chat(history, **sampling)
        origin = {"model": assistant.origin.name, "note": assistant.origin.note or CAUTION}
        print_json(origin | dataclasses.asdict(answer))
        return
    _speak(assistant.stream(history, **sampling))


def serve(
    model: Annotated[str, typer.Argument(help="A source that has been pulled.")] = "default",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name under which clients reach this server.")
    ] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file: speak https.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of its key.")] = None,
    upstream: Annotated[
        str | None, typer.Option(help="Guard this OpenAI-compatible server: http://HOST:PORT/v1.")
    ] = None,
    upstream_key_variable: Annotated[
        str | None, typer.Option(help="Environment variable with the upstream's key.")
    ] = None,
    context: Annotated[int | None, typer.Option(help="Fewer tokens than the model allows.")] = None,
    cache_tokens: Annotated[int | None, typer.Option(help="Room for all answers' tokens.")] = None,
    max_running: Annotated[int | None, typer.Option(help="Answers written at once.")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Requests that may queue.")] = None,
    weights: WeightsOption = None,
    activations: ActivationsOption = None,
    kv: KvOption = None,
    dtype: DtypeOption = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps.")] = None,
    threads: ThreadsOption = None,
    draft: DraftOption = None,
    no_draft: NoDraftFlag = False,
    drain_seconds: Annotated[float, typer.Option(help="Wait for answers at the end.")] = 30.0,
    new_key: Annotated[str | None, typer.Option(help="Make a key of this name, and end.")] = None,
    revoke_key: Annotated[str | None, typer.Option(help="Remove a key, and end.")] = None,
    list_keys: Annotated[bool, typer.Option("--list-keys", help="Names only, and end.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Serve a private assistant: chat page and OpenAI-compatible API, behind keys.

    Nothing leaves this machine, unless --upstream names another. A key is made at the first start
    and shown once.
    """
    if new_key is not None or revoke_key is not None or list_keys:
        _manage_keys(new_key, revoke_key, as_json=as_json)
        return
    import asyncio

    from attending import endpoint
    from attending.gateway.serve import ServeOptions
    from attending.gateway.serve import serve as run

    engine: dict[str, Any] = {"context": context, "cache_tokens": cache_tokens}
    engine |= {"max_running": max_running, "max_waiting": max_waiting}
    engine |= {"weights": weights, "activations": activations, "kv": kv}
    engine |= {"dtype": dtype, "device": device, "threads": threads}
    engine["draft"] = chosen_draft(draft, no_draft=no_draft)
    options = ServeOptions.build(
        {
            "model": model,
            "upstream": upstream,
            "upstream_key_variable": upstream_key_variable,
            "host": host,
            "port": port,
            "allow_hosts": allow_host or [],
            "drain_seconds": drain_seconds,
            "tls_certificate": tls_certificate,
            "tls_key": tls_key,
            "engine": {name: value for name, value in engine.items() if value is not None},
        },
        where="attending serve",
    )

    announce = partial(_announce, as_json=as_json)
    asyncio.run(run(options, announce, endpoint.EngineProcess))


def pull(
    source: Annotated[str, typer.Argument(help="As hf:org/name, https://..., or a name.")],
    as_json: JsonFlag = False,
) -> None:
    """Download a model or data set, verify it and keep it in the cache."""
    from attending import sources

    with progress_bar() as progress:
        found = sources.pull(source, progress=progress)
    if as_json:
        print_json({**dataclasses.asdict(found), "path": str(found.path)})
        return
    licence = f"Licence: {found.licence}. " if found.licence else ""
    err.print(f"{escape(found.name)} is ready. {escape(licence + found.note)}")
    out.print(str(found.path), markup=False)


def plan(
    model: Annotated[str, typer.Argument(help="A source, or a config.json.")],
    card: Annotated[str, typer.Option(help="A card's name, a size such as 24GiB, or cpu.")],
    as_json: JsonFlag = False,
) -> None:
    """Say what fits on a card: weights, cache, activations, and the longest context."""
    from attending.engine import plan as planning

    result = planning.plan(_architecture(model), planning.load_card(card))
    if as_json:
        print_json(result.to_json())
        return
    print_table(*planning.table(result))
    out.print(planning.explain(result), markup=False)


def doctor(
    model: Annotated[str | None, typer.Argument(help="Also say how fast this could run.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Look at this machine: versions, threads, instruction sets, memory, and what would be slow."""
    from attending import sources
    from attending.engine import doctor as examination

    arch = _architecture(model) if model else None
    report = examination.examine(arch, sources.cache_dir())
    if as_json:
        print_json(report.to_json())
        return
    print_table(*examination.table(report))
    for finding in report.findings:
        out.print(f"{finding.level:>8}  {finding.text}", markup=False)


def report(
    folders: Annotated[
        list[Path], typer.Argument(help="A run's folder; of evaluations several, to compare.")
    ],
    to: Annotated[
        Path | None, typer.Option("--out", help="Folder of a comparison; default: out/comparison.")
    ] = None,
) -> None:
    """Draw a run's metrics as one HTML page, or several evaluations side by side."""
    if len(folders) > 1:
        from attending.cli.evaluating import print_pairs
        from attending.evaluate.compare import combine

        target = to or Path("out/comparison")
        print_pairs(combine(folders, target))
        page = target / "report.html"
    elif (folders[0] / "report.json").is_file():
        from attending.evaluate.page import write_page

        page = write_page(folders[0])
    else:
        from attending.report import write_report

        page = write_report(folders[0])
    out.print(str(page), markup=False)


def _announce(told: "Announcement", *, as_json: bool) -> None:
    """What a person must know once the server is ready."""
    if as_json:
        print_json(dataclasses.asdict(told))
        return
    for warning in told.warnings:
        err.print(f"[bold yellow]warning:[/] {escape(warning)}")
    err.print(f"[dim]{escape(told.model)}: {escape(told.note or CAUTION)}[/]")
    if told.new_key:
        err.print("API key, shown this once:")
        out.print(told.new_key, markup=False)
    err.print("[dim]attending serve --new-key NAME makes another key.[/]")
    err.print(f"API: {escape(told.url)}/v1   Ctrl-C ends.")
    err.print("Chat page; this address signs in once:")
    out.print(told.sign_in_url, markup=False)


def chosen_draft(draft: str | None, *, no_draft: bool) -> str | None:
    """What `ComputeOptions.draft` takes; a UsageError where both options are given."""
    if draft is not None and no_draft:
        raise UsageError(f"--draft {draft} and --no-draft: give one of them.")
    return "none" if no_draft else draft


def _architecture(model: str) -> "Architecture":
    """Of a model whose configuration is shipped, or which has been pulled."""
    from attending import sources
    from attending.model.architecture import parse_config
    from attending.model.files import read_config

    known = sources.shipped_config(model)
    return parse_config(known) if known else read_config(sources.resolve(model).path)


def _manage_keys(new: str | None, revoked: str | None, *, as_json: bool) -> None:
    from attending.gateway.keys import Keys

    keys = Keys()
    key = None if new is None else keys.add(new)
    if revoked is not None:
        keys.revoke(revoked)
    if as_json:
        names = [{"name": record.name, "created": record.created} for record in keys]
        print_json({"new_key": key, "keys": names})
        return
    if key:
        out.print(key, markup=False)
        err.print("[dim]Shown this once; a running server knows it already.[/]")
    for record in keys:
        err.print(escape(f"{record.created}  {record.name}"))


def _converse(assistant: "Model", history: list[dict[str, str]], sampling: dict[str, Any]) -> None:
    """Read, answer, remember; nothing said here is written to a disk."""
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys at the prompt)
    err.print(
        "[dim]/reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer.[/]"
    )
    beginning = list(history)
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            err.print()
            return
        except KeyboardInterrupt:
            err.print("[dim](Ctrl-D ends)[/]")
            continue
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            history[:] = beginning
            err.print("[dim]forgotten[/]")
        elif line:
            _turn(assistant, history, line, sampling)


def _turn(
    assistant: "Model", history: list[dict[str, str]], line: str, sampling: dict[str, Any]
) -> None:
    """One question and its answer; a question that cannot be asked is not remembered."""
    question = {"role": "user", "content": line}
    try:
        answer = _speak(assistant.stream([*history, question], **sampling))
    except AttendingError as error:
        err.print(f"[bold red]error:[/] {escape(error)}")
        return
    history += [question, {"role": "assistant", "content": answer.text}]


def _speak(stream: "Stream") -> "Answer":
    """Print an answer as it is written; Ctrl-C ends it and keeps what was said."""
    if stream.messages_left_out:
        err.print(f"[dim]the oldest {stream.messages_left_out} messages no longer fit: left out[/]")
    start = time.monotonic()
    with suppress(KeyboardInterrupt):
        for piece in stream:
            style = "dim" if piece.kind == "reasoning" else None
            out.out(UNPRINTABLE.sub("", piece.text), end="", style=style, highlight=False)
            out.file.flush()
    out.print()
    answer = stream.answer
    seconds = time.monotonic() - start
    ending = {"length": f", cut at {answer.output_tokens}", "cancelled": ", stopped", "stop": ""}
    rate = answer.output_tokens / seconds if seconds else 0.0
    err.print(
        f"[dim]{answer.output_tokens} tokens, {rate:.1f}/s, seed {answer.seed}"
        f"{ending[answer.finish_reason]}[/]"
    )
    return answer
