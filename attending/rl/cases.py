"""The cases that reinforcement learning runs on: read strictly, written back, chosen by pass rate.

A case is a line of JSON: `id`, `messages` up to the user's turn, `kind`, and how the next answer is
scored: a `rule` (`attending.verifier.rules`), `rubrics` (HealthBench's form), or `patient`, the
name of a simulated one (`attending.verifier.patient.find`), whose complaint may be the messages.
"""

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from attending.artifact import disk_has_room
from attending.chat import ROLES
from attending.config import suggest
from attending.endpoint import Endpoint
from attending.errors import ConfigError, ReplyError
from attending.rl.recipe import RewardConfig
from attending.rl.reward import worth_of_nothing
from attending.rl.types import Case
from attending.rl.verify import judge_text
from attending.sources import Progress
from attending.verifier.ask import together
from attending.verifier.judge.verdict import Judge
from attending.verifier.rubric.schema import Rubric, parse_rubric, read_lines
from attending.verifier.rules import check

SCORED = {"rule": dict, "rubrics": list, "patient": str}
KEYS = {"id", "messages", "kind", *SCORED}
# Without a model's own settings for chat, such as top_k = 20: a run's sampler has none either.
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class Chosen(NamedTuple):
    """The cases to train on, and how many were left out on each side."""

    cases: list[Case]
    too_hard: int
    too_easy: int
    unmeasured: int


def read_cases(path: Path) -> list[Case]:
    """All cases of a file.

    Raises:
        ConfigError: With file and line, for what is no case or is there twice.
    """
    cases, places = list[Case](), dict[str, str]()
    for where, row in read_lines(path):
        try:
            cases.append(parse_case(row))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        name = cases[-1].id
        if name in places:
            raise ConfigError(
                f"{where}: id {name!r} is that of {places[name]}; each needs its own."
            )
        places[name] = where
    if not cases:
        raise ConfigError(f"{path.name} has no case: expected one JSON object a line.")
    return cases


def parse_case(row: Mapping[str, Any]) -> Case:
    """Of one line; ConfigError for what no answer could follow or nothing could score."""
    if unknown := sorted(row.keys() - KEYS):
        raise ConfigError(f"unknown key {unknown[0]!r}.{suggest(unknown[0], KEYS)}")
    name, kind, turns = row.get("id"), row.get("kind"), row.get("messages", [])
    if not (isinstance(name, str) and name and isinstance(kind, str) and kind):
        raise ConfigError(f"id {name!r} and kind {kind!r}: expected two texts that are not empty.")
    scored = {key: row[key] for key in SCORED if key in row}
    if len(scored) != 1 or not all(one and isinstance(one, SCORED[k]) for k, one in scored.items()):
        found = ", ".join(scored) or "nothing"
        raise ConfigError(f"case {name!r} is scored by {found}: give a rule, rubrics or a patient.")
    is_text = isinstance(turns, list) and all(
        isinstance(turn, dict)
        and turn.keys() == {"role", "content"}
        and turn["role"] in ROLES
        and isinstance(turn["content"], str)
        for turn in turns
    )
    if not is_text or ([turn["role"] for turn in turns][-1:] or ["user"]) != ["user"]:
        raise ConfigError(
            f"case {name!r}: its messages are no texts that end with the user's turn."
        )
    if not turns and "patient" not in scored:
        raise ConfigError(f"case {name!r} has no messages: only a patient opens by a complaint.")
    if "rule" in scored:
        check(scored["rule"], "x")  # of an empty answer less is looked at
    elif "rubrics" in scored:
        scored = {"prompt_id": name, "prompt": turns, **scored}
        scored = {"criteria": parse_rubric(scored).criteria}
    return Case(name, tuple(turns), kind, **scored)


def line_of(case: Case) -> dict[str, Any]:
    """A case as its file has it."""
    scored: dict[str, Any] = {"rule": case.rule, "patient": case.patient}
    if case.criteria:
        scored["rubrics"] = Rubric(case.id, case.messages, case.criteria).row()["rubrics"]
    turns = [dict(turn) for turn in case.messages]
    told = {key: value for key, value in scored.items() if value}
    return {"id": case.id, "messages": turns, "kind": case.kind, **told}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One a line, in a folder that is made; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    with disk_has_room(path), draft.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(one, ensure_ascii=False) + "\n" for one in rows)
    draft.replace(path)


def is_affine_only(case: Case) -> bool:
    """Whether HealthBench's score has no denominator: nothing in the rubric earns points."""
    return bool(case.criteria) and all(one.points < 0 for one in case.criteria)


async def pass_rates(
    cases: Iterable[Case], samples: Mapping[str, Sequence[str]], judge: Judge | None = None
) -> dict[str, float]:
    """By id, the share of the start model's answers that pass; of what has a rule and answers.

    With a judge of cases with criteria, too: what is worth more than an answer that meets none;
    unscored answers do not count.
    """

    async def passes(case: Case, text: str) -> bool | None:
        if case.rule:
            return check(case.rule, text).passed
        worth = (await judge_text(case, text, judge, RewardConfig())).score
        return None if worth is None else worth > worth_of_nothing(case.criteria)

    able = [case for case in cases if case.rule or (case.criteria and judge)]
    asked = [(case, text) for case in able for text in samples.get(case.id, ())]
    found = await together([passes(*each) for each in asked])
    known: dict[str, list[bool]] = {}
    for (case, _), one in zip(asked, found, strict=True):
        if one is not None:
            known.setdefault(case.id, []).append(one)
    return {name: sum(every) / len(every) for name, every in known.items()}


def choose(
    cases: Iterable[Case], rates: Mapping[str, float], low: float = 0.2, high: float = 0.8
) -> Chosen:
    """Those with a pass rate from `low` to `high`: of others a group seldom has an advantage.

    M2 keeps prompts of suitable difficulty (arXiv 2509.02208, section 3.3) and gives no band.
    """
    kept, counts = list[Case](), {"too_hard": 0, "too_easy": 0, "unmeasured": 0}
    for case in cases:
        if (rate := rates.get(case.id)) is None:
            counts["unmeasured"] += 1
        elif low <= rate <= high:
            kept.append(case)
        else:
            counts["too_hard" if rate < low else "too_easy"] += 1
    return Chosen(kept, **counts)


async def measure(
    endpoint: Endpoint,
    cases: Sequence[Case],
    samples: int,
    max_tokens: int,
    progress: Progress = lambda *_: None,
    template: Mapping[str, Any] | None = None,
    concurrency: int = 16,
) -> dict[str, list[str]]:
    """So many answers of a model to each case without a patient, sampled as in a run; by id.

    `template` is what the run will tell the chat template, as without it other answers are passed.
    A case to which a reply failed has fewer, or none, and is unmeasured then.
    """
    found: dict[str, list[str]] = {case.id: [] for case in cases}
    todo = [(case, seed) for case in cases if not case.patient for seed in range(samples)]
    pending, done = iter(todo), 0
    how: dict[str, Any] = {**PLAIN, "max_tokens": max_tokens}
    how |= {"chat_template_kwargs": dict(template)} if template else {}

    async def work() -> None:
        nonlocal done
        for case, seed in pending:
            with contextlib.suppress(ReplyError):
                reply = await endpoint.chat([dict(t) for t in case.messages], seed=seed, **how)
                found[case.id].append(reply.text)
            done += 1
            progress(done, len(todo), "answers")

    await together([work() for _ in range(min(concurrency, len(todo)))])
    return found
