"""`attending phi`: find identifiers, replace them, train the tagger."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from attending.cli.terminal import JsonFlag, err, escape, out, print_json, progress_bar
from attending.errors import UsageError

if TYPE_CHECKING:
    from attending.phi import Policy, Span

app = typer.Typer(help="Find and replace identifiers of persons, English and Chinese.")

FileArgument = Annotated[str, typer.Argument(help="A text file, or a .jsonl; `-` reads a pipe.")]
FieldOption = Annotated[
    str | None, typer.Option(help="Of JSON records, the one field that is read; default: text.")
]
RecordsFlag = Annotated[
    bool, typer.Option("--records", help="Each line is a JSON record, as in a .jsonl.")
]
CAUTION = (
    "No filter finds everything: see benchmarks/phi.md for what leaks. A person must check before "
    "anything leaves."
)


@app.command()
def scan(
    file: FileArgument,
    field: FieldOption = None,
    records: RecordsFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Find identifiers: with --json one line of spans for every line of the file.

    Offsets count code points from the start of the line, or of the field of a .jsonl record.
    Context crosses the lines of a text, not the records of a .jsonl.
    """
    from attending.phi.scan import scan as scan_text
    from attending.phi.scan import scan_lines

    counts: dict[str, int] = {}
    with _open(file) as source:
        found: Iterator[list[Span]]
        if name := _field(file, field, records):
            found = (scan_text(text) for text, _ in _records(source, name))
        else:
            found = scan_lines(_lines(source, file))
        for spans in found:
            for span in spans:
                counts[span.category] = counts.get(span.category, 0) + 1
            if as_json:
                row = {"spans": [dataclasses.asdict(span) for span in spans]}
                sys.stdout.write(json.dumps(row) + "\n")
    if not as_json:
        for category, count in sorted(counts.items(), key=lambda item: -item[1]):
            out.print(f"{count:8,}  {category}")
        out.print(f"{sum(counts.values()):8,}  in all")
    err.print(f"[dim]{escape(CAUTION)}[/]")


