"""The simulated patient: gate, affective unit, factual unit (Baichuan-M2, arXiv 2509.02208, 2.1).

Each doctor's message goes through three steps. The *gate* ends the consultation once the doctor
has concluded. Retrieval then finds the facts that were asked for; the *affective unit* words them,
and them alone, as the persona would, so that what it does not know cannot leak; the *factual unit*
holds the words against the record and refuses leaks, contradictions and inventions. Without an
endpoint all three are rules and nothing is generated; with one, its model gates, words and checks,
a refused reply is asked for again, and after the last try the rules' wording is used; the turn
keeps the faults of what was refused.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import PositiveInt

from attending.config import Config
from attending.endpoint import Endpoint
from attending.errors import UsageError
from attending.verifier.ask import ask
from attending.verifier.data import template
from attending.verifier.patient import factual, speech
from attending.verifier.patient.case import Access, Case, Fact
from attending.verifier.patient.faults import Fault, form_faults
from attending.verifier.patient.gate import End, concluded
from attending.verifier.patient.lexicon import concepts
from attending.verifier.patient.match import Heard, Matcher
from attending.verifier.rules.rule import answer_of

MOST_FINDINGS = 8  # told to one order


class PatientOptions(Config):
    """How a patient is played."""

    max_tries: PositiveInt = 3
    """Times that an endpoint is asked to word one reply."""
    max_turns: PositiveInt = 20
    """Replies after which the consultation is over, whatever the doctor says."""
    max_reply_tokens: PositiveInt = 200
    """Most tokens that an endpoint may word a reply with."""


class Gate(Config):
    """What the gate's model replies."""

    reason: str
    """Why."""
    concluded: bool
    """The doctor has."""


class Factual(Config):
    """What the factual unit's model replies, of a patient's words."""

    reason: str
    """Why."""
    leaks: bool
    """They tell what is not allowed yet."""
    contradicts: bool
    """They say the opposite of the record."""
    invents: bool
    """They say what the record does not have."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One reply of the patient, and what it took."""

    text: str
    asked: tuple[str, ...] = ()  # ids of the facts asked for
    revealed: tuple[str, ...] = ()  # ids of the facts said, those that are not so included
    end: str = ""  # why the consultation is over: an `End`, or "turns"
    faults: tuple[Fault, ...] = ()  # of the refused wordings, one after another
    tries: int = 0  # of the endpoint


