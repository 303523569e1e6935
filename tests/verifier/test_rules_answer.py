"""Rules about answers: every case read by hand."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from attending.errors import ConfigError, UsageError
from attending.verifier.rules import RULES, check, rule

OPTIONS = {
    **{"A": "Aspirin", "B": "Warfarin", "C": "Metformin", "D": "E. coli"},
    "E": "Metformin and insulin",
}
RED = {"kind": "numeric", "answer": 7}
CHOSEN = [
    *("The answer is (C)", "Answer: C.", r"so \boxed{C}", "C", "(C)", "**C**", "c", "metformin"),
    *(
        "答案是C",
        "选C",
        "答案：（C）",
        "【答案】C",
        "答案是Ｃ",
        "应选择C。",
        "答案为：C项",
        "故选C",
    ),
    *("The answer is A. Wait, the answer is C", "The answer is C, not A.", "C. Metformin"),
    *("The answer is C because A is wrong", "<think>A</think>The answer is C", "Metformin."),
    *("The answer is C. Aspirin is wrong.", "The answer is metformin because", "#### C"),
    *("The answer is **C**", "Answer:\n\nC", "The correct option is C) Metformin"),
    *("(C) is correct", "Option C is the correct answer.", r"\boxed{\text{C}}", r"$$\boxed{C}$$"),
    *("Final answer: c", "The best choice is option C", "I would choose C", "The answer is: (c)"),
    *("C\n\nExplanation: it is first line.", "**C. Metformin**\n\nAspirin does nothing.", "C."),
    *("The answer to this question is C.", "A是错的，所以正确选项是C", "排除A、B，故选 C"),
    *("Answer: B\nOn reflection, answer: C", "Correct answer: C: Metformin"),
    *(
        "Based on this, the most appropriate next step is C. Metformin.",
        "Diagnosis: C",
        "最可能的诊断是C",
    ),
    "Final Answer: **C**\n\nIf the answer is A, the patient would bleed.",
    "Answer: C\n\nIf the answer is A, she bleeds. You may think the answer is B.",
    "Final answer: C\nA boy would be different: there the answer is A.",
    "Final answer: A. Wait, the answer is C.",
    "The answer is C. The most common drug is aspirin. The treatment of fever is aspirin.",
    *(
        "The tempting answer is A.\nThe answer is C.",
        "## Final Answer\nC",
        "答案是C。如果答案是A，会出血",
    ),
    *("Therefore, C. Metformin is the correct answer.", "The answer is metformin (C)."),
    *(
        "The cause of her symptoms is C",
        "If she is stable, the answer is C",
        "C. Metformin, as A fails",
    ),
]
UNDECIDED = [
    *("", "I think so", "The answer is A or C", "答案是A和C", "Answer: A, C", "C. Aspirin", "AC"),
    *("The answer is C. Aspirin", "Answer: C-reactive protein", "It is not metformin."),
    *(r"\boxed{A}, \boxed{C}", r"$\boxed{A}$ and $\boxed{C}$", "The answer is not C", "B, C"),
    *("A patient with this needs care", "answer is a beta blocker", "The answer is AC", "不选C"),
    *("<think>The answer is C</think>Hello", "<think>The answer is C", "Both A and C are right"),
    *("<think>x</think>The answer is C<think>or", "C\nor rather\nA"),
    *(
        "The answer is aspirin and warfarin.",
        "The answer is aspirin, warfarin.",
        "答案是Aspirin和C",
    ),
    *("Answer: metformin, aspirin and warfarin", "The answer is C. Metformin or A. Aspirin"),
    *("The answer is aspirin (C).", "The next step is not C", "I don't think the answer is C"),
    *("If the answer is C, she bleeds.", "The wrong answer is C", "最可能的诊断不是C"),
]


@pytest.mark.parametrize("text", CHOSEN)
def test_a_choice_is_found(text: str) -> None:
    found = check({"kind": "choice", "options": OPTIONS, "answer": "C"}, text)
    assert found == (True, "answers C", 1.0)
    assert not check({"kind": "choice", "options": OPTIONS, "answer": "A"}, text).passed


@pytest.mark.parametrize("text", UNDECIDED)
def test_no_choice_or_two_pass_for_no_option(text: str) -> None:
    for answer in OPTIONS:
        found = check({"kind": "choice", "options": OPTIONS, "answer": answer}, text)
        assert not found.passed and re.search("no answer|different answers", found.reason)


def test_an_options_own_text_may_begin_with_a_letter_or_with_another_option() -> None:
    for text, letter in {
        **{"The answer is E. coli": "D", "E": "E", "metformin and insulin": "E"},
        **{"Answer: E. Metformin and insulin": "E", "答案是阿司匹林，因为": "A"},
        "The answer is the ß-blocker is given.": "F",
    }.items():
        options = (
            OPTIONS
            | {"F": "The ß-blocker is given.\n"}
            | ({"A": "阿司匹林"} if letter == "A" else {})
        )
        assert check({"kind": "choice", "options": options, "answer": letter}, text).passed, text


NUMBERS: list[tuple[str, Any, dict[str, Any]]] = [
    *(("#### 42", 42, {}), ("42 apples", 42, {}), ("It costs 1,234.5 dollars", 1234.5, {})),
    *(("$1,200", "1200", {}), ("50%", 50, {}), ("50%", 0.5, {}), ("0.5", "50%", {})),
    *(("3/4", 0.75, {}), (r"\frac{3}{4}", 0.75, {}), (r"\boxed{\frac{3}{4}}", 0.75, {})),
    *(("2 1/2", 2.5, {}), ("2½", 2.5, {}), ("1.5e-3", 0.0015, {}), ("1.5 × 10^-3", 0.0015, {})),
    *((r"1.5 \times 10^{-3}", 0.0015, {}), ("1.5×10⁻³", 0.0015, {}), ("−7", -7, {})),
    *(("The answer is 41.9", 42, {"absolute": 0.2}), ("41.9", 42, {"relative": 0.01})),
    *(("answer: 6*7 = 42", 42, {}), ("The answer is 42. There were 7 days.", 42, {})),
    *(("答案是42岁", 42, {}), ("１２３", 123, {}), ("HbA1c 6.5%", 6.5, {}), ("x is 5.", 5, {})),
    *(("Answer: 41\n#### 42", 42, {}), ("The answer is not 5 but 6", 6, {}), ("-> 5", 5, {})),
    *(("The dose is 500 mg every 8 hours.", 500, {}), ("剂量是500毫克，每8小时", 500, {})),
    *(("The dose is 500 mg, which is given for 8 days", 500, {}), ("<answer>5</answer>", 5, {})),
    *(("Every 8 hours 500 mg for 7 days", 500, {"units": {"mg": 1.0}}), ("5 is right", 5, {})),
    *(
        ("The gap is 8 hours.\nGive 500 mg.", 500, {"units": {"mg": 1.0}}),
        ("6*7 = 42 in 7 days", 42, {}),
    ),
    *(("Answer: 2 mg/kg × 70 kg = 140 mg", 140, {}), ("The answer is 42, since x = 7", 42, {})),
    *(
        ("5 is right", 5, {"units": {"mg": 1.0}}),
        ("Answer: 5 every 8 h", 5, {"units": {"mg": 1.0}}),
    ),
    *(
        ("The dose is 500 mg.\nTake it every 8 hours.", 500, {}),
        ("In total 12 + 24 = 36.\n120 - 36 = 84 left", 84, {}),
    ),
    ("The total is 4 * 3 = 12.\nThe rest is 20 total – 12 = 8 gnomes.", 8, {}),
    *(("If not 5, what? The answer is 6.", 6, {}), ("The answer is approximately 5", 5, {})),
]
HEDGES = [
    *("not", "never", "less than", "greater than or equal to", "not equal to", ">", "≥", r"\leq"),
    *(
        "at least",
        "up to",
        "under",
        "exceeding",
        "**not**",
        "a minimum of",
        "小于",
        "至少",
        "不超过",
    ),
]
NOT_NUMBERS: list[tuple[str, Any, dict[str, Any]]] = [
    *(("The answer is 41.9", 42, {}), ("the answer is 3-5", 3, {}), ("3 or 5", 5, {})),
    *(("none", 3, {}), ("<think>42</think>", 42, {}), ("<think>42", 42, {}), ("1e999", 1, {})),
    *(("1/0", 1, {}), ("-7", 7, {}), ("50%", "5%", {}), ("42.0001", 42, {})),
    *(
        (f"{lead}{hedge} 5.", 5, {})
        for lead in ("", "It is ", "The answer is ")
        for hedge in HEDGES
    ),
    *(
        (f"The answer is 5 {tail}", 5, {})
        for tail in ("or more", "mg or less", "is wrong", "以上", "and above")
    ),
    *(
        ("The answer isn't 5", 5, {}),
        ("答案不是5", 5, {}),
        ("The dose is 500 mg every 8 hours", 8, {}),
    ),
    ("Answer: 1000 kg, so 1 kg", 1, {"units": {"g": 1.0}}),
]


@pytest.mark.parametrize(("text", "answer", "more"), NUMBERS)
def test_a_number_is_read(text: str, answer: float | str, more: dict[str, float]) -> None:
    assert check({"kind": "numeric", "answer": answer, **more}, text).passed


@pytest.mark.parametrize(("text", "answer", "more"), NOT_NUMBERS)
def test_another_number_does_not_pass(
    text: str, answer: float | str, more: dict[str, float]
) -> None:
    assert check({"kind": "numeric", "answer": answer, **more}, text).score == 0.0


def test_a_text_of_signs_takes_no_minutes() -> None:
    start = time.monotonic()
    for text in ("#" * 20_000, "\\boxed{" * 3_000, "answer to " + "a " * 20_000, "1 " * 10_000):
        for spec in (RED, {"kind": "exact", "answer": "a"}, {"kind": "items", "answer": ["a"]}):
            assert not check(spec, text).passed
    assert time.monotonic() - start < 10


def test_units_are_converted_or_refused() -> None:
    spec = {"kind": "numeric", "answer": 1000, "units": {"mg": 1.0, "g": 1000.0, "mg/dL": 10.0}}
    passed = [check(spec, text).passed for text in ("1 g", "1000 mg", "1000", "100 mg/dL")]
    assert passed == [True] * 4
    assert check(spec, "1000 kg").reason == "unit 'kg', not of mg, g, mg/dL"
    assert not check(spec, "1000 g").passed


@pytest.mark.parametrize(
    ("text", "answer", "same"),
    [
        *(("Aspirin", "aspirin", True), (" ASPIRIN. ", "aspirin", True)),
        *(("The answer is aspirin.", "Aspirin", True), ("Ａｓｐｉｒｉｎ", "aspirin", True)),
        *(("heart  attack", "Heart-attack", True), ("阿司 匹林。", "阿司匹林", True)),
        *(("1,000", "1000", True), ("The answer is aspirin. It thins.", "aspirin", True)),
        *(("HER2+", "her2+", True), ("HER2+", "HER2-", False), ("1.5", "15", False)),
        *(("-5", "5", False), ("<5", "5", False), ("5%", "5", False), ("", "aspirin", False)),
        *(("Diagnosis: acute appendicitis", "acute appendicitis", True), ("Drug: x", "y", False)),
        *(("**The most likely diagnosis is** _flu_.", "flu", True), ("Antidote: flu", "flu", True)),
        *(("Final answer: the diagnosis is **flu**", "flu", True), ("诊断：流感", "流感", True)),
        *(("She coughs.\n**Diagnosis:** flu", "flu", True), ("It is flu. It ends.", "flu", True)),
        *(("## Final answer\n\n**flu**", "flu", True), ("Flu. Treatment: rest", "flu", True)),
        *(("Ruled out: flu", "flu", False), ("The diagnosis is not flu", "flu", False)),
        *(("What it is not: flu", "flu", False), ("Flu? No.", "flu", False)),
        *(("Differential diagnosis: flu", "flu", False), ("排除：流感", "流感", False)),
        *(("The diagnosis is flu or a cold", "flu", False), ("Diagnosis: no flu", "flu", False)),
        *(("aspirin and more", "aspirin", False), ("<think>aspirin</think>", "aspirin", False)),
    ],
)
def test_exact_is_word_by_word(text: str, answer: str, same: bool) -> None:
    assert check({"kind": "exact", "answer": answer}, text).passed is same


def test_items_are_a_set_with_f1() -> None:
    def scored(text: str, *answer: str, **more: float) -> tuple[bool, str, float]:
        return check({"kind": "items", "answer": answer, **more}, text)

    whole = (True, "precision 1.00, recall 1.00", 1.0)
    assert scored("- Aspirin\n- warfarin", "Warfarin", "aspirin") == whole
    assert scored("答案是：发热、咳嗽和乏力", "乏力", "发热", "咳嗽") == whole
    assert scored('["a", "b"]', "a", "b") == scored("Answer:\n1. y\n2. x", "x", "y") == whole
    for text in (
        *("- **Fever**: high\n- **Cough**: dry", "- **Fever:** high\n- **Cough:** dry"),
        *("1. Fever: high\n2. Cough – dry", "* **Fever** is common\n* __Cough__ too"),
        *("Symptoms: fever and cough", "The symptoms are fever and cough.", "- *Fever*\n+ Cough"),
        "Final answer:\n- Fever: its cause is a virus. Answer\n- Cough",
    ):
        assert scored(text, "fever", "cough") == whole, text
    assert scored("- INR: 2\n- Fever: no", "INR: 2", "fever") == whole
    assert scored("- **No** fever\n- Avoid: cough", "fever", "cough")[2] == 0.0
    # 2 of 3 right, both wanted found: F1 = 2 * 2 / (3 + 2).
    found = scored("aspirin, warfarin and heparin", "aspirin", "warfarin")
    assert found == (False, "precision 0.67, recall 1.00", 0.8)
    assert scored("aspirin, warfarin and heparin", "aspirin", "warfarin", min_f1=0.8)[0]
    assert scored("", "a")[2] == 0.0


def test_maths_compares_formulas() -> None:
    pytest.importorskip("math_verify", reason="needs the extra verify")
    for text, answer, same in [
        *((r"so $\boxed{\frac{1}{2}}$", "0.5", True), ("It is $x^2+2x+1$", "(x+1)^2", True)),
        *(
            (r"$\boxed{3}$", "2", False),
            ("hello", "2", False),
            ("<think>$2$</think>$3$", "2", False),
        ),
    ]:
        assert check({"kind": "maths", "answer": answer}, text).passed is same, text
    with pytest.raises(ConfigError, match="no formula"):
        check({"kind": "maths", "answer": ""}, "$2$")


def test_maths_ends_with_hostile_text_in_any_thread() -> None:
    pytest.importorskip("math_verify", reason="needs the extra verify")
    texts = [r"$(x+y+z)^{99}$", r"\boxed{9^{9^{9^9}}}", "$x^{4000000000}+x$", "$" * 20_000, "$2$"]
    start = time.monotonic()
    with ThreadPoolExecutor(2) as threads:
        told = [*threads.map(lambda text: check({"kind": "maths", "answer": "2"}, text), texts)]
    assert [one.passed for one in told] == [False, False, False, False, True]
    assert told[0].reason == "no verdict within 3 s of computing and 2 GB"
    assert time.monotonic() - start < 30
    same = r"$(x+y+z)^{99}$"  # equal as it stands: nothing is expanded
    assert check({"kind": "maths", "answer": "(x+y+z)^{99}"}, same).passed


def test_a_wrong_rule_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, told in [
        ({"kind": "choise"}, "Did you mean 'choice'?"),
        ({}, f"Known: {', '.join(sorted(RULES))}"),
        ({"kind": "numeric", "anwser": 1}, "Did you mean 'answer'?"),
        ({"kind": "numeric"}, "answer: Field required"),
        ({"kind": "numeric", "answer": "many"}, "'many' is no number"),
        ({"kind": "choice", "options": {"A": "x"}, "answer": "B"}, "'B' is none of A"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(told)):
            check(spec, "The answer is 1")

    def absent(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(rule, "import_module", absent)
    with pytest.raises(UsageError, match=r"needs math_verify.*pip install -e '\.\[verify\]'"):
        check({"kind": "maths", "answer": "1"}, "1")
