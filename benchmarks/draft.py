"""A draft's arithmetic: tokens of a round, what rows and the draft's steps cost, what comes of it.

    python benchmarks/draft.py DATA DRAFT [--model default] [--prompts 20] [--tokens 128]
                               [--keep out/draft.jsonl] [--threads N] [--no-torch] [--page draft]
                               [--begun DRAFT] [--gated GATED_DRAFT] [--openvino PYTHON]

DATA is the folder with `eval/kqa_201_physician_rubric.jsonl`, `eval/gsm8k_test.jsonl` and
`train/medquad_qa.jsonl`. Each prompt is answered greedily by every path before the next one; an
answer is kept as soon as it is there, so an interrupted run goes on; those of other drafts, models,
settings or states of the engine's code in the same file are left alone. `--begun` names the draft
that DRAFT went on from, if there is one. GATED_DRAFT was trained as the first of them was, but with
the gate. How they fared is read from their `metrics.jsonl`. PYTHON is of an environment with
openvino-genai, whose prompt lookup is measured beside its plain path. Writes NAME.md, NAME.svg and,
how the draft was trained, NAME_training.svg. Budget with the default model on two cores: 60 prompts
by eleven paths some 35 minutes; nothing else should run.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from draft_training import compared, trained
from page import HERE, Measure, write

import attending
from attending.artifact import digest
from attending.corpus.split import draw, is_held_out
from attending.engine.local import Model
from attending.engine.scheduler import Request
from attending.evaluate.intervals import Estimate, bootstrap, ratio
from attending.logs import cut
from attending.mesh import hardware
from attending.model.files import gguf_in
from attending.sources import resolve
from attending.verifier.judge.pairs import PARTS, read_kqa

DEPTHS = (1, 2, 3, 4, 5)
USERS = (2, 4, 8, 16)
REPEATS = 3
PLAIN, ADAPTING = "plain", "as served: depth by what was measured"
TORCH, TORCH_DRAFT = "torch, plain", "torch, k = 5"
PEERS = {"plain": "OpenVINO GenAI, plain", "lookup": "OpenVINO GenAI, prompt lookup"}
FIXED = tuple(f"k = {depth}" for depth in DEPTHS)
PATHS = (PLAIN, *FIXED, ADAPTING, TORCH, TORCH_DRAFT, *PEERS.values())
OWN = {TORCH_DRAFT: TORCH, PEERS["lookup"]: PEERS["plain"]}
"""Whose answers a path's are compared with, where it is not our plain path."""
NOTES = """
{model} with the draft {draft}, on {prompts} prompts that it was not trained on ({sources}), greedy,
at most {tokens} tokens an answer, one user, {threads}. *tau*: tokens of a round, the target's own
included; *v*: a step of k + 1 rows, in which the draft's keys and values are kept but nothing is
proposed, over the plain path's of one row; *d*: a step of the draft over that; *predicted*:
tau / (v + k d); *measured*: tokens a second over those of our plain path, whatever the path.
Prompts' time is left out. Every path answered a prompt before the next one began, ours in an order
of their own. *{torch}* is the same model in float32{peer}.

Measured, with its 95 % interval over prompts: {measured}. The best depth was chosen by the same
prompts.{own}

tau with its 95 % interval over prompts: {intervals}.

By source, at k = {best}: {by_source}. Accepted by position there, where all before were:
{positions}.

Greedy answers identical to those of the plain path, torch's and the peer's to those of their own:
{identical}.

Several users at once, of all sources, tokens/s over the same without a draft, medians of {repeats}
with their range, as long as all are being answered: with k = {best} {crowd}. {even} As served:
{served}.

Training: {training}

![Training]({name}_training.svg)
{gated}"""


