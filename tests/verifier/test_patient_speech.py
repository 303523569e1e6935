"""What a patient says of a vignette's facts: right grammar, the same facts; and lay words."""

import re
from collections import Counter
from functools import cache

import pytest

from attending.verifier.patient.case import Access, Persona
from attending.verifier.patient.speech import first_person, lay
from attending.verifier.patient.vignette import read_vignettes
from tests.conftest import SHARED

ROWS = SHARED / "data/patient_cases/mediq_imedqa_dev.jsonl"
needs_cases = pytest.mark.skipif(not ROWS.is_file(), reason="../shared/data is not here")

HIS = [
    ("Patient is a 21-year-old male.", "I am a 21-year-old male."),
    ("Patient is 18-year-old male.", "I am an 18-year-old male."),
    ("He complains of fatigue.", "I have fatigue."),
    ("He takes lisinopril and smokes daily.", "I take lisinopril and smoke daily."),
    ("The pain worsens on inspiration and is 8 out of 10.",) * 2,
    ("He frequently has trouble sleeping.", "I frequently have trouble sleeping."),
    ("He then takes a nap and sometimes drinks.", "I then take a nap and sometimes drink."),
    ("He no longer socializes.", "I no longer socialize."),
    ("The patient worries and does not sleep.", "I worry and do not sleep."),
    ("Patient washes his face, brushes his teeth.", "I wash my face, brush my teeth."),
    ("He doesn't smoke but drinks wine.", "I don't smoke but I drink wine."),
    ("He does not smoke and drinks wine.", "I do not smoke and I drink wine."),
    ("He has a cough that worsens at night and wakes him.",
     "I have a cough that worsens at night and wakes me."),
    ("When asked why, the patient's wife points at him.",
     "When asked why, my wife points at me."),
    ("A syringe was found near the patient.", "A syringe was found near me."),
    ("He and his wife have a dog.", "My wife and I have a dog."),
    ("Neither the patient nor his wife smokes.", "Neither I nor my wife smokes."),
    ("His father lost his job when he was 50.", "My father lost his job when he was 50."),
    ("His father was 60 when he lost his job.", "My father was 60 when he lost his job."),
    ("His father says he hurt himself.", "My father says I hurt myself."),
    ("On arrival, he is alert.", "On arrival, I was alert."),
    ("He's tired.", "I am tired."),
    ("Patient denies fever or chills.", "No fever or chills."),
    ("Patient denies smoking, drug or alcohol use.", "No smoking, drug or alcohol use."),
    ("He denies any locking of his jaw.", "No locking of my jaw."),
    ("He denies taking any drugs.", "No, I am not taking any drugs."),
    ("He denies other illness and takes no pills.", "No other illness and I take no pills."),
    ("He has chills but denies any cough.", "I have chills, but no cough."),
    ("He reports trying various drugs.", "Trying various drugs."),
    ("The patient states that his back hurts.", "My back hurts."),
    ("Over the last week, he reports headaches.", "Over the last week, headaches."),
    ("He says he is well but that he is tired.", "I am well but I am tired."),
    ("He describes the pain as dull.", "I would describe the pain as dull."),
    ("Patient presents with headache.", "I have headache."),
    ("A 56-year-old man with a known clot presents to the clinic.",
     "I am a 56-year-old man with a known clot. I came to the clinic."),
    ("A 35-year-old taxi driver is brought in by his wife.",
     "I am a 35-year-old taxi driver. I was brought in by my wife."),
    ("A 27-year-old man and his wife present to the clinic.",
     "I am a 27-year-old man. My wife and I came to the clinic."),
    ("A 40-year-old man who smokes has a cough.",) * 2,  # no rule is sure
    ("A 40-year-old man who smokes comes in.", "I am a 40-year-old man who smokes. I came in."),
    ("He works as a patient care attendant.", "I work as a patient care attendant."),
    ("60 subjects were asked to describe their pain.",) * 2,
]  # fmt: skip
HERS = [
    ("She has had 2 operations.", "I have had 2 operations."),
    ("Patient's mother has asthma.", "My mother has asthma."),
    ("Two days ago, she fell on her arm.", "Two days ago, I fell on my arm."),
    ("Patient has pain in her back.", "I have pain in my back."),
    ("Her sister found her, and asked her why.", "My sister found me, and asked me why."),
    ("He hit her on her head.", "He hit me on my head."),
    ("Her mother has gout for which she takes pills.",
     "My mother has gout for which she takes pills."),
]  # fmt: skip
MOTHERS = [
    ("A 5-year-old boy is brought to the office by his mother.",
     "He is a 5-year-old boy. I brought him to the office."),
    ("His mother reports that he has a rash.", "He has a rash."),
    ("His mother denies any fever.", "No fever."),
    ("The mother is 30 and this is her first child.", "I am 30 and this is my first child."),
    ("Patient's mother noticed that her son limps.", "I noticed that my son limps."),
    ("The boy's father has asthma.", "His father has asthma."),
    ("He lives with his 16-year-old mother.",) * 2,
    ("The child has pain in the knee and takes no pills.",
     "He has pain in the knee and takes no pills."),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), HIS)
def test_a_man_speaks_of_himself(text: str, says: str) -> None:
    assert first_person(text, sex="male") == says


