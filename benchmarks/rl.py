"""The three stages of reinforcement learning on the default model, and what each is worth.

    python benchmarks/rl.py DATA_DIR WORK_DIR

makes cases, judges, models and answers in WORK_DIR, each once: what was stopped is gone on with,
what is there is kept. A seed or a stage that ended leaves its figures in rl/NAME.json, of which
rl.md and rl.svg are made, so that they can be run on several days. A line says beforehand what is
left to run takes. --help lists what shrinks it; `--set NAME=VALUE` goes to every run of
`attending rl`.
"""

import argparse
import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from page import HERE, kept
from rl_page import write

import attending as product
from attending import endpoint
from attending.artifact import digest
from attending.corpus.split import draw
from attending.logs import read_metrics
from attending.rl.cases import PLAIN, line_of, read_cases, write_rows
from attending.rl.fragments import tellable
from attending.rl.interviews import names
from attending.rl.types import Case
from attending.verifier.consult import consult
from attending.verifier.judge.embedded import EmbeddedJudge
from attending.verifier.judge.pairs import PARTS, read_kqa
from attending.verifier.patient.find import find_case
from attending.verifier.rubric.schema import read_lines
from attending.verifier.rubric.score import affine_score
from attending.verifier.rules import check
from attending.verifier.rules.rule import answer_of

KINDS = (("dosage", 1), ("options", 2), ("options", 3), ("format", 1))
PROMPTS, GROUP, TOKENS, CONTEXT = 8, 8, 48, 512
STEP_SECONDS, ANSWERS_A_SECOND = 40, 6  # measured and reckoned, of the default model on two cores
KEYS = ("rl/score", "heldout/score", "rl/length_tokens", "rl/entropy_nats")
KEYS += ("rl/zero_advantage_share", "rl/mismatch_kl_nats")
SAMPLED = 4  # answers to a held-out case beside the likeliest
REJECTION = """
keep = 2
threshold = 1.0
[tasks.practice]
kind = "prompts"
data = "practice.jsonl"
repeats = {repeats}
sampling = {{ temperature = 1.0, top_p = 1.0, max_tokens = {tokens}, seed = {seed} }}
"""
TUNING = """
model = "{model}"
root = "{root}"
epochs = {epochs}
context = {context}
seed = {seed}
[data.kept]
path = "learnt.jsonl"
id = "{{id}}"
[batch]
tokens = {tokens}
micro_tokens = {micro}
[optimizer]
peak = 2e-5
final = 2e-6
warmup_tokens = 8192
skip_window = 0
[state]
every_tokens = 32768
[heldout]
every_tokens = 1000000
max_tokens = 4000
final_tokens = 4000
"""


def attending(*words: object) -> None:
    done = subprocess.run([sys.executable, "-m", "attending.cli", *map(str, words)])
    if done.returncode:
        raise SystemExit(done.returncode)


def made(out: Path, *words: object, resume: bool = True) -> Path:
    """What a command writes, if it is not there; SystemExit if other words made it."""
    file = out.with_name(f"{out.name}.asked.json")
    if not out.exists():
        file.unlink(missing_ok=True)

    def make() -> dict[str, Any]:
        if not out.exists():
            attending(*words, "--out", out, *(["--resume"] if resume else []))
        return {}

    kept(file, [*map(str, words)], make)
    return out


def sets(*pairs: str) -> list[str]:
    return [word for pair in pairs for word in ("--set", pair)]


def budget(told: argparse.Namespace) -> str:
    """Hours, by arithmetic."""
    step = STEP_SECONDS / 3600
    seeds = sum(not record(f"rules-{s}").exists() for s in range(told.seeds)) * ("1" in told.stages)
    has_second, has_third = (
        number in told.stages and not record(name).exists()
        for number, name in (("2", "rubrics"), ("3", "dialogues"))
    )
    runs = {
        "choosing cases": (seeds > 0) * told.drawn * len(KINDS) * 8 / ANSWERS_A_SECOND / 3600,
        "stage 1": seeds * told.steps * step,
        "its baseline": seeds * told.steps * step,
        "two judges": has_second * 0.3,
        "choosing questions": has_second * told.questions * 6 * 2 / ANSWERS_A_SECOND / 3600,
        "stage 2": has_second * told.steps * step * 1.5,
        "interviews and stage 3": has_third * (0.5 + told.steps * step * 1.2),
        "answers to held-out cases": 0.1 * (2 * seeds + 2 * has_second + 3 * has_third),
    }
    parts = ", ".join(f"{name} {hours:.1f} h" for name, hours in runs.items())
    return f"budget: {sum(runs.values()):.1f} h on two cores: {parts}"


