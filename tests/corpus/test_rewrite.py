"""Rewriting: what is faithful by hand, and a run with an endpoint that helps, fails or is down."""

import asyncio
import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from attending.chat import Tokenizer
from attending.corpus import run, steps
from attending.corpus.fidelity import drugs, numbers, unfaithful
from attending.corpus.recipe import CorpusConfig, RewriteConfig
from attending.corpus.rewrite import rewritten
from attending.corpus.split import is_held_out
from attending.endpoint import Endpoint, EndpointOptions
from attending.errors import ConfigError, EndpointError
from attending.shards import Shards
from tests.corpus.making import Found, build, prose, recipe, write_jsonl
from tests.recording import record_to, replay_from
from tests.running import running

RATIO = (0.5, 1.5)
EN = "The patient, aged 64, took aspirin 81 mg daily and 1,000 mL of fluid; temperature 38.5 °C."
ZH = "患者64岁，每日口服阿司匹林100毫克，补液1000毫升，体温38.5℃。"


@pytest.mark.parametrize(
    ("source", "text", "why"),
    [
        (EN, "Aged 64, the patient took 81 mg of aspirin daily, 1000 ml of fluid; 38.5℃.", ""),
        (EN, EN.replace("81 mg", "81mg").replace("°C", "degrees Celsius"), ""),
        (EN, EN.replace("81 mg", "18 mg"), "number_lost"),
        (EN, EN.replace("81 mg", "81 g"), "number_lost"),
        (EN, EN.replace("38.5", "385"), "number_lost"),
        (EN, EN + " Check again in 2 days.", "number_added"),
        (EN, EN.replace("aspirin", "the drug"), "drug_lost"),
        (EN, EN + " Warfarin is an alternative.", "drug_added"),
        (EN, EN[:30], "length"),
        (EN, EN * 2, "length"),
        (EN, "", "empty"),
        (EN, "I'm sorry, but " + EN, "refusal"),
        (EN, "Here is the rewritten text: " + EN, "preamble"),
        ("Sorry, " + EN, "Sorry, " + EN, ""),
        (ZH, "患者64岁，体温38.5 摄氏度，每日口服阿司匹林 100 mg，补液 1,000 ml。", ""),
        (ZH, ZH.replace("１", "1").replace("64", "６４"), ""),
        (ZH, ZH.replace("100毫克", "100克"), "number_lost"),
        (ZH, ZH.replace("阿司匹林", "该药"), "drug_lost"),
        (ZH, ZH + "必要时加用氯吡格雷。", "drug_added"),
        (ZH, ZH + "3天后复查。", "number_added"),
        (ZH, "抱歉，" + ZH, "refusal"),
        (ZH, "以下是改写后的文本：" + ZH, "preamble"),
    ],
)
def test_what_is_faithful_and_what_is_not(source: str, text: str, why: str) -> None:
    assert unfaithful(source, text, RATIO) == why


def test_numbers_keep_their_units_signs_and_places() -> None:
    told = "−5 °C, 3-5 mg/kg, 0.5 µg per ml, 45-year-old, 120/80 mmHg, 2%, COVID-19, 1,234.5, B12"
    assert numbers(told) == {
        *("-5 celsius", "3", "5 mg/kg", "0.5 ug/ml", "45 year", "120", "80 mmhg", "2 %", "19"),
        *("1234.5", "12"),
    }
    assert numbers("每次10毫克/公斤，3个月") == {"10 mg/kg", "3 month"}
    assert numbers("5.0 mg") != numbers("5 mg") and numbers("10 m²") == {"10 m2"}


def test_drug_names_are_whole_words_and_the_longest() -> None:
    assert drugs("Aspirin, ASPIRIN; metforminx; insulin glargine") == {
        "aspirin",
        "insulin glargine",
    }
    assert drugs("予阿莫西林克拉维酸钾及aspirin口服") == {"阿莫西林克拉维酸钾", "aspirin"}


Say = Callable[[str, int], str | Response]