@pytest.mark.parametrize(("text", "says"), HERS)
def test_a_woman_speaks_of_herself(text: str, says: str) -> None:
    assert first_person(text, sex="female") == says


@pytest.mark.parametrize(("text", "says"), MOTHERS)
def test_a_mother_speaks_of_her_son(text: str, says: str) -> None:
    assert first_person(text, "mother", "male") == says


def test_who_came_along_is_who_speaks() -> None:
    assert first_person("His parents gave him syrup.", "parents", "male") == "We gave him syrup."
    assert first_person("Her mother has gout.", "father", "female") == "Her mother has gout."
    assert first_person("Patient's skin is dry.", "mother") == "The child’s skin is dry."
    assert first_person("She says he hurt her.") == "He hurt me."  # the first is the patient


@cache
def told() -> list[tuple[str, str, Persona]]:
    return [
        (fact.text, fact.says, case.persona)
        for case in read_vignettes(ROWS)
        for fact in case.of(Access.TELL)
    ]


VERB = r"(?:has|is|does|was not has|are|denies|takes|feels|states|reports|presents|comes)"
NEVER = (  # what no patient says
    rf"\bI (?:\w+ly |also |never |often )*{VERB}\b(?<!and I are)",
    r"\bI (?:am|was|have) (?:\w+ )?(?:presents|comes|takes|drinks|denies|reports)\b",
    r"(?<!type )\bI (?:also |often |never |no longer )?(?!was|always)[a-z]+[^\Wus]s\b(?<!times)",
    r"\b(?:my my|me me|I I|no no|a me|an me|I’s|I's|meself|we’s)\b",
    r"\bI am an? \d+-\w+-old [^.]*\b(?:presents|comes|is brought|was brought)\b",
    r"\b(?:I|my|me) denies\b|^[a-z]",
)
BODY = r"(?:head|neck|chest|back|arm|leg|knee|hand|foot|feet|eyes?|abdomen|skin|jaw|hip|wrist)s?"
FRAME = re.compile(  # a person, or that a person says, comes or feels
    r"patient|s?he|his|hers?|him|(?:him|her|my|them)sel(?:f|ves)|the[ym]|their|i|m[ey]|we|ours?|us|it"
    r"|the|an?|that|this|no|not|of|to|by|with|was|were|ha[sd]|have|having|is|am|are|do|does|did|in|now"
    r"|sa(?:ys?|id)|(?:state|endorse|note|claim|add|mention|report|complain|present)(?:s|d|ed|ing)?"
    r"|den(?:y|ies|ied)|c[oa]mes?|also|feel(?:s|ing)?|any|mother|mom|father|dad|parents?|concerned"
    r"|wom[ae]n|m[ae]n|boy|girl|child|infant|newborn|neonate|baby|son|brought|addi\w+ly|adamantly|d"
    r"|do(?:es)?n|ha(?:s|ve)n|s|t|would"
)


@needs_cases
def test_no_vignette_makes_a_patient_speak_wrongly() -> None:
    for text, says, persona in told():
        assert re.findall(r"\d+", text) == re.findall(r"\d+", says), (text, says)
        if persona.informant:
            assert not re.search(r"\b[Pp]atient(?!s)\b(?! with)", says), (text, says)
            continue
        wrong = [pattern for pattern in NEVER if re.search(pattern, says)]
        assert not wrong, (text, says, wrong)
        theirs = {"male": "his", "female": "her"}.get(persona.sex or "")
        if theirs and not re.search(r"mother|father|grand|sister|brother|husband|wife", text):
            assert not re.search(rf"\b{theirs} (?:\w+ )?{BODY}\b", says, re.I), (text, says)
    assert len(told()) > 6500


@needs_cases
def test_no_vignette_loses_a_word_or_gains_one() -> None:
    def words(text: str) -> Counter[str]:
        found = (one for one in re.findall(r"[^\W\d_]+", text.lower()))
        own = (one for one in found if not FRAME.fullmatch(one))
        return Counter(re.sub(r"(?:ie)?[esy]*$", "", one) for one in own)

    for text, says, _ in told():
        assert words(text) == words(says), (text, says)


LOW, HIGH = Persona(literacy="low"), Persona(literacy="high")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("I have dyspnea and hypertension.", "I have shortness of breath and high blood pressure."),
        ("Hypertension is treated.", "High blood pressure is treated."),
        ("I have portal hypertension.", "I have portal hypertension."),
        ("I had pulmonary edema.", "I had fluid in the lungs."),
        ("I have bilateral knee pain.", "I have bilateral knee pain."),
        ("The pain is bilateral.", "The pain is on both sides."),
        ("I have exertional dyspnea.", "I have shortness of breath on effort."),
        ("I had an appendectomy.", "I had an appendix operation."),
        ("I have mild rhinorrhea.", "I have mild discharge from the nose."),
        ("I have hemoptysis.", "I have been coughing up blood."),
        ("He had a febrile seizure.", "He had a febrile seizure."),
        ("No dysphagia to solids.", "No trouble swallowing solids."),
    ],
)
def test_low_literacy_says_lay_words(text: str, says: str) -> None:
    assert lay(text, LOW) == says
    assert lay(text, HIGH) == text