def record(name: str) -> Path:
    """Where figures are kept."""
    return HERE / "rl" / f"{name}.json"


def noted(told: argparse.Namespace, name: str, keys: str, make: Callable[[], Any]) -> None:
    """Keep what a seed or a stage showed, beside the options that it depends on."""
    kept(record(name), {key: getattr(told, key) for key in f"model tokens {keys}".split()}, make)


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Of the metrics that are drawn: steps and values."""
    rows = list(read_metrics(run / "metrics.jsonl"))
    return {key: [(row["step"], round(row[key], 5)) for row in rows if key in row] for key in KEYS}


def practice(told: argparse.Namespace) -> tuple[Path, Path]:
    """Stage 1's cases: to learn from by the start model's pass rate, held out as they are made."""
    folder, medquad = told.work / "cases", told.data / "train" / "medquad_qa.jsonl"
    for kind, level in KINDS:
        how = (kind, "--level", level, "--medquad", medquad)
        name = f"{kind}-{level}.jsonl"
        chosen = ("--count", told.drawn, "--model", told.model, "--recipe", "rules")
        band = ("--low", told.low, "--high", told.high)
        made(folder / "train" / name, "cases", *how, *chosen, *band, resume=False)
        held = ("--count", told.heldout, "--part", "held_out")
        made(folder / "heldout" / name, "cases", *how, *held, resume=False)
    files = []
    for part in ("train", "heldout"):
        every = [
            case for file in sorted((folder / part).glob("*.jsonl")) for case in read_cases(file)
        ]
        files.append(folder / f"{part}.jsonl")
        write_rows(files[-1], map(line_of, every))
    return files[0], files[1]


def learn(told: argparse.Namespace, name: str, recipe: str, *pairs: str) -> Path:
    """A run of `attending rl` that keeps every group to read, and so what it computed."""
    own = (f"steps={told.steps}", f"prompts={PROMPTS}", f"group={GROUP}", *pairs)
    own += (f"watch.samples={PROMPTS}", f"watch.every_steps={max(told.steps // 6, 1)}", *told.set)
    return made(told.work / name, "rl", recipe, *sets(*own))


def computed(run: Path, tokenizer: Any) -> dict[str, int]:
    """Tokens that a run sampled, rows that it trained on, and the answers' tokens among them.

    Groups that agree are none.
    """
    sampled = trained = answers = learnt = 0
    for _, row in read_lines(run / "rollouts.jsonl"):
        sizes = [one["tokens"] for one in row["answers"]]
        answers, sampled = answers + len(sizes), sampled + sum(sizes)
        if len({one["score"] for one in row["answers"]}) > 1:
            prompt = len(tokenizer.render(row["messages"]))
            trained += prompt + sum(sizes) - len(sizes)
            learnt += sum(sizes)
    found = {"answers": answers, "sampled_tokens": sampled}
    return found | {"trained_rows": trained, "learnt_tokens": learnt}


def rejection(told: argparse.Namespace, train: Path, seed: int, spent: dict[str, int]) -> Path:
    """The baseline: as many answers to the same cases, as many rows of the right ones."""
    folder, cases = told.work / f"rejection-{seed}", read_cases(train)
    out = told.work / f"tuned-{seed}"
    if out.exists():
        return out
    folder.mkdir(exist_ok=True)
    keys = ("id", "messages", "rule")
    rows = ({key: line_of(case)[key] for key in keys} for case in cases)
    write_rows(folder / "practice.jsonl", rows)
    repeats = max(2, round(spent["answers"] / len(cases)))
    text = REJECTION.format(repeats=repeats, tokens=told.tokens, seed=10_000 * seed)
    (folder / "own.toml").write_text(text, "utf-8")
    answered = folder / "answers"
    if not (answered / "kept.jsonl").exists():
        again = ["--resume"] if (answered / "plan.json").exists() else []
        how = ("--data", folder, "--out", answered, *again)
        attending("rejection", folder / "own.toml", told.model, *how)
    tokenizer, size, learnt, right = product.load(told.model).tokenizer, 0, 0, []
    for _, row in read_lines(answered / "kept.jsonl"):
        *before, last = row["messages"]
        shown = [turn | ({"weight": 0} if turn["role"] == "assistant" else {}) for turn in before]
        right.append({"id": row["id"], "messages": [*shown, last]})
        (example,) = tokenizer.examples(right[-1]["messages"])
        size, learnt = size + len(example.ids) - 1, learnt + sum(example.is_learnt)
    write_rows(folder / "learnt.jsonl", right)
    if not size * spent["trained_rows"]:
        raise SystemExit("no answer was right, or no group told answers apart: take other cases.")
    epochs = spent["trained_rows"] / size
    values = {"model": told.model, "root": folder, "epochs": f"{epochs:.4f}", "seed": seed}
    values |= {"context": told.context, "tokens": 4 * told.context, "micro": 2 * told.context}
    (folder / "tuning.toml").write_text(TUNING.format(**values), "utf-8")
    found = {"kept": len(right), "epochs": epochs, "repeats": repeats}
    write_json(folder / "told.json", found | {"learnt_tokens": round(learnt * epochs)})
    return made(out, "sft", folder / "tuning.toml")


def write_json(path: Path, value: Any) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(value), "utf-8")
    draft.replace(path)


def answered(told: argparse.Namespace, arm: str, model: object, file: Path) -> dict[str, Any]:
    """What a model answers to held-out cases: the likeliest first, then some that are sampled."""
    cases = read_cases(file)

    async def ask() -> dict[str, Any]:
        async with endpoint.open(str(model)) as opened:

            async def one(case: Case, seed: int) -> dict[str, Any]:
                how = PLAIN | {"temperature": float(seed > 0), "seed": seed}
                turns = [dict(turn) for turn in case.messages]
                size = told.tokens * (2 if case.criteria else 1)
                reply = await opened.chat(turns, max_tokens=size, **how)
                return {"text": reply.text, "tokens": reply.output_tokens}

            seeds = range(1 if cases[0].criteria else 1 + SAMPLED)
            every = [(case, seed) for case in cases for seed in seeds]
            replies = await asyncio.gather(*(one(*each) for each in every))
        rows: dict[str, Any] = {}
        for (case, _), reply in zip(every, replies, strict=True):
            rows.setdefault(case.id, {"kind": kind_of(case), "answers": []})
            rows[case.id]["answers"].append(reply)
        return rows

    def make() -> dict[str, Any]:
        found = asyncio.run(ask())
        for case in cases:
            for one in found[case.id]["answers"]:
                if case.rule:
                    one["score"] = float(check(case.rule, one["text"]).passed)
        return {"rows": found}

    asked = {"model": str(model), "cases": digest(file), "tokens": told.tokens}
    found: dict[str, Any] = kept(told.work / f"answers-{arm}.json", asked, make)["rows"]
    return found


def kind_of(case: Case) -> str:
    return case.id.partition("/")[0]


def scored(answers: dict[str, Any]) -> dict[str, Any]:
    """Each case's kind, and its answers' scores, the likeliest's first."""
    return {
        name: {"kind": row["kind"], "scores": [one["score"] for one in row["answers"]]}
        for name, row in answers.items()
    }


