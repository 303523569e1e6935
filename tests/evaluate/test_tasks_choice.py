"""Multiple choice: formats to the byte, one request or one an option, a written answer."""

import asyncio
import re
from math import log
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.endpoint import Endpoint
from attending.engine import local
from attending.errors import ConfigError, ContextError, ReplyError, UsageError
from attending.evaluate.sample import Sample
from attending.evaluate.tasks.likelihood import score
from tests.engine.folders import write_model
from tests.engine.served import serve
from tests.evaluate.toy import Toy, asking, graded, said, task
from tests.hallway.test_chat import RAW

pytestmark = pytest.mark.anyio
ROW = {"question": "Which? ", "options": {"A": "one", "B": "two"}, "answer_idx": "B", "g": "a_b"}
LIKELY = {" A": 0.1, " B": 0.4, " x": 0.2}


def prompt(folder: Path, row: Any = ROW, **config: Any) -> str:
    text: str = task(folder, "choice", row, **config).examples[0].messages[0]["content"]
    return text


def test_prompts_are_those_of_lm_evaluation_harness(tmp_path: Path) -> None:
    assert prompt(tmp_path) == "Question: Which? \nA. one\nB. two\nAnswer:"
    mmlu = "The following are multiple choice questions (with answers) about a b.\n\n"
    told = prompt(tmp_path, prompt="mmlu", columns={"group": "g"})
    assert told == f"{mmlu}Which?\nA. one\nB. two\nAnswer:"
    row = {"question": "Q", "opa": "1", "opb": "{{ x }}", "cop": 1}
    columns: dict[str, Any] = {"answer": "cop", "options": ["opa", "opb"]}
    told = prompt(tmp_path, row, prompt="medmcqa", columns=columns)
    assert told == "Question: Q\nChoices:\nA. 1\nB. {{ x }}\nAnswer:"
    row = {"question": "Q", "answer": "no", "contexts": ["One.", "Two."]}
    columns = {"context": "contexts", "answer": "answer"}
    told = prompt(tmp_path, row, fixed=["yes", "no"], columns=columns)
    assert told == "Abstract: One.\nTwo.\nQuestion: Q\nAnswer:"
    assert prompt(tmp_path, prompt="{{ question }}?") == "Which? ?"


@pytest.mark.parametrize(
    ("row", "columns", "answer"),
    [
        ({"answer_idx": "A"}, {}, "A"),
        ({"answer_idx": "two"}, {}, "B"),
        ({"answer_idx": 1}, {}, "B"),
        ({"answer_idx": 1}, {"first": 1}, "A"),
        ({"answer_idx": "c", "options": ["a", "b", "c"]}, {}, "C"),
        ({"answer_idx": "B", "options": {"A": "B", "B": "A"}}, {}, "B"),
        ({"p": "x", "q": "y", "k": 0}, {"options": ["p", "q"], "answer": "k"}, "A"),
    ],
)
def test_columns_say_where_options_and_answer_are(
    tmp_path: Path, row: Any, columns: Any, answer: str
) -> None:
    one = task(tmp_path, "choice", ROW | row, columns=columns)
    assert one.examples[0].data["rule"]["answer"] == answer
    assert one.examples[0].data["reference"].startswith(f"{answer}. ")


def test_chance_ids_groups_and_the_sample_follow_the_data(tmp_path: Path) -> None:
    three = ROW | {"options": ["a", "b", "c"], "answer_idx": 0}
    one = task(tmp_path, "choice", ROW, three, columns={"group": "g"})
    assert one.chance == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert [example.id for example in one.examples] == ["0", "1"]
    assert one.examples[0].tags == ("g:a_b",) and len(one.sha256) == 64
    assert len(task(tmp_path, "choice", ROW, three, ROW, limit=2).examples) == 2


