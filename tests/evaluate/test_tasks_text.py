"""Bits per byte: the sum of a text's log-probabilities, cut at a character."""

import json
from math import log
from pathlib import Path

import pytest

from attending.endpoint import Endpoint
from attending.engine import local
from attending.errors import ConfigError, ContextError, UsageError
from tests.engine.folders import write_model
from tests.engine.served import serve
from tests.evaluate.toy import Toy, asking, graded, said, task

pytestmark = pytest.mark.anyio


async def test_bits_per_byte_are_the_sum_over_the_bytes(tmp_path: Path) -> None:
    one = task(tmp_path, "text", {"text": "é b b"})
    async with asking(toy := Toy({" b": 0.25}, writes=True)) as endpoint:
        answer = await one.ask(endpoint, one.examples[0], 0)
    grade = one.grade(one.examples[0], answer)
    assert answer.logprobs == pytest.approx({"text": 2 * log(0.25)}) and answer.text == ""
    assert grade.score == pytest.approx(4 / 6) and grade.weight == 6  # é has two bytes
    assert one.is_loss and one.metric == "bits per byte" and toy.asked[-1]["echo"]


def test_a_text_is_cut_where_a_character_ends(tmp_path: Path) -> None:
    one = task(tmp_path, "text", {"body": "aé" * 9}, text="body", max_bytes=5)
    assert one.examples[0].messages[0]["content"] == "aéa"  # 4 bytes: the fifth begins an é
    with pytest.raises(ConfigError, match="row 1: 'text' holds no text to predict"):
        task(tmp_path, "text", {"text": ""})


async def test_a_text_longer_than_the_context_is_an_error_that_says_so(tmp_path: Path) -> None:
    one = task(tmp_path, "text", {"text": "word " * 99})
    async with asking(Toy(context=200)) as endpoint:
        with pytest.raises(ContextError, match=r"495 characters.*Lower max_bytes"):
            await one.ask(endpoint, one.examples[0], 0)
    async with asking(Toy(status=405)) as endpoint:
        with pytest.raises(UsageError, match="no completions"):
            await one.ask(endpoint, one.examples[0], 0)


async def test_a_served_model_gives_the_bits_of_its_logits(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    model, text = local.load(str(folder)), "the patient has a fever and 肺炎, a fever"
    one = task(tmp_path, "text", {"text": text}, {"text": text * 30})
    ids = model.tokenizer.encode(text)
    logprobs = model.logits([ids])[0].double().log_softmax(-1)
    bits = -sum(float(logprobs[i, token]) for i, token in enumerate(ids[1:])) / log(2)
    with serve(folder, dtype="float32") as (url, _):
        async with Endpoint(url, "tiny") as endpoint:
            answer = await one.ask(endpoint, one.examples[0], 0)
            with pytest.raises(ContextError):
                await one.ask(endpoint, one.examples[1], 0)
    score = one.grade(one.examples[0], answer).score
    assert score == pytest.approx(bits / len(text.encode()), abs=1e-4)


def test_an_answer_survives_its_file(tmp_path: Path) -> None:
    one = task(tmp_path, "text", {"text": "ab"})
    kept = json.loads(json.dumps({"text": -2 * log(2)}))
    assert one.grade(one.examples[0], said("", logprobs=kept)).score == pytest.approx(1.0)
    with pytest.raises(KeyError):
        graded(one, "")
