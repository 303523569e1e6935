"""Constructed pairs of a statement and an answer, labelled by how they were made.

K-QA's statements are physicians' own rewordings of their answers (arXiv 2401.14493); those of
MedQuAD (Ben Abacha, Demner-Fushman 2019) are sentences that rules reword. Every answer that does
not support its statement is about the same subject: its support was removed or contradicted, or it
answers another question about the disease. Edits leave positives too, so that they are no sign.
"""

import hashlib
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from attending.errors import UsageError
from attending.verifier.contradict import contradict
from attending.verifier.data import table
from attending.verifier.judge.embedded import nearness, sentences
from attending.verifier.judge.encoder import Bert, Weights, embed

RULES = table("judge/reword")
DROP, LISTING, SUBJECT, DULL = (
    re.compile(RULES[name]) for name in ("drop", "listing", "subject", "boilerplate")
)
SYNONYM = re.compile(rf"\b({'|'.join(sorted(RULES['synonyms'], key=len, reverse=True))})\b")
STATEMENT = re.compile(r"[A-Z](?:\S+ ){5,34}\S+\.")
PARTS = {"train": slice(101), "tune": slice(101, 141), "report": slice(141, 201)}
LONGEST = 12  # sentences of a document
ALIGNED, SAME, SUPPORT = 0.5, 0.75, 0.8  # least cosine of support; of a repeat; share of the best
Rows = Sequence[Mapping[str, Any]]


class Supported(NamedTuple):
    """A statement with the answer that it was drawn from."""

    statement: str
    parts: list[str]
    siblings: Sequence[list[str]]  # other answers about the same disease
    cluster: str  # the question
    weight: float


class Pair(NamedTuple):
    """A statement, an answer's sentences, and whether they support it.

    Kinds that are met: `plain`, `elsewhere` (another sentence was edited), `negated` (both say the
    opposite). Not met: `removed`, `contradicted`, `sibling`.
    """

    statement: str
    parts: list[str]
    met: bool
    kind: str
    cluster: str
    weight: float