@app.command()
def redact(
    file: FileArgument,
    field: FieldOption = None,
    records: RecordsFlag = False,
    to: Annotated[Path | None, typer.Option(help="Write here, and nothing if it fails.")] = None,
    action: Annotated[
        str, typer.Option(help="placeholder, mask, surrogate, hash or keep, for all categories.")
    ] = "placeholder",
    category: Annotated[
        list[str] | None, typer.Option(help="CATEGORY=ACTION for one; dates also `shift`.")
    ] = None,
    key_variable: Annotated[
        str | None, typer.Option(help="Environment variable with the secret key.")
    ] = None,
    patient: Annotated[str, typer.Option(help="Whose dates are shifted together.")] = "",
    patient_field: Annotated[
        str | None,
        typer.Option(help="The same, of JSON records: the field that names the patient."),
    ] = None,
    second_pass: Annotated[
        bool, typer.Option("--second-pass", help="Hide known names' other mentions too.")
    ] = False,
) -> None:
    """Write a text without its identifiers.

    Without --to, text goes to standard output as it is decided; with --second-pass a text is read
    whole first. Of JSON records only one field is redacted: the others stay as they are.
    """
    from attending.phi import Stream
    from attending.phi import redact as redact_text

    name = _field(file, field, records)
    if patient_field and not name:
        raise UsageError("--patient-field needs JSON records: a .jsonl, or --records.")
    policy = _policy(action, category or [], key_variable, patient or patient_field or "")
    if to and (to.exists() or not to.parent.is_dir()):
        what = "exists" if to.exists() else "is in no folder that exists"
        raise UsageError(f"{to.name} {what}; choose another place for --to.")
    with ExitStack() as stack:
        source = stack.enter_context(_open(file))
        draft = to.with_name(to.name + ".tmp") if to else None
        target: IO[str] = sys.stdout
        if to and draft:
            target = stack.enter_context(draft.open("w", encoding="utf-8", newline=""))
            stack.callback(lambda: draft.unlink(missing_ok=True))
        if name:
            for text, record in _records(source, name):
                if patient_field and record:
                    policy = dataclasses.replace(policy, patient=_named(record, patient_field))
                if record:
                    record[name] = redact_text(text, policy, second_pass=second_pass)
                target.write(json.dumps(record, ensure_ascii=False) + "\n" if record else "\n")
        elif second_pass:
            target.write(redact_text("".join(_lines(source, file)), policy, second_pass=True))
        else:
            stream = Stream(policy)
            for line in _lines(source, file):
                target.write(stream.feed(line))
            target.write(stream.close())
        target.flush()
        if to and draft:
            draft.replace(to)
    err.print(f"[dim]{escape(CAUTION)}[/]")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, or a TOML file.")] = "tagger",
    to: Annotated[Path, typer.Option("--out", help="Folder for the weights.")] = Path("out/phi"),
    change: Annotated[list[str] | None, typer.Option("--set", help="A value: a.b=c.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe and end.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Train the tagger on notes that the project generates."""
    from attending.phi.recipe import PhiConfig

    config = PhiConfig.load(recipe, "phi", change or [])
    if dry_run:
        print_json(config.model_dump(mode="json"))
        return
    from attending.phi import training

    with progress_bar(of_bytes=False) as progress:
        metrics = training.run(config, to, progress)
    if as_json:
        print_json(metrics)
    else:
        out.print(str(to), markup=False)


def _policy(action: str, pairs: list[str], variable: str | None, patient: str) -> "Policy":
    from attending.phi import Policy
    from attending.phi.actions import key_from

    chosen = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UsageError(f"--category {pair!r} is not of the form CATEGORY=ACTION")
        chosen[name] = value
    key = key_from(variable) if variable else b""
    return Policy(action, chosen, key, patient)  # type: ignore[arg-type]  # it checks them itself


def _open(file: str) -> IO[bytes]:
    if file == "-":
        return sys.stdin.buffer
    path = Path(file)
    if not path.is_file():
        raise UsageError(
            f"{path.name or file} is no file; give a text file, a .jsonl, or - for a pipe."
        )
    if path.suffix == ".gz":
        raise UsageError(
            f"{path.name} is packed: give it as a pipe, gunzip -c FILE | ... phi scan -"
        )
    return path.open("rb")


def _lines(source: IO[bytes], file: str) -> Iterator[str]:
    """Lines, each with its line feed; long ones in parts."""
    import codecs

    decoder = codecs.getincrementaldecoder("utf-8")()
    read = waiting = 0
    try:
        while data := source.read(1 << 20):
            waiting = len(decoder.getstate()[0])
            yield decoder.decode(data)
            read += len(data)
        waiting = len(decoder.getstate()[0])
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at = read - waiting + error.start
        raise UsageError(
            f"{Path(file).name} is not UTF-8 at byte {at}: nothing after it was read. "
            "Convert it first, for example with iconv."
        ) from None


def _field(file: str, field: str | None, records: bool) -> str:
    """The field of JSON records that is read; nothing for a plain text."""
    if not records and not file.lower().endswith(".jsonl"):
        if field:
            raise UsageError("--field needs JSON records: a .jsonl, or --records.")
        return ""
    return field or "text"


def _records(source: IO[bytes], field: str) -> Iterator[tuple[str, dict[str, object]]]:
    """The field of every record, and the record; an empty line has neither."""
    for number, line in enumerate(source, 1):
        if not line.strip():
            yield "", {}
            continue
        try:
            record = json.loads(line)
        except ValueError:
            raise UsageError(f"line {number} is no JSON: expected a record a line.") from None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise UsageError(f"line {number} has no text {field!r}: choose it with --field.")
        yield record[field], record


def _named(record: dict[str, object], field: str) -> str:
    if not record.get(field):
        raise UsageError(
            f"a record has no {field!r}, which names the patient: nothing was shifted."
        )
    return str(record[field])
