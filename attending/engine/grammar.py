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
        self._matcher, self._tokenizer, self._decoder = matcher, tokenizer, tokenizer.decoder()
        self._open_id = tokenizer.control_id(THINK_OPEN) if tokenizer.reasons else None
        self._is_free, self._is_first = opened, not opened
        self._thought = ""

    def allowed(self) -> NDArray[np.bool_] | None:
        """[V] what may come next; None: anything."""
        if self._is_free:
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = np.unpackbits(bits, bitorder="little").astype(np.bool_)
        if self._is_first and self._open_id is not None:
            mask[self._open_id] = True  # the model may choose to reason first
        return mask

    def advance(self, token: int) -> None:
        """A token was chosen."""
        if self._is_free:
            self._thought = self._thought[-64:] + self._decoder.feed(token)
            _, closed, rest = self._thought.partition(THINK_CLOSE)
            self._is_free = not closed
            if rest.strip():  # the same token went on behind the tag
                self._matcher.consume_tokens(self._tokenizer.encode(rest.lstrip()))
                self._check()
        elif self._is_first and token == self._open_id:
            self._is_free = True
        else:
            self._matcher.consume_token(token)
            self._check()
        self._is_first = False

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UsageError(f"the form of the answer cannot be enforced: {_reason(self._matcher)}")


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
        try:
            grammar = LLMatcher.grammar_from_json_schema(dict(schema), overrides=JSON_OPTIONS)
        except ValueError:  # its message repeats the schema
            raise UsageError("the schema cannot be enforced: it is not JSON.") from None
        return self._compile(grammar, opened)

    def call(
        self, functions: Sequence[tuple[str, Mapping[str, Any]]], *, opened: bool
    ) -> Constraint:
        """An answer that is one call of one of the functions, given with their schemas."""
        head, tail = self._tag(CALL_OPEN, "", "\n"), self._tag(CALL_CLOSE, "\n", "")
        names = [f"call_{index}" for index in range(len(functions))]
        rules = [f"start: {head} call {tail}", f"call: {' | '.join(names)}"]
        for rule, (name, parameters) in zip(names, functions, strict=True):
            begin = json.dumps(f'{{"name": {json.dumps(name)}, "arguments": ')
            # A schema is the root of its own rule, so its own `$ref`s stay true.
            schema = {"type": "object", **parameters, "x-guidance": JSON_OPTIONS}
            rules += [
                f'{rule}: {begin} {rule}_json "}}"',
                f"{rule}_json: %json {json.dumps(schema)}",
            ]
        return self._compile(LLMatcher.grammar_from_lark("\n".join(rules)), opened)

    def _tag(self, tag: str, before: str, after: str) -> str:
        """A tag in Lark: as its own token where the vocabulary has one, else as text."""
        if self._tokenizer.control_id(tag) is None:
            return json.dumps(before + tag + after)
        spaces = [json.dumps(text) if text else "" for text in (before, after)]
        return f"{spaces[0]} <[{self._tokenizer.control_id(tag)}]> {spaces[1]}"

    def _compile(self, grammar: str, opened: bool) -> Constraint:
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise UsageError(f"the schema cannot be enforced: {_reason(matcher)}")
        if matcher.is_accepting():  # nothing at all is no JSON
            raise UsageError("the schema cannot be enforced: it has no finite answer.")
        return Constraint(matcher, self._tokenizer, opened=opened)

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        try:
            return LLTokenizer(
                json.dumps(self._tokenizer.definition),
                n_vocab=self._vocab_size,
                eos_token=sorted(self._stop_ids),
            )
        except ValueError as error:
            raise UsageError(f"this model's vocabulary allows no grammar: {error}") from None


def _reason(matcher: LLMatcher) -> str:
    return str(matcher.get_error()).strip().partition("\n")[0]
