"""What is wrong with a simulated patient's words, typed: Baichuan-M2 filters by such faults."""

import re
from collections.abc import Sequence
from enum import StrEnum

from attending.overlap import ngrams, normalise
from attending.verifier.data import table

MAX_TOKENS = 120  # words, or Han characters
LOOP = 6  # tokens in a row that come again


class Fault(StrEnum):
    """A defect of one reply."""

    REPETITION = "repetition"  # the reply before, or itself in a loop
    OVER_LENGTH = "over_length"
    ROLE_INVERSION = "role_inversion"  # the patient asks, advises or diagnoses as a doctor does
    LEAK = "leak"  # a fact that was not asked for
    CONTRADICTION = "contradiction"  # a fact turned into its opposite
    FABRICATION = "fabrication"  # a number that no fact has, or what the factual unit refuses


def form_faults(text: str, earlier: Sequence[str] = ()) -> list[Fault]:
    """Of a reply's form, given the patient's earlier ones."""
    tokens, found = normalise(text), []
    grams = ngrams(tokens, LOOP).tolist()
    is_loop = len(grams) - len(set(grams)) >= LOOP
    if is_loop or (len(tokens) > 3 and any(normalise(other) == tokens for other in earlier)):
        found.append(Fault.REPETITION)
    if len(tokens) > MAX_TOKENS or not tokens:
        found.append(Fault.OVER_LENGTH)
    if re.search(table("patient/cues")["inverted"], text, re.IGNORECASE | re.MULTILINE):
        found.append(Fault.ROLE_INVERSION)
    return found
