"""Cases made without a model: tasks whose answer is computed, and rubrics out of answers.

What they say is in `tasks.toml`. What a case is about (the numbers and what is done with them, or
the subject) decides by its hash which part it is in. So nothing of a held-out case is trained on,
its wording either. MedQuAD's subjects are held out as the corpus holds them out.
"""

import re
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from hashlib import sha256
from importlib import resources
from itertools import islice, product
from math import prod
from pathlib import Path
from random import Random
from string import Template
from typing import Any, Literal, NamedTuple

from attending.config import suggest
from attending.corpus.split import draw, is_held_out
from attending.errors import ConfigError, UsageError
from attending.rl.types import Case
from attending.verifier.rubric.reference import from_reference
from attending.verifier.rubric.schema import Message, read_lines

DATA = tomllib.loads((resources.files("attending.rl") / "tasks.toml").read_text("utf-8"))
SUBJECTS, DRUGS = (re.split(r"[|\n]", DATA[name]) for name in ("subjects", "drugs"))
FIELDS = ("focus", "qtype", "question", "answer")
PARTS = ("plus", "minus", "times", "over")
HELD_OUT = 5  # one in so many sums and subjects of ours
ONE = re.compile(r"\b1 (tablet|time)s\b")
FEW = 10  # options whose every pair is drawn again and again
MOST_TRIES = 2000  # draws in a row that bring nothing new
Part = Literal["train", "held_out"]
Row = Mapping[str, Any]
Rows = Sequence[Row]
Maker = Callable[[Random, int, Rows, bool], Iterator[Case]]


class Drawn(NamedTuple):
    """A task with all but its wording."""

    name: str
    key: str
    """What decides its answer."""
    like: str
    """What the answered ones before it share with it."""
    texts: tuple[Sequence[str], ...]
    """Of each part of the prompt its wordings, the last for the held-out part."""
    values: Row
    """Of the names in the wordings."""
    rule: Row
    answer: str = ""
    """As an example of a good one."""


