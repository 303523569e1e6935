"""A rubric out of a reference answer and a case's facts, by rules alone: no model, no cost.

It rewards what the reference says and punishes what contradicts it; so it is as good as the
reference, and blind to another answer that is right as well. Words are in `reference.toml`.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from attending.errors import ConfigError
from attending.overlap import HAN, normalise
from attending.verifier.contradict import contradict
from attending.verifier.data import table
from attending.verifier.rubric.check import repeats
from attending.verifier.rubric.schema import LARGEST, Criterion, Message, Rubric
from attending.verifier.sentences import sentences

WORDS = table("rubric/reference")


def _any(words: Sequence[str]) -> str:
    """Whole words where they are English."""
    return rf"(?:(?<![a-z])(?:{'|'.join(words)})(?!(?<=[a-z])[a-z]))"


FIND = {name: re.compile(_any(words), re.I) for name, words in WORDS["find"].items()}
UNNAMED = [(re.compile(_any(one["words"]), re.I), one) for one in WORDS["unnamed"]]
IMPORTANCE = [(re.compile(_any(one["words"]), re.I), one["points"]) for one in WORDS["importance"]]
OPENING = re.compile(rf"(?:{FIND['opening'].pattern}[,，:：]?\s*)*", re.I)
MARKER = r"[ \t]*(?:[-*•]|\d{1,2}[.)、])"
LIST = re.compile(rf"^([^\n]+)[:：][ \t]*\n+((?:{MARKER}[^\n]*(?:\n+|\Z))+)", re.M)
ITEM = re.compile(rf"^{MARKER}\s*", re.M)
SUBJECT = re.compile(
    rf"(?!(?i:{FIND['adjunct'].pattern}))((?:[^,;:.()]|\([^)]*\)){{2,80}}?),? "
    rf"({FIND['verb'].pattern})"
)
COMMA = re.compile(r",\s*(?:and |or )?(?![^(]*\))|、|以及|和|及")
CONJUNCTION = re.compile(WORDS["conjunction"])
LEADS = [form.partition("{}")[0] for form in WORDS["wording"].values()]
SINGULAR, PLURAL = ("is", "was", "has", "does"), ("are", "were", "have", "do")
HANZI = re.compile(f"[{HAN}]")


class _Topic(NamedTuple):
    """What a following pronoun stands for."""

    text: str
    is_plural: bool


def from_reference(
    name: str,
    conversation: Sequence[Message],
    answer: str,
    facts: Sequence[str] = (),
    *,
    limit: int = 20,
) -> Rubric:
    """Each statement of the answer or the facts is a criterion, its contradiction a negative one.

    A statement is a sentence, a clause with a subject of its own, or an item of a list ("Side
    effects include A, B, and C"). Dropped are questions, filler, less than four words that are no
    order, a second referral to a doctor (but no emergency), a pronoun without a certain noun that
    is no diagnosis, and of the facts who came where. Points are 10 for an emergency, 8 safety,
    7 dose or course, 6 diagnosis or treatment, else 4; the items of a list share them. The
    weightiest `limit` criteria stay, in order; at most a quarter are negative, with the points of
    what they contradict; a fact with an age or an admission has no contradiction.

    Raises:
        ConfigError: Nothing is stated.
    """
    wanted, unwanted = list[Criterion](), list[Criterion]()
    told = [("reference", *one) for one in statements(answer)]
    told += [("case", fact.strip(), 1) for fact in facts]
    for source, text, items in told:
        bare = FIND["person"].sub("", text) if source == "case" else text
        if not normalise(FIND["anyone"].sub("", bare)):
            continue
        tags = ("level:example", f"source:{source}")
        points = max(1, weigh(bare) // items)
        said = _worded(text, source == "case")
        wanted.append(Criterion(said, points, ("axis:completeness", *tags)))
        false = [other for other, kind in contradict(text) if kind != "entity"]
        if false and items == 1 and bare == text:
            unwanted.append(Criterion(_worded(false[0]), -points, ("axis:accuracy", *tags)))
    draft = Rubric(name, tuple(conversation), (*wanted, *unwanted))
    again = {one.criteria[1] for one in repeats(draft)}
    left = [place for place in range(len(draft.criteria)) if place not in again]
    left.sort(key=lambda place: -abs(draft.criteria[place].points))
    against = [place for place in left if place >= len(wanted)][: limit // 4]
    kept = [place for place in left if place < len(wanted)][: limit - len(against)] + against
    if not kept:
        raise ConfigError(f"the reference of {name!r} states nothing that could be judged.")
    return Rubric(name, draft.conversation, tuple(draft.criteria[place] for place in sorted(kept)))


def weigh(text: str) -> int:
    """Points by the first class of words that a statement matches."""
    found = (points for words, points in IMPORTANCE if words.search(text))
    return int(next(found, WORDS["points"]))


def statements(text: str) -> Iterator[tuple[str, int]]:
    """What a text states, each to be understood alone; and the number of its list's items."""
    topic: _Topic | None = None
    is_referred, text = False, re.sub(r"\b’\b", "'", text)
    for clause in re.split(r"[;；]\s*|\n", "\n".join(sentences(LIST.sub(_unfold, text)))):
        clause = OPENING.sub("", clause, count=1)
        clause, topic = _resolved(clause[:1].upper() + clause[1:], topic)
        is_grave = weigh(clause) == LARGEST and clause[-1:] in ".!。！"  # a heading has no stop
        is_whole = any(FIND[name].match(clause) for name in ("imperative", "diagnosed"))
        is_short = not is_whole and len(normalise(clause)) < (6 if HANZI.search(clause) else 4)
        is_referral = len(clause) < 120 and bool(FIND["referral"].search(clause))
        is_idle = is_short or FIND["filler"].search(clause) or (is_referral and is_referred)
        if clause[-1:] in "?？:：" or (is_idle and not is_grave):
            continue
        is_referred |= is_referral
        for items in map(_items, _parts(clause, topic)):
            yield from ((item, len(items)) for item in items)


def _unfold(hit: re.Match[str]) -> str:
    """A list under a heading: each item with the heading before it."""
    head = hit[1].strip()
    head += " " if re.search(rf"{FIND['joins'].pattern}$", head, re.I) else ": "
    items = (item.strip() for item in ITEM.split(hit[2]) if item.strip())
    return "".join(f"{head}{item[0].lower()}{item[1:]}\n" for item in items)


def _resolved(text: str, topic: _Topic | None) -> tuple[str, _Topic | None]:
    """A statement whose subject is named, or nothing, and the subject for the next one."""
    if FIND["expletive"].match(text):
        return text, topic
    for unnamed, one in UNNAMED:
        if (hit := unnamed.match(text)) and (one["is_sure"] or topic is None):
            return one["name"] + re.sub("^'s", " is", text[hit.end() :]), None
    for name, is_plural in (("one", False), ("many", True)):
        hit = FIND[name].match(text)
        if hit and topic and topic.is_plural is is_plural:
            return topic.text + re.sub("^'s", " is", text[hit.end() :]), topic
    if FIND["lost"].match(text):
        return "", None
    hit = SUBJECT.match(text)
    if not hit or FIND["subordinate"].search(hit[1]):
        return text, None
    head = re.split(r",| \(| (?:such as|like|of|in|for|with)\b", hit[1])[0]
    is_many = hit[2] in PLURAL or (hit[2] not in SINGULAR and re.search(r"[^sui]s$| and ", head))
    return text, _Topic(hit[1], bool(is_many))


def _parts(text: str, topic: _Topic | None) -> list[str]:
    """What "X is A, but it should B." says, in two statements, where X is known."""
    if topic is None or not text.startswith(topic.text):
        return [text]
    *before, last = CONJUNCTION.split(text[len(topic.text) :])
    if any(map(FIND["subordinate"].search, before)):
        return [text]
    return [*(f"{topic.text} {part.strip()}." for part in before), f"{topic.text} {last.strip()}"]


def _items(text: str) -> list[str]:
    """What "X include A, B, and C." says, in three statements; another text as it is."""
    for hit in FIND["enumerating"].finditer(text):
        listed = [one.strip() for one in COMMA.split(text[hit.end() :].strip(" :：.。"))]
        listed = [one for one in listed if not FIND["rest"].fullmatch(one)]
        bare = [re.sub(r"\([^)]*\)", "", one) for one in listed]
        is_plain = all(0 < len(normalise(one)) <= 10 for one in bare)
        if len(listed) > 2 and is_plain and not any(map(FIND["clause"].search, bare)):
            head, end = ("", "。") if HANZI.search(hit[0]) else (" ", ".")
            return [f"{text[: hit.end()]}{head}{one}{end}" for one in listed]
    return [text]


def statement_of(criterion: str) -> str:
    """What a criterion made here states, without the words that make it one."""
    return re.sub(rf"^(?:{'|'.join(map(re.escape, LEADS))})", "", criterion)


def _worded(text: str, is_case: bool = False) -> str:
    """As a criterion says it; an order is another thing to say than a fact."""
    form = "case" if is_case else "order" if FIND["imperative"].match(text) else "fact"
    form += "_chinese" if HANZI.search(text) else ""
    return str(WORDS["wording"][form]).format(text.rstrip(" .!。！"))
