"""Rewards and checks that need no model: the same for RL, data building and evaluation (M2).

A rule is a function of a response's text and of its own fields; as data, `{"kind": "choice",
"options": {...}, "answer": "C"}`.
"""

from collections.abc import Callable, Mapping
from typing import Any

from attending.config import suggest
from attending.errors import ConfigError
from attending.verifier.rules.answer import choice, exact, items, maths, numeric
from attending.verifier.rules.ifeval import instructions
from attending.verifier.rules.rule import Checked, answer_of, bind, verdict
from attending.verifier.rules.text import json_value, language, length, regex, sections, think

RULES: dict[str, Callable[..., Checked]] = {
    **{"choice": choice, "numeric": numeric, "maths": maths, "exact": exact, "items": items},
    **{"regex": regex, "json": json_value, "sections": sections, "think": think},
    **{"length": length, "language": language, "ifeval": instructions},
}


def check(spec: Mapping[str, Any], response: str) -> Checked:
    """Judge a response by a rule given as data.

    Nothing within `<think>...</think>` counts, and a response cut within it has no answer; only
    the rule `think` looks there. Where the prompt ends in `<think>` (M2's mode `on`), give
    `"<think>" + response`.

    Raises:
        ConfigError: Unknown kind, or a field that is unknown, absent or wrong.
        UsageError: The rule needs the extra `verify`.
    """
    kind = str(spec.get("kind", ""))
    if kind not in RULES:
        raise ConfigError(f"unknown kind of rule {kind!r}.{suggest(kind, RULES)}")
    fields = {name: value for name, value in spec.items() if name != "kind"}
    own = bind(RULES[kind], fields, f"rule {kind}")
    visible = response if kind == "think" else answer_of(response)
    if visible is None:
        return verdict(False, "no answer: the thinking does not end")
    return RULES[kind](visible, **own)
