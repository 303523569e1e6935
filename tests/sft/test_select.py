"""Selection: faults by hand, near-duplicates by counting, clusters that are plain, fair shares."""

import json
import random
import time
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attending.errors import ConfigError
from attending.overlap import ngrams, normalise
from attending.sft.select import Cluster, SelectConfig, deal, duplicates, exchange, fault, select
from tests.conftest import SHARED

FINE = "It is treated with rest."
DRUGS = ("aspirin", "warfarin", "metformin", "insulin", "heparin", "digoxin", "lithium", "codeine")
CITIES = ("Paris", "Rome", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo", "Quito")


def sample(prompt: str, answer: str = FINE) -> dict[str, Any]:
    turns = [("system", "Be brief."), ("user", prompt), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def medical() -> list[str]:
    return [f"Which side effects does {drug} have in old patients?" for drug in DRUGS]


def geographic() -> list[str]:
    return [f"Plan a cheap weekend of museums and food around {city}." for city in CITIES]


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        *[("", "no_prompt"), ("?! …", "no_prompt"), ("Hi", ""), ("发烧怎么办", "")],
        ("Summarize the following text:", "cut_prompt"),
        ("Translate into German:\nThe knee hurts.", ""),
        ("Read the note.\n\nThen answer the following:", "cut_prompt"),
        ("BP 120/80, no fever.\n\nSummarize the note in three points:", ""),
        ("What is anaemia? Answer:", ""),
        ("Q: What is anaemia?\nA:", ""),
        ("Answer:", "cut_prompt"),
        ("贫血是什么？\n答案：", ""),
        ("请总结以下病历：", "cut_prompt"),
        ("Compare aspirin, warfarin,", "cut_prompt"),
        ("Compare aspirin and", "cut_prompt"),
        ("What is this drug used for", ""),
        ("My knee hurts :(", ""),
        ("What is seen in the image?", "missing_picture"),
        (
            "As shown in the figure below, the heart has four chambers. Name them.",
            "missing_picture",
        ),
        ("What is seen in the image?\n![a lung](https://example.org/lung.png)", ""),
        ("Which muscle is attached to the tibia?", ""),
        ("如图所示，诊断是什么？", "missing_picture"),
        ("Explain the passage below.", "missing_text"),
        ("Explain the passage below.\n\nThe heart has four chambers.", ""),
        ("Is a child of 30 kg or below given half the dose?", ""),
        ("解释下面的段落。", "missing_text"),
        ("Write a referral for [NAME] with [DIAGNOSIS].", "placeholder"),
        ("Write a template of a referral with [NAME] in it.", ""),
        ("[NAME] was seen. " + "She is well and has no fever. " * 10, ""),
        ("Dear {{ patient_name }}, you have an appointment.", "placeholder"),
        ("What does `{{ patient_name }}` do in Jinja?", ""),
        ("Simplify $x^{{a}}$.", ""),
        ("Explain [insert topic] to a child.", "placeholder"),
        ("The capital of France is ____.", "blank"),
        ("The capital of France is ____.\nA. Paris\nB. Rome", ""),
        ("Fill in: the heart has ____ chambers.", ""),
        ("It is treated with REST!", "echo"),
    ],
)
def test_prompts_that_cannot_be_answered_have_a_reason(prompt: str, why: str) -> None:
    assert fault(prompt, FINE) == why


@pytest.mark.parametrize("filling", ["\n", " ", ", ", "`", "{{", "below ", "____", "| ", ": "])
def test_no_prompt_takes_minutes(filling: str) -> None:
    start = time.process_time()
    fault(f"What {filling * 20_000} is it?", FINE)
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        *[("", "no_answer"), ("...", "no_answer"), ("C", ""), ("4.", "")],
        ("The causes are:", "cut_answer"),
        ("Take aspirin, or", "cut_answer"),
    ],
)
def test_answers_that_teach_nothing_have_a_reason(answer: str, why: str) -> None:
    assert fault("What is it?", answer) == why


def test_the_prompt_is_what_users_said_before_the_last_answer() -> None:
    said = [
        ("user", "Hello. "),
        ("assistant", "Yes?"),
        ("user", "My knee."),
        ("assistant", "Rest."),
    ]
    turns: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in said]
    assert exchange(turns) == ("Hello. \nMy knee.", "Rest.")
    assert exchange([*turns, {"role": "user", "content": "Thanks"}])[0] == "Hello. \nMy knee."
    assert exchange(turns[:1]) == ("Hello.", '""')  # which has no word
    assert fault(*exchange(turns[:1])) == "no_answer"
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert fault(*exchange([turns[0], call])) == ""


