"""The adapter for lm-evaluation-harness: absent it says so, present it gives our own decisions."""

import asyncio
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from attending.endpoint import Endpoint
from attending.errors import UsageError
from tests.engine.folders import write_model
from tests.engine.served import serve
from tests.evaluate.toy import task

WORDS = ["fever", "a fever", "patient", "system"]
TEMPLATE = "the patient has a {{ question }}"


def test_without_the_harness_the_error_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("lm_eval"):
        pytest.skip("lm_eval is here")
    with pytest.raises(UsageError, match="pip install -e"):
        import attending.evaluate.lm_eval_model  # noqa: F401
    assert "attending.evaluate.lm_eval_model" not in sys.modules


def test_a_task_of_the_harness_decides_as_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from lm_eval.tasks import TaskManager

    from attending.evaluate.lm_eval_model import AttendingLM

    folder = write_model(tmp_path / "tiny", initializer_range=0.6)
    rows = [{"question": f"{x} is", "answer": w} for x in ("x", "fever") for w in WORDS]
    how = {"columns": {"answer": "answer"}, "fixed": WORDS, "prompt": TEMPLATE}
    one = task(tmp_path, "choice", *rows, **how)
    theirs: dict[str, Any] = {
        "task": "tiny",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": TEMPLATE,
        "doc_to_choice": WORDS,
        "doc_to_target": "{{ answer }}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tiny.yaml").write_text(json.dumps(theirs))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with serve(folder) as (url, _):

        async def ask() -> list[Any]:
            async with Endpoint(url, "tiny") as endpoint:
                return [await one.ask(endpoint, example, 0) for example in one.examples]

        answers = asyncio.run(ask())
        model = AttendingLM(url, batch_size=1, device=None)
        found = lm_eval.simple_evaluate(
            model=model, tasks=["tiny"], task_manager=manager, bootstrap_iters=0, log_samples=True
        )
        history = [{"role": "user", "content": "a fever"}]
        asked = [
            _Asked("the patient", {"max_gen_toks": 8, "until": ["ev"], "do_sample": False}),
            _Asked(model.apply_chat_template(history), {"max_gen_toks": 8}),
        ]
        assert "ev" not in (written := model.generate_until(asked))[0] and len(written) == 2
        with pytest.raises(UsageError, match="log-likelihoods have no chat"):
            model.loglikelihood([_Asked(model.apply_chat_template(history), " a")])
        [rolled] = model.loglikelihood_rolling([_Asked("a fever has")])
        [(paired, _)] = model.loglikelihood([_Asked("a", " fever has")])
        assert rolled == pytest.approx(paired, abs=1e-5)
    samples = sorted(found["samples"]["tiny"], key=lambda sample: sample["doc_id"])
    for sample, answer in zip(samples, answers, strict=True):
        logprobs = {w: float(r[0][0]) for w, r in zip(WORDS, sample["resps"], strict=True)}
        assert answer.text == max(WORDS, key=lambda w: logprobs[w])
        assert answer.logprobs == pytest.approx({w: logprobs[w] for w in answer.logprobs}, abs=1e-4)
    ours = [one.grade(e, a).score for e, a in zip(one.examples, answers, strict=True)]
    assert found["results"]["tiny"]["acc,none"] == pytest.approx(sum(ours) / len(ours))


class _Asked:
    """As much of the harness's Instance as a model reads."""

    def __init__(self, *args: Any) -> None:
        self.args = args
