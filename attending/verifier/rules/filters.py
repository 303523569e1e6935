"""M2's four filters for prompts that a rule can check (Baichuan-M2, section 3.3, first stage)."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attending.endpoint import Endpoint, Reply
from attending.errors import ReplyError, UsageError
from attending.overlap import normalise
from attending.verifier.data import template
from attending.verifier.rules import check
from attending.verifier.rules.rule import DATA, answer_of
from attending.verifier.rules.text import script

ANSWERED = re.compile(DATA["filters"]["answered"])
REPLIES: dict[str, bool] = DATA["filters"]["replies"]


class Candidate(NamedTuple):
    """A prompt with its rule, and the reference answer as a response would write it."""

    key: str
    prompt: str
    rule: Mapping[str, Any]
    reference: str


class Filtered(NamedTuple):
    """Which candidates stay, and where each other one ended."""

    kept: tuple[Candidate, ...]
    removed: dict[str, str]  # key: the filter
    undecided: dict[str, str]  # key: the filter that got no usable reply
    counts: dict[str, int]  # kept, undecided, and removed by each filter


async def filtered(
    candidates: Sequence[Candidate],
    endpoint: Endpoint,
    pass_rates: Mapping[str, float],
    band: tuple[float, float],
    **sampling: Any,
) -> Filtered:
    """Keep what passes all four, in this order; a candidate ends at the first that it fails.

    definite: the reference passes its own rule, and no equal prompt has another reference.
    agreed: the answer of the endpoint's model, an advanced one, passes the rule.
    reasoning: that model says that the answer takes reasoning.
    difficulty: the start model's pass rate of this key is within the band, ends included.

    Raises:
        UsageError: A key is there twice, or has no pass rate.
        EndpointError: Nobody answers; what was answered is not asked again.
    """
    keys = Counter(candidate.key for candidate in candidates)
    if wrong := [key for key, count in keys.items() if count > 1 or key not in pass_rates]:
        raise UsageError(f"keys twice or without a pass rate: {wrong[:5]}; give each key once.")
    answers: dict[str, set[str]] = {}
    for one in candidates:
        answers.setdefault(_plain(one.prompt), set()).add(_plain(one.reference))

    async def end(one: Candidate) -> tuple[str, bool]:
        """The filter at which a candidate ends, and whether for want of a usable reply."""
        is_one = len(answers[_plain(one.prompt)]) == 1
        if not is_one or not check(one.rule, one.reference).passed:
            return "definite", False
        for name in ("agreed", "reasoning"):
            try:
                passed = await _asked(endpoint, name, one, sampling)
            except ReplyError:
                return name, True
            if not passed:
                return name, False
        return "" if band[0] <= pass_rates[one.key] <= band[1] else "difficulty", False

    ends = await asyncio.gather(*map(end, candidates))
    fates = [*zip(candidates, ends, strict=True)]
    kept = tuple(one for one, (name, _) in fates if not name)
    removed = {one.key: name for one, (name, is_open) in fates if name and not is_open}
    undecided = {one.key: name for one, (name, is_open) in fates if is_open}
    counts = {"kept": len(kept), "undecided": len(undecided), **Counter(removed.values())}
    return Filtered(kept, removed, undecided, counts)


def _plain(text: str) -> str:
    return " ".join(normalise(text)) or text


async def _asked(
    endpoint: Endpoint, name: str, one: Candidate, sampling: Mapping[str, Any]
) -> bool:
    def read(reply: Reply) -> bool:
        text = answer_of(reply.text)
        if not text or reply.finish_reason == "length":
            raise ReplyError("the reply is empty or cut: allow more max_tokens.")
        if name == "agreed" and ANSWERED.match(text.splitlines()[-1]):
            return check(one.rule, text).passed
        word = text.strip(' .。*"“”').casefold()
        if name == "agreed" or word not in REPLIES:
            raise ReplyError(f"the reply has not the form that {name}.jinja asks for.")
        return REPLIES[word]

    chinese = script(one.prompt) == "zh"
    asked = template(f"rules/prompts/{name}").render(prompt=one.prompt, chinese=chinese)
    kind = json.dumps([name, one.rule], sort_keys=True)
    said = await endpoint.derived([{"role": "user", "content": asked}], read, kind=kind, **sampling)
    return bool(said.value)
