"""The environment of `verifiers`, end to end: doctor and judge are one endpoint on loopback."""

import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from attending.errors import UsageError
from attending.verifier.judge.verdict import Verdict
from attending.verifier.patient.find import find_case
from tests.hallway.test_endpoint import Call, asking

vf = pytest.importorskip("verifiers.v1", reason="verifiers 0.4 is not installed")
pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]
ASKED = ["Where is the pain?", "Have you thrown up?", "Are you allergic to any medicine?"]
SAID = [
    "My belly has been hurting since yesterday.",
    "It began around my belly button and has moved down to the right.",
    "I feel sick, and I threw up once this morning.",
    "Penicillin gave me a rash once.",
]
LAST = "You most likely have acute appendicitis. Please go to the hospital today."
Judging = Callable[[Call, str, bool], Awaitable[None]]


@pytest.fixture(autouse=True)
def _keep_out_of_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("verifiers.v1.runtimes.subprocess.CACHE_DIR", tmp_path)


async def approve(call: Call, criterion: str, is_good: bool) -> None:
    """Every positive criterion is met, no negative one."""
    key = "acceptable" if is_good else "unacceptable"
    await call.answer(json.dumps({"explanation": "so it is", key: is_good}))


async def see_the_hospital(call: Call, criterion: str, is_good: bool) -> None:
    """One criterion is met, a positive one."""
    key, is_met = "acceptable" if is_good else "unacceptable", "hospital" in criterion
    await call.answer(json.dumps({"explanation": "so it is", key: is_met}))


async def fail_once(call: Call, criterion: str, is_good: bool) -> None:
    """One criterion, a negative one, gets no verdict."""
    if "Eat or drink" in criterion:
        await call.send(403, {})
    else:
        await approve(call, criterion, is_good)


async def rollout(script: list[str], judging: Judging = approve, **values: Any) -> tuple[Any, Any]:
    """An episode of a doctor that says its script again and again, and what was asked of it."""

    async def behave(call: Call) -> None:
        said = call.body["messages"]
        if call.body["model"] == "judge":
            prompt = said[-1]["content"]
            return await judging(call, prompt.rpartition("\n[")[2], "is positive" in prompt)
        if call.body["model"] == "fluent":
            return await call.send(403, {})
        asked.append(call.body)
        at = sum(message["role"] == "assistant" for message in said) % len(script)
        if not script[at]:
            return await call.send(400, {"error": {"message": "no"}})
        message = {"role": "assistant", "content": script[at].replace("NOTHING", "")}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
        value = {"id": "1", "object": "chat.completion", "created": 0, "model": "served"}
        return await call.send(200, value | {"choices": [choice], "usage": usage})

    asked: list[Any] = []
    async with asking(behave) as (server, _):
        chosen = {"id": "attending", "cases": ["appendicitis"]}
        served = {"judge": {"url": server.url, "model": "judge"}, **values}
        if "patient" in values:
            served["patient"] = {"url": server.url, **values["patient"]}
        config = vf.resolve_env_config({"taskset": chosen, **served})
        environment = vf.load_environment(config)
        client = vf.EvalClientConfig(base_url=f"{server.url}/v1", api_key_var="NO_SUCH_KEY")
        sampling = vf.SamplingConfig(temperature=0.3)
        async with environment.serving():
            [task] = environment.taskset
            context = vf.ModelContext(model="policy", client=client, sampling=sampling)
            return await environment.run_episode(task, context), asked


async def test_a_doctor_asks_three_questions_concludes_and_is_rewarded() -> None:
    episode, asked = await rollout([*ASKED, f"<think>Easy.</think>{LAST}"])
    [trace] = episode.traces
    assert (episode.ok, trace.agent.name, trace.agent.trainable) == (True, "doctor", True)
    assert (trace.num_turns, trace.num_branches, trace.stop_condition) == (4, 1, "plan")
    roles = ["system", *["user", "assistant"] * 4]
    assert [message.role for message in trace.messages] == roles
    assert all(said in trace.messages[1 + 2 * at].content for at, said in enumerate(SAID))
    told = [turn["revealed"] for turn in trace.info["turns"]]
    assert told == [("pain",), ("moved",), ("nausea",), ("allergy",), ()]
    assert trace.info["conversation"][-2]["content"] == LAST
    shares = {"elicited_share": 4 / 14, "examined_share": 0.0, "personification": 0.75}
    counts = {"turns": 4.0, "privacy": 1.0, "fact": 1.0, "faults": 0.0, "unscored": 0.0}
    assert trace.metrics == pytest.approx(shares | counts)
    assert (trace.rewards["affine_score"].score, trace.reward) == (1.0, 1.0)
    assert [call["temperature"] for call in asked] == [0.3] * 4
    untold = [f.says for f in find_case("appendicitis").facts if f.id not in sum(told, ())]
    assert not [says for says in [*untold, "acute appendicitis"] if says in json.dumps(asked)]
    assert json.dumps(episode.to_record())  # what `vf-eval` writes


