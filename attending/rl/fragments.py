"""Baichuan-M2's third stage: slices of consultations, whose next single reply is reinforced.

The model as it is interviews simulated patients for a few turns; what was said is the prompt, and
of the replies sampled to it each is worth what it makes the patient tell: facts that it has and
that were not told before, at most `most_facts`. What is denied or found by examining is worth
nothing, or asking for everything would be paid. A reply that was said before, or that nothing can
be answered to, is worth nothing; one that concludes is worth the share of the case that was found
out. The report scores fragments by rubrics that a model writes for each; facts told are counted by
the simulator, which needs none. Where the simulator errs (`turn.faults`), or a consultation grows
too long, the slice ends before that.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from attending.chat import Tokenizer
from attending.errors import ConfigError
from attending.overlap import normalise
from attending.rl.prompts import Prompt, text_of
from attending.rl.recipe import RlConfig
from attending.rl.sampler import Asked, Sampler
from attending.rl.types import Verdict
from attending.verifier.patient.case import Access
from attending.verifier.patient.case import Case as PatientCase
from attending.verifier.patient.simulator import Patient, Turn, render
from attending.verifier.rules.rule import answer_of


class Fragment(NamedTuple):
    """A consultation up to the doctor's turn."""

    prompt: Prompt
    """Its case has the messages so far."""
    patient: PatientCase
    """Who answers."""
    said: tuple[str, ...]
    """The doctor's messages so far; the patient, being rules, answers them as before."""
    told: frozenset[str]
    """Ids of the facts that the patient has told."""
    is_cut: bool
    """It ends earlier than was asked for: it was concluded, grew too long, or the patient erred."""


class Room(NamedTuple):
    """What a consultation is rendered with."""

    tokenizer: Tokenizer
    template: Mapping[str, Any]
    max_prompt: int

    def prompt(self, asked: Prompt, case: PatientCase, patient: Patient) -> Prompt | None:
        """The doctor's turn; None where it is too long."""
        system = {"role": "system", "content": render("doctor", case.language)}
        messages = (system, *patient.conversation)
        ids = tuple(self.tokenizer.render(messages, **self.template))
        if len(ids) > self.max_prompt:
            return None
        return Prompt(asked.number, replace(asked.case, messages=messages), ids)


async def play(
    drawn: Sequence[Prompt],
    patients: Mapping[str, PatientCase],
    sampler: Sampler,
    room: Room,
    turns: Sequence[int],
    *,
    seed: int,
    version: int,
    temperature: float = 1.0,
) -> list[Fragment]:
    """Let the model interview each patient for so many turns; all of them side by side.

    Raises:
        ConfigError: A complaint alone does not fit a prompt.
    """
    played = [Patient(patients[one.case.patient]) for one in drawn]
    fragments = []
    for one, patient in zip(drawn, played, strict=True):
        told = frozenset(patient.open().revealed)
        prompt = room.prompt(one, patient.case, patient)
        if prompt is None:
            raise ConfigError(
                f"the complaint of {one.case.patient} and the doctor's instructions are more than "
                f"max_prompt={room.max_prompt} tokens: raise it."
            )
        fragments.append(Fragment(prompt, patient.case, (), told, is_cut=False))
    for turn in range(max(turns, default=0)):
        going = [i for i, f in enumerate(fragments) if turns[i] > turn and not f.is_cut]
        asked = []
        for at in going:
            number, case, ids = fragments[at].prompt
            (own,) = np.random.SeedSequence((seed, version, number, turn)).generate_state(1)
            asked.append(Asked(case.id, ids, int(own), temperature))
        for place, rollout in sorted(sampler.sample(asked, version)):
            at, known = going[place], fragments[going[place]]
            text = (answer_of(text_of(room.tokenizer, rollout)) or "").strip()
            reply = await played[at].answer(text) if text else None
            after = None
            if reply and not reply.end and not reply.faults:
                after = room.prompt(known.prompt, known.patient, played[at])
            if after is None:
                fragments[at] = known._replace(is_cut=True)
                continue
            assert reply is not None
            told = known.told | set(reply.revealed)
            fragments[at] = Fragment(after, known.patient, (*known.said, text), told, is_cut=False)
    return fragments


async def judge_reply(fragment: Fragment, text: str, most_facts: int) -> Verdict:
    """What the next reply makes the patient tell."""
    answer = (answer_of(text) or "").strip()
    if not answer:
        return Verdict(0.0, "no answer")
    if normalise(answer) in [normalise(one) for one in fragment.said]:
        return Verdict(0.0, "said before")
    patient = await replay(fragment)
    reply = await patient.answer(answer)
    if reply.faults:
        return Verdict(None, f"the simulated patient erred: {reply.faults[0]}")
    return worth_of(fragment, reply, most_facts)


def worth_of(fragment: Fragment, reply: Turn, most_facts: int) -> Verdict:
    """Of the patient's reply: facts not told before, or how much of the case was found out."""
    if reply.end:
        share = elicited_share(fragment)
        return Verdict(share, f"concluded ({reply.end})", {"concluded": share})
    new = (set(reply.revealed) & tellable(fragment.patient)) - fragment.told
    score = min(len(new), most_facts) / most_facts
    return Verdict(score, f"{len(new)} new facts", {"asking": score})


def tellable(case: PatientCase) -> frozenset[str]:
    """Ids of what the patient has and can tell."""
    return frozenset(fact.id for fact in case.of(Access.TELL) if fact.present)


def elicited_share(fragment: Fragment) -> float:
    """Of the facts that the patient can tell, those that it has."""
    known = tellable(fragment.patient)
    return len(known & fragment.told) / max(len(known), 1)


async def replay(fragment: Fragment) -> Patient:
    """The patient as it stands after what was said."""
    patient = Patient(fragment.patient)
    patient.open()
    for text in fragment.said:
        await patient.answer(text)
    return patient


def turns_of(drawn: Sequence[Prompt], config: RlConfig, step: int) -> list[int]:
    """How long each consultation has gone on: from none to one less than the most, evenly."""
    return [
        int(np.random.default_rng((config.seed, step, one.number)).integers(config.dialogue.turns))
        for one in drawn
    ]
