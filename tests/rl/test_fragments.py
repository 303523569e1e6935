"""Slices of consultations, with a doctor that says what the test wants."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import attending
from attending.chat import Tokenizer
from attending.errors import ConfigError
from attending.logs import read_metrics
from attending.rl.fragments import Fragment, Room, elicited_share, judge_reply, play, replay
from attending.rl.loop import rl
from attending.rl.prompts import Prompts
from attending.rl.sampler import Asked
from attending.rl.types import Case, Rollout
from attending.verifier.patient.find import find_case
from tests.pretrain.conftest import one_thread  # noqa: F401  (a fixture)
from tests.rl.test_loop import recipe
from tests.train.making import CHATML, LLAMA, make_model, make_tokenizer

NAME = "appendicitis"
CASE = Case("one", (), "consultations", patient=NAME)
PATIENTS = {NAME: find_case(NAME)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fragments")
    tokenizer = make_tokenizer(place / "tokenizer")
    (tokenizer / "chat_template.jinja").write_text(CHATML, "utf-8")
    make_model(place / "model", tokenizer, {**LLAMA, "max_position_embeddings": 4096})
    for name in ("train", "heldout"):
        row = {"id": name, "messages": [], "kind": "consultations", "patient": NAME}
        (place / f"{name}.jsonl").write_text(json.dumps(row) + "\n", "utf-8")
    return place


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return attending.load(folder / "model").tokenizer


class Scripted:
    """A doctor that says one line a turn; what it was asked is kept."""

    def __init__(self, tokenizer: Tokenizer, *lines: str) -> None:
        self.tokenizer, self.lines = tokenizer, list(lines)
        self.asked: list[Asked] = []

    def load(self, *_: Any) -> None:
        raise AssertionError

    def sample(self, asked: Sequence[Asked], version: int) -> Iterator[tuple[int, Rollout]]:
        self.asked += asked
        line = self.lines.pop(0) if asked else ""
        for place, one in enumerate(asked):
            ids = (*self.tokenizer.encode(line, is_first=False), 1)
            told = (0.0,) * len(ids)
            yield place, Rollout(one.case, one.prompt, ids, told, "stop", one.seed, version)


def played(tokenizer: Tokenizer, *lines: str, turns: int, most: int = 4000) -> Fragment:
    doctor = Scripted(tokenizer, *lines)
    prompts = Prompts([CASE], tokenizer, {}, most, 0)
    room = Room(tokenizer, {}, most)
    (found,) = asyncio.run(
        play(prompts.draw(1), PATIENTS, doctor, room, [turns], seed=0, version=3)
    )
    return found


def worth(fragment: Fragment, text: str, most_facts: int = 2) -> tuple[float | None, str]:
    verdict = asyncio.run(judge_reply(fragment, text, most_facts))
    return verdict.score, verdict.reason


def test_a_slice_is_what_was_said_and_what_the_server_would_be_asked(tokenizer: Tokenizer) -> None:
    fragment = played(tokenizer, "Do you have a fever?", turns=1)
    roles = [turn["role"] for turn in fragment.prompt.case.messages]
    assert roles == ["system", "user", "assistant", "user"]
    assert fragment.said == ("Do you have a fever?",) and not fragment.is_cut
    assert fragment.prompt.ids == tuple(tokenizer.render(fragment.prompt.case.messages))
    before = played(tokenizer, turns=0)
    assert fragment.told > before.told and elicited_share(fragment) > elicited_share(before)


def test_a_reply_is_worth_the_new_facts_that_it_elicits(tokenizer: Tokenizer) -> None:
    start = played(tokenizer, turns=0)
    assert worth(start, "Do you have a fever?") == (0.5, "1 new facts")
    assert worth(start, "Do you have a fever?", 1) == (1.0, "1 new facts")
    after = played(tokenizer, "Do you have a fever?", turns=1)
    assert worth(after, "do you have a FEVER?") == (0.0, "said before")
    assert worth(after, "Any fever at all, then?") == (0.0, "0 new facts")
    assert worth(after, "zzz") == (0.0, "0 new facts")
    assert worth(after, " ") == (0.0, "no answer")
    share, reason = worth(after, "My diagnosis is acute appendicitis. Goodbye.")
    assert reason.startswith("concluded") and share == elicited_share(after)


def test_what_is_denied_or_found_by_examining_is_worth_nothing(tokenizer: Tokenizer) -> None:
    start = played(tokenizer, turns=0)
    assert worth(start, "Let me examine your abdomen and take your temperature.")[0] == 0.0
    assert worth(start, "I will order blood tests and an ultrasound.")[0] == 0.0
    other = start._replace(patient=find_case("肺炎"), told=frozenset())
    assert worth(other, "有没有咳血？") == (0.0, "0 new facts")  # 没有咳血。
    assert "咯血" in asyncio.run(asyncio.run(replay(other)).answer("有没有咳血？")).revealed


def test_a_reply_cut_while_thinking_is_not_said_to_the_patient(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "opens_reasoning", lambda self, ids: True)
    cut = played(tokenizer, "Do you have a fever?", turns=1)
    assert cut.is_cut and cut.said == ()
    whole = played(tokenizer, "Ask.</think>Do you have a fever?", turns=1)
    assert whole.said == ("Do you have a fever?",)


def test_judging_does_not_change_the_patient(tokenizer: Tokenizer) -> None:
    start = played(tokenizer, turns=0)
    assert worth(start, "Do you have a fever?") == worth(start, "Do you have a fever?")


def test_a_consultation_that_ends_or_grows_too_long_is_cut_before(tokenizer: Tokenizer) -> None:
    ended = played(tokenizer, "My diagnosis is acute appendicitis. Goodbye.", "More?", turns=2)
    assert (
        ended.is_cut
        and ended.said == ()
        and ended == played(tokenizer, turns=0)._replace(is_cut=True)
    )
    start = len(played(tokenizer, turns=0).prompt.ids)
    long = played(tokenizer, "Do you have a fever?", turns=1, most=start + 10)
    assert long.is_cut and long.said == ()
    silent = played(tokenizer, "", turns=1)
    assert silent.is_cut and silent.said == ()
    with pytest.raises(ConfigError, match=f"the complaint of {NAME} .* max_prompt=50"):
        played(tokenizer, turns=0, most=50)


def test_the_stage_runs_and_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    config = recipe(
        (folder, folder / "model"),
        prompts=1,
        steps=2,
        max_prompt=3000,
        max_tokens=16,
        micro_tokens=3100,
        dialogue={"turns": 2},
        watch={"every_steps": 1},
    )
    out = rl(config, tmp_path / "out")
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "rl/reward" in row]
    assert len(rows) == 2 and {"rl/fragment_turns", "rl/cut_fragment_share"} <= {*rows[0]}
    key = "heldout/score"
    held = [row[key] for row in read_metrics(out / "metrics.jsonl") if key in row]
    assert len(held) == 3 and all(0 <= one <= 1 for one in held)
    assert "heldout/length_tokens" not in (out / "metrics.jsonl").read_text("utf-8")
    kept = [json.loads(x) for x in (out / "rollouts.jsonl").read_text("utf-8").splitlines()]
    assert len(kept) == 2 and all(len(row["answers"]) == 4 for row in kept)
    roles = [[turn["role"] for turn in row["messages"]] for row in kept]
    assert all(one[:2] == ["system", "user"] for one in roles)  # what was said before