def test_near_duplicates_name_the_first_that_stays() -> None:
    words = [f"word{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(40)]
    texts = [" ".join(words), " ".join([*words, "please"]), " ".join(words[::-1])]
    texts += [" ".join([*words, *"please do it"]), texts[0].upper() + "!"]
    # Of 38 n-grams of three tokens all are common, of 39; none; of 48; all.
    assert duplicates(texts, SelectConfig(similarity=0.7)) == {1: 0, 3: 0, 4: 0}
    assert duplicates(texts, SelectConfig()) == {1: 0, 4: 0}
    assert duplicates(texts, SelectConfig(similarity=0.98)) == {4: 0}


@pytest.mark.parametrize(
    ("change", "is_twin"),
    [
        *[("", True), ("please", True), ("2", False), ("not", False), ("except", False)],
        ("without", False),
    ],
)
def test_a_word_that_makes_another_question_makes_no_duplicate(change: str, is_twin: bool) -> None:
    long = "Which of the drugs that this old and rather frail patient takes every day is known"
    texts = [f"{long} to cause a cough?", f"{long} {change} to cause a cough?"]
    assert duplicates(texts, SelectConfig(similarity=0.7)) == ({1: 0} if is_twin else {})


def test_the_same_question_about_another_disease_is_no_duplicate() -> None:
    form = "What research, clinical trials among it, is being done for patients who have {}?"
    texts = [form.format(name) for name in ("a hepatitis", "a glioma", "a hepatitis")]
    assert duplicates(texts, SelectConfig(similarity=0.6)) == {2: 0}


def test_of_near_duplicates_the_longest_answer_may_stay() -> None:
    rows = [sample("What is a stroke?", "A bleed."), sample("What is a STROKE", FINE * 3)]
    assert select(rows, SelectConfig()).kept == [0]
    chosen = select(rows, SelectConfig(keep="longest"))
    assert chosen.kept == [1]
    assert chosen.dropped == [(0, "near_duplicate", 1)]


@given(st.integers(0, 2**32))
def test_what_repeats_a_text_is_as_similar_as_was_asked_and_what_stays_is_no_copy(
    seed: int,
) -> None:
    rng = random.Random(seed)
    base = [[rng.choice("abcdefghij") * 3 for _ in range(30)] for _ in range(3)]
    texts = []
    for _ in range(12):
        own = list(rng.choice(base))
        for _ in range(rng.choice([0, 1, 8])):
            own.insert(rng.randrange(30), rng.choice(own))
        texts.append(" ".join(own))
    twins = duplicates(texts, SelectConfig(similarity=0.75))
    grams = [{*ngrams(normalise(text), 3).tolist()} for text in texts]

    def alike(a: int, b: int) -> float:
        return len(grams[a] & grams[b]) / len(grams[a] | grams[b])

    assert all(other < at and other not in twins for at, other in twins.items())
    assert all(alike(at, other) >= 0.75 for at, other in twins.items())
    stay = [at for at in range(len(texts)) if at not in twins]
    assert all(alike(a, b) < 1 for a, b in combinations(stay, 2))


def test_clusters_part_what_differs_and_are_told_by_their_words() -> None:
    rows = [sample(text) for pair in zip(medical(), geographic(), strict=True) for text in pair]
    chosen = select(rows, SelectConfig(clusters=2, budget=6))
    assert [row[:2] for row in chosen.clusters] == [(8, 3), (8, 3)]
    told = {word for row in chosen.clusters for word in row.words[:6]}
    assert told >= {"effects", "patients"} or told >= {"side", "does"}
    assert sum(at % 2 for at in chosen.kept) == 3  # three of each
    assert {one.reason for one in chosen.dropped} == {"not_drawn"}
    assert sorted([*chosen.kept, *(one.at for one in chosen.dropped)]) == list(range(16))


def test_a_small_cluster_is_taken_whole_and_the_rest_dealt_on() -> None:
    rows = [sample(text) for text in [*medical(), *geographic()[:2]]]
    chosen = select(rows, SelectConfig(clusters=2, budget=7))
    assert [row[:2] for row in chosen.clusters] == [(8, 5), (2, 2)]
    assert {8, 9} <= {*chosen.kept}
    assert select(rows, SelectConfig(clusters=2, budget=99)).kept == list(range(10))
    assert select(rows, SelectConfig(clusters=2)).kept == list(range(10))


def test_a_small_source_is_not_lost_beside_a_large_one() -> None:
    large = [sample(text) | {"source": "large"} for text in medical()]
    small = [sample(text) | {"source": "small"} for text in [*geographic()[:4], medical()[0]]]
    config = SelectConfig(clusters=2, budgets={"large": 2, "small": 3})
    chosen = select([*large, *small], config)
    assert sum(at < len(large) for at in chosen.kept) == 2 and len(chosen.kept) == 5
    twin = next(one for one in chosen.dropped if one.reason == "near_duplicate")
    assert (twin.at, twin.twin) == (len(large) + 4, 0)  # also of another source
    assert sum(one.drawn for one in chosen.clusters) == 5
    rest = select([*large, *small], config.replace(budget=1, budgets={"small": 0}))
    assert [at for at in rest.kept if at >= len(large)] == [len(large) + n for n in range(4)]
    assert len(rest.kept) == 5


def test_the_draw_is_the_seeds_and_not_that_of_the_order() -> None:
    rows = [sample(text) for text in medical() + geographic()]
    config = SelectConfig(clusters=3, budget=5)
    turned = random.Random(1).sample(rows, len(rows))
    first, again = select(rows, config), select(turned, config)
    assert [rows[at] for at in first.kept] == sorted(
        (turned[at] for at in again.kept), key=rows.index
    )
    assert first.clusters == again.clusters and first == select(rows, config)
    others = [select(rows, config.replace(seed=seed)).kept for seed in range(1, 5)]
    assert any(kept != first.kept for kept in others)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_conversations_are_chosen_too(count: int) -> None:
    chosen = select([sample(text) for text in medical()[:count]], SelectConfig(budget=1))
    assert len(chosen.kept) == min(count, 1)
    assert sum(row.size for row in chosen.clusters) == count


def test_what_was_not_fitted_has_the_cluster_of_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attending.sft.select.FITTED", 9)
    monkeypatch.setattr("attending.sft.select.CHUNK", 5)
    rows = [sample(text) for text in medical() + geographic()]
    chosen = select(rows, SelectConfig(clusters=2, budget=6))
    assert [row[:2] for row in chosen.clusters] == [(8, 3), (8, 3)]
    assert sum(at < 8 for at in chosen.kept) == 3


def test_equal_rows_of_features_leave_no_cluster_empty() -> None:
    rows = [sample("a b"), sample("b a b a"), sample("c d"), sample("c d c d e")]
    chosen = select(rows, SelectConfig(clusters=64))
    assert chosen.kept == [0, 1, 2, 3]
    assert all(isinstance(row, Cluster) and row.size for row in chosen.clusters)


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(0, 200))
def test_water_is_shared_out_to_the_last_drop(sizes: list[int], budget: int) -> None:
    shares = deal(sizes, budget)
    assert sum(shares) == min(budget, sum(sizes))
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    open_ = [n for n, size in zip(shares, sizes, strict=True) if n < size]
    assert not open_ or max(shares) <= min(open_) + 1  # only what is empty has less


def test_shares_by_hand() -> None:
    assert deal([5, 1, 3], 6) == [3, 1, 2]
    assert deal([10, 10, 10], 8) == [2, 3, 3]
    assert deal([0, 4], 3) == [0, 3]


def test_settings_that_are_none() -> None:
    with pytest.raises(ConfigError, match="similarity"):
        SelectConfig.build({"similarity": 0.0})
    with pytest.raises(ConfigError, match="clusters"):
        SelectConfig.build({"clusters": 0})


def test_whole_instructions_of_test_sets_have_no_fault() -> None:
    folder = SHARED / "data/eval"
    if not folder.exists():
        pytest.skip("no shared data")
    for name, key in (("ifeval_541", "prompt"), ("gsm8k_test", "question")):
        lines = (folder / f"{name}.jsonl").read_text("utf-8").split("\n")
        prompts = [json.loads(line)[key].strip() for line in lines if line]
        assert [prompt for prompt in prompts if fault(prompt, FINE)] == []