def first_stage(told: argparse.Namespace) -> None:
    def begun() -> dict[str, Any]:
        return {"answers": scored(answered(told, "start", told.model, practice(told)[1]))}

    def one(seed: int) -> dict[str, Any]:
        train, heldout = practice(told)
        own = (f"cases={train}", f"heldout={heldout}", f"model={told.model}", f"seed={seed}")
        own += (f"watch.heldout_cases={len(read_cases(heldout))}", f"max_tokens={told.tokens}")
        run = learn(told, f"rules-{seed}", "rules", *own)
        spent = computed(run, product.load(told.model).tokenizer)
        tuned = rejection(told, train, seed, spent)
        return {
            "cases": len(read_cases(train)),
            "rl": scored(answered(told, f"rules-{seed}", run, heldout)),
            "rejection": scored(answered(told, f"tuned-{seed}", tuned, heldout)),
            "spent": spent,
            "tuned": json.loads((told.work / f"rejection-{seed}" / "told.json").read_text("utf-8")),
            "curves": curves(run),
        }

    noted(told, "start", "heldout", begun)
    keys = "heldout steps context drawn low high set"
    for seed in range(told.seeds):
        noted(told, f"rules-{seed}", keys, partial(one, seed))


def halves(told: argparse.Namespace) -> Path:
    """Disjoint text for two judges, and MedQuAD's subjects of neither, for the cases."""
    folder = told.work / "halves"
    kqa = read_kqa(told.data / "eval" / "kqa_201_physician_rubric.jsonl")
    medquad = [row for _, row in read_lines(told.data / "train" / "medquad_qa.jsonl")]
    train, rest = kqa[PARTS["train"]], kqa[PARTS["train"].stop :]
    for at, name in enumerate(("training", "reporting")):
        own = train[at::2]
        # The parts are cut by place: the other half's places are taken by this half, once more.
        twice = (own * 2)[: len(train)]
        write_rows(folder / f"kqa-{name}.jsonl", [*twice, *rest])
        some = [row for row in medquad if draw("judges", row["focus"]) % 4 == at]
        write_rows(folder / f"medquad-{name}.jsonl", some)
    others = [row for row in medquad if draw("judges", row["focus"]) % 4 > 1]
    write_rows(folder / "medquad-cases.jsonl", others)
    return folder


