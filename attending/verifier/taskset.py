"""Cases as tasks of `verifiers` 0.4, and the harness that lets a policy talk about them."""

from collections.abc import Iterator
from typing import Any

import verifiers.v1 as vf
from pydantic import Field
from verifiers.v1.dialects.chat import message_to_wire

from attending.endpoint import Endpoint
from attending.errors import EndpointError, ReplyError
from attending.verifier.patient.find import find_cases
from attending.verifier.patient.simulator import render


class CaseData(vf.TaskData):
    """A case; the doctor is shown none of it."""

    case: dict[str, Any]  # as its file has it: a strict record would refuse the wire's lists


class Consultation(vf.Task[CaseData]):
    """What the doctor is to do; `ConsultationEnv` scores it."""


class CasesConfig(vf.TasksetConfig):
    """Which cases."""

    cases: list[str] = Field(["appendicitis", "肺炎"], min_length=1)
    """Names as `attending consult` takes them, or FILE.jsonl with a case a row."""
    seed: int = 0
    """Draws what the first source leaves open; the next one has the next seed."""


class ConsultationTaskset(vf.Taskset[Consultation, CasesConfig]):
    """The cases, in the order named."""

    def load(self) -> Iterator[Consultation]:
        """Raises UsageError or ConfigError for what is no case."""
        for seed, name in enumerate(self.config.cases, self.config.seed):
            for case in find_cases(name, seed):
                told, values = render("doctor", case.language), case.model_dump(mode="json")
                data = CaseData(id=case.id, name=case.id, system_prompt=told, case=values)
                yield Consultation(data, self.config.task)


class TalkHarness(vf.Harness[vf.HarnessConfig]):
    """One request a turn, from this process: verifiers' own `null` starts a program for each."""

    APPENDS_SYSTEM_PROMPT = SUPPORTS_RESUME = True
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: Any,
        trace: Any,
        runtime: Any,
        endpoint: str,
        secret: str,
        mcp_urls: Any,
        data: Any,
    ) -> vf.ProgramResult:
        """Have the conversation in `data` answered; verifiers is the `endpoint`, and records it."""
        said = [*map(message_to_wire, data.prompt)]
        if data.system_prompt:
            said.insert(0, {"role": "system", "content": data.system_prompt})
        async with Endpoint(endpoint, ctx.model, api_key=secret) as policy:
            try:
                await policy.chat(said)
            except (EndpointError, ReplyError) as error:
                return vf.ProgramResult(1, "", str(error))
        return vf.ProgramResult(0, "", "")
