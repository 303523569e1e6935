"""From tokens to the parts of an answer: one incremental parser for everything a stream may hold.

Stop texts, reasoning between think tags and tool calls are found wherever the borders of tokens
fall; the parts are the same for every way the text is cut. What cannot be parsed stays text:
nothing that the model wrote is lost.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from attending.chat import THINK_CLOSE, THINK_OPEN, Tokenizer

CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


class Piece(NamedTuple):
    """A part of an answer's text."""

    kind: Literal["reasoning", "content"]
    text: str


class Call(NamedTuple):
    """A tool call that the model wrote."""

    name: str
    arguments: str
    """As JSON."""


Part = Piece | Call


class AnswerParser:
    """Splits a stream of answer text.

    Reasoning that is never closed stays reasoning: cut-off thoughts are not an answer.
    """

    def __init__(
        self,
        *,
        reasons: bool = False,
        opened: bool = False,
        tools: bool = False,
        stops: Sequence[str] = (),
    ) -> None:
        """Say what may occur.

        Args:
            reasons: Answers may begin with `<think>`.
            opened: The prompt already ended with the opening tag.
            tools: Content may hold `<tool_call>` blocks of JSON, as Qwen and Hermes write them.
            stops: Texts that end the answer, none of them empty.
        """
        self.ended = False
        """Whether a stop text was met; what is fed after it is ignored."""
        self._stops, self._tools = stops, tools
        self._tail = ""  # may become a stop text
        self._held = ""  # may become a tag
        self._gap = ""  # white space before a call, in case it is none
        self._state: Literal["start", "reasoning", "between", "content", "call"]
        self._state = "reasoning" if opened else "start" if reasons else "content"
        self._trim = opened

    @property
    def phase(self) -> Literal["undecided", "reasoning", "answer"]:
        """Where the text fed so far ends; undecided while it may still begin a think tag."""
        if self._state == "start":
            return "undecided"
        return "reasoning" if self._state == "reasoning" else "answer"

    def feed(self, text: str) -> list[Part]:
        """The parts that are certain by now."""
        if self.ended:
            return []
        self._tail += text
        found = [(at + len(s), at) for s in self._stops if (at := self._tail.find(s)) >= 0]
        if found:  # the one that is complete first
            self.ended = True
            self._held += self._tail[: min(found)[1]]
            return self._parts(final=True)
        keep = max((_overlap(self._tail, stop) for stop in self._stops), default=0)
        cut = len(self._tail) - keep
        self._held += self._tail[:cut]
        self._tail = self._tail[cut:]
        return self._parts(final=False)

    def finish(self) -> list[Part]:
        """What was held back: the answer has ended."""
        if self.ended:
            return []
        self.ended = True
        self._held += self._tail
        return self._parts(final=True)

    def _parts(self, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        for part in self._advance(final=final):
            if isinstance(part, Call):
                parts.append(part)
            elif parts and isinstance(parts[-1], Piece) and parts[-1].kind == part.kind:
                parts[-1] = Piece(part.kind, parts[-1].text + part.text)
            elif part.text:
                parts.append(part)
        return parts

    def _advance(self, *, final: bool) -> Iterator[Part]:
        steps = {
            "start": self._start,
            "reasoning": self._reasoning,
            "between": self._between,
            "content": self._content,
            "call": self._call,
        }
        before = None
        while self._state != before:
            before = self._state
            yield from steps[before](final=final)

    def _start(self, *, final: bool) -> Iterator[Part]:
        body = self._held.lstrip()
        if body.startswith(THINK_OPEN):
            self._held = body.removeprefix(THINK_OPEN)
            self._state, self._trim = "reasoning", True
        elif final or not THINK_OPEN.startswith(body):
            self._state = "content"
        yield from ()

    def _between(self, *, final: bool) -> Iterator[Part]:
        self._held = self._held.lstrip("\n")
        self._state = "content" if self._held else "between"
        yield from ()

    def _reasoning(self, *, final: bool) -> Iterator[Part]:
        if self._trim:
            self._held = self._held.lstrip("\n")
            self._trim = not self._held
        thought, closed, rest = self._held.partition(THINK_CLOSE)
        if closed:
            self._state, self._held = "between", rest
            yield Piece("reasoning", thought.rstrip("\n"))
            return
        keep = 0 if final else _overlap(self._held, THINK_CLOSE)
        text = self._held[: len(self._held) - keep]
        certain = text.rstrip("\n")  # newlines before the closing tag are not part of the thought
        self._held = "" if final else self._held[len(certain) :]
        yield Piece("reasoning", certain)

    def _content(self, *, final: bool) -> Iterator[Part]:
        if not self._tools:
            text, self._held = self._held, ""
            yield Piece("content", text)
            return
        text, opened, rest = self._held.partition(CALL_OPEN)
        if opened:
            certain = text.rstrip()  # white space before a call is no part of the content
            self._state, self._held, self._gap = "call", rest, text[len(certain) :]
        else:
            keep = 0 if final else _overlap(self._held, CALL_OPEN)
            text = self._held[: len(self._held) - keep]
            certain = text if final else text.rstrip()
            self._held = self._held[len(certain) :]
        yield Piece("content", certain)

    def _call(self, *, final: bool) -> Iterator[Part]:
        body, closed, rest = self._held.partition(CALL_CLOSE)
        if closed or final:
            call = _read_call(body) if closed else None
            self._state, self._held = "between" if call else "content", rest
            yield call or Piece("content", self._gap + CALL_OPEN + body + closed)


class AnswerWriter:
    """Takes one request's tokens as they come and gives the parts they complete."""

    def __init__(self, tokenizer: Tokenizer, parser: AnswerParser, stop_ids: Iterable[int]) -> None:
        """`stop_ids` end the answer and have no text."""
        self._decoder = tokenizer.decoder()
        self._parser = parser
        self._stop_ids = frozenset(stop_ids)
        self._has_called = False
        self._undecided = 0  # tokens that may turn out to begin the reasoning
        self.token_ids: list[int] = []
        self.reasoning_tokens = 0
        self.finish_reason: FinishReason | None = None
        """None until the answer has ended."""

    @classmethod
    def of_chat(
        cls,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop_ids: Iterable[int],
        stops: Sequence[str] = (),
        *,
        tools: bool = False,
    ) -> "AnswerWriter":
        """For the answer to a rendered conversation."""
        opened = tokenizer.reasons and tokenizer.opens_reasoning(prompt)
        parser = AnswerParser(reasons=tokenizer.reasons, opened=opened, tools=tools, stops=stops)
        return cls(tokenizer, parser, stop_ids)

    def feed(self, token: int | None, finish: Literal["stop", "length"] | None) -> list[Part]:
        """A token, and how the engine says that the answer ended, if it did."""
        parts: list[Part] = []
        if token is not None:
            self.token_ids.append(token)
            before = self._parser.phase
            if token not in self._stop_ids:
                parts = self._parser.feed(self._decoder.feed(token))
            self._undecided += before == "undecided"
            if before == "reasoning" or (before, self._parser.phase) == ("undecided", "reasoning"):
                self.reasoning_tokens += self._undecided or 1
                self._undecided = 0
        if self._parser.ended:
            finish = "stop"
        elif finish is not None:
            parts += self._parser.feed(self._decoder.finish())
            finish = "stop" if self._parser.ended else finish
            parts += self._parser.finish()
        self._has_called = self._has_called or any(isinstance(part, Call) for part in parts)
        called = self._has_called and finish == "stop"
        self.finish_reason = "tool_calls" if called else finish
        return parts


def _read_call(text: str) -> Call | None:
    try:
        value = json.loads(text)
        arguments = value.get("arguments", {})
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        if not isinstance(value["name"], str) or not isinstance(arguments, dict):
            return None
    except (ValueError, KeyError, AttributeError, RecursionError):
        return None
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


def _overlap(text: str, tag: str) -> int:
    """Length of the longest proper beginning of `tag` that `text` ends with."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:size]):
            return size
    return 0