def make(
    kind: str, count: int, seed: int, level: int, medquad: Path | None = None, part: Part = "train"
) -> Iterator[Case]:
    """So many cases of a kind, none of them twice: `dosage`, `format`, `options` or `rubric`.

    Args:
        kind: The last two are made of MedQuAD; `format` takes its subjects from there, if given.
        count: Of cases.
        seed: The same one gives the same cases.
        level: From 1, the easiest, to 3; of `dosage` to 4.
        medquad: A JSONL file of `focus`, `qtype`, `question` and `answer`.
        part: Of the two, which have no subject, numbers or wording in common.

    Raises:
        UsageError: Unknown kind, no MedQuAD, or there are not so many cases.
        ConfigError: A row of MedQuAD that is none.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown kind of case {kind!r}.{suggest(kind, KINDS)}")
    if medquad is None and kind in ("options", "rubric"):
        raise UsageError(f"cases of kind {kind!r} are made of MedQuAD: give its JSONL file.")
    rows, is_last = list[Row](), part == "held_out"
    for where, row in read_lines(medquad) if medquad else ():
        if lacks := [key for key in FIELDS if not isinstance(row.get(key), str)]:
            raise ConfigError(f"{where} lacks {lacks[0]!r}: expected a row of MedQuAD.")
        rows.append(row)
    rng, made = Random(f"{kind}/{seed}/{level}/{part}"), 0
    for case in islice(KINDS[kind](rng, level, rows, is_last), count):
        made += 1
        yield case
    if made < count:
        raise UsageError(
            f"there are {made} cases of kind {kind!r}, level {level}, part {part!r}, not {count}: "
            "ask for fewer, or for another level."
        )


def _dosage(rng: Random, level: int, _: Rows, is_last: bool) -> Iterator[Drawn]:
    """Arithmetic of few steps, its answer a whole number; an equal sum is in the same part."""
    # By task, then by answer: the numbers. So none is likelier as there are more sums of it.
    facts = defaultdict[int, dict[int, list[tuple[Row, str]]]](lambda: defaultdict(list))
    tasks = _of_level("dosage", level)
    for place, task in enumerate(tasks):
        names, some = zip(*task["levels"][str(level)].items(), strict=True)
        for values in (dict(zip(names, one, strict=True)) for one in product(*some)):
            parts = [sorted(values.get(one, one) for one in task.get(part, ())) for part in PARTS]
            plus, minus, times, over = parts
            first = sum(plus) - sum(minus) if plus else 1
            answer = Fraction(first * prod(times), prod(over))
            is_whole = answer.denominator == 1 and 0 < answer <= DATA["largest"][level - 1]
            if is_whole and (draw("held out", parts) % HELD_OUT == 0) == is_last:
                facts[place][int(answer)].append((values, str(parts)))
    while facts:
        task = tasks[place := rng.choice(list(facts))]
        result = rng.choice(list(facts[place]))
        drawn, key = rng.choice(facts[place][result])
        both = [result, rng.choice([one for one in facts[place] if one != result] or [result + 1])]
        told = {**drawn, "drug": rng.choice(DRUGS), "first": min(both), "second": max(both)}
        rule = {"kind": "numeric", "answer": result}
        closings = DATA["closings"].get(str(level), DATA["closings"]["more"])
        yield Drawn(
            task["name"], key, task["name"], (task["wordings"], closings), told, rule, str(result)
        )


def _format(rng: Random, level: int, rows: Rows, is_last: bool) -> Iterator[Drawn]:
    """A medical question and a form for its answer."""
    own = [one for one in SUBJECTS if (draw("held out", one) % HELD_OUT == 0) == is_last]
    subjects = sorted({row["focus"] for row in _of_part(rows, is_last)}) or own
    tasks = _of_level("format", level)
    while tasks:
        task = rng.choice(tasks)
        values = {name: rng.choice(some) for name, some in task["levels"][str(level)].items()}
        rule, values = filled(task["rule"], values), {**values, "focus": rng.choice(subjects)}
        yield Drawn(task["name"], "", "", (DATA["asked"], task["wordings"]), values, rule)


def _options(rng: Random, level: int, rows: Rows, is_last: bool) -> Iterator[Drawn]:
    """A fact about a subject beside the same kind of fact about another one.

    Neither place nor option tells which is right: the places alternate, and as a pair of options is
    drawn before the subject, each is right as often as it is wrong.
    """
    task: Row = next((one for one in DATA["options"] if one["level"] == level), {})
    facts = defaultdict[str, dict[str, str]](dict)  # by option, by subject: the answer
    for row in _of_part(rows, is_last) if task else ():
        if row["qtype"] == task["qtype"]:
            hits = ((re.search(one, row["answer"]), said) for one, said in task["facts"])
            if right := next((hit.expand(said) for hit, said in hits if hit), ""):
                facts[right].setdefault(row["focus"], row["answer"])
    names, is_first, tries = sorted(facts), True, 0
    while len(names) > 1 and tries < MOST_TRIES:
        right, wrong = rng.sample(names, 2)
        tries += 1
        subject = rng.choice(sorted(facts[right]))
        if re.search(task["signs"].get(wrong, re.escape(wrong)), facts[right][subject], re.I):
            continue
        both = (right, wrong) if is_first else (wrong, right)
        rule = {"kind": "choice", "options": dict(zip("AB", both, strict=True))}
        rule |= {"answer": "A" if is_first else "B"}
        values = {"focus": subject, "first": both[0], "second": both[1]}
        like = " ".join(sorted(both)) if len(names) < FEW else ""
        yield Drawn(task["name"], subject, like, (task["wordings"],), values, rule, right)
        is_first, tries = not is_first, 0


def _worded(drawn: Callable[[Random, int, Rows, bool], Iterator[Drawn]], kind: str) -> Maker:
    """Tasks as cases, each prompt once, behind others like it that are answered already.

    What is answered there is always of the part that is trained on, and never what is asked.
    """

    def turns(rng: Random, one: Drawn, is_last: bool) -> tuple[Message, ...]:
        own = (texts[-1:] if is_last else texts[:-1] for texts in one.texts)
        text = filled(" ".join(map(rng.choice, own)), one.values)
        text = ONE.sub(r"1 \1", text[:1].upper() + text[1:])
        return {"role": "user", "content": text}, {"role": "assistant", "content": one.answer}

    def cases(rng: Random, level: int, rows: Rows, is_last: bool) -> Iterator[Case]:
        shots = dict(enumerate(DATA["shots"].get(kind, ()), 1)).get(level, 0)
        answered = drawn(Random(rng.random()), level, rows, False)
        seen, tries = set[str](), 0
        for one in drawn(rng, level, rows, is_last):
            asked, _ = turns(rng, one, is_last)
            tries = tries + 1 if asked["content"] in seen else 0
            if tries > MOST_TRIES:
                return
            if not tries:
                seen.add(asked["content"])
                others = (o for o in islice(answered, MOST_TRIES) if o.like == one.like)
                near = islice((o for o in others if o.key != one.key), shots)
                told = (turn for other in near for turn in turns(rng, other, False))
                name = _name(kind, level, one.name, asked["content"])
                yield Case(name, (*told, asked), kind, rule=one.rule)

    return cases


def _rubrics(rng: Random, level: int, rows: Rows, is_last: bool) -> Iterator[Case]:
    """Questions with the criteria that `from_reference` makes of their answers."""
    words, most = ([0, *DATA["rubric"][name]] for name in ("words", "criteria"))
    own, seen = _of_part(rows, is_last), set[str]()
    for row in rng.sample(own, len(own)) if 0 < level < len(words) else ():
        text = row["question"]
        for pattern, plain in DATA["rubric"]["plain"]:
            text = re.sub(pattern, plain, text)
        name = _name("rubric", level, row["qtype"], text)
        if name in seen or not words[level - 1] < len(row["answer"].split()) <= words[level]:
            continue
        with suppress(ConfigError):  # an answer that states nothing
            turns = ({"role": "user", "content": text},)
            rubric = from_reference(name, turns, row["answer"], limit=most[level])
            if len(rubric.criteria) > 1:
                seen.add(name)
                yield Case(name, turns, "rubric", criteria=rubric.criteria)


def filled(value: Any, values: Row) -> Any:
    """With what `$name` stands for, at any depth; a text that is only a name becomes its value."""
    if isinstance(value, dict):
        return {key: filled(one, values) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, values) for one in value]
    if not isinstance(value, str):
        return value
    is_name = value[:1] == "$" and value[1:] in values
    return values[value[1:]] if is_name else Template(value).safe_substitute(values)


def _of_part(rows: Rows, is_last: bool) -> Rows:
    return [row for row in rows if is_held_out(row["focus"]) == is_last]


def _of_level(kind: str, level: int) -> list[Row]:
    return [one for one in DATA[kind] if str(level) in one["levels"]]


def _name(kind: str, level: int, task: str, text: str) -> str:
    """An id that the prompt decides."""
    return f"{kind}-{level}/{task}/{sha256(text.encode()).hexdigest()[:12]}"


KINDS: dict[str, Maker] = {
    "dosage": _worded(_dosage, "dosage"),
    "format": _worded(_format, "format"),
    "options": _worded(_options, "options"),
    "rubric": _rubrics,
}
