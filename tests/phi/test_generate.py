"""Generated notes: their spans are where they say, and training on them works."""

import random

import numpy as np
import pytest

from attending.errors import CheckpointError, UsageError
from attending.linear import Linear
from attending.phi import CATEGORIES, checks, tagger, training
from attending.phi.generate import CATEGORY, LANGUAGES, SLOT, Writer, fragments, generate
from attending.phi.recipe import PhiConfig
from attending.phi.tokens import tokenise


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_span_is_tight_in_order_and_of_a_known_category(language: str) -> None:
    notes = list(generate(language, 60, seed=3))
    assert notes == list(generate(language, 60, seed=3))
    assert notes != list(generate(language, 60, seed=4))
    seen = set()
    for note in notes:
        end = 0
        for span in note.spans:
            assert end <= span.start < span.end <= len(note.text)
            assert note.text[span.start : span.end].strip()
            end = span.end
            seen.add(span.category)
    assert seen <= set(CATEGORIES)
    assert len(seen) > 15


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_slot_can_be_filled(language: str) -> None:
    writer = Writer(language, random.Random(0))
    slots = {slot for line in fragments(language) for slot, _ in SLOT.findall(line)}
    assert slots
    for slot in slots:
        assert writer.value(slot).strip(), slot
    assert slots - CATEGORY.keys()


def test_generated_resident_numbers_are_valid() -> None:
    spans = [
        note.text[span.start : span.end]
        for note in generate("zh", 150, seed=0)
        for span in note.spans
        if span.category == "resident_id" and "\n" not in note.text[span.start : span.end]
    ]
    whole = [number for number in spans if "*" not in number and len(number) >= 18]
    assert len(whole) > 5
    assert all(checks.resident_id(number) for number in whole)


def test_a_wrapped_note_keeps_its_identifiers() -> None:
    writer = Writer("zh", random.Random(1))
    for _ in range(30):
        text, spans = writer.fill("姓名：{name}，电话{phone}，住{address}，于{date}就诊。")
        wrapped, moved = writer.wrap(text, spans)
        for before, after in zip(spans, moved, strict=True):
            plain = "".join(wrapped[after.start : after.end].split())
            assert plain == "".join(text[before.start : before.end].split())


def test_a_small_tagger_learns_its_own_notes(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(training, "_add_libraries", lambda add, entries: None)
    config = PhiConfig(notes=16, epochs=3, hide={"name": 0.2})
    metrics = training.run(config, tmp_path / "tagger", lambda *_: None)
    assert metrics["phi/smoothed_accuracy"] > 0.8
    trained = tagger.load(tmp_path / "tagger")
    again = training.run(config, tmp_path / "again", lambda *_: None)
    assert again == metrics
    for name in ("tagger.safetensors", "lexicon.safetensors"):
        assert (tmp_path / "tagger" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    note = next(generate("en", 1, seed=0))
    sample = training.sample(note, {}, np.random.default_rng(0))
    right = trained.probabilities(tokenise(note.text)).argmax(axis=1) == sample.labels
    assert right.mean() > 0.9
    assert sum(path.stat().st_size for path in (tmp_path / "tagger").glob("*.safetensors")) < 2e6


def test_the_shipped_tagger_is_small_and_says_how_it_was_made() -> None:
    from importlib import resources

    folder = resources.files("attending.phi") / "weights"
    sizes = [(folder / f"{name}.safetensors").stat().st_size for name in ("tagger", "lexicon")]  # type: ignore[attr-defined]
    assert sum(sizes) <= 2_000_000
    import json

    run = json.loads((folder / "run.json").read_text("utf-8"))
    assert run["recipe"] == PhiConfig.load("tagger", "phi").model_dump(mode="json")


def test_without_the_word_lists_training_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:  # type: ignore[no-untyped-def]
    def absent(name: str) -> object:
        raise ImportError(name=name)

    monkeypatch.setattr(training.importlib, "import_module", absent)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[phi\]'"):
        training.lexicon()


def test_weights_of_another_kind_are_refused() -> None:
    other = Linear(("a", "b"), np.zeros((8, 2), np.float32), np.zeros(2, np.float32))
    words = tagger.Lexicon.build({})
    with pytest.raises(CheckpointError, match="train it anew"):
        tagger.Tagger(other, words, np.zeros((1, 1), np.float32))
