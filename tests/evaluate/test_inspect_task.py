"""HealthBench under Inspect: a scripted model, and a judge on loopback that misses a verdict."""

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from attending.errors import UsageError
from tests.hallway.test_endpoint import Call, asking

TASK = "attending.evaluate.inspect_task"
TOLD = "Rest, and drink water."
CRITERIA = {
    "one": [("mentions rest", 5), ("mentions water", 3), ("mentions an antibiotic", -6)],
    "two": [("mentions rest", 4), ("mentions a doctor", 6)],  # of a doctor nothing is known
    "three": [("mentions a pillow", 2), ("mentions water", -4)],
}
pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("anyio_backend", ["asyncio"])]


def write_rows(path: Path) -> Path:
    rows = [
        {
            "prompt_id": name,
            "prompt": [{"role": "user", "content": f"{name}:\u2028what helps?"}],
            "rubrics": [{"criterion": text, "points": points} for text, points in criteria],
        }
        for name, criteria in CRITERIA.items()
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    return path


async def behave(call: Call) -> None:
    prompt = call.body["messages"][-1]["content"]
    assert f"assistant: {TOLD}" in prompt and "hm" not in prompt
    criterion = prompt.rpartition("# Criterion\n")[2].partition("\n")[0]
    if "doctor" in criterion:
        return await call.send(403, {})
    is_met = criterion.split()[-1] in TOLD.lower()
    return await call.answer(json.dumps({"explanation": "so", "criteria_met": is_met}))


async def run(tmp_path: Path, rows: Path, url: str, judge_id: str = "judge", **more: Any) -> Any:
    inspect_ai = pytest.importorskip("inspect_ai", reason="inspect-ai is not installed")
    from inspect_ai.model import ModelOutput, ModelUsage, get_model

    output = ModelOutput.from_content("mockllm/model", f"<think>hm</think>\n{TOLD}")
    output.usage = ModelUsage()  # or Inspect counts tokens with a file that it downloads
    task = importlib.import_module(TASK).healthbench(str(rows), url, judge_id)
    model = get_model("mockllm/model", custom_outputs=[output] * 9)
    told = {"log_dir": str(tmp_path / "logs"), **more}
    [log] = await inspect_ai.eval_async(task, model=model, **told)
    return log


async def test_scores_are_healthbenchs_and_a_missing_verdict_is_no_score(tmp_path: Path) -> None:
    async with asking(behave) as (server, _):
        log = await run(tmp_path, write_rows(tmp_path / "rows.jsonl"), server.url)
    assert log.status == "success", log.error
    scores = {sample.id: sample.scores["by_judge"] for sample in log.samples}
    assert scores["one"].value == {"score": 1.0, "unscored": 0.0, "least": 1.0, "most": 1.0}
    assert scores["three"].value == {"score": -2.0, "unscored": 0.0, "least": -2.0, "most": -2.0}
    assert math.isnan(scores["two"].value["score"]) and scores["two"].value["unscored"] == 1.0
    assert scores["two"].value["least"] == 0.4 and scores["two"].value["most"] == 1.0
    assert scores["one"].answer == TOLD and scores["one"].metadata["judge"] == "judge"
    met = [verdict["met"] for verdict in scores["two"].metadata["verdicts"]]
    assert met == [True, None] and "403" in scores["two"].metadata["verdicts"][1]["explanation"]
    found = {one.name: one for one in log.results.scores}
    means = {name: next(iter(one.metrics.values())).value for name, one in found.items()}
    # (1 - 2) / 2 and (1 + 0.4 - 2) / 3 are below 0, (1 + 1 - 2) / 3 is 0: clipped as means only
    assert means == {"score": 0.0, "unscored": 1 / 3, "least": 0.0, "most": 0.0}
    assert (found["score"].scored_samples, found["score"].unscored_samples) == (2, 1)


async def test_a_mean_above_zero_is_not_clipped(tmp_path: Path) -> None:
    async with asking(behave) as (server, _):
        rows = write_rows(tmp_path / "rows.jsonl")
        log = await run(tmp_path, rows, server.url, sample_id=["one", "two"])
    found = {one.name: next(iter(one.metrics.values())).value for one in log.results.scores}
    assert found == {"score": 1.0, "unscored": 0.5, "least": 0.7, "most": 1.0}


async def test_a_judge_that_is_the_model_is_refused(tmp_path: Path) -> None:
    async with asking(behave) as (server, _):
        log = await run(tmp_path, write_rows(tmp_path / "rows.jsonl"), server.url, "model")
    assert log.status == "error" and "model would grade itself" in log.error.message


async def test_without_inspect_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, TASK, raising=False)
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    with pytest.raises(UsageError, match=r"inspect_ai is not installed: pip install -e"):
        importlib.import_module(TASK)
