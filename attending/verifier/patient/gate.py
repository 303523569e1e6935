"""The termination gate: has the doctor concluded?

Baichuan-M2 names predefined triggers, such as a diagnosis given, and publishes no list
(arXiv 2509.02208, 2.1); these are ours: a diagnosis, a plan, or a farewell, unless the last words
go on asking or examining. What a doctor merely considers ends nothing.
"""

import re
from enum import StrEnum

from attending.verifier.data import table
from attending.verifier.sentences import sentences


class End(StrEnum):
    """Why a consultation is over."""

    DIAGNOSIS = "diagnosis"
    PLAN = "plan"
    FAREWELL = "farewell"


def concluded(message: str) -> End | None:
    """Of a doctor's message, in English or Chinese; None where the consultation goes on."""
    cues = table("patient/cues")["end"]
    parts = [re.sub(cues["confirm"], "", one, flags=re.IGNORECASE) for one in sentences(message)]
    if any(re.search(cues["goes_on"], part, re.IGNORECASE) for part in parts[-2:]):
        return None
    for end in (End.FAREWELL, End.PLAN, End.DIAGNOSIS):
        where = " ".join(parts[-2:] if end is End.FAREWELL else parts)
        if re.search(cues[end], where, re.IGNORECASE):
            return end
    return End.DIAGNOSIS if re.search(cues["illness"], " ".join(parts), re.IGNORECASE) else None