def read_rows(path: Path, *fields: str) -> list[dict[str, Any]]:
    """The records of a JSONL file; UsageError unless each has the fields."""
    lines = path.read_text("utf-8").split("\n") if path.is_file() else []
    try:
        rows = [json.loads(line) for line in lines if line.strip()]
        is_whole = bool(rows) and all(row.keys() >= {*fields} for row in rows)
    except (json.JSONDecodeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise UsageError(f"{path.name} is not a JSONL file whose rows have {', '.join(fields)}.")
    return rows


def read_kqa(path: Path) -> list[dict[str, Any]]:
    """K-QA's rows, in the order of their questions' sha256, which decides the parts."""
    fields = ("Question", "Free_form_answer", "Must_have", "Nice_to_have", "ICD_10_diag")
    rows = read_rows(path, *fields)
    return sorted(rows, key=lambda row: hashlib.sha256(row["Question"].encode()).hexdigest())


def kqa_cases(
    rows: Rows,
    part: str,
    weight: float = 1.0,
    documents: Rows = (),
    rng: random.Random | None = None,
) -> Iterator[Supported]:
    """Every statement of a part, half of them in other words again where there is an `rng`.

    Siblings share the diagnosis; those to train on are of the same part.
    """
    chosen = rows[PARTS[part]]
    others = chosen if part == "train" else rows
    for row in chosen:
        code, parts = row["ICD_10_diag"] or "", sentences(row["Free_form_answer"])
        subject = f"{row['Question']} {code}".lower()
        near = [one["Free_form_answer"] for one in others if code == one["ICD_10_diag"] != ""]
        near = [text for text in near if text != row["Free_form_answer"]]
        near += [one["answer"] for one in documents if one["focus"].lower() in subject]
        siblings = [sentences(text)[:LONGEST] for text in near[:3]]
        for text in filter(str.strip, (*row["Must_have"], *row["Nice_to_have"])):
            statement = (
                text.strip() if rng is None or rng.random() < 0.5 else reword(text.strip(), rng)
            )
            yield Supported(statement, parts, siblings, row["Question"], weight)


def medquad_cases(
    documents: Rows, kqa: Rows, count: int, rng: random.Random
) -> Iterator[Supported]:
    """Two reworded sentences of each of `count` answers, of no disease in K-QA's held-out rows."""
    held = [*kqa[PARTS["tune"]], *kqa[PARTS["report"]]]
    named = " ".join(" ".join(map(str, row.values())) for row in held).lower()
    by_focus = defaultdict(list)
    for row in documents:
        by_focus[row["focus"], *row["synonyms"]].append(row["answer"])
    order = [(names, text) for names, texts in by_focus.items() for text in texts]
    for names, text in rng.sample(order, len(order)):
        if not count:
            return
        parts = sentences(text)[:LONGEST]
        usable = [part for part in parts if STATEMENT.fullmatch(part) and not DULL.search(part)]
        is_held = any(name.lower() in named for name in names if len(name) > 3)
        if len(parts) > 2 and len(usable) > 1 and not is_held:
            count -= 1
            siblings = [sentences(one)[:LONGEST] for one in by_focus[names] if one != text]
            for part in rng.sample(usable, 2):
                yield Supported(reword(part, rng), parts, siblings[:1], names[0], 1.0)


def reword(sentence: str, rng: random.Random) -> str:
    """One item of a list, fewer asides, other words: what it says stays true."""
    if (listing := LISTING.match(sentence)) and rng.random() < 0.8:
        items = re.split(r", (?:and |or )?", listing[2])
        sentence = f"{listing[1]} {rng.choice(items).strip()}."
    text, swap = DROP.sub("", sentence).strip(), RULES["synonyms"]
    text = SYNONYM.sub(lambda hit: swap[hit[1]] if rng.random() < 0.7 else hit[1], text)
    if rng.random() < 0.3:
        text = SUBJECT.sub("It", text)
    return text[:1].upper() + text[1:]


def construct(bert: Bert, cases: Iterable[Supported], rng: random.Random) -> list[Pair]:
    """All pairs of all cases; edits only where the supporting sentence is plain to see."""
    some = [case for case in cases if case.parts]
    known = embed(bert, (t for c in some for t in (c.statement, *c.parts, *chain(*c.siblings))))
    return [Pair(*one, c.cluster, c.weight) for c in some for one in _variants(c, rng, known)]


def _variants(
    case: Supported, rng: random.Random, known: Weights
) -> Iterator[tuple[str, list[str], bool, str]]:
    statement, parts = case.statement, case.parts
    yield statement, parts, True, "plain"
    near = nearness(statement, parts, known)
    best = max(range(len(parts)), key=lambda i: sum(near[i]))
    if near[best][0] < ALIGNED:
        return
    rest = [p for p, own in zip(parts, near, strict=True) if sum(own) < SUPPORT * sum(near[best])]
    if rest:
        yield statement, rest, False, "removed"
        other = rng.choice(rest)
        new = rng.choice(["", *(text for text, _ in contradict(other))])
        edited = (new if part == other else part for part in parts)
        yield statement, [part for part in edited if part], True, "elsewhere"
    for sibling in filter(None, case.siblings):
        if max(cosine for cosine, _ in nearness(statement, sibling, known)) < SAME:
            yield statement, sibling, False, "sibling"
            break
    if not (made := contradict(statement)):
        return
    kind = rng.choice(sorted({kind for _, kind in made}))
    opposite = claim = next(new for new, its in made if its == kind)
    yield opposite, parts, False, "contradicted"
    # In place of the support stands the opposite of the statement, or the support's own negation.
    theirs = contradict(parts[best])
    if near[best][0] >= SAME and kind == "negation" and theirs[:1] and theirs[0][1] == kind:
        claim = rng.choice([claim, theirs[0][0]])
    against = [
        claim if part == parts[best] else part
        for part in parts
        if part == parts[best] or part in rest
    ]
    yield statement, against, False, "contradicted"
    yield reword(opposite, rng), against, True, "negated"
