"""The default model here and in its peers: prefill, decode, cold start and memory, in turns.

    python benchmarks/peers.py FOLDER [--repeats 3] [--only WORD ...] [--llama-server PROGRAM]
        [--vllm PYTHON] [--ours 'NAME=MODEL OPTIONS' ...] [--perplexity TEXT] [--trial]

FOLDER keeps the peers' environments and converted models; what is there is used again (the first
time: ten minutes and 3 GB). `--ours` names our rows and what follows `attending bench` in each;
`--trial` runs a few tokens of everything, writes no page. Budget: about half
a minute a row and repeat, so ten rows three times are a quarter of an hour. One process measures
at a time; nothing else should run.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from shutil import which
from typing import Any, NamedTuple

import variants
from page import Measure, write

import attending
from attending import sources
from attending.engine.bench import Work, decode_prompts, token_ids
from attending.model.files import gguf_in

PEERS = Path(__file__).parent / "peers"
USERS = (1, 8)
QUANTITIES = {
    "prefill of 512, tokens/s": "prefill_tok_s",
    "decode, 1 user, tokens/s": "decode_1_tok_s",
    "decode, 8 users, tokens/s": "decode_8_tok_s",
    "sampled, 8 users, tokens/s": "sampled_8_tok_s",
    "cold first token, s": "ttft_s",
    "peak memory, MiB": "peak_mib",
}
# None installs torch but the one that needs it to run; it converts for the others.
ENVIRONMENTS = {
    "openvino": ["openvino-genai==2026.4.1"],
    "onnxruntime": ["onnxruntime-genai==0.18.0"],
    "ctranslate2": ["ctranslate2==4.8.5"],
    "transformers": [
        "torch==2.13.0",
        "transformers==5.23.0",
        "accelerate",
        "onnx",
        "onnx-ir",
        "onnxruntime-genai==0.18.0",
        "ctranslate2==4.8.5",
    ],
}
NOTES = """
SmolLM2-135M-Instruct, the default model, whose only weights are a Q4_1 GGUF: all others are made
from it. {threads} threads everywhere, the same random token ids, lengths and clock in every engine;
nothing ends an answer early, and no prompt is found in a cache. *Prefill* is one prompt of 512
tokens to its first token. *Decode* is 128 tokens after prompts of 128, of all users together, the
prompts' time left out, at temperature 0; *sampled* is the same at temperature 0.7 and top-p 0.9.
*Cold first token* runs from the start of a process to the first token of a prompt of 16, with the
files in the system's cache. *Peak memory* is VmHWM of that process after all this work. Every row
is one fresh process a repeat; the rows take turns. A ratio is {first} over that row, of the repeats
that ran side by side: above 1 we are faster, and for the last two columns slower or larger.

What computes a row, with its version:

{paths}

Perplexity of the paths: {perplexity}
"""


class Subject(NamedTuple):
    """A row: how its process is started."""

    name: str
    environment: str
    script: str
    model: Path
    variant: str = ""


def main() -> None:
    given = arguments()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    work = Work(USERS, 16, 8, 1) if given.trial else Work(USERS, 512, 128, 1)
    ours = dict(row.split("=", 1) for row in given.ours)
    told: dict[str, dict[str, Any]] = {}
    values: dict[tuple[str, str], list[float]] = {}
    missing: dict[str, str] = {}
    subjects = []
    for subject, prepare in peers(folder, given):
        if given.only and not any(word in subject.name for word in given.only):
            continue
        try:
            if subject.environment in ENVIRONMENTS:
                environment(folder, subject.environment)
            prepare()
            subjects.append(subject)
        except OSError as error:
            missing[subject.name] = str(error)
    for repeat in range(given.repeats):
        file = folder / "work.json"
        file.write_text(json.dumps(instructions(work, given.threads, repeat)))
        runs = {name: partial(our_run, work, given.threads, ours[name]) for name in ours}
        runs |= {one.name: partial(their_run, folder, file, one) for one in subjects}
        for name, run in runs.items():
            if name in missing:
                continue
            try:
                told[name] = run()
            except (OSError, RuntimeError) as error:
                missing[name] = str(error)
                continue
            print(json.dumps({"repeat": repeat, "row": name} | told[name]), flush=True)
            for quantity, key in QUANTITIES.items():
                values.setdefault((quantity, name), []).append(told[name][key])
    for name, reason in missing.items():
        print(f"{name}: {reason}", file=sys.stderr)
    if given.trial:
        return
    rows = [Measure(q, name, v) for (q, name), v in values.items() if name not in missing]
    paths = [f"- {name}: {one['path']} ({one['version']})" for name, one in told.items()]
    paths += [f"- {name}: {reason}" for name, reason in missing.items()]
    words = {"threads": given.threads, "perplexity": given.perplexity, "first": next(iter(ours))}
    notes = NOTES.format(**words, paths="\n".join(paths))
    title = "The default model beside its peers"
    print(write("peers", title, notes, rows, rows_are_subjects=True).read_text("utf-8"))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="words of the peers' names")
    parser.add_argument("--ours", nargs="*", default=["attending=default"])
    parser.add_argument("--llama-server", default="llama-server")
    parser.add_argument("--vllm", default="", help="the python of an environment with vLLM")
    parser.add_argument(
        "--perplexity", default="not measured here.", help="a sentence for the page"
    )
    parser.add_argument("--trial", action="store_true")
    return parser.parse_args()


def peers(folder: Path, given: argparse.Namespace) -> Iterator[tuple[Subject, partial[None]]]:
    """Every peer's row, and what makes its environment and model."""
    stored = gguf_in(sources.resolve("default").path)
    assert stored
    saved = folder / "model"
    for kind in ("Q4_1", "Q4_0", "Q8_0"):
        file = stored if kind == "Q4_1" else folder / f"{kind}.gguf"
        for variant, name in (("", "OpenVINO GenAI"), ("batching", "OpenVINO GenAI batching")):
            if variant and kind == "Q4_0":
                continue
            subject = Subject(f"{name} {kind}", "openvino", "run_openvino.py", file, variant)
            yield subject, partial(make_gguf, stored, file, kind)
    for bits in ("int4", "int8"):
        target = folder / f"onnx-{bits}"
        command = ["-m", "onnxruntime_genai.models.builder", "-m", str(saved), "-o", str(target)]
        command += ["-p", bits, "-e", "cpu", "-c", str(folder / "onnx-cache")]
        subject = Subject(f"ORT GenAI {bits}", "onnxruntime", "run_onnxruntime.py", target)
        yield subject, partial(convert, folder, saved, target, command)
    target = folder / "ct2-int8"
    command = ["-m", "ctranslate2.converters.transformers", "--model", str(saved)]
    command += ["--output_dir", str(target), "--quantization", "int8"]
    subject = Subject("CTranslate2 int8", "ctranslate2", "run_ctranslate2.py", target, "int8")
    yield subject, partial(convert, folder, saved, target, command)
    subject = Subject("transformers float32", "transformers", "run_transformers.py", saved)
    yield subject, partial(convert, folder, saved, saved, [])
    for kind in ("Q4_1", "Q4_0", "Q8_0"):
        file = stored if kind == "Q4_1" else folder / f"{kind}.gguf"
        subject = Subject(f"llama.cpp {kind}", "", "run_llama.py", file, given.llama_server)
        yield subject, partial(llama_there, given.llama_server, stored, file, kind)
    subject = Subject("vLLM", given.vllm, "run_vllm.py", saved, "bfloat16")
    yield subject, partial(vllm_there, given.vllm, folder, saved)