async def test_the_reward_is_the_affine_score_of_the_verdicts() -> None:
    episode, _ = await rollout([LAST], see_the_hospital)
    [trace] = episode.traces
    points = [(row["points"], row["met"]) for row in trace.info["criteria"]]
    assert [pair for pair in points if pair[1]] == [(10, True)]
    lowest = -sum(point for point, _ in points if point < 0)
    assert lowest > 0
    wanted = (10 + lowest) / sum(abs(point) for point, _ in points)
    assert trace.rewards["affine_score"].score == pytest.approx(wanted)
    assert trace.info["judge"] == "judge"
    assert "physicians was not measured" in trace.info["caution"]


async def test_a_missing_verdict_is_counted_and_never_a_reward() -> None:
    episode, _ = await rollout([LAST], fail_once)
    [trace] = episode.traces
    assert (episode.ok, trace.rewards, trace.agent.trainable) == (True, {}, False)
    assert (trace.metrics["unscored"], trace.metrics["turns"]) == (1.0, 1.0)
    assert [row["met"] for row in trace.info["criteria"]].count(None) == 1


async def test_a_talk_that_the_patient_or_a_limit_or_silence_ends_is_scored_all_the_same() -> None:
    limit = {"doctor": {"max_turns": 1}}
    for script, values, end, turns in (
        (ASKED, {"max_turns": 2}, "turns", 2.0),
        (ASKED, limit, "max_turns", 1.0),
        ([ASKED[0], "NOTHING"], {}, "silence", 1.0),
    ):
        episode, _ = await rollout(script, **values)
        [trace] = episode.traces
        assert (episode.errors, trace.stop_condition, trace.reward) == ([], end, 1.0)
        assert trace.metrics["turns"] == turns


async def test_a_doctor_that_says_nothing_at_all_or_fails_has_no_reward() -> None:
    episode, _ = await rollout(["NOTHING"])
    [trace] = episode.traces
    assert (trace.ok, trace.rewards, trace.agent.trainable) == (True, {}, False)
    episode, asked = await rollout([""])
    [trace] = episode.traces
    assert (trace.ok, trace.rewards, trace.agent.trainable, len(asked)) == (False, {}, False, 1)
    assert trace.last_error.type == "ProviderError"


async def test_a_patient_that_fails_ends_the_rollout_and_keeps_what_was_said() -> None:
    episode, asked = await rollout(ASKED, patient={"model": "fluent"})
    [trace] = episode.traces
    assert "fluent at 127.0.0.1" in episode.last_error.message
    assert (episode.ok, trace.ok, trace.rewards, len(asked)) == (False, False, {}, 1)
    assert [message.content for message in trace.messages[2:]] == ASKED[:1]


async def test_without_an_address_the_embedded_judge_judges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Embedded:
        name, caution = "embedded", "It knows little."

        async def __call__(self, rubric: Any, answer: str) -> list[Verdict]:
            assert answer == LAST
            return [Verdict(one.points > 0, "") for one in rubric.criteria]

    module = type(sys)("embedded")
    module.EmbeddedJudge = Embedded  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "attending.verifier.judge.embedded", module)
    [trace] = (await rollout([LAST], judge={}))[0].traces
    assert (trace.reward, trace.info["judge"]) == (1.0, "embedded")
    assert trace.info["caution"] == "It knows little."


async def test_one_model_is_not_doctor_and_judge() -> None:
    async def never(*_: Any) -> None:
        raise AssertionError

    served = {"url": "http://127.0.0.1:9", "model": "policy"}
    for who in ("judge", "patient"):
        episode, asked = await rollout(ASKED, never, **{who: served})
        assert "policy would talk with itself or grade itself" in episode.last_error.message
        assert (episode.ok, asked) == (False, [])


async def test_the_tasks_are_the_cases_named_and_survive_the_wire(tmp_path: Path) -> None:
    file = tmp_path / "cases.jsonl"
    file.write_text(find_case("appendicitis").replace(id="mine").model_dump_json() + "\n")
    config = vf.taskset_config_type("attending")(id="attending", cases=["肺炎", str(file)])
    tasks = [*vf.load_taskset(config)]
    assert [(task.data.idx, task.data.id, task.data.prompt) for task in tasks] == [
        (0, "肺炎", None),
        (1, "mine", None),
    ]
    assert tasks[1].data.system_prompt.startswith("You are a physician")
    sent = json.loads(tasks[1].data.model_dump_json())
    assert type(tasks[1]).data_type().model_validate(sent) == tasks[1].data
    with pytest.raises(UsageError, match="apendicitis"):
        [*vf.load_taskset(config.model_copy(update={"cases": ["apendicitis"]}))]


async def test_configs_refuse_what_could_not_work() -> None:
    for wrong in (
        {"judge": {"url": "http://me:secret@host/v1"}},
        {"judge": {"host": "x"}},
        {"patient": {"url": "gpt"}},
        {"max_turns": 0},
        {"taskset": {"id": "attending", "cases": []}},
    ):
        with pytest.raises(ValidationError):
            vf.resolve_env_config({"taskset": {"id": "attending"}, **wrong})