def prompts(data: Path, count: int) -> Iterator[tuple[str, int, str]]:
    """Source, number and text; a source's in an order of its own."""
    files = {
        "K-QA": ("eval/kqa_201_physician_rubric.jsonl", ("Question", "question")),
        "MedQuAD, held out": ("train/medquad_qa.jsonl", ("question",)),
        "GSM8K test": ("eval/gsm8k_test.jsonl", ("question",)),
    }
    said: set[str] = set()
    for name, (file, fields) in files.items():
        if name == "K-QA":  # the part that nothing of ours was fitted on
            told = read_kqa(data / file)[PARTS["report"]]
        else:
            told = [json.loads(line) for line in (data / file).read_text("utf-8").splitlines()]
        rows = [*enumerate(told)]
        if name.startswith("MedQuAD"):
            # Some questions are there of two subjects, of which one was trained on.
            said = {row["question"].casefold() for row in told if not is_held_out(row["focus"])}
            rows = [
                (i, row)
                for i, row in rows
                if is_held_out(row["focus"]) and row["question"].casefold() not in said
            ]
        rows.sort(key=lambda one: draw("benchmark", 0, name, one[0]))
        for number, row in rows[:count]:
            yield name, number, next(str(row[field]) for field in fields if field in row)


def paths(asked: argparse.Namespace) -> dict[str, Model]:
    """A model for each; their weights are mapped once."""
    how: dict[str, Any] = {"threads": asked.threads}
    found = {PLAIN: attending.load(asked.model, draft="none", **how)}
    for depth in DEPTHS:
        options = {"draft": asked.draft, "draft_depth": depth, **how}
        found[f"k = {depth}"] = attending.load(asked.model, **options)
    found[ADAPTING] = attending.load(asked.model, draft=asked.draft, **how)
    if asked.torch:
        in_torch = {"dtype": "float32", **how}
        found[TORCH] = attending.load(asked.model, draft="none", **in_torch)
        found[TORCH_DRAFT] = attending.load(
            asked.model, draft=asked.draft, draft_depth=5, **in_torch
        )
    for model in found.values():
        model.make_room(max(USERS) * 1024, max(USERS))
    return found


def answer(model: Model, texts: Sequence[str], tokens: int) -> dict[str, Any]:
    """Of one or several users: ids, seconds while all are answered, and what the draft did."""
    scheduler, told = model.scheduler, model.scheduler.speculation
    before = (told.rounds, told.accepted.copy(), told.tried.copy()) if told else None
    sampling = model.sampling(temperature=0.0, max_tokens=tokens, seed=0)
    asked = [model.tokenizer.render([{"role": "user", "content": text}]) for text in texts]
    written: dict[int, list[int]] = {
        scheduler.submit(Request(tuple(ids), sampling, model.stop_ids)): [] for ids in asked
    }
    steps, count, seconds, has_ended = list[float](), 0, 0.0, False
    while scheduler.num_running or scheduler.num_waiting:
        is_full, start = all(written.values()) and not has_ended, time.perf_counter()
        drafting = told.drafting if told else 0.0
        outputs = scheduler.step()
        if is_full:
            spent = time.perf_counter() - start
            steps.append(spent - ((told.drafting - drafting) if told else 0.0))
            seconds, count = seconds + spent, count + len(outputs)
        for output in outputs:
            if output.error:
                raise output.error
            written[output.handle] += [] if output.token is None else [output.token]
            has_ended = has_ended or output.finish is not None
    row: dict[str, Any] = {"ids": [*written.values()], "tokens": count, "seconds": seconds}
    row["step_s"] = statistics.median(steps) if steps else 0.0
    if told and before:
        row["rounds"] = told.rounds - before[0]
        row["accepted"] = (told.accepted - before[1]).tolist()
        row["tried"] = (told.tried - before[2]).tolist()
        row["draft_s"] = told.draft_seconds.at(len(texts))
    return row