def second_stage(told: argparse.Namespace) -> None:
    noted(told, "rubrics", "heldout steps documents questions set", partial(rubrics, told))


def rubrics(told: argparse.Namespace) -> dict[str, Any]:
    folder, cases = halves(told), told.work / "cases"
    judges = {}
    for name, reads in (("training", "text"), ("reporting", "measures")):
        files = (folder / f"kqa-{name}.jsonl", folder / f"medquad-{name}.jsonl")
        how = sets(f"reads={reads}", f"documents={told.documents}", "epochs=1")
        judges[name] = made(told.work / f"judge-{name}", "judge", "train", *files, *how)
    parts, size = [], 2 * told.tokens
    chosen = ("--model", told.model, "--judge", f"embedded:{judges['training']}", "--answers", 6)
    chosen += ("--low", 0.1, "--high", 0.9, "--max-tokens", size, "--recipe", "rubrics")
    for part, count in (("train", told.questions), ("held_out", told.heldout)):
        how = ("--medquad", folder / "medquad-cases.jsonl", "--count", count, "--part", part)
        how += chosen if part == "train" else ()
        parts.append(made(cases / f"rubric-{part}.jsonl", "cases", "rubric", *how, resume=False))
    own = (f"cases={parts[0]}", f"heldout={parts[1]}", f"model={told.model}")
    own += tuple(
        f"{key}=embedded:{judges[name]}"
        for key, name in (("judge", "training"), ("reporter", "reporting"))
    )
    run = learn(told, "rubrics", "rubrics", *own, f"max_tokens={size}")
    found: dict[str, Any] = {"before": answered(told, "rubric-before", told.model, parts[1])}
    found |= {"after": answered(told, "rubric-after", run, parts[1]), "curves": curves(run)}
    for name, where in judges.items():
        judge = EmbeddedJudge(folder=where)
        found[name] = json.loads((where / "report.json").read_text("utf-8"))["embedded"]["macro-F1"]
        for case in read_cases(parts[1]):
            for arm in ("before", "after"):
                (one,) = found[arm][case.id]["answers"]
                text = answer_of(one["text"])
                met = [each.met for each in asyncio.run(judge(case.rubric, text))] if text else []
                one[name] = (affine_score(case.criteria, met) or 0.0) if met else 0.0
    for arm in ("before", "after"):
        for case_id, row in found[arm].items():
            (one,) = row["answers"]
            found[arm][case_id] = {key: one[key] for key in (*judges, "tokens")}
    return found


def third_stage(told: argparse.Namespace) -> None:
    keys = "steps interviews patients set tune"
    noted(told, "dialogues", keys, partial(dialogues, told))


