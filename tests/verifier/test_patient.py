"""The simulated patient tells what it is asked, ends when it should, and types its faults."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from attending.errors import UsageError
from attending.verifier.patient.case import Access
from attending.verifier.patient.faults import Fault, form_faults
from attending.verifier.patient.find import find_case
from attending.verifier.patient.gate import End, concluded
from attending.verifier.patient.lexicon import concepts, denies, stem
from attending.verifier.patient.scores import fact_score, personification_score, privacy_score
from attending.verifier.patient.simulator import Patient, PatientOptions, Turn, render
from attending.verifier.patient.speech import lay
from tests.hallway.test_endpoint import Call, asking

pytestmark = pytest.mark.anyio
Say = Callable[[str, str], str]  # step and prompt to the whole reply
FINE = {"reason": "r", "leaks": False, "contradicts": False, "invents": False}


def behaving(say: Say) -> Callable[[Call], Awaitable[None]]:
    async def behave(call: Call) -> None:
        prompt = call.body["messages"][0]["content"]
        step = next(
            (
                s
                for s, words in (("gate", '"concluded"'), ("factual", '"leaks"'))
                if words in prompt
            ),
            "affective",
        )
        await call.answer(say(step, prompt))

    return behave


async def reply(say: Say, message: str, **options: Any) -> tuple[Turn, list[str]]:
    """One turn of the shipped case, worded by a scripted endpoint, and the steps it was asked."""
    steps: list[str] = []

    def noted(step: str, prompt: str) -> str:
        steps.append(step)
        return say(step, prompt)

    async with asking(behaving(noted)) as (_, endpoint):
        patient = Patient(find_case("appendicitis"), endpoint, PatientOptions(**options))
        patient.open()
        return await patient.answer(message), steps


def honest(step: str, prompt: str) -> str:
    if step == "gate":
        return json.dumps({"reason": "r", "concluded": "You have" in prompt})
    return json.dumps(FINE) if step == "factual" else "Well, it hit a 7 out of 10, I'd say."


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ("Have you had any vomiting?", ["nausea"]),
        ("Are you running a temperature, or have you lost your appetite?", ["fever", "appetite"]),
        ("Okay, thanks. How bad is it, from 0 to 10?", ["intensity"]),
        ("Do you have any allergies?", ["allergy"]),
        ("What medications do you take?", ["medication"]),
        ("Any past medical history?", ["history"]),
        ("Let me check your vital signs.", ["temperature", "pulse"]),
        ("I would like to examine your abdomen.", ["abdomen"]),
        ("What is your blood pressure?", []),  # nobody knows it before it is measured
        ("Do you have acute appendicitis?", []),
        ("Do you speak French?", []),
    ],
)
async def test_the_patient_tells_what_is_asked(question: str, told: list[str]) -> None:
    patient = Patient(find_case("appendicitis"))
    patient.open()
    turn = await patient.answer(question)
    assert sorted(turn.revealed) == sorted(told)
    says = {fact.id: fact.says for fact in patient.case.facts}
    assert all(lay(says[name], patient.case.persona) in turn.text for name in told)


async def test_findings_are_not_the_patients_words() -> None:
    patient = Patient(find_case("appendicitis"))
    patient.open()
    turn = await patient.answer("I'd like to order an ultrasound of your abdomen.")
    assert turn.text.startswith("[Findings] Ultrasound shows")
    turn = await patient.answer("Let me do an ECG.")
    assert turn.revealed == () and "No result of that is on record" in turn.text


async def test_open_questions_bring_one_symptom_at_a_time() -> None:
    patient = Patient(find_case("appendicitis"))
    assert patient.open().revealed == ("pain",)
    told = [(await patient.answer("Anything else?")).revealed for _ in range(9)]
    assert told[0] == ("moved",) and told[1] == ("worse",)
    assert [len(one) for one in told] == [1] * 8 + [0]  # and no history, unless it is asked for


async def test_chinese() -> None:
    patient = Patient(find_case("肺炎"))
    assert "咳嗽" in patient.open().text
    assert (await patient.answer("您发烧吗？有没有痰？")).revealed == ("发热", "痰")
    assert (await patient.answer("我给您听一下肺。")).revealed == ("肺部",)
    assert (await patient.answer("您这是肺炎，需要住院治疗。")).end == End.PLAN


@pytest.mark.parametrize(
    ("message", "end"),
    [
        ("You have acute appendicitis.", End.DIAGNOSIS),
        ("Take ibuprofen twice a day and come back if it gets worse.", End.PLAN),
        ("Goodbye, and take care.", End.FAREWELL),
        ("It is gout. Any questions?", End.DIAGNOSIS),
        ("It could be appendicitis. Does it hurt when you cough?", None),
        ("You were diagnosed with asthma in 2012, is that right?", None),
        ("I'll order a scan, then we'll talk again.", None),
        ("Thank you, that's very helpful.", None),
        ("诊断是急性胃炎，按时吃药。", End.PLAN),
        ("可能是胃炎，疼了多久了？", None),
    ],
)
def test_the_gate(message: str, end: End | None) -> None:
    assert concluded(message) == end


async def test_nothing_is_said_after_the_end() -> None:
    patient = Patient(find_case("appendicitis"), options=PatientOptions(max_turns=2))
    patient.open()
    await patient.answer("Any fever?")
    assert (await patient.answer("Any cough?")).end == "turns"
    with pytest.raises(UsageError, match="has ended"):
        await patient.answer("Hello?")
    with pytest.raises(UsageError, match="spoken already"):
        patient.open()
    with pytest.raises(UsageError, match="empty message"):
        await Patient(find_case("appendicitis")).answer(" ")


async def test_an_endpoint_words_what_was_asked_and_nothing_else() -> None:
    prompts: list[str] = []

    def say(step: str, prompt: str) -> str:
        prompts.append(prompt)
        return honest(step, prompt)

    turn, steps = await reply(say, "How bad is the pain, out of ten?")
    assert turn == Turn(
        "Well, it hit a 7 out of 10, I'd say.", ("intensity",), ("intensity",), tries=1
    )
    assert steps == ["gate", "affective", "factual"]
    affective = prompts[1]
    assert "I'd say it is a 7 out of 10." in affective
    assert "Penicillin" not in affective and "appendicitis" not in affective  # it cannot leak


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("It is a 9 out of 10.", Fault.FABRICATION),
        ("It is a 7 out of 10. And penicillin gave me a rash once.", Fault.LEAK),
        ("I wouldn't say it is a 7 out of 10.", Fault.CONTRADICTION),
        ("Hello, doctor. My belly has been hurting since yesterday.", Fault.REPETITION),
        ("It is a 7. " + "It really does hurt a lot and I do not know why it does. " * 12,
         Fault.OVER_LENGTH),
        ("It is a 7. As your doctor, I would recommend you take ibuprofen.", Fault.ROLE_INVERSION),
        ("Doctor: how are you?", Fault.ROLE_INVERSION),
    ],
)  # fmt: skip
async def test_a_faulty_wording_is_refused_and_asked_for_again(text: str, fault: Fault) -> None:
    said = iter([text, "A 7 out of 10."])

    def say(step: str, prompt: str) -> str:
        return next(said) if step == "affective" else honest(step, prompt)

    turn, _ = await reply(say, "How bad is the pain, out of ten?")
    assert turn.text == "A 7 out of 10." and turn.tries == 2
    assert fault in turn.faults


async def test_the_model_of_the_factual_unit_is_heard() -> None:
    said = iter(["A 7 out of 10, and my cat is ill.", "A 7 out of 10."])

    def say(step: str, prompt: str) -> str:
        if step == "factual":
            return json.dumps(FINE | {"invents": "my cat" in prompt})
        return next(said) if step == "affective" else honest(step, prompt)

    turn, _ = await reply(say, "How bad is the pain?")
    assert turn.faults == (Fault.FABRICATION,) and turn.tries == 2


async def test_after_the_last_try_the_rules_speak() -> None:
    def say(step: str, prompt: str) -> str:
        return "I am 99 years old." if step == "affective" else honest(step, prompt)

    turn, steps = await reply(say, "How bad is the pain?", max_tries=2)
    assert "I'd say it is a 7 out of 10." in turn.text
    assert steps.count("affective") == 2
    assert turn.faults == (Fault.FABRICATION,) * 2


async def test_the_gate_of_an_endpoint_ends_it() -> None:
    turn, steps = await reply(honest, "You have what we feared.")
    assert turn.end == End.DIAGNOSIS and steps == ["gate"]


def test_faults_of_form() -> None:
    assert form_faults("I have a cough.") == []
    assert form_faults("I have a cough.", ["I have a  COUGH"]) == [Fault.REPETITION]
    assert form_faults("No.", ["No."]) == []  # short answers may come again
    assert form_faults("it hurts so very much here and " * 4) == [Fault.REPETITION]
    assert form_faults("") == [Fault.OVER_LENGTH]
    assert form_faults("请问您哪里不舒服？") == [Fault.ROLE_INVERSION]


def test_scores_by_hand() -> None:
    case = find_case("appendicitis")  # ISTP, low literacy, short of money
    turns = [
        Turn("Hello. My belly has been hurting since yesterday.", (), ("pain",)),
        Turn("I smoke about ten a day.", ("smoke",), ("smoke",)),
        Turn("I smoke about ten a day. Penicillin gave me a rash once.", ("smoke",), ("smoke",)),
        Turn("I don't smoke about ten a day.", ("smoke",), ("smoke",)),
        Turn("It is a 9 out of 10.", ("intensity",), ("intensity",)),
        Turn("I'm not sure what you mean. Could you ask that another way?"),
        Turn(
            "All right. [Findings] The temperature is 38.1 °C.", ("temperature",), ("temperature",)
        ),
    ]
    assert privacy_score(case, turns) == 5 / 6
    assert fact_score(case, turns) == 4 / 6
    assert privacy_score(case, turns[:1]) is fact_score(case, turns[:1]) is None
    plain = [Turn("Hello."), Turn("It hurts.")]
    assert personification_score(case, plain) == 1.0
    chatty = [*plain, Turn("What can we do? I am worried about my dyspnea.")]
    assert personification_score(case, chatty) == (0.0 + 0.5) / 2


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("Any nausea or loss of appetite?", {"nausea", "appetite"}),
        ("Have you had fever, diarrhea or burning when you pee?", {"fever", "bowels", "urine"}),
        ("Are you allergic to anything, and do you take any medicines?", {"allergy", "medication"}),
        ("Let me take your temperature. Does coughing hurt?", {"temperature", "worse"}),
        ("Can I check your blood pressure?", {"pulse"}),
        ("I'll check your vitals and press on your belly.", {"temperature", "pulse", "abdomen"}),
        ("Let me order a CBC.", {"blood"}),
        ("I'd like to get an MRI.", set()),
    ],
)
async def test_several_things_in_one_message(message: str, told: set[str]) -> None:
    patient = Patient(find_case("appendicitis"))
    patient.open()
    turn = await patient.answer(message)
    assert {*turn.revealed} == told
    findings = {fact.id for fact in patient.case.of(Access.EXAMINE)} & told
    assert ("[Findings]" in turn.text) == bool(findings or not told)
    if findings and told - findings:  # the patient's words first, then the record's
        spoken, _, found = turn.text.partition("[Findings]")
        facts = {fact.id: fact.says for fact in patient.case.facts}
        assert all(facts[name] in found for name in findings)
        assert all(facts[name] in spoken for name in told - findings)


def test_concepts_join_lay_and_clinical_words() -> None:
    assert concepts("Are you short of breath?") == concepts("any dyspnoea") == {"DYSPNEA"}
    assert concepts("trouble with your swallowing") & concepts("dysphagia")
    assert stem("swelling") == stem("swells") and stem("dizziness") != stem("dizz")
    assert denies("She has never smoked.") and not denies("She smokes.")


def test_prompts_are_there_in_both_languages_and_hold_their_inputs() -> None:
    for language in ("en", "zh"):
        assert "<<X>>" in render("gate", language, message="<<X>>")
        case = find_case("appendicitis")
        filled = render(
            "affective", language, persona=case.persona, conversation=[], message="M",
            statements=["S1"], fallback="F", refused=["leak"],
        )  # fmt: skip
        assert "S1" in filled and "M" in filled and "leak" in filled and "{#" not in filled
        assert "R1" in render("factual", language, reply="R", allowed=["A"], record=["R1"])
        assert render("doctor", language)
