"""Presidio's recognizers beside our own, as an option for whole texts.

Nothing here imports Presidio: its recognizers and engines are told by their methods. Their
decisions are not bounded to a window, so they are no part of `scan` and its stream.
"""

from collections.abc import Iterable
from typing import Any, Protocol

from attending.phi.scan import PhiError, scan
from attending.phi.spans import Canvas, Span

CATEGORY = {
    "PERSON": "name",
    "LOCATION": "location",
    "DATE_TIME": "date",
    "PHONE_NUMBER": "phone",
    "EMAIL_ADDRESS": "email",
    "US_SSN": "ssn",
    "MEDICAL_LICENSE": "license",
    "US_DRIVER_LICENSE": "license",
    "US_PASSPORT": "passport",
    "UK_NHS": "mrn",
    "US_MBI": "health_plan",
    "CREDIT_CARD": "account",
    "IBAN_CODE": "account",
    "US_BANK_NUMBER": "account",
    "URL": "url",
    "IP_ADDRESS": "ip",
    "MAC_ADDRESS": "ip",
}
"""Presidio's entities as categories; any other is an `id`."""


class Recognizer(Protocol):
    """As Presidio's `EntityRecognizer`, one that needs no language model."""

    supported_entities: list[str]

    def analyze(self, text: str, entities: list[str], nlp_artifacts: Any) -> Iterable[Any] | None:
        """Results with `entity_type`, `start`, `end` and `score`."""


def scan_with(text: str, recognizers: Iterable[Recognizer], *, least: float = 0.5) -> list[Span]:
    """Our identifiers and those that Presidio's recognizers find with a score of at least `least`.

    Raises:
        PhiError: One of them failed; nothing may pass.
    """
    canvas = Canvas(len(text))
    for recognizer in recognizers:
        try:
            found = recognizer.analyze(text, recognizer.supported_entities, None) or ()
            for one in found:
                if one.score >= least:
                    category = CATEGORY.get(one.entity_type, "id")
                    canvas.paint(one.start, one.end, category, min(float(one.score), 0.9))
        except Exception as error:  # noqa: BLE001  (whatever failed, nothing may pass)
            name = type(recognizer).__name__
            raise PhiError(
                f"{name} failed ({type(error).__name__}): nothing was let through. Remove it from "
                "the list, or repair it."
            ) from None
    for span in scan(text):
        canvas.paint(span.start, span.end, span.category, max(span.score, 0.91))
    return canvas.spans(text)