def dialogues(told: argparse.Namespace) -> dict[str, Any]:
    tables = told.data / "patient_cases"
    sources = {"tables": tables, "vignettes": tables / "mediq_imedqa_dev.jsonl"}
    files: dict[str, Path] = {}
    for part in ("train", "held_out"):
        every = []
        for name, source in sources.items():
            count = min(len(names(source, part)), told.patients * (3 if part == "train" else 1))
            how = ("patient", "--patients", source, "--count", count, "--part", part)
            out = told.work / "cases" / f"patient-{name}-{part}.jsonl"
            every += read_cases(made(out, "cases", *how, resume=False))
        files[part] = told.work / "cases" / f"patient-{part}.jsonl"
        write_rows(files[part], map(line_of, every))
    talks = []
    for name, source in sources.items():
        how = ("interview", "--patients", source, "--count", told.interviews // 2)
        out = told.work / "cases" / f"interview-{name}.jsonl"
        talks += [row for _, row in read_lines(made(out, "cases", *how, resume=False))]
    write_rows(told.work / "cases" / "interviews.jsonl", talks)
    own = sets(f"root={told.work / 'cases'}", f"model={told.model}", *told.tune)
    warm = made(told.work / "warm", "sft", "interviews", *own)
    heldout = f"heldout={files['held_out']}"
    run = learn(told, "dialogues", "dialogues", f"model={warm}", f"cases={files['train']}", heldout)
    models = {"start": told.model, "interviews": warm, "reinforced": run}
    arms = {name: consulted(told, name, one, files["held_out"]) for name, one in models.items()}
    return {"arms": arms, "curves": curves(run)}


def consulted(told: argparse.Namespace, arm: str, model: object, file: Path) -> dict[str, Any]:
    """Of each held-out patient: facts told after the complaint, turns, the share of what it has."""

    async def ask() -> dict[str, Any]:
        rows: dict[str, Any] = {}
        how: dict[str, Any] = {"temperature": 0.0, "max_tokens": told.tokens, "max_turns": 6}
        async with endpoint.open(str(model)) as doctor:
            for case in read_cases(file):
                patient = find_case(case.patient)
                trace = await consult(patient, doctor, **how)
                known = tellable(patient)
                first, *later = [known & {*turn.revealed} for turn in trace.turns]
                new = set[str]().union(*later) - first
                share = len(new | first) / len(known)
                rows[case.id] = {"facts": len(new), "turns": max(len(later), 1), "share": share}
        return {"rows": rows}

    asked = {"model": str(model), "cases": digest(file), "tokens": told.tokens}
    to = told.work / f"consulted-{arm}.json"
    found: dict[str, Any] = kept(to, asked, lambda: asyncio.run(ask()))["rows"]
    return found


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "work"):
        parser.add_argument(name, type=lambda text: Path(text).absolute())
    parser.add_argument("--model", default="default")
    for name, value, says in (
        ("seeds", 3, "of stage 1 and its baseline"),
        ("steps", 60, "of every run"),
        ("tokens", TOKENS, "of an answer; twice as many where criteria judge"),
        ("context", CONTEXT, "of a row of the baseline's training"),
        ("drawn", 250, "cases of each kind to choose from"),
        ("heldout", 36, "cases of each kind to report on"),
        ("documents", 250, "of each judge's training"),
        ("questions", 240, "with rubrics to choose from"),
        ("interviews", 400, "of the warm-up"),
        ("patients", 20, "held out of each source; three times as many to learn from"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{says} ({value})")
    parser.add_argument("--low", type=float, default=0.2, help="least pass rate of a case (0.2)")
    parser.add_argument("--high", type=float, default=0.8, help="greatest (0.8)")
    parser.add_argument("--stages", default="123", help="which of them (123)")
    parser.add_argument("--set", action="append", default=[], help="of every run of attending rl")
    parser.add_argument("--tune", action="append", default=[], help="of the warm-up")
    told = parser.parse_args(words)
    print(budget(told), flush=True)
    told.work.mkdir(parents=True, exist_ok=True)
    stages = {"1": first_stage, "2": second_stage, "3": third_stage}
    for stage in told.stages:
        stages[stage](told)
    write()


if __name__ == "__main__":
    main(sys.argv[1:])
