"""Messages to token ids and back: the only place that renders a conversation.

Text from users never becomes a control token. Before a template is rendered, every character of
theirs that could begin a control string is followed by a mark; in the result only the template's
own strings still match, and the marks are taken out before the pieces between are encoded.
"""

import datetime
import hashlib
import itertools
import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import tokenizers
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from attending.errors import ContextError, TokenizerError

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool", "developer")
REPLACEMENT = "\ufffd"
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


class Example(NamedTuple):
    """A conversation as it is trained on."""

    ids: list[int]
    is_learnt: list[bool]
    """Of each id: whether it is a target."""


class Tokenizer:
    """A tokenizer with its chat template."""

    def __init__(self, definition: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """From the contents of `tokenizer.json` and of `tokenizer_config.json`.

        The chat template is `config["chat_template"]`; without one, only plain text is encoded.
        """
        added = definition.get("added_tokens") or []
        self._added = {token["content"]: token for token in added}
        # Runs of white space are vocabulary, not control; everything else added is control.
        self._control = {name: token for name, token in self._added.items() if name.strip()}
        self._by_id = {token["id"]: token for token in added}
        # Without its added tokens, since taking out only some would renumber the others.
        self._plain = _without_added_tokens(definition)
        later = _without_first_prefix(definition)
        self._later = self._plain if later is definition else _without_added_tokens(later)
        self.definition, self.config = definition, config
        self.template: str | None = config.get("chat_template")

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read a model folder's tokenizer and template.

        Raises:
            TokenizerError: `tokenizer.json` is absent or unreadable.
        """
        definition = _read_json(folder / "tokenizer.json")
        if definition is None:
            raise TokenizerError(
                f"{folder.name} has no tokenizer.json. A SentencePiece tokenizer.model alone is "
                "not read: convert it with the tokenizer's own library and put the file there."
            )
        config = dict(_read_json(folder / "tokenizer_config.json") or {})
        template = folder / "chat_template.jinja"
        if template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        elif isinstance(config.get("chat_template"), list):  # several, by name
            named = {entry["name"]: entry["template"] for entry in config["chat_template"]}
            config["chat_template"] = named.get("default")
        return cls(definition, config)

    @cached_property
    def sha256(self) -> str:
        """Of the definition: what it says, however the file is spaced."""
        return hashlib.sha256(json.dumps(self.definition, sort_keys=True).encode()).hexdigest()

    @property
    def num_ids(self) -> int:
        """One more than the largest id."""
        known = [*self.definition["model"]["vocab"].values(), *self._by_id]
        return int(max(known)) + 1

    def encode(self, text: str, *, is_first: bool = True) -> list[int]:
        """Plain text to ids, with the beginning-of-text id if it is first and this one adds any."""
        frame = [i for i in self._plain.encode("").ids if i in self._by_id]
        begin = [i for i in frame if i not in self.stop_ids][:is_first]
        return begin + self._encode_text(text, is_first=is_first)

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; special tokens are left out, markers such as `<think>` are kept."""
        stream = self.decoder()
        return "".join(stream.feed(token) for token in ids) + stream.finish()

    def spelled(self, ids: Iterable[int]) -> str:
        """Ids to text with control tokens in their places, for people."""
        stream, told = self.decoder(), ""
        for token in ids:
            known = self._by_id.get(token)
            told += stream.finish() + str(known["content"]) if known else stream.feed(token)
        return told + stream.finish()

    def decoder(self) -> "TextStream":
        """A fresh incremental decoder."""
        return TextStream(self._plain, self._by_id)

    def render(self, messages: Sequence[Message], /, **variables: Any) -> list[int]:
        """A conversation to the ids that ask for the next answer.

        Args:
            messages: Each `{"role": ..., "content": ...}`, as in the OpenAI API.
            variables: For the template, e.g. `thinking_mode="off"` or `tools=[...]`.

        Raises:
            TokenizerError: No template, an unknown role, or the template refuses the messages.
        """
        mark = _unused_character([messages, variables])
        return list(self._encode_pieces(self._text(messages, mark, variables, asks=True), mark))

    def examples(self, messages: Sequence[Message], /, **variables: Any) -> list["Example"]:
        """A conversation to ids and loss masks; what the assistant says is learnt, and its ending.

        Before each turn that is learnt stands what `render` gives for it, id for id: a model is
        trained on what it will be asked. Where a template rewrites turns once they are past, as
        those do that drop old reasoning, turns become examples of their own. An assistant's
        message with `"weight": 0` is context.

        Raises:
            TokenizerError: As for `render`; no turn to learn; or the template does not go on from
                its own request for an answer, or ends an answer with no stop id.
        """
        mark, found = _unused_character([messages, variables]), list[Example]()
        for place, message in enumerate(messages):
            if message.get("role") != "assistant" or not message.get("weight", 1):
                continue
            asked = self._text(messages[:place], mark, variables, asks=True)
            whole = self._text(messages[: place + 1], mark, variables, asks=False)
            if not whole.startswith(asked):
                raise TokenizerError(
                    f"the chat template does not put message {place + 1} behind its own request "
                    "for an answer; set what it asks for, such as enable_thinking=false."
                )
            prompt = list(self._encode_pieces(asked, mark))
            answer = list(self._encode_pieces(whole[len(asked) :], mark, is_first=False))
            ends = [i for i, token in enumerate(answer, 1) if token in self.stop_ids]
            if not ends:
                raise TokenizerError(
                    f"the chat template ends message {place + 1} with no stop id (known: "
                    f"{sorted(self.stop_ids)}): a model would never learn to stop."
                )
            if not (found and prompt[: len(found[-1].ids)] == found[-1].ids):
                found.append(Example([], []))
            ids, is_learnt = found[-1]
            new = [*prompt[len(ids) :], *answer[: ends[0]]]
            is_learnt += [False] * (len(prompt) - len(ids)) + [True] * ends[0]
            ids += new
        if not found:
            _check(messages)
            raise TokenizerError("there is no assistant's message to learn from.")
        return found

    def _text(
        self, messages: Sequence[Message], mark: str, variables: Mapping[str, Any], *, asks: bool
    ) -> str:
        """What the template makes of messages, texts escaped with a mark; `asks` for an answer."""
        if self._template is None:
            raise TokenizerError(
                "this model has no chat template; it can only complete plain text."
            )
        _check(messages)
        messages = [_plain_message(message) for message in messages]
        try:
            escaped = [
                {k: value if k == "role" else self._escape(value, mark) for k, value in m.items()}
                for m in messages
            ]
            told = {"tools": None} | {k: self._escape(v, mark) for k, v in variables.items()}
            return self._template.render(
                messages=escaped, add_generation_prompt=asks, **self._special_strings, **told
            )
        except RecursionError:
            raise TokenizerError("the messages are nested too deeply.") from None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            reason = str(error).replace(mark, "")
            raise TokenizerError(f"the chat template refused the messages: {reason}") from None

    def fit(
        self, messages: Sequence[Message], room_tokens: int, /, **variables: Any
    ) -> tuple[list[int], int]:
        """Render, forgetting the oldest turns until the ids fit; a system message stays.

        Returns:
            The ids and how many messages were left out.

        Raises:
            ContextError: The last message alone does not fit.
        """
        _check(messages)
        system = [m for m in messages[:1] if m.get("role") in ("system", "developer")]
        turns = messages[len(system) :]

        def fits(start: int) -> bool:
            return len(self.render([*system, *turns[start:]], **variables)) <= room_tokens

        # Dropping more turns never makes a conversation longer, so halving finds the first fit.
        starts = [i for i, m in enumerate(turns) if i == 0 or m.get("role") == "user"]
        start = 0 if fits(0) else starts[min(bisect_left(starts, True, key=fits), len(starts) - 1)]
        ids = self.render([*system, *turns[start:]], **variables)
        if len(ids) > room_tokens:
            raise ContextError(
                f"the message is {len(ids):,} tokens with its frame; {room_tokens:,} fit. "
                "Shorten it, or use a model with a longer context."
            )
        return ids, start

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer, by the tokenizer's own configuration."""
        names = [self._special_strings.get("eos_token"), *self.config.get("extra_eos_tokens", [])]
        names += [name for name in ("<|im_end|>", "<|eot_id|>") if name in (self.template or "")]
        return frozenset(self._control[name]["id"] for name in names if name in self._control)

    def least_tokens(self, text: str) -> int:
        """So many tokens a text has at least, without encoding it."""
        return len(text.encode("utf-8", "surrogatepass")) // self._longest

    @cached_property
    def _longest(self) -> int:
        return max(len(name.encode()) for name in self._plain.get_vocab())

    def control_id(self, name: str) -> int | None:
        """The id of an added token such as `<think>`, if the vocabulary has it."""
        return self._control[name]["id"] if name in self._control else None

    @property
    def takes_tools(self) -> bool:
        """Whether the template has a place for tools."""
        return bool(re.search(r"\btools\b", self.template or ""))

    @property
    def reasons(self) -> bool:
        """Whether this model's answers may begin with reasoning between think tags."""
        return THINK_CLOSE in (self.template or "")

    def opens_reasoning(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a rendered prompt leaves the model inside its reasoning already."""
        return self.decode(prompt_ids[-4:]).rstrip().endswith(THINK_OPEN)

    @cached_property
    def _template(self) -> jinja2.Template | None:
        if self.template is None:
            return None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            return environment.from_string(self.template)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"the chat template is not valid: {error}") from None

    @cached_property
    def _special_strings(self) -> dict[str, str]:
        """`bos_token` and its like, as templates know them."""
        values = {k: v for k, v in self.config.items() if k.endswith("_token") and v}
        return {k: v["content"] if isinstance(v, dict) else str(v) for k, v in values.items()}

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        names = sorted(self._control, key=len, reverse=True)
        parts = []
        for name in names:
            token = self._control[name]
            left, right = (r"\s*" if token.get(side) else "" for side in ("lstrip", "rstrip"))
            parts.append(f"{left}{re.escape(name)}{right}")
        return re.compile(f"({'|'.join(parts)})" if parts else "(?!)()")

    def _escape(self, value: Any, mark: str) -> Any:
        """Put the mark behind every character that could begin a control string."""
        if isinstance(value, str):
            return self._starts.sub(lambda found: found[0] + mark, value)
        if isinstance(value, Mapping):
            return {self._escape(k, mark): self._escape(v, mark) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._escape(item, mark) for item in value]
        return value

    @cached_property
    def _starts(self) -> re.Pattern[str]:
        # A letter is only marked where the whole string follows, so that words which templates
        # compare ("function") stay as they are.
        parts = {
            f"{name[0]}(?={re.escape(name[1:])})" if name[0].isalnum() else re.escape(name[0])
            for name in self._control
        }
        return re.compile("|".join(sorted(parts)) or "(?!)")

    def _encode_pieces(self, text: str, mark: str, *, is_first: bool = True) -> Iterator[int]:
        for index, piece in enumerate(self._control_pattern.split(text)):
            if index % 2:
                yield (self._control.get(piece) or self._control[piece.strip()])["id"]
            elif piece:
                first = is_first and index == 0
                yield from self._encode_text(piece.replace(mark, ""), is_first=first)

    def _encode_text(self, text: str, *, is_first: bool) -> list[int]:
        """Text without control strings; added runs of white space are matched here."""
        if re.search("[\ud800-\udfff]", text):
            raise TokenizerError("the text holds half a character (a lone surrogate).")
        ids: list[int] = []
        for index, piece in enumerate(self._space_pattern.split(text)):
            if index % 2:
                ids.append(self._added[piece]["id"])
            elif piece:
                encoder = self._plain if is_first and not ids else self._later
                # As a batch of one: only that lets other threads run meanwhile.
                ids += encoder.encode_batch([piece], add_special_tokens=False)[0].ids
        unknown = self._control.get(self._special_strings.get("unk_token", ""), {}).get("id")
        spelled = {token["id"] for token in self._control.values()} - {unknown}
        if not spelled.isdisjoint(ids):  # no vocabulary of a supported model spells its own
            raise TokenizerError("this vocabulary spells a control token; the text is refused.")
        return ids

    @cached_property
    def _space_pattern(self) -> re.Pattern[str]:
        spaces = sorted(self._added.keys() - self._control.keys(), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, spaces))})" if spaces else "(?!)()")


class TextStream:
    """Ids in one by one, text out as soon as it is whole characters.

    Each text is what an id adds to the ids shown just before, since some decoders look back (a
    leading space is dropped at the very beginning only).
    """

    def __init__(self, plain: tokenizers.Tokenizer, control: Mapping[int, Any]) -> None:
        self._plain, self._control = plain, control
        self._ids: list[int] = []
        self._shown = 0

    def feed(self, token: int) -> str:
        """The text that this id completes; empty while a character is still in pieces."""
        control = self._control.get(token)
        if control is not None:
            return self.finish() + ("" if control["special"] else str(control["content"]))
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(REPLACEMENT):  # perhaps the first bytes of a character
            return ""
        del self._ids[: self._shown]
        self._shown = len(self._ids)
        return text

    def finish(self) -> str:
        """What is left; bytes that never became a character show as replacement characters."""
        text = self._new_text()
        if text:
            self._ids, self._shown = [], 0
        return text

    def _new_text(self) -> str:
        before, now = (self._plain.decode(ids) for ids in (self._ids[: self._shown], self._ids))
        return str(now)[len(before) :]


def _without_added_tokens(definition: Mapping[str, Any]) -> tokenizers.Tokenizer:
    model, bulk = dict(definition["model"]), {}
    merges = model.get("merges") or [""]
    if model.get("type") == "BPE" and type(merges[0]) is not str:
        bulk = {k: v for k, v in model.items() if k != "type" and v is not None}
        model |= {"vocab": {}, "merges": []}
    rest = {**definition, "model": model, "added_tokens": []}
    plain = tokenizers.Tokenizer.from_str(json.dumps(rest))
    if bulk:  # as JSON it takes three times as long
        plain.model = tokenizers.models.BPE(**bulk | {"merges": [*map(tuple, merges)]})
    plain.no_truncation()
    plain.no_padding()
    return plain


def _without_first_prefix(definition: Mapping[str, Any]) -> Mapping[str, Any]:
    """For text behind a control token: SentencePiece's `first` prefixes only the very beginning."""
    splitter = definition.get("pre_tokenizer") or {}
    if splitter.get("prepend_scheme") != "first":
        return definition
    return {**definition, "pre_tokenizer": {**splitter, "prepend_scheme": "never"}}


def _check(messages: Sequence[Message]) -> None:
    if isinstance(messages, str) or not all(isinstance(m, Mapping) for m in messages):
        raise TokenizerError('messages are a list of {"role": "user", "content": "..."}.')
    if not messages:
        raise TokenizerError("there are no messages; give at least one from the user.")
    for message in messages:
        if message.get("role") not in ROLES:
            raise TokenizerError(f"role {message.get('role')!r} is not one of {', '.join(ROLES)}.")


def _plain_message(message: Message) -> Message:
    """Content as one text, and a model's own think block apart, where escaping would hide it."""
    content = message.get("content")
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        content = "".join(part["text"] for part in content)
    message = {**message, "content": "" if content is None else content}
    if message.get("reasoning"):
        message.setdefault("reasoning_content", message["reasoning"])
    if message["role"] == "assistant" and THINK_CLOSE in message["content"]:
        thought, _, answer = message["content"].rpartition(THINK_CLOSE)
        message["content"] = answer.lstrip("\n")
        if not message.get("reasoning_content"):
            message["reasoning_content"] = thought.rpartition(THINK_OPEN)[2].strip("\n")
    return message


def _unused_character(values: Any) -> str:
    """A private-use character that occurs nowhere in the values."""
    used = set(json.dumps(values, ensure_ascii=False, default=str))
    codes = itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0x10FFFE))
    return next(chr(code) for code in codes if chr(code) not in used)


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{file.name} is not valid JSON: {error}") from None
    return values


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().astimezone().strftime(form)


class _Generation(Extension):
    """`{% generation %}` marks an assistant's words in some templates; their text is kept."""

    tags = {"generation"}  # noqa: RUF012  (the name and type jinja asks for)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