class Peer:
    """OpenVINO in a process of its own, which answers a prompt when it is asked."""

    def __init__(self, asked: argparse.Namespace, ours: Model) -> None:
        self._ours = ours
        threads = str(asked.threads or hardware()["available_cores"])
        stops = ",".join(map(str, sorted(ours.stop_ids)))
        stored = str(gguf_in(resolve(asked.model).path))
        command = [asked.openvino, str(HERE / "peers" / "run_lookup.py"), stored, threads]
        command += [str(asked.tokens), stops]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.answer("Good morning!")  # buffers and the clock settle

    def answer(self, text: str) -> list[dict[str, Any]]:
        """A row of each of its paths."""
        ids = self._ours.tokenizer.render([{"role": "user", "content": text}])
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(ids) + "\n")
        self._process.stdin.flush()
        found: list[dict[str, Any]] = []
        while len(found) < len(PEERS):
            line = self._process.stdout.readline()
            if not line:
                raise SystemExit(f"{PEERS['plain']} has ended: see its words above.")
            if line.startswith("{"):  # it has words of its own
                row = json.loads(line)
                told = {"path": PEERS[row["path"]], "ids": [row["ids"]]}
                found.append(row | told | {"tokens": len(row["ids"]) - 1})
        return found


def engine_digest() -> str:
    """Of the code that answers: what it measured before a change of it is another's."""
    total = hashlib.sha256()
    for folder in ("engine", "model"):
        for file in sorted((Path(attending.__file__).parent / folder).rglob("*")):
            if file.suffix in (".py", ".cpp"):
                total.update(file.read_bytes())
    return total.hexdigest()


