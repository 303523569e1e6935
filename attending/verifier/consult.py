"""A consultation: a doctor model interviews a patient, and is judged; all of it in one trace."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attending.endpoint import Endpoint
from attending.errors import AttendingError, ConfigError, ReplyError, UsageError
from attending.verifier.data import template
from attending.verifier.judge.verdict import Judge, Verdict
from attending.verifier.patient.case import Access, Case
from attending.verifier.patient.scores import fact_score, personification_score, privacy_score
from attending.verifier.patient.simulator import Patient, PatientOptions, Turn, render
from attending.verifier.rubric.reference import from_reference, weigh
from attending.verifier.rubric.schema import Rubric
from attending.verifier.rubric.score import affine_score, bounds, score
from attending.verifier.rules.rule import answer_of

DISCLAIMER = (
    "A simulated consultation. The patient is no person, the doctor is a language model, and "
    "nothing here may guide care."
)
Message = Mapping[str, str]


@dataclass(slots=True)
class Said:
    """One message of the trace."""

    speaker: str  # patient or doctor
    text: str
    seconds: float
    input_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    turn: Turn | None = None  # of the patient: what was asked, revealed, faulty


@dataclass(slots=True)
class Trace:
    """Everything that happened; `rows` are its lines, `page` shows it to a clinician."""

    case: Case
    doctor: str  # model ids
    patient: str
    instructions: str
    said: list[Said] = field(default_factory=list)
    error: str = ""  # of what broke it off; what was said before is kept
    judge: str = ""
    caution: str = ""
    rubric: Rubric | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    endpoints: Sequence[Endpoint] = ()  # all that are asked

    @property
    def turns(self) -> list[Turn]:
        """The patient's."""
        return [said.turn for said in self.said if said.turn]

    @property
    def cost(self) -> float | None:
        """Of all endpoints so far; None where a price is unknown."""
        spent = [endpoint.totals.cost for endpoint in self.endpoints]
        return None if None in spent else sum(cost or 0.0 for cost in spent)

    def measures(self) -> dict[str, float | None]:
        """What is counted, not judged; None where it has no meaning."""
        told = {one for turn in self.turns for one in turn.revealed}
        shares = {
            name: [fact.id for fact in self.case.of(access) if fact.present]
            for name, access in (("elicited", Access.TELL), ("examined", Access.EXAMINE))
        }
        return {
            "turns": float(max(0, len(self.turns) - 1)),
            **{f"{k}_share": len({*v} & told) / len(v) if v else None for k, v in shares.items()},
            "privacy": privacy_score(self.case, self.turns),
            "fact": fact_score(self.case, self.turns),
            "personification": personification_score(self.case, self.turns),
        }

    def scores(self) -> dict[str, Any]:
        """Of the rubric; empty where nothing was judged."""
        if self.rubric is None:
            return {}
        criteria, met = self.rubric.criteria, [verdict.met for verdict in self.verdicts]
        return {
            "score": score(criteria, met),
            "affine_score": affine_score(criteria, met),
            "bounds": bounds(criteria, met),
            "unscored": met.count(None),
        }

    def unjudged(self) -> str:
        """Why there is no score, where there is none."""
        lacking = [verdict for verdict in self.verdicts if verdict.met is None]
        if lacking:
            count = f"{len(lacking)} of {len(self.verdicts)} criteria are unscored"
            return f"{count}: {lacking[0].explanation}"
        if self.verdicts or self.error:
            return ""
        is_out = bool(self.turns) and self.turns[-1].end == "turns"
        return "Not judged: it ran out of turns." if is_out else "Not judged: there is no judge."

    def rows(self) -> Iterator[dict[str, Any]]:
        """The lines of `trace.jsonl`: the case, each message, each criterion, the result."""
        yield {
            "kind": "case",
            "note": DISCLAIMER,
            "case": self.case.model_dump(mode="json"),
            "models": {"doctor": self.doctor, "patient": self.patient, "judge": self.judge},
            "instructions": self.instructions,
        }
        for said in self.said:
            yield {"kind": "message", **asdict(said)}
        for one, verdict in zip(
            self.rubric.criteria if self.rubric else (), self.verdicts, strict=True
        ):
            yield {"kind": "criterion", **asdict(one), **verdict._asdict()}
        yield {
            "kind": "result",
            **self.measures(),
            **self.scores(),
            "caution": self.caution,
            "ended": self.turns[-1].end if self.turns else "",
            "output_tokens": sum(one.totals.output_tokens for one in self.endpoints),
            "cost": self.cost,
            "error": self.error,
        }

    def page(self) -> str:
        """One HTML file without anything from elsewhere."""
        facts = {fact.id: fact for fact in self.case.facts}
        *_, result = self.rows()
        return template("trace.html").render(
            trace=self, facts=facts, note=DISCLAIMER, result=result
        )

    def write(self, folder: Path) -> None:
        """`trace.jsonl` and `trace.html`; a reader never sees half of one."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows())
        for name, text in (("trace.jsonl", lines), ("trace.html", self.page())):
            draft = folder / f"{name}.tmp"
            draft.write_text(text, encoding="utf-8")
            draft.replace(folder / name)


async def consult(
    case: Case,
    doctor: Endpoint,
    *,
    fluent: Endpoint | None = None,
    judge: Judge | None = None,
    rubric: Rubric | None = None,
    allow_self_play: bool = False,
    max_turns: int = 20,
    heard: Callable[[Trace], object] = lambda trace: None,
    **sampling: Any,
) -> Trace:
    """Let a doctor's model interview a patient until one ends it, and judge its last message.

    Args:
        case: Who is the patient.
        doctor: The model, as an endpoint.
        fluent: Words the patient; the embedded one otherwise.
        judge: Judges the doctor's last message by the rubric; None judges nothing.
        rubric: Of one's own; by default one out of the case.
        allow_self_play: Let one model be doctor and patient.
        max_turns: Most replies of the patient.
        heard: Is given the trace whenever something was said, so that it may be kept.
        sampling: Of the doctor.

    An endpoint's failure ends the trace with its `error`; what was said until then is in it.
    """
    if fluent and fluent.model == doctor.model and not allow_self_play:
        raise UsageError(
            f"{doctor.model} would be doctor and patient: name another model, or allow it "
            "(--allow-self)."
        )
    patient = Patient(case, fluent, PatientOptions(max_turns=max_turns))
    trace = Trace(
        case,
        doctor.model,
        fluent.model if fluent else "embedded",
        render("doctor", case.language),
        error="it was interrupted.",
        endpoints=(doctor, *([fluent] if fluent else []), *(judge.endpoints if judge else ())),
    )

    def add(said: Said) -> None:
        trace.said.append(said)
        heard(trace)

    try:
        turn = patient.open()
        base = (rubric or case_rubric(case, patient.conversation)) if judge else None
        add(Said("patient", turn.text, 0.0, turn=turn))
        while not turn.end:
            system = {"role": "system", "content": trace.instructions}
            reply = await doctor.chat([system, *patient.conversation], **sampling)
            counts = (reply.input_tokens, reply.output_tokens, reply.finish_reason)
            add(Said("doctor", answer_of(reply.text) or "", reply.latency_seconds, *counts))
            if not trace.said[-1].text:
                raise ReplyError(
                    f"{doctor.model} wrote no answer, or only thoughts: more max_tokens?"
                )
            start = time.monotonic()
            turn = await patient.answer(trace.said[-1].text)
            add(Said("patient", turn.text, time.monotonic() - start, turn=turn))
        if judge and base and turn.end != "turns":  # else nothing was concluded
            before = tuple(patient.conversation[:-2])
            trace.judge, trace.caution = judge.name, judge.caution
            asked = Rubric(base.name, before, base.criteria)
            trace.verdicts = await judge(asked, trace.said[-2].text)
            trace.rubric = asked
        trace.error = ""
    except AttendingError as error:
        trace.error = str(error)
    return trace


def case_rubric(case: Case, conversation: Sequence[Message]) -> Rubric:
    """Out of the case's reference answer, its diagnosis and its weighty facts; without a model.

    Raises:
        ConfigError: The case has neither a reference nor a diagnosis: give a rubric of your own.
    """
    told = case.reference
    if case.diagnosis and case.diagnosis.lower() not in told.lower():
        words = {"en": f"The diagnosis is {case.diagnosis}.", "zh": f"诊断是{case.diagnosis}。"}
        told = f"{words[case.language]} {told}"
    if not told.strip():
        raise ConfigError(
            f"case {case.id} has neither a diagnosis nor a reference answer to judge by: give a "
            "rubric of your own (--rubric FILE), or judge nothing (--judge none)."
        )
    facts = [f for f in case.of(Access.TELL) if f.present and f.kind != "person"]
    return from_reference(
        case.id, conversation, told, [f.text for f in facts if weigh(f.text) > weigh("")]
    )