class Fake:
    """An endpoint that answers with `say(text of the prompt, number of the request)`."""

    def __init__(self, say: Say) -> None:
        self.say, self.asked = say, list[str]()
        self.app = Starlette(
            routes=[
                Route("/v1/models", lambda _: JSONResponse({"data": [{"id": "m"}]})),
                Route("/v1/chat/completions", self.answer, methods=["POST"]),
            ]
        )

    async def answer(self, request: Request) -> Response:
        content = (await request.json())["messages"][-1]["content"]
        self.asked.append(content.rpartition("Text:\n")[2])
        said = self.say(self.asked[-1], len(self.asked))
        if isinstance(said, Response):
            return said
        choice = {"message": {"content": said}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": 50}
        return JSONResponse({"choices": [choice], "usage": usage, "model": "m"})


def config(root: Path, url: str, **told: Any) -> CorpusConfig:
    if not (root / "a.jsonl").exists():
        key = next(str(n) for n in range(1000) if is_held_out(str(n)))
        rows = [{"text": prose(n), "key": key if n == 5 else f"train-{n}"} for n in range(24)]
        write_jsonl(root / "a.jsonl", rows)
    executor = {"tasks": 2, "workers": 1}
    values = {"url": url, "model": "m", "concurrency": 2, **told}
    source = {"path": "*.jsonl", "private": False, "holdout_key": "{key}"}
    return recipe(root, rewrite=values, executor=executor, sources={"notes": source})


def texts(found: Found, root: Path) -> list[str]:
    tokenizer, shards = Tokenizer.from_folder(root / "tokenizer"), Shards(found.out / "train")
    return [tokenizer.decode(shards.document(n)) for n in range(shards.num_documents)]


def notes(found: Found) -> dict[str, int]:
    told = found.funnel["notes"].items()
    return {k.removeprefix("rewrite_"): v for k, v in told if k.startswith("rewrite_")}


def better(text: str, _: int = 0) -> str:
    return "In short, " + text


def test_faithful_answers_replace_training_texts_and_the_rest_stays(tmp_path: Path) -> None:
    fake = Fake(lambda text, _: better(text) if "case 1" in text else "I cannot do that.")
    with running(fake.app) as url:
        found = build(config(tmp_path, url, tries=2), tmp_path / "out")
    done = [text for text in texts(found, tmp_path) if text.startswith("In short")]
    assert done and all("case 1" in text for text in done)
    told = notes(found)
    assert told["done"] == len(done) and told["refusal"] + told["done"] + told["held_out"] == 24
    assert len(fake.asked) == told["done"] + 2 * told["refusal"]
    assert told["input_tokens"] == 100 * len(fake.asked)
    assert found.documents() == 24 and found.removed() == []
    assert "rewrite" in [row["step"] for row in found.funnel["rows"]]


def test_the_budget_ends_the_asking_and_the_rest_is_counted(tmp_path: Path) -> None:
    fake = Fake(better)
    with running(fake.app) as url:
        found = build(config(tmp_path, url, budget_tokens=1200), tmp_path / "out")
        cost = {"budget_cost": 0.0008, "price_per_million": [1.0, 0.0]}
        other = build(config(tmp_path, url, **cost), tmp_path / "other")
    told = notes(found)
    assert (told["done"], told["held_out"], told["budget"]) == (
        4,
        2,
        18,
    )  # half is the other task's
    assert notes(other)["done"] == 4
    assert len(texts(found, tmp_path)) + told["held_out"] == 24


def test_a_resumed_run_asks_nothing_again_and_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(lambda text, _: better(text) if len(text) % 2 else "no")

    def stopped(*_: object) -> str:
        raise RuntimeError

    with running(fake.app) as url:
        told = config(tmp_path, url)
        whole = build(told, tmp_path / "whole")
        fake.asked.clear()
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(steps.Mix, "apply", stopped)
            build(told, tmp_path / "out")
        cache_files = list((tmp_path / "out.tmp" / "work" / "rewrite").glob("*.sqlite"))
        assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in cache_files)
        first, asked = [*fake.asked], len(fake.asked)
        resumed = build(told, tmp_path / "out", resume=True)
    assert resumed.bytes() == whole.bytes()
    assert asked and set(first).isdisjoint(fake.asked[asked:])
    assert not (tmp_path / "out" / "work").exists()


def test_an_endpoint_that_is_down_stops_the_run_which_another_address_can_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attending.endpoint.random.uniform", lambda *_: 0.0)
    down = config(tmp_path, "http://127.0.0.1:9")
    with pytest.raises(EndpointError, match=r"rewriting stopped.*--resume"):
        build(down, tmp_path / "out")
    with running(Fake(better).app) as url:
        found = build(config(tmp_path, url), tmp_path / "out", resume=True)
    assert notes(found)["done"] > 0


def test_malformed_and_cut_answers_leave_the_document(tmp_path: Path) -> None:
    cut = {"choices": [{"message": {"content": "x"}, "finish_reason": "length"}], "usage": {}}
    for body, why in (({"answer": 42}, "malformed"), (cut, "cut")):
        fake = Fake(lambda *_, body=body: JSONResponse(body))  # type: ignore[misc]
        with running(fake.app) as url:
            found = build(config(tmp_path, url, tries=1), tmp_path / why)
        assert notes(found)[why] + notes(found)["held_out"] == 24


def test_only_the_sources_domains_and_lengths_named_are_asked_for(tmp_path: Path) -> None:
    fake = Fake(better)
    with running(fake.app) as url:
        found = build(config(tmp_path, url, max_characters=10), tmp_path / "a")
        assert notes(found)["too_long"] + notes(found)["held_out"] == 24
        found = build(config(tmp_path, url, sources=["other"]), tmp_path / "b")
        assert notes(found) == {"other_source": 24}
    assert fake.asked == []
    with pytest.raises(ConfigError, match="no prompt 'absent'"):
        run.build(config(tmp_path, url, prompt="absent"), tmp_path / "c")


@pytest.fixture
def tape(tmp_path: Path) -> Iterator[Path]:
    """What a real address said once."""
    yield tmp_path / "tape.jsonl"


def test_a_recorded_endpoint_gives_the_same_rewriting(tape: Path) -> None:
    answer = "Aged 64, the patient took 81 mg of aspirin daily, 1000 ml of fluid; 38.5 °C."
    told = RewriteConfig.build({"url": "http://localhost", "tries": 2})
    fake = Fake(lambda _, number: answer if number == 2 else EN.replace("81", "18"))

    async def ask(url: str, wire: Any) -> Any:
        async with Endpoint(url, "m", options=EndpointOptions(), wire=wire) as asked:
            return await rewritten(asked, EN, told)

    with running(fake.app) as url:
        said = asyncio.run(ask(url, record_to(tape)))
        again = asyncio.run(ask(url, replay_from(tape)))
    assert said == again == (answer, "", 200, 100)
    assert len(tape.read_text().splitlines()) == 3 and json.loads(tape.read_text().splitlines()[0])
