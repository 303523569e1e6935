"""Answers of a prescribed form: a grammar says at each place which tokens may follow.

llguidance compiles JSON schemas and computes the masks. A model that reasons is free until its
reasoning has ended: a grammar from the first token would silence the reasoning.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from attending.chat import THINK_CLOSE, THINK_OPEN, Tokenizer
from attending.engine.answer import CALL_CLOSE, CALL_OPEN
from attending.errors import UsageError

# Only as pretty-printers write it: small models may otherwise go on with spaces for ever.
JSON_OPTIONS: Any = {"whitespace_pattern": r"( |\n {0,16})"}


class Constraint:
    """The grammar of one answer."""

    def __init__(self, matcher: LLMatcher, tokenizer: Tokenizer, *, opened: bool) -> None:
        """`opened`: the prompt leaves the model inside its reasoning."""
        self._matcher, self._decoder = matcher, tokenizer.decoder()
        self._open_id = tokenizer.control_id(THINK_OPEN) if tokenizer.reasons else None
        self._is_free, self._is_first = opened, not opened
        self._thought = ""

    def allowed(self) -> NDArray[np.bool_] | None:
        """[V] what may come next; None: anything."""
        if self._is_free:
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.unpackbits(bits, bitorder="little").astype(np.bool_)
        if self._is_first and self._open_id is not None:
            mask[self._open_id] = True  # the model may choose to reason first
        return mask

    def advance(self, token: int) -> None:
        """A token was chosen."""
        if self._is_free:
            self._thought = (self._thought + self._decoder.feed(token))[-64:]
            self._is_free = THINK_CLOSE not in self._thought
        elif self._is_first and token == self._open_id:
            self._is_free = True
        else:
            self._matcher.consume_token(token)
        self._is_first = False


class Grammars:
    """Compiles what clients prescribe, for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]) -> None:
        """`vocab_size`: of the model's logits, which may be more than the tokenizer's."""
        self._tokenizer, self._vocab_size, self._stop_ids = tokenizer, vocab_size, stop_ids

    def json(self, schema: Mapping[str, Any], *, opened: bool) -> Constraint:
        """An answer that is JSON of a schema.

        Raises:
            UsageError: The schema is not valid, or uses what cannot be enforced.
        """
        grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides=JSON_OPTIONS)
        return self._compile(grammar, opened)

    def call(self, functions: Sequence[tuple[str, Mapping[str, Any]]], *, opened: bool) -> Any:
        """An answer that is one call of one of the functions, given with their schemas."""
        schemas = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": dict(parameters)},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name, parameters in functions
        ]
        lark = "start: OPEN call CLOSE\n".replace("OPEN", self._tag(CALL_OPEN, "", "\n"))
        lark = lark.replace("CLOSE", self._tag(CALL_CLOSE, "\n", ""))
        lark += f"call: %json {json.dumps({'anyOf': schemas, 'x-guidance': JSON_OPTIONS})}\n"
        return self._compile(LLMatcher.grammar_from_lark(lark), opened)

    def _tag(self, tag: str, before: str, after: str) -> str:
        """A tag in Lark: as its own token where the vocabulary has one, else as text."""
        if self._tokenizer.control_id(tag) is None:
            return json.dumps(before + tag + after)
        spaces = [json.dumps(text) if text else "" for text in (before, after)]
        return f"{spaces[0]} <[{self._tokenizer.control_id(tag)}]> {spaces[1]}"

    def _compile(self, grammar: str, opened: bool) -> Constraint:
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().strip().partition("\n")[0]
            raise UsageError(f"the schema cannot be enforced: {reason}")
        return Constraint(matcher, self._tokenizer, opened=opened)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        return LLTokenizer(
            json.dumps(self._tokenizer.definition),
            n_vocab=self._vocab_size,
            eos_token=sorted(self._stop_ids),
        )