def make_gguf(stored: Path, file: Path, kind: str) -> None:
    if not file.exists():
        variants.write(stored, file, kind)


def llama_there(program: str, stored: Path, file: Path, kind: str) -> None:
    if which(program) is None:
        raise OSError("not installed")
    make_gguf(stored, file, kind)


def vllm_there(python: str, folder: Path, saved: Path) -> None:
    if not python:
        raise OSError("not installed")
    convert(folder, saved, saved, [])


def convert(folder: Path, saved: Path, target: Path, command: Sequence[str]) -> None:
    """Save the model as a Hugging Face folder, then let the peer's own tool convert it."""
    if not saved.exists():
        attending.load("default").save(saved)
    if not target.exists():
        run([str(environment(folder, "transformers")), *command])


def environment(folder: Path, name: str) -> Path:
    """The python of a virtual environment, made at first."""
    python = folder / name / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", str(folder / name)])
        run([str(python), "-m", "pip", "install", "-q", *ENVIRONMENTS[name]])
    return python


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise OSError(done.stderr.strip().rpartition("\n")[2])


def instructions(work: Work, threads: int, repeat: int) -> dict[str, Any]:
    """What `peers/measuring.py` reads: the prompts themselves, as `attending bench` has them."""
    vocab = attending.load("default").arch.vocab_size
    told: dict[str, Any] = {"threads": threads, "answer_tokens": work.answer_tokens}
    told["cold"] = [token_ids(vocab, 16, 0)]
    told["warm"] = [
        token_ids(vocab, work.decode_prompt, 1 << 20, user) for user in range(USERS[-1])
    ]
    told["prefill"] = [token_ids(vocab, work.prompt_tokens, repeat)]
    for name, users in (("decode", USERS), ("sampled", USERS[1:])):
        told[name] = {
            n: [decode_prompts(vocab, work, seed, n, name) for seed in (1000 + repeat, repeat)]
            for n in users
        }
    return told


def our_run(work: Work, threads: int, words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "attending.cli", "bench", *shlex.split(words), "--json"]
    command += [] if "--draft" in words else ["--no-draft"]  # drafts are compared in draft.py
    command += ["--batch", ",".join(map(str, work.batch)), "--prompt", str(work.prompt_tokens)]
    command += ["--tokens", str(work.answer_tokens), "--repeats", "1", "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2])
    report = json.loads(done.stdout)
    found = {name: report[name]["median"] for name in ("prefill_tok_s", "ttft_s", "peak_mib")}
    for users in USERS:
        found[f"decode_{users}_tok_s"] = report["decode_tok_s"][str(users)]["median"]
        found[f"sampled_{users}_tok_s"] = report["sampled_tok_s"][str(users)]["median"]
    path = ", ".join(f"{name} {what}" for name, what in report["path"].items())
    return found | {"path": path, "version": f"attending {report['versions']['attending']}"}


def their_run(folder: Path, work: Path, subject: Subject) -> dict[str, Any]:
    python = Path(subject.environment or sys.executable)
    if subject.environment in ENVIRONMENTS:
        python = environment(folder, subject.environment)
    command = [python, PEERS / subject.script, work, subject.model, subject.variant]
    start = time.perf_counter()
    with (folder / "stderr.txt").open("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout
        seconds, last = 0.0, ""
        for line in process.stdout:  # some engines write lines of their own between
            if line == "first token\n":
                seconds = time.perf_counter() - start
            last = line if line.startswith("{") else last
        if process.wait() or not last:
            errors.seek(0)
            raise RuntimeError(errors.read().strip().rpartition("\n")[2])
    return json.loads(last) | {"ttft_s": seconds}


if __name__ == "__main__":
    main()
