"""Personas, drawn: the 16 types, literacy, finances and emotion, uniform and independent.

No source gives their true frequencies, so uniform says nothing about any population.
"""

import random
import re
from itertools import product
from typing import Literal, get_args

from attending.verifier.patient.case import Persona

TYPES = tuple("".join(letters) for letters in product("EI", "SN", "TF", "JP"))
CHILD = 12  # younger ones are spoken for


def draw_persona(
    draw: random.Random, age: int | None, sex: Literal["female", "male"] | None, record: str = ""
) -> Persona:
    """One that fits the record: a small child's is the one who came along."""

    def one(field: str) -> str:
        return str(draw.choice(get_args(Persona.model_fields[field].annotation)))

    return Persona.build(
        {
            "mbti": draw.choice(TYPES),
            "literacy": one("literacy"),
            "finances": one("finances"),
            "emotion": one("emotion"),
            "age": age,
            "sex": sex,
            "informant": _informant(record) if age is not None and age < CHILD else "",
        }
    )


def _informant(record: str) -> str:
    found = re.search(r"\b(?:grand)?(?:mother|father)\b|\bparents\b", record.lower())
    return found[0] if found else "mother"
