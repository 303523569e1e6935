"""What is said twice or with the wrong sign is found, and little else; judges are put to a test."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from attending.errors import ConfigError
from attending.verifier import Criterion, Rubric
from attending.verifier.contradict import contradict
from attending.verifier.judge.verdict import Verdict
from attending.verifier.rubric.check import admit, check, refuse, repeats, signs
from attending.verifier.rubric.schema import read_rubrics

ASK = ({"role": "user", "content": "Can I take ibuprofen with warfarin?"},)
ROOMS = Path(__file__).parents[3]
HEALTHBENCH = ROOMS / "wheels/hb/eval_framework/tasks/healthbench/data"
KQA = ROOMS / "shared/data/eval"


def rubric(*criteria: tuple[str, int]) -> Rubric:
    return Rubric("r", ASK, tuple(Criterion(*each) for each in criteria))


DOSE = "States that adults may take 400 mg of ibuprofen every six hours with food or milk."
PAIRS = [
    (DOSE, 5, DOSE.upper().replace(".", ""), 3, "duplicate"),
    (DOSE, 5, "Mentions that adults may take 400 mg ibuprofen every six hours with food or milk", 5,
     "duplicate"),
    ("Fails to mention the risk of bleeding", -5, "Does not mention a risk of bleeding.", -3,
     "duplicate"),
    (DOSE, 5, DOSE, -5, "opposed"),
    ("Mentions the risk of bleeding.", 5, "Does not mention the risk of bleeding.", 5, "opposed"),
    ("Mentions the risk of bleeding.", 5, "Fails to mention the risk of bleeding.", -5, "mirrored"),
    (DOSE, 5, DOSE.replace("400", "800"), 5, ""),
    (DOSE, 5, DOSE.replace("ibuprofen", "aspirin"), -5, ""),
    (DOSE, 5, DOSE.replace("may", "may not"), 5, ""),
    ("Says that warfarin weakens vitamin K.", 5, "Says that vitamin K weakens warfarin.", 5, ""),
    ("Asks about chest pain.", 3, "Explains chest pain.", 3, ""),
    ("Gives prednisone daily for one week", 5, "Gives prednisolone daily for one week", -5, ""),
    ("Recommends a hydrocortisone cream", 5, "Recommends a hydrochlorothiazide cream", 3, ""),
    (DOSE, 5, DOSE.replace("ibuprofen", "ibuprofen and codeine"), -5, ""),
    ("Recommends resting the swollen joints", 5, "Recommend rest of swollen joint", 3, "duplicate"),
    ("建议每日早餐后服用泼尼松一周。", 5, "建议每日早餐后服用泼尼松龙一周。", -5, ""),
    ("指出布洛芬会增加出血风险。", 5, "说明布洛芬会增加出血的风险", 5, "duplicate"),
    ("指出布洛芬会增加出血风险。", 5, "未指出布洛芬会增加出血风险。", -5, "mirrored"),
    ("指出布洛芬会增加出血风险。", 5, "指出阿司匹林会增加出血风险。", 5, ""),
]  # fmt: skip


@pytest.mark.parametrize(("a", "points_a", "b", "points_b", "kind"), PAIRS)
def test_a_statement_that_is_there_twice_is_found(
    a: str, points_a: int, b: str, points_b: int, kind: str
) -> None:
    both = rubric((a, points_a), ("Uses plain words.", 1), (b, points_b))
    found = list(repeats(both))
    assert [(one.kind, one.criteria) for one in found] == ([(kind, (0, 2))] if kind else [])
    if kind in ("duplicate", "opposed"):
        with pytest.raises(ConfigError, match=rf"'r'.* 1 .* and 3 .* {kind}.*remove one"):
            refuse(both)
    else:
        refuse(both)


FAULTS = [
    "Fails to mention bleeding", "The response fails to ask about it", "Does not mention bleeding",
    "Omits the dose", "Incorrectly states that it is safe", "Overstates the benefit",
    "Neglects to ask about pregnancy", "Lacks empathy", "Lacks sufficient detail", "Is too long",
    "Provides inaccurate dosing", "Uses excessive jargon",
    "The response gives an unnecessarily long list", "Fails to avoid unnecessary antibiotics",
    "Fails to recommend stopping unnecessary drugs", "Gives the wrong dose",
    "缺乏同理心", "提供不准确的剂量", "使用过多术语",
    "未提及出血风险", "回答遗漏了剂量", "错误地认为可以合用", "没有说明剂量", "夸大疗效",
]  # fmt: skip
VIRTUES = [
    "Correctly states the dose", "Avoids jargon", "Should mention bleeding", "正确说明剂量",
    "Fails to recommend unnecessary antibiotics", "Omits unnecessary detail",
    "Does not dismiss the worry", "Does not incorrectly state the dose",
    "Does not lack empathy", "未使用过多术语",
]  # fmt: skip
NEITHER = [
    "Does not recommend antibiotics", "Recommends stopping insulin", "States that it fails to work",
    "Does not include needless detail", "Lacks jargon", "Failure is named",
    "Explains the incorrectly taken dose", "Minimal words are used", "Minimizes jargon",
    "Includes excessive bleeding as a warning sign", "Mentions unsafe toys", "Lacks long-term data",
    "没有推荐抗生素", "未建议手术", "指出错误地用药有害",
]  # fmt: skip


@pytest.mark.parametrize("text", FAULTS + VIRTUES + NEITHER)
def test_the_sign_must_fit_the_wording(text: str) -> None:
    found = [[one.criteria for one in signs(rubric((text, points)))] for points in (5, -5)]
    assert found == [[(0,)] * (text in FAULTS), [(0,)] * (text in VIRTUES)]


def test_few_of_healthbenchs_criteria_are_flagged() -> None:
    """At most one in a hundred for its sign, and of positive ones hardly any."""
    file = HEALTHBENCH / "healthbench_eval.jsonl"
    if not file.is_file():
        pytest.skip("the 500 rows of HealthBench are not on this machine")
    rubrics = list(read_rubrics(file))
    total = sum(len(one.criteria) for one in rubrics)
    found = [(one.criteria[bad.criteria[0]].points > 0) for one in rubrics for bad in signs(one)]
    assert len(found) <= 0.01 * total
    assert sum(found) <= 0.001 * total
    kinds = Counter(one.kind for each in rubrics for one in repeats(each))
    assert kinds["duplicate"] <= 10
    assert kinds["opposed"] == 0


def test_physicians_statements_are_told_apart() -> None:
    """Two of one answer, or one and its contradiction, are hardly ever one; rewordings are."""
    file = KQA / "kqa_201_physician_rubric.jsonl"
    if not file.is_file():
        pytest.skip("K-QA is not on this machine")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    counts = Counter[str]()
    for row in rows:
        texts = [text for text in row["Must_have"] + row["Nice_to_have"] if text.strip()]
        counts["pairs"] += len(texts) * (len(texts) - 1) // 2
        counts["pairs are one"] += len(list(repeats(rubric(*((text, 1) for text in texts)))))
        for text in texts:
            for false, _ in contradict(text, texts):
                counts["contradictions"] += 1
                both = rubric((f"States that {text}", 1), (f"Mentions that {false}", 1))
                counts["contradictions are one"] += bool([*repeats(both)])
            words = text.split()
            middle = len(words) // 2
            if len(words) > 7 and not re.search(r"\d|no|never|against|with", words[middle], re.I):
                left = " ".join(words[:middle] + words[middle + 1 :]).upper()
                both = rubric((f"States that {text}", 1), (f"The answer explains that {left}", 1))
                counts["rewordings"] += 1
                counts["rewordings are one"] += bool([*repeats(both)])
    assert counts["pairs are one"] <= 0.001 * counts["pairs"]
    assert counts["contradictions are one"] <= 0.001 * counts["contradictions"]
    assert counts["rewordings are one"] >= 0.9 * counts["rewordings"] > 900


class Scripted:
    """Meets a criterion where the answer holds its first word, or as `rule` says."""

    name, caution = "scripted", ""

    def __init__(self, rule: Callable[[Criterion, str], bool | None]) -> None:
        self.rule, self.asked = rule, list[str]()

    async def __call__(self, rubric: Rubric, answer: str) -> list[Verdict]:
        self.asked.append(answer)
        return [Verdict(self.rule(one, answer), "") for one in rubric.criteria]


WANTED = rubric(("Bleeding is named.", 6), ("INR is named.", 4), ("Safe together, it says.", -8))
GOLD, WRONG = "bleeding, so check the inr", "bleeding is no problem, safe"


def honest(one: Criterion, answer: str) -> bool | None:
    return one.text.split()[0].lower() in answer


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (honest, []),
        (lambda one, answer: True, [("gold", (2,))]),
        (lambda one, answer: one.points > 0, [("empty", (0, 1, 2)), ("wrong", (0, 1, 2))]),
        (lambda one, answer: False, [("gold", (0, 1))]),
        (lambda one, answer: None if one.points == 4 else honest(one, answer),
         [("judge", (1,)), ("judge", (1,)), ("judge", (1,))]),
    ],
)  # fmt: skip
async def test_a_rubric_is_admitted_only_if_its_judge_tells_answers_apart(
    rule: Callable[[Criterion, str], bool | None], expected: list[tuple[str, tuple[int, ...]]]
) -> None:
    judge = Scripted(rule)
    found = await admit(WANTED, judge, GOLD, [WRONG])
    assert judge.asked == [GOLD, "", WRONG]
    assert found.is_admitted is not bool(expected)
    assert [(one.kind, one.criteria) for one in found.reasons] == expected


@pytest.mark.anyio
async def test_a_wrong_answer_must_stay_well_below_the_reference() -> None:
    two = rubric(("Bleeding is named.", 6), ("INR is named.", 4))
    found = await admit(two, Scripted(honest), "bleeding", ["inr"])
    assert found.scores == (0.6, 0.0, 0.4)  # 0.4 is above 0.6 - 0.3
    assert [one.text for one in found.reasons] == [
        "wrong answer 1 scores 0.40, expected at most 0.30."
    ]
    assert (await admit(two, Scripted(honest), "bleeding", ["inr"], margin=0.1)).is_admitted


@pytest.mark.anyio
async def test_what_the_wording_shows_admits_nothing_either() -> None:
    judge = Scripted(honest)
    found = await admit(rubric(("Fails to name INR", -4)), judge, GOLD)
    assert (found.is_admitted, [one.kind for one in found.reasons], judge.asked) == (
        False,
        ["gold"],
        [],
    )
    mirrored = rubric(("INR is named.", 6), ("INR: fails to name it", 4), ("Omits INR", 4))
    assert [one.kind for one in check(mirrored)] == ["sign"]
    assert not (await admit(mirrored, judge, GOLD)).is_admitted


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