class Patient:
    """One patient for one consultation."""

    def __init__(
        self, case: Case, endpoint: Endpoint | None = None, options: PatientOptions | None = None
    ) -> None:
        """Of a case; `endpoint` makes its words fluent, and must not be the doctor."""
        self.case, self.options = case, options or PatientOptions()
        self.turns: list[Turn] = []
        self.conversation: list[dict[str, str]] = []  # the patient is the user
        self._endpoint, self._matcher = endpoint, Matcher(case)
        self._told: set[str] = set()

    def open(self) -> Turn:
        """The first words: the complaint, in the persona's manner."""
        if self.turns:
            raise UsageError(
                "this patient has spoken already: make a new one for a new consultation"
            )
        hello = speech.pick(self.case, 0, "greet")
        complaint = speech.lay(self.case.complaint, self.case.persona)
        found = [fact.id for fact in self.case.facts if fact.says == self.case.complaint]
        return self._say(None, Turn(f"{hello} {complaint}", revealed=tuple(found)))

    async def answer(self, message: str) -> Turn:
        """The reply to the doctor's message; its `end` says that there will be no further one.

        Raises:
            UsageError: The message is empty, or the consultation is over.
            EndpointError, ReplyError: The endpoint brings nothing that can be used.
        """
        if not message.strip():
            raise UsageError("an empty message of the doctor: nothing can be answered.")
        if self.turns and self.turns[-1].end:
            raise UsageError(f"the consultation has ended ({self.turns[-1].end}).")
        if end := await self._gate(message):
            return self._say(message, Turn(self._phrase("goodbye"), end=end))
        heard = self._matcher.heard(message, self._told)
        facts = [*heard.told]
        if heard.is_open:
            facts += self._next_untold(facts)
        found, plain = heard.found[:MOST_FINDINGS], self._plain(heard, facts, message)
        asked = tuple(fact.id for fact in facts)
        turn = Turn(plain, asked, asked)
        if self._endpoint and (plain or not found):
            turn = await self._word(message, facts, plain)
        if found or (heard.is_order and not facts):
            turn = self._with_findings(turn, found)
        if len(self.turns) >= self.options.max_turns:
            turn = replace(turn, end="turns")
        return self._say(message, turn)

    def _with_findings(self, turn: Turn, found: Sequence[Fact]) -> Turn:
        """The record's words after the patient's: nobody words a finding."""
        label = self._phrase("findings") if found else self._phrase("nothing_found")
        text = " ".join(part for part in (turn.text, label, *(f.says for f in found)) if part)
        names = tuple(fact.id for fact in found)
        return replace(
            turn, text=text, asked=(*turn.asked, *names), revealed=(*turn.revealed, *names)
        )

    def _say(self, message: str | None, turn: Turn) -> Turn:
        if message is not None:
            self.conversation.append({"role": "assistant", "content": message})
        self.conversation.append({"role": "user", "content": turn.text})
        self._told |= set(turn.revealed)
        self.turns.append(turn)
        return turn

    def _phrase(self, name: str) -> str:
        return speech.pick(self.case, len(self.turns), name)

    def _plain(self, heard: Heard, facts: Sequence[Fact], message: str) -> str:
        """The embedded wording of what may be said; empty where only findings are asked for."""
        if facts:
            return speech.reply(self.case, facts, len(self.turns))
        if heard.is_order:
            manner = self.case.persona.finances
            return "" if heard.found else speech.pick(self.case, len(self.turns), "order", manner)
        if heard.is_open:
            return self._phrase("nothing_else")
        if heard.kinds:
            is_closed = any(not fact.present for fact in self.case.facts)
            return self._phrase("particular" if is_closed else "unknown")
        if not re.search(r"[?？]", message) and not heard.is_unclear:
            return self._phrase("acknowledge")
        known = any(concept.isupper() for concept in concepts(message))
        return self._phrase("unknown" if known and not heard.is_unclear else "unclear")

    def _next_untold(self, besides: Sequence[Fact]) -> list[Fact]:
        """One more symptom, for a question that asks for anything; at first the complaint."""
        tellable = [f for f in self.case.of(Access.TELL) if f.present and f not in besides]
        untold = [f for f in tellable if f.kind == "symptom" and f.id not in self._told]
        if not untold and len(self.turns) == 1:
            untold = [f for f in tellable if f.says == self.case.complaint]
        return untold[:1]

    async def _gate(self, message: str) -> str:
        """Why the consultation ends with this message; empty where it goes on."""
        if self._endpoint is None:
            return concluded(message) or ""
        told = await self._check("gate", Gate, message=message)
        return (concluded(message) or End.DIAGNOSIS) if told["concluded"] else ""

    async def _word(self, message: str, facts: Sequence[Fact], plain: str) -> Turn:
        """The affective unit's wording that the factual unit lets pass, or the rules' own."""
        assert self._endpoint is not None
        asked = tuple(fact.id for fact in facts)
        refused: list[str] = []
        faults: list[Fault] = []
        for tries in range(1, self.options.max_tries + 1):
            prompt = render(
                "affective",
                self.case.language,
                persona=self.case.persona,
                conversation=self.conversation,
                message=message,
                statements=[fact.says for fact in facts],
                fallback=plain,
                refused=refused,
            )
            reply = await self._endpoint.chat(
                [{"role": "user", "content": prompt}],
                max_tokens=self.options.max_reply_tokens,
                seed=tries,
            )
            text = answer_of(reply.text) or ""
            found = form_faults(text, [turn.text for turn in self.turns])
            found += factual.faults(self.case, text, facts, self._told)
            found = found or await self._refused_by_model(text, facts)
            if not found:
                said = factual.revealed(self.case, text, facts)
                return Turn(text, asked, said, "", (*faults,), tries)
            faults += found
            refused.append(", ".join(found))
        return Turn(plain, asked, asked, "", (*faults,), self.options.max_tries)

    async def _refused_by_model(self, text: str, facts: Sequence[Fact]) -> list[Fault]:
        """The factual unit's own judgement, after the rules found nothing."""
        told = [fact.says for fact in self.case.facts if fact.id in self._told and fact.present]
        found = await self._check(
            "factual",
            Factual,
            reply=text,
            allowed=[*dict.fromkeys([*told, *(fact.says for fact in facts)])],
            record=[fact.text for fact in self.case.facts if fact.present],
        )
        kinds = {
            "leaks": Fault.LEAK,
            "contradicts": Fault.CONTRADICTION,
            "invents": Fault.FABRICATION,
        }
        return [kind for name, kind in kinds.items() if found[name]]

    async def _check(self, name: str, form: type[Config], **values: Any) -> dict[str, bool]:
        """Yes or no from a unit's model; its reason is not kept."""
        assert self._endpoint is not None
        messages = [{"role": "user", "content": render(name, self.case.language, **values)}]
        how: dict[str, Any] = {"max_tokens": self.options.max_reply_tokens, "temperature": 0.0}
        kind = f"patient {name}"
        found = await ask(
            self._endpoint,
            messages,
            form,
            kind,
            keep=lambda told: told.model_dump(exclude={"reason"}),
            **how,
        )
        return dict(found.kept)


def render(name: str, language: str, **values: Any) -> str:
    """A prompt of this folder, in a case's language; every value is plain text in it."""
    return template(f"patient/prompts/{name}.{language}").render(**values).strip()
