"""Whole texts, streams, second looks, and what happens when a part fails."""

import pytest

from attending.phi import PhiError, Stream, find_again, matcher, redact, scan, tagger
from attending.phi.presidio import scan_with
from attending.phi.tokens import tokenise

NOTE = (
    "Patient: Amara Okonkwo, DOB 13/05/1962. Ms. Okonkwo called from (555) 123-4567.\n"
    "患者王小明，电话13812345678，2023年5月6日入院。\n"
)


def fail(*_: object) -> None:
    raise RuntimeError("Amara Okonkwo")


@pytest.mark.parametrize("part", [(matcher, "paint"), (tagger, "shipped")])
def test_if_a_part_fails_nothing_passes(
    part: tuple[object, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*part, fail)
    with pytest.raises(PhiError, match="nothing was let through") as error:
        redact(NOTE)
    assert "Okonkwo" not in str(error.value)
    stream = Stream()
    assert stream.feed(NOTE) == ""
    with pytest.raises(PhiError):
        stream.close()


def test_a_stream_that_failed_gives_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream()
    with monkeypatch.context() as patch:
        patch.setattr(matcher, "paint", fail)
        with pytest.raises(PhiError):
            stream.feed(NOTE * 20)
    for call in (lambda: stream.feed(NOTE * 20), stream.close):
        with pytest.raises(PhiError):
            call()


def test_a_stream_gives_early_what_cannot_change() -> None:
    stream = Stream()
    told = stream.feed("The lungs are clear and the heart is regular. " * 40)
    assert len(told) > 1000
    assert told.startswith("The lungs are clear")


def test_a_second_pass_finds_a_names_other_mentions() -> None:
    text = "Patient: Amara Okonkwo.\n" + "Stable. " * 300 + "so okonkwo Okonkwo went home; 王五."
    spans = scan(text)
    again = find_again(text, spans)
    last = text.rindex("Okonkwo")
    assert any(span.start <= last < span.end for span in again)
    assert find_again("No one here.", []) == []
    assert redact(redact(text), second_pass=True) == redact(text)


class Result:
    def __init__(self, entity_type: str, start: int, end: int, score: float) -> None:
        self.entity_type, self.start, self.end, self.score = entity_type, start, end, score


class Recognizer:
    def __init__(self, *results: Result) -> None:
        self.supported_entities = ["PERSON"]
        self.results = results

    def analyze(self, text: str, entities: list[str], nlp_artifacts: object) -> list[Result]:
        assert entities == self.supported_entities
        return list(self.results)


class Broken(Recognizer):
    def analyze(self, text: str, entities: list[str], nlp_artifacts: object) -> list[Result]:
        raise ValueError(text)


def test_presidios_recognizers_add_to_ours() -> None:
    text = "zzyzx has MRN: 00123456"
    spans = scan_with(text, [Recognizer(Result("PERSON", 0, 5, 0.8), Result("X", 6, 9, 0.2))])
    assert [(s.category, text[s.start : s.end]) for s in spans] == [
        ("name", "zzyzx"),
        ("mrn", "00123456"),
    ]


def test_a_presidio_recognizer_that_fails_lets_nothing_through() -> None:
    with pytest.raises(PhiError, match="Broken failed") as error:
        scan_with("Amara Okonkwo", [Broken()])
    assert "Amara" not in str(error.value)


def test_what_a_thread_has_looked_up_stays_when_another_forgets_it() -> None:
    words = tagger.Vocabulary(tagger.Lexicon.build({}))
    tokens = tokenise("Amara Okonkwo of Springfield")
    before = words.features(tokens)
    looked_up, _ = words._lookup(tokens.words)
    kept = looked_up.copy()
    for first in range(0, tagger.CACHE + 1000, 1000):  # more words than are remembered
        words.features(tokenise(" ".join(f"{n:x}z" for n in range(first, first + 1000))))
    assert (looked_up == kept).all()
    assert (words.features(tokens) == before).all()
