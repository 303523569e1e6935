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
from importlib import resources
from typing import Any

import jinja2
from pydantic import PositiveInt

from attending.config import Config
from attending.endpoint import Endpoint
from attending.errors import UsageError
from attending.verifier.ask import ask
from attending.verifier.patient import speech
from attending.verifier.patient.case import Access, Case, Fact
from attending.verifier.patient.faults import Fault, form_faults
from attending.verifier.patient.gate import End, concluded
from attending.verifier.patient.lexicon import concepts, denies
from attending.verifier.patient.match import Matcher
from attending.verifier.sentences import sentences

LEAKED = 0.55  # cosine from which a sentence states a fact that was not asked for
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
    said_faults: tuple[Fault, ...] = ()  # of this text
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
        facts, plain = self._answer_by_rules(message)
        asked = tuple(fact.id for fact in facts)
        turn = Turn(plain, asked, asked)
        is_findings = any(fact.access is Access.EXAMINE for fact in facts)
        if self._endpoint and not is_findings:  # findings are the record's words, not the patient's
            turn = await self._word(message, facts, plain)
        elif not is_findings:
            turn = replace(turn, said_faults=tuple(self._faults(plain, facts)))
        if len(self.turns) >= self.options.max_turns:
            turn = Turn(self._phrase("goodbye"), end="turns")
        return self._say(message, turn)

    def _say(self, message: str | None, turn: Turn) -> Turn:
        if message is not None:
            self.conversation.append({"role": "assistant", "content": message})
        self.conversation.append({"role": "user", "content": turn.text})
        self._told |= set(turn.revealed)
        self.turns.append(turn)
        return turn

    def _phrase(self, name: str) -> str:
        return speech.pick(self.case, len(self.turns), name)

    def _answer_by_rules(self, message: str) -> tuple[list[Fact], str]:
        """What may be said, and the embedded wording of it."""
        asked = self._matcher.asked(message, self._told)
        facts = [*asked.facts[:MOST_FINDINGS]]
        if asked.is_open:
            facts += self._next_untold(facts)
        if facts and facts[0].access is Access.EXAMINE:
            label = self._phrase("findings")
            return facts, " ".join([label, *(fact.says for fact in facts)])
        if facts:
            return facts, speech.reply(self.case, facts, len(self.turns))
        if asked.is_order:
            manner = speech.pick(self.case, len(self.turns), "order", self.case.persona.finances)
            return [], f"{manner} {self._phrase('nothing_found')}"
        if asked.is_open:
            return [], self._phrase("nothing_else")
        if asked.kinds:
            none = any(fact.kind in asked.kinds and not fact.present for fact in self.case.facts)
            return [], self._phrase("deny" if none else "unknown")
        if not re.search(r"[?？]", message):
            return [], self._phrase("acknowledge")
        is_clear = any(concept.isupper() for concept in concepts(message))
        return [], self._phrase("unknown" if is_clear else "unclear")

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
            text = reply.text.rpartition("</think>")[2].strip()
            found = self._faults(text, facts) or await self._refused_by_model(text, facts)
            if not found:
                return Turn(text, asked, self.revealed(text, facts), "", (*faults,), (), tries)
            faults += found
            refused.append(", ".join(found))
        own = tuple(self._faults(plain, facts))
        return Turn(plain, asked, asked, "", (*faults,), own, self.options.max_tries)

    def _faults(self, text: str, facts: Sequence[Fact]) -> list[Fault]:
        earlier = [turn.text for turn in self.turns]
        return form_faults(text, earlier) + self.factual_faults(text, facts)

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

    def factual_faults(self, text: str, facts: Sequence[Fact]) -> list[Fault]:
        """The rules' part of the factual unit, of any wording of some facts.

        A leak is a sentence nearer to a fact that is so and was neither asked for nor told than to
        any that was; a contradiction denies what is so, or the reverse; a number must be known.
        """
        found = []
        allowed = {fact.id: fact for fact in facts}
        known = [fact for fact in self.case.facts if fact.id in self._told] + list(facts)
        if set(self.revealed(text, facts)) - allowed.keys() - self._told:
            found.append(Fault.LEAK)
        for part in sentences(text):
            words = concepts(part)
            for fact in facts:
                own = concepts(fact.says)
                same = len(words & own) >= 0.7 * len(own) > 0
                if same and denies(part) != denies(fact.says) and Fault.CONTRADICTION not in found:
                    found.append(Fault.CONTRADICTION)
        numbers = set(re.findall(r"\d+(?:\.\d+)?", text))
        stated = " ".join([*(f"{fact.text} {fact.says}" for fact in known), self.case.complaint])
        if numbers - set(re.findall(r"\d+(?:\.\d+)?", stated)):
            found.append(Fault.FABRICATION)
        return found

    def revealed(self, text: str, facts: Sequence[Fact] = ()) -> tuple[str, ...]:
        """The facts that a reply states: those meant, as far as said, and any other it is near."""
        meant = {fact.id: fact for fact in facts}
        found: dict[str, None] = {}
        for part in sentences(text):
            if part.rstrip().endswith(("?", "？")):
                continue
            words = concepts(part)
            near = self._matcher.stated(part)
            said = [f for f in meant.values() if len(words & concepts(f.says)) >= 0.5 * len(words)]
            if said:
                found.update(dict.fromkeys(fact.id for fact in said))
            elif near and near[0] >= LEAKED and near[1].present and not denies(part):
                found[near[1].id] = None
        return tuple(found)

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
    folder = resources.files("attending.verifier.patient") / "prompts"
    source = (folder / f"{name}.{language}.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    return environment.from_string(source).render(**values).strip()
