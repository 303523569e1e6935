"""How many identifiers the filter finds, beside Presidio on the same notes in the same run.

    python benchmarks/phi.py [PEER_PYTHON]

PEER_PYTHON has presidio-analyzer and a small English spaCy model; without it only ours is measured.
Budget: four sets of 200 notes, our filter three times, the peer once: about 5 minutes.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from page import HERE, Measure, write

from attending.phi import Span, scan
from attending.phi.generate import LANGUAGES, Note, generate

REPEATS, GENERATED = 3, 200
PEER = """
import importlib, json, pkgutil, sys, time
from presidio_analyzer import AnalyzerEngine
from presidio_analyzer.nlp_engine import NlpEngineProvider
model = next(m.name for m in pkgutil.iter_modules() if m.name.startswith("en_core_web_sm"))
setup = {"nlp_engine_name": "spacy", "models": [{"lang_code": "en", "model_name": model}]}
engine = AnalyzerEngine(nlp_engine=NlpEngineProvider(nlp_configuration=setup).create_engine())
for line in sys.stdin:
    text = json.loads(line)
    start = time.perf_counter()
    found = engine.analyze(text, language="en")
    seconds = time.perf_counter() - start
    print(json.dumps([seconds, [[one.start, one.end] for one in found]]), flush=True)
"""
NOTES = """
Notes written by nobody about nobody; no figure here is one of a hospital's real notes.
*Generated* notes come from the fragments that the tagger was trained on, with another seed.
*Blind* notes were written apart, by authors who had seen neither rules nor fragments (other
templates, names, formats, noise, tables, dictation), and nobody looked at what leaks there: **the
blind rows are the figures that count.**

*Recall* is strict: a span counts if every letter and digit of it is hidden. *Precision* is the
share of our spans that touch an identifier, and, of characters, the share of hidden letters and
digits that belong to one. *Leaky* notes have at least one span that is not wholly hidden; a note
names about 22 identifiers. Our speed is that of all notes as one text, as `attending phi scan FILE`
reads it; one short note at a time costs half as much again. Presidio runs its default recognizers
with a small English model, on
Chinese too, for which it has none.
"""
Spans = list[tuple[int, int]]


class Score(NamedTuple):
    """Of one filter on one set of notes."""

    found: Counter[str]
    wanted: Counter[str]
    spans: int
    right_spans: int
    characters: int
    right_characters: int
    leaky: float

    @property
    def recall(self) -> float:
        return self.found.total() / self.wanted.total()


def main() -> None:
    peer = sys.argv[1] if len(sys.argv) > 1 else None
    measures: list[Measure] = []
    by_category: dict[str, Score] = {}
    for name, notes in sets():
        texts = [text for text, _ in notes]
        spans = [[(s.start, s.end) for s in scan(text)] for text in texts]
        by_category[name] = score = judge(notes, spans)
        if not name.startswith("blind"):
            continue
        whole, rates = "\n\n".join(texts), []
        for _ in range(REPEATS):
            start = time.perf_counter()
            scan(whole)
            rates.append(len(whole) / (time.perf_counter() - start) / 1e3)
        measures += figures(name, "attending", score, rates)
        if peer:
            seconds, theirs = presidio(peer, texts)
            rate = sum(map(len, texts)) / seconds / 1e3
            measures += figures(name, "Presidio", judge(notes, theirs), [rate] * REPEATS)
    page = write("phi", "Identifiers found", NOTES + table(by_category), measures)
    print(page.read_text("utf-8"))


def sets() -> Iterator[tuple[str, list[tuple[str, list[tuple[int, int, str]]]]]]:
    for language in LANGUAGES:
        notes = generate(language, GENERATED, seed=1_000)
        yield f"generated {language}", [(n.text, [*map(truth, identifiers(n))]) for n in notes]
        lines = (HERE / "notes" / f"blind.{language}.jsonl").read_text("utf-8").splitlines()
        yield f"blind {language}", [(row["text"], row["spans"]) for row in map(json.loads, lines)]


def identifiers(note: Note) -> Iterator[Span]:
    """Those of a generated note, which marks ages below 90 too."""
    for span in note.spans:
        value = note.text[span.start : span.end]
        if span.category != "age" or not value.isdigit() or int(value) > 89:
            yield span


def truth(span: Span) -> tuple[int, int, str]:
    return span.start, span.end, span.category


def judge(notes: list[tuple[str, list[tuple[int, int, str]]]], spans: Iterable[Spans]) -> Score:
    found, wanted = Counter[str](), Counter[str]()
    count = right = characters = right_characters = leaky = 0
    for (text, gold), ours in zip(notes, spans, strict=True):
        hidden = {at for start, end in ours for at in range(start, end)}
        wanted_at = {at for start, end, _ in gold for at in range(start, end)}
        missed = False
        for start, end, category in gold:
            whole = all(at in hidden for at in range(start, end) if text[at].isalnum())
            wanted[category] += 1
            found[category] += whole
            missed |= not whole
        leaky += missed
        count += len(ours)
        right += sum(not wanted_at.isdisjoint(range(start, end)) for start, end in ours)
        shown = {at for at in hidden if text[at].isalnum()}
        characters += len(shown)
        right_characters += len(shown & wanted_at)
    return Score(found, wanted, count, right, characters, right_characters, leaky / len(notes))


def figures(name: str, subject: str, score: Score, rates: list[float]) -> list[Measure]:
    values = {
        "recall": score.recall,
        "span precision": score.right_spans / max(1, score.spans),
        "character precision": score.right_characters / max(1, score.characters),
        "leaky notes": score.leaky,
    }
    found = [Measure(f"{name}: {what}", subject, [value]) for what, value in values.items()]
    return [*found, Measure(f"{name}: k characters/s, one core", subject, rates)]


def table(scores: dict[str, Score]) -> str:
    """Recall by category, and how many there are."""
    categories = sorted({category for score in scores.values() for category in score.wanted})
    lines = [f"| recall | {' | '.join(scores)} |", f"|{'---|' * (len(scores) + 1)}"]
    for category in categories:
        cells = [
            f"{score.found[category] / score.wanted[category]:.3f} of {score.wanted[category]}"
            if score.wanted[category]
            else ""
            for score in scores.values()
        ]
        lines.append(f"| {category} | {' | '.join(cells)} |")
    totals = [f"**{score.recall:.3f}** of {score.wanted.total()}" for score in scores.values()]
    right = [f"{score.right_spans / score.spans:.3f}" for score in scores.values()]
    lines += [f"| all | {' | '.join(totals)} |", f"| span precision | {' | '.join(right)} |"]
    return "\nOurs, by category:\n\n" + "\n".join(lines) + "\n"


def presidio(python: str, texts: list[str]) -> tuple[float, list[Spans]]:
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    run = subprocess.run(
        [python, "-c", PEER], input=lines, capture_output=True, text=True, check=True
    )
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    return sum(row[0] for row in rows), [[(a, b) for a, b in row[1]] for row in rows]


if __name__ == "__main__":
    main()
