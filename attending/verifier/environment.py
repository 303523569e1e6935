"""The consultation as an environment of `verifiers` 0.4, which must be installed.

    vf-eval attending -m MODEL --no-push --client.base-url URL/v1 --env.judge.url URL/v1

The agent `doctor` is the policy; our `Patient` is no agent, and ends the talk. Reward: the affine
score of the doctor's last message. Where a verdict is missing there is none, nor is the trace
trainable, as verifiers takes none for 0. Its ids have no dots: `attending` hands out `__all__`.
"""

from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Any

import verifiers.v1 as vf
from pydantic import Field, PositiveInt

from attending import endpoint as endpoints
from attending.endpoint import Endpoint, EndpointOptions
from attending.errors import UsageError
from attending.verifier.consult import Said, Trace, case_rubric
from attending.verifier.judge.ask import EndpointJudge
from attending.verifier.patient.case import Case
from attending.verifier.patient.simulator import Patient, PatientOptions, Turn
from attending.verifier.rules.rule import answer_of
from attending.verifier.taskset import Consultation, ConsultationTaskset, TalkHarness

__all__ = ["ConsultationEnv", "ConsultationTaskset", "TalkHarness"]


class Served(vf.BaseConfig):
    """A model beside the policy's."""

    url: str = Field("", pattern=r"^(https?://[^\s@?#]+|unix:/.+)?$")
    """http(s)://HOST[:PORT][/v1] or unix:/PATH.sock; empty: the embedded patient or judge."""
    model: str = ""
    """One of several there."""
    api_key_var: str | None = None
    """Environment variable that holds the key."""


class ConsultationConfig(vf.EnvConfig):
    """Who takes part."""

    doctor: vf.AgentConfig = vf.AgentConfig(runtime=vf.SubprocessConfig())  # it runs no code
    patient: Served = Served()
    judge: Served = Served()
    max_turns: PositiveInt = 20
    """Replies after which the patient ends it."""


class ConsultationEnv(vf.Env[ConsultationConfig]):
    """A patient for each rollout, one judge for all."""

    async def start(self) -> None:
        """Connect to what is served; load the embedded judge where none is."""
        self._stack = AsyncExitStack()
        self._fluent = await self._connect(self.config.patient)
        if not (judge := await self._connect(self.config.judge)):
            from attending.verifier.judge.embedded import EmbeddedJudge
        self._judge = EndpointJudge(judge) if judge else EmbeddedJudge()

    async def stop(self) -> None:
        """Disconnect."""
        await self._stack.aclose()

    async def _connect(self, one: Served) -> Endpoint | None:
        how = EndpointOptions(api_key_variable=one.api_key_var)
        opened = endpoints.open(one.url, model_id=one.model, options=how)
        return await self._stack.enter_async_context(opened) if one.url else None

    async def setup(self, agents: Any) -> None:
        """Raises UsageError where the doctor's model is patient or judge as well."""
        name = agents.doctor.config.model
        if name in (self._judge.name, self._fluent and self._fluent.model):
            raise UsageError(f"{name} would talk with itself or grade itself: name another model.")

    async def run(self, task: Consultation, agents: Any) -> None:
        """Talk until the patient ends it, a limit does, or the doctor says nothing."""
        case, most = Case.build(task.data.case), PatientOptions(max_turns=self.config.max_turns)
        patient = Patient(case, self._fluent, most)
        async with agents.doctor.interaction(task) as talk:
            turn = patient.open()
            while not turn.end:
                said = answer_of((await talk.turn(turn.text)).last_reply)
                if not said:
                    break
                turn = await patient.answer(said)
            talk.trace.stop(str(turn.end) or "silence")
            talk.trace.info["turns"] = [*map(asdict, patient.turns)]
            talk.trace.info["conversation"] = patient.conversation

    async def finalize(self, task: Consultation, episode: Any) -> None:
        """Record the metrics, and the reward where no verdict is missing."""
        [trace] = episode.traces
        trace.agent.trainable = False  # until it is scored
        if not trace.ok:
            return
        said = [Said("patient", one["text"], 0.0, turn=Turn(**one)) for one in trace.info["turns"]]
        record = Trace(Case.build(task.data.case), "", "", "", said)
        if told := trace.info["conversation"][:-1]:  # all but the patient's last words
            record.rubric = case_rubric(record.case, told[:-1])
            record.verdicts = await self._judge(record.rubric, told[-1]["content"])
            trace.info |= {"judge": self._judge.name, "caution": self._judge.caution}
            trace.info["criteria"] = [row for row in record.rows() if row["kind"] == "criterion"]
        measures, scores = record.measures(), record.scores()
        measures["faults"] = float(sum(len(turn.faults) for turn in record.turns))
        measures["unscored"] = scores.get("unscored")
        trace.record_metrics({name: value for name, value in measures.items() if value is not None})
        if (reward := scores.get("affine_score")) is not None:
            trace.record_reward("affine_score", reward)
            trace.agent.trainable = True