@pytest.mark.parametrize(
    ("row", "config", "says"),
    [
        ({"answer_idx": "E"}, {}, "rows.jsonl, row 2: 'answer_idx' is 'E', not one of A, B"),
        ({"answer_idx": 5}, {}, "'answer_idx' is 5"),
        ({"options": ["a"]}, {}, "1 options: expected 2 to 26"),
        ({"options": "a"}, {}, "'options' holds 'a', of the wrong kind"),
        ({"question": 3}, {}, "'question' holds 3"),
        ({}, {"columns": {"question": "questoin"}}, "has no 'questoin'. Did you mean 'question'"),
        ({}, {"columns": {"id": "g"}}, "1 ids more than once"),
        ({}, {"prompt": "medqaa"}, "no prompt 'medqaa'. Did you mean 'medqa'"),
        ({}, {"prompt": "{{ nothing }}"}, "the prompt cannot be made"),
    ],
)
def test_what_a_row_lacks_is_named(tmp_path: Path, row: Any, config: Any, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        task(tmp_path, "choice", ROW, ROW | row, **config)
    assert says in str(error.value)


async def test_one_request_decides_where_the_likeliest_tokens_do(tmp_path: Path) -> None:
    one, toy = task(tmp_path, "choice", ROW), Toy(LIKELY)
    async with asking(toy) as endpoint:
        answer = await one.ask(endpoint, one.examples[0], 0)
    assert len(toy.asked) == 1 and answer.text == "B"
    assert answer.logprobs == pytest.approx({"A": log(0.1), "B": log(0.4)})
    assert one.grade(one.examples[0], answer).score == 1.0
    assert one.grade(one.examples[0], answer).reason == "answers B"


async def test_an_option_that_is_one_token_is_known_to_be_less_likely(tmp_path: Path) -> None:
    one, toy = task(tmp_path, "choice", ROW), Toy({" B": 0.1, " ": 0.3, " x": 0.05})
    async with asking(toy) as endpoint:
        for requests in (2, 3):  # " " might begin " A"; once it did not, it never will
            answer = await one.ask(endpoint, one.examples[0], 0)
            assert answer.text == "B" and len(toy.asked) == requests


async def test_options_of_several_tokens_are_scored_whole(tmp_path: Path) -> None:
    row = {"question": "Q", "answer": "no, never"}
    fixed, columns = ["yes", "no, never"], {"answer": "answer"}
    one = task(tmp_path, "choice", row, fixed=fixed, columns=columns, prompt="{{ question }}:")
    toy = Toy({" no": 0.5, ",": 0.9, " never": 0.8, " yes": 0.3})
    async with asking(toy) as endpoint:
        answer = await one.ask(endpoint, one.examples[0], 0)
    assert answer.text == "no, never" and len(toy.asked) == 2
    assert answer.logprobs == pytest.approx({"yes": log(0.3), "no, never": log(0.5 * 0.9 * 0.8)})


async def test_an_option_of_several_tokens_is_never_taken_for_one(tmp_path: Path) -> None:
    row, fixed = {"question": "Q", "answer": "no"}, ["no", "yes, sir"]
    how = {"columns": {"answer": "answer"}, "prompt": "{{ question }}:"}
    one = task(tmp_path, "choice", row, fixed=fixed, **how)
    toy = Toy({" no": 0.1, " yes": 0.3, ",": 0.9, " sir": 0.9, " x": 0.01})
    async with asking(toy) as endpoint:
        for _ in range(2):
            assert (await one.ask(endpoint, one.examples[0], 0)).text == "yes, sir"
    assert len(toy.asked) == 4


CHANCES = st.floats(1e-5, 1, allow_subnormal=False)
TOKENS = ["", " ", " y", " yes", " no", ",", " sir", " A", "B", *(f" x{i}" for i in range(25))]


@settings(max_examples=40, deadline=None)
@given(
    chances=st.dictionaries(st.sampled_from(TOKENS), CHANCES, min_size=3),
    top=st.sampled_from([1, 20]),
    writes=st.booleans(),
    counts=st.booleans(),
)
def test_the_short_way_decides_as_the_long_one(
    tmp_path_factory: pytest.TempPathFactory, chances: Any, top: int, writes: bool, counts: bool
) -> None:
    toy = Toy(chances, top=top, writes=writes, counts=counts)
    row = {"question": "Q", "answer": "yes"}
    fixed, columns = ["yes", "no", "yes, sir", "y"], {"answer": "answer"}
    folder = tmp_path_factory.mktemp("task")
    one = task(folder, "choice", row, fixed=fixed, columns=columns, prompt="{{ question }}:")
    words = {"yes": [" yes"], "no": [" no"], "yes, sir": [" yes", ",", " sir"], "y": [" y"]}
    long = {name: sum(map(toy.logprob, tokens)) for name, tokens in words.items()}

    async def ask() -> None:
        async with asking(toy) as endpoint:
            for _ in range(2):  # the second time it is known what is one token
                answer = await one.ask(endpoint, one.examples[0], 0)
                assert long[answer.text] == pytest.approx(max(long.values()), abs=1e-9)
                told = {name: long[name] for name in answer.logprobs}
                assert answer.logprobs == pytest.approx(told, abs=1e-9)

    asyncio.run(ask())


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("writes", [True, False])
async def test_written_tokens_and_the_prompt_do_not_count(writes: bool, counts: bool) -> None:
    toy = Toy({"a": 0.5, " b": 0.25, "!": 0.9}, writes=writes, counts=counts)
    async with asking(toy) as endpoint:
        last = await score(endpoint, "a b b", "a b", 2 if counts else None)
        assert not last.is_greedy and (await score(endpoint, "!!", "!", 1)).is_greedy
        assert (last.total, last.num_tokens) == (pytest.approx(log(0.25)), 1)
        whole = await score(endpoint, "a b b")  # the first token is given
        assert (whole.total, whole.num_tokens) == (pytest.approx(2 * log(0.25)), 3)
        joined = ("ab", "a", 1) if counts else ("ab", "a", None)
        with pytest.raises(ReplyError, match="toy joins 'b' to what precedes it"):
            await score(endpoint, *joined)


async def test_a_token_that_the_server_puts_first_moves_no_border(tmp_path: Path) -> None:
    one, toy = task(tmp_path, "choice", ROW), Toy({" x": 0.5}, head="<s>", top=1)
    toy.probability = {" A": 0.1, " B": 0.2, " x": 0.5}
    async with asking(toy) as endpoint:
        answer = await one.ask(endpoint, one.examples[0], 0)
    assert answer.logprobs == pytest.approx({"A": log(0.1), "B": log(0.2)})


@pytest.mark.parametrize(
    ("toy", "says"),
    [
        (Toy(LIKELY, status=404), "has no completions: .* --set tasks.NAME.method=generation"),
        (Toy({}, echoes=False), "does not echo its prompt's log-probabilities"),
        (Toy(LIKELY, top=-1), "gives no log-probabilities of a prompt"),
    ],
)
async def test_an_endpoint_that_cannot_is_told_what_can_be_done(
    tmp_path: Path, toy: Toy, says: str
) -> None:
    one = task(tmp_path, "choice", ROW)
    async with asking(toy) as endpoint:
        with pytest.raises(UsageError, match=says):
            await one.ask(endpoint, one.examples[0], 0)


async def test_a_question_longer_than_the_context_is_an_error_that_says_so(tmp_path: Path) -> None:
    one = task(tmp_path, "choice", ROW | {"question": "why " * 100})
    async with asking(Toy(LIKELY, context=200)) as endpoint:
        with pytest.raises(ContextError, match=r"refuses a text of 4.. characters"):
            await one.ask(endpoint, one.examples[0], 0)


async def test_a_written_answer_is_read_by_the_verifiers_rule(tmp_path: Path) -> None:
    one, toy = task(tmp_path, "choice", ROW, method="generation"), Toy(says="The answer is B.")
    async with asking(toy) as endpoint:
        answer = await one.ask(endpoint, one.examples[0], 0)
    sent = toy.asked[0]["messages"][0]["content"]
    assert sent.startswith("Which? \n\nA. one\nB. two\n\n") and '"The answer is X."' in sent
    assert one.grade(one.examples[0], answer).score == 1.0 and answer.logprobs is None
    for text, wanted in (
        ("<think>A or B?</think>The answer is B.", 1.0),
        ("<think>The answer is B.", 0.0),
        ("The answer is A.", 0.0),
        ("I do not know.", 0.0),
        ("", 0.0),
    ):
        grade = graded(one, text)
        assert grade.score == wanted
        is_silent = text in ("", "I do not know.", "<think>The answer is B.")
        assert grade.reason.startswith("no answer") == is_silent
    samples = [Sample(one.examples[0], said(""), graded(one, text)) for text in ("", "B")]
    assert one.more(samples) == {"no_answer": 0.5} and one.more([]) == {}


def test_fixed_options_are_written_as_they_are(tmp_path: Path) -> None:
    row = {"question": "Q", "answer": "maybe", "contexts": ["One.", "Two."]}
    columns = {"context": "contexts", "answer": "answer"}
    fixed = ["yes", "no", "maybe"]
    one = task(tmp_path, "choice", row, method="generation", fixed=fixed, columns=columns)
    text = one.examples[0].messages[0]["content"]
    assert text.startswith("One.\nTwo.\n\nQ\n\n") and text.endswith("one of: yes, no, maybe.")
    assert graded(one, "So the answer is maybe.").score == 1.0
    assert graded(one, "The answer is no.").score == 0.0 and one.chance == pytest.approx(1 / 3)


WORDS = [t[1:] for t in map(RAW.id_to_token, range(400)) if re.fullmatch("Ġ[a-z]+", t or "")]


@pytest.mark.parametrize(("fixed", "is_short"), [(WORDS, True), (["a fever", "system ab"], False)])
async def test_both_ways_agree_with_the_models_logits(
    tmp_path: Path, fixed: list[str], is_short: bool
) -> None:
    folder = write_model(tmp_path / "tiny", initializer_range=0.6)
    model = local.load(str(folder))
    rows = [{"question": f"has {x}", "answer": fixed[0]} for x in ("the", "a fever", "x", "system")]
    how = {"columns": {"answer": "answer"}, "prompt": "the patient {{ question }}"}
    one = task(tmp_path, "choice", *rows, fixed=fixed, **how)
    shown = list[int]()
    with serve(folder, dtype="float32") as (url, _):
        async with Endpoint(url, "tiny") as endpoint:
            for example in one.examples:
                before = endpoint.totals.requests
                answer = await one.ask(endpoint, example, 0)
                shown.append(endpoint.totals.requests - before)
                start = model.tokenizer.encode(example.messages[0]["content"])
                long = dict[str, float]()
                for text in fixed:
                    ids = start + (end := model.tokenizer.encode(f" {text}"))
                    logprobs = model.logits([ids])[0].double().log_softmax(-1)[len(start) - 1 :]
                    long[text] = sum(float(logprobs[i, token]) for i, token in enumerate(end))
                assert answer.text == max(long, key=lambda text: long[text])
                told = {name: long[name] for name in answer.logprobs or {}}
                assert answer.logprobs == pytest.approx(told, abs=1e-4)
    assert (1 in shown) == is_short, shown