def measure(asked: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows; those that are kept already are not measured again."""
    file, models = Path(asked.keep), paths(asked)
    file.parent.mkdir(parents=True, exist_ok=True)
    cut(file)  # of one that was killed: half a line
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    settings = {key: getattr(asked, key) for key in ("model", "prompts", "tokens", "threads")}
    settings |= {"draft": digest(Path(asked.draft)), "engine": engine_digest()}
    settings["target"] = digest(resolve(asked.model).path)
    count, rows = len(rows), [row for row in rows if row["settings"] == settings]
    if len(rows) < count:
        print(
            f"{file}: {count - len(rows)} answers are of another draft, model, engine or setting."
        )
    known = {(row["source"], row["number"], row["repeat"], row["path"]) for row in rows}

    def keep(row: dict[str, Any]) -> None:
        key = row["source"], row["number"], row["repeat"], row["path"]
        if key in known:
            return
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row | {"settings": settings}) + "\n")
        rows.append(row)
        known.add(key)

    def note(source: str, number: int, path: str, texts: Sequence[str], repeat: int = 0) -> None:
        if (source, number, repeat, path) not in known:
            row = {"source": source, "number": number, "repeat": repeat, "path": path}
            keep(row | answer(models[path], texts, asked.tokens))

    told = list(prompts(Path(asked.data), asked.prompts))
    for model in models.values():  # threads, buffers and the clock settle
        answer(model, ["Good morning!"], 8)
    peer = Peer(asked, models[PLAIN]) if asked.openvino else None
    for source, number, text in told:
        # In another order for each prompt, so that no path is always the first.
        for path in sorted(models, key=lambda path: draw("path", source, number, path)):
            note(source, number, path, [text])
        if peer and (source, number, 0, PEERS["lookup"]) not in known:
            for row in peer.answer(text):
                keep({"source": source, "number": number, "repeat": 0} | row)
    best = best_of(rows)
    mixed = [text for *_, text in sorted(told, key=lambda one: draw("crowd", *one[:2]))]
    for repeat in range(REPEATS):
        for users in USERS:
            own = (PLAIN, best, ADAPTING)
            for path in sorted(own, key=lambda path: draw("path", repeat, users, path)):
                note("users", users, path, (mixed * users)[:users], repeat)
    return rows


def rate(rows: Sequence[dict[str, Any]]) -> float:
    """Tokens a second, of what lasted long enough to have one."""
    timed = [row for row in rows if row["seconds"]]
    return float(sum(row["tokens"] for row in timed) / sum(row["seconds"] for row in timed))


def faster(rows: Sequence[dict[str, Any]], than: Sequence[dict[str, Any]]) -> Estimate:
    """The ratio of both rates, with its interval over the prompts that both answered."""
    of = {(row["source"], row["number"]): row for row in than}
    pairs = [(row, of[row["source"], row["number"]]) for row in rows]
    terms = [(a["tokens"], a["seconds"], b["tokens"], b["seconds"]) for a, b in pairs]

    def quotient(sums: Any) -> Any:
        return sums[..., 0] / sums[..., 1] / (sums[..., 2] / sums[..., 3])

    return bootstrap(terms, range(len(terms)), quotient, seed=0, resamples=1000)


def best_of(rows: Sequence[dict[str, Any]]) -> str:
    """The fastest depth for one user."""
    alone = [row for row in rows if row["source"] != "users"]
    return max(FIXED, key=lambda name: rate([r for r in alone if r["path"] == name]))


def over_their_own(of: dict[str, list[dict[str, Any]]]) -> str:
    """What a draft brings where it is not our native path's; in words."""
    told = [interval(name, faster(of[name], of[own])) for name, own in OWN.items() if name in of]
    return f" Over the plain path of its own: {'; '.join(told)}." if told else ""


def tau(rows: Sequence[dict[str, Any]]) -> Estimate:
    """Tokens of a round with its interval over prompts."""
    terms = [(row["rounds"] + sum(row["accepted"]), row["rounds"]) for row in rows if row["rounds"]]
    return bootstrap(terms, range(len(terms)), ratio, seed=0, resamples=1000)


def crowds(rows: Sequence[dict[str, Any]], path: str) -> dict[int, list[float]]:
    """Of each number of users: tokens a second on a path over those without a draft, by repeat."""
    of = {
        (row["number"], row["repeat"], row["path"]): rate([row])
        for row in rows
        if row["source"] == "users"
    }
    return {
        users: [of[users, at, path] / of[users, at, PLAIN] for at in range(REPEATS)]
        for users in USERS
    }


def even(alone: float, crowd: dict[int, list[float]]) -> str:
    """Up to how many users it pays: up to the first that it does not."""
    pays = 0
    for users, gain in [(1, alone), *((u, statistics.median(of)) for u, of in crowd.items())]:
        if gain <= 1:
            break
        pays = users
    return f"Drafting pays up to {pays} of these." if pays else "Drafting does not pay here."


def interval(name: str, found: Estimate) -> str:
    """In words."""
    return f"{name} {found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def ranges(crowd: dict[int, list[float]]) -> str:
    """In words."""
    return "; ".join(
        f"{users} users {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
        for users, found in crowd.items()
    )


def step_seconds(rows: Sequence[dict[str, Any]]) -> float:
    """Of a step, in the median of the answers that had one."""
    return statistics.median(row["step_s"] for row in rows if row["step_s"])


def page(asked: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> Path:
    """Write the page."""
    alone = [row for row in rows if row["source"] != "users"]
    there = {row["path"] for row in alone}
    names = [name for name in PATHS if name in there]
    of = {name: [row for row in alone if row["path"] == name] for name in names}
    plain, best = of[PLAIN], best_of(rows)
    one_row = step_seconds(plain)
    measures, intervals, identical = [], [], []
    wanted = {
        (name, row["source"], row["number"]): row["ids"]
        for name in (PLAIN, *OWN.values())
        for row in of.get(name, [])
    }
    for name in names:
        measures.append(Measure("tokens/s", name, [rate(of[name])]))
        measures.append(Measure("measured", name, [rate(of[name]) / rate(plain)]))
        first = OWN.get(name, PLAIN)
        same = sum(row["ids"] == wanted[first, row["source"], row["number"]] for row in of[name])
        identical += [] if name in (PLAIN, *OWN.values()) else [f"{name} {same} of {len(of[name])}"]
        if not name.startswith("k = "):
            continue
        depth, length = int(name[4:]), tau(of[name])
        v = step_seconds(of[name]) / one_row
        d = statistics.median(row["draft_s"] for row in of[name]) / one_row
        intervals.append(interval(name, length))
        figures = {"tau": length.value, "v": v, "d": d, "predicted": length.value / (v + depth * d)}
        measures += [Measure(quantity, name, [value]) for quantity, value in figures.items()]
    sources = [*dict.fromkeys(row["source"] for row in alone)]
    own = {source: [row for row in of[best] if row["source"] == source] for source in sources}
    tried, accepted = (
        [sum(column) for column in zip(*(row[key] for row in of[best]), strict=True)]
        for key in ("tried", "accepted")
    )
    crowd = crowds(rows, best)
    notes = NOTES.format(
        model=asked.model,
        draft=Path(asked.draft).name,
        prompts=len(plain),
        sources=", ".join(sources),
        tokens=asked.tokens,
        threads=f"{asked.threads} threads" if asked.threads else "all cores",
        torch=TORCH,
        peer=f"; OpenVINO GenAI is {of[PEERS['plain']][0]['version']}"
        if PEERS["plain"] in of
        else "",
        intervals="; ".join(intervals),
        best=best[4:],
        by_source="; ".join(f"{name} {tau(mine).value:.2f}" for name, mine in own.items()),
        positions=", ".join(f"{a / max(t, 1):.2f}" for a, t in zip(accepted, tried, strict=True)),
        identical="; ".join(identical),
        own=over_their_own(of),
        repeats=REPEATS,
        crowd=ranges(crowd),
        served=ranges(crowds(rows, ADAPTING)),
        measured="; ".join(interval(name, faster(of[name], plain)) for name in names[1:]),
        even=even(rate(of[best]) / rate(plain), crowd),
        training=trained(stages(asked), asked.gated, HERE / f"{asked.page}_training.svg"),
        name=asked.page,
        gated=compared(stages(asked)[0], Path(asked.gated)) if asked.gated else "",
    )
    return write(
        asked.page, "A draft's arithmetic", notes, measures, rows_are_subjects=True, ratios=False
    )


def stages(asked: argparse.Namespace) -> list[Path]:
    """The draft, after the one it went on from."""
    return [Path(one) for one in (asked.begun, asked.draft) if one]


def require(asked: argparse.Namespace) -> None:
    """SystemExit, before anything is measured, where the page could not be written."""
    runs = []
    for folder in (*stages(asked), *map(Path, filter(None, [asked.gated]))):
        for name in ("metrics.jsonl", "run.json"):
            if not (folder / name).is_file():
                raise SystemExit(
                    f"{folder} has no {name}: give a folder that attending draft made."
                )
        runs.append(json.loads((folder / "run.json").read_text("utf-8")))
    if asked.begun and digest(Path(asked.begun)) not in [p["sha256"] for p in runs[1]["parents"]]:
        raise SystemExit(f"{asked.draft} did not go on from {asked.begun}.")
    if not asked.gated:
        return
    first, last = runs[0], runs[-1]
    if [run["recipe"]["head"].pop("gated") for run in (first, last)] != [False, True]:
        raise SystemExit(f"{stages(asked)[0]} must have no gate, and {asked.gated} must have one.")
    if any(first[key] != last[key] for key in ("recipe", "parents")):
        raise SystemExit(f"{stages(asked)[0]} and {asked.gated} differ by more than the gate.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("data")
    parser.add_argument("draft")
    parser.add_argument("--model", default="default")
    parser.add_argument("--prompts", type=int, default=20, help="of each source")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--keep", default="out/draft.jsonl", help="what was measured")
    parser.add_argument("--page", default="draft", help="name of the page")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--begun", help="the draft that this one went on from")
    parser.add_argument("--gated", help="the same draft with the gate")
    parser.add_argument("--openvino", help="the python of an environment with openvino-genai")
    parser.add_argument("--no-torch", dest="torch", action="store_false")
    asked = parser.parse_args()
    require(asked)
    print(page(asked, measure(asked)))


if __name__ == "__main__":
    main()
