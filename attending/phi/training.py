"""Trains the tagger on generated notes: `attending phi train`.

Every word of a generated note is in our lists, as hardly any in a hospital's is. So some are shown
to the model as words never seen, more often where the label is a name or a place.
"""

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from attending import artifact
from attending.errors import UsageError
from attending.linear import Floats, Ids, Linear, fit
from attending.phi import tagger
from attending.phi.generate import LANGUAGES, SLOT, Note, fragments, generate
from attending.phi.generate import lexicon as word_lists
from attending.phi.recipe import PhiConfig
from attending.phi.spans import CATEGORIES
from attending.phi.tokens import Tokens, fold, tokenise
from attending.sources import Progress

LABEL = dict.fromkeys(CATEGORIES, "code") | {
    **{name: name for name in ("name", "location", "date", "age")},
    **dict.fromkeys(("phone", "fax", "email", "url", "ip"), "contact"),
}
GIVEN, FAMILY, PLACE, ORDINARY, FREQUENT, MEDICAL = (1 << i for i in range(len(tagger.FLAGS)))
LISTS = {
    GIVEN: "given given_one given_two minority",
    FAMILY: "family surname",
    PLACE: "city county street_name place district street estate village province state",
    ORDINARY: "drug condition eponym symptom finding procedure dept role herb formula word "
    "surname_words",
    MEDICAL: "drug eponym herb formula",
}
COMMON_RANK, NAME_RANK = 4000, 2000  # of English words by frequency: frequent; likelier a name
HAN_COUNT, HAN_LENGTH = 200, 4  # of jieba's words: least count to be ordinary, most characters
RATE, BATCH, RIDGE = 10.0, 32, 1e-5
Add = Callable[[Iterable[str], int], None]


class Sample(NamedTuple):
    """A note for training."""

    tokens: Tokens
    labels: NDArray[np.int64]  # index in tagger.LABELS, [tokens]
    hidden: NDArray[np.bool_]  # shown as words never seen, [tokens]


def run(config: PhiConfig, out: Path, progress: Progress) -> dict[str, float]:
    """Train, and publish weights, lexicon and `run.json`; returns figures on unseen notes."""
    record = artifact.Record("phi", config.model_dump(mode="json"), config.seed, [])
    with artifact.publish(out) as draft:
        words = lexicon()
        rng = np.random.default_rng(config.seed)
        ids, targets = _features(config, words, rng, progress)
        progress(0, None, f"fitting {len(ids):,} tokens, {config.epochs} times")
        model = fit(
            tagger.rows(ids),
            targets,
            tagger.LABELS,
            buckets=tagger.BUCKETS,
            epochs=config.epochs,
            rate=RATE,
            batch=BATCH,
            seed=config.seed,
        )
        model.save(draft / "tagger.safetensors")
        model = Linear.load(draft / "tagger.safetensors")  # as it was rounded
        smoother, metrics = _fit_smoother(model, words, config, rng)
        words.save(draft / "lexicon.safetensors", smoother)
        artifact.write_run(draft, record, metrics)
    return metrics


def sample(note: Note, hide: dict[str, float], rng: np.random.Generator) -> Sample:
    """Label a note's tokens; `hide` is the share of each label's words shown as never seen."""
    tokens = tokenise(fold(note.text))
    labels = np.zeros(len(tokens.words), np.int64)
    starts = np.array([span.start for span in note.spans], np.int64)
    ends = np.array([span.end for span in note.spans], np.int64)
    kinds = np.array([tagger.LABELS.index(LABEL[span.category]) for span in note.spans], np.int64)
    span = np.searchsorted(starts, tokens.starts, side="right") - 1
    inside = span >= 0
    inside[inside] = tokens.starts[inside] < ends[span[inside]]
    labels[inside] = kinds[span[inside]]
    chance = np.array([hide.get(name, 0.0) for name in tagger.LABELS])
    is_word = np.fromiter((word.isalpha() for word in tokens.words), bool, len(labels))
    return Sample(tokens, labels, is_word & (rng.random(len(labels)) < chance[labels]))


def lexicon() -> tagger.Lexicon:
    """What words may be: by our lists, and by zxcvbn's, Faker's and jieba's."""
    entries: dict[str, int] = {}

    def add(texts: Iterable[str], bits: int) -> None:
        for text in texts:
            entries[text.lower()] = entries.get(text.lower(), 0) | bits

    for language in LANGUAGES:
        words = word_lists(language)
        for bits, names in LISTS.items():
            for text in (text for name in names.split() for text in words.get(name, ())):
                if bits == ORDINARY:
                    add(re.findall(r"[a-z]{2,}", text), ORDINARY | FREQUENT)
                if bits == MEDICAL and text.isascii():
                    add(
                        (word for word in re.findall(r"[A-Za-z]{3,}", text) if word[0].isupper()),
                        bits,
                    )
                elif bits != ORDINARY or not text.isascii():
                    add([text], bits)
        plain = " ".join(SLOT.sub(" ", line) for line in fragments(language))
        add(re.findall(r"(?<![A-Za-z])[a-z]{2,}", plain), ORDINARY | FREQUENT)
    _add_libraries(add, entries)
    return tagger.Lexicon.build(entries)


def _features(
    config: PhiConfig, words: tagger.Lexicon, rng: np.random.Generator, progress: Progress
) -> tuple[Ids, NDArray[np.int64]]:
    vocabulary = tagger.Vocabulary(words)
    blocks, targets, done = [], [], 0
    for language in LANGUAGES:
        for note in generate(language, config.notes, config.seed):
            tokens, labels, hidden = sample(note, config.hide, rng)
            blocks.append(vocabulary.features(tokens, hidden))
            targets.append(labels)
            done += 1
            progress(done, len(LANGUAGES) * config.notes, "writing notes")
    return np.concatenate(blocks), np.concatenate(targets)


def _fit_smoother(
    model: Linear, words: tagger.Lexicon, config: PhiConfig, rng: np.random.Generator
) -> tuple[Floats, dict[str, float]]:
    """Softmax regression on what `Tagger.context` gives for notes the model has not seen."""
    raw = tagger.Tagger(model, words, np.zeros((1, 1), np.float32))
    inputs, targets, alone = [], [], []
    for language in LANGUAGES:
        for note in generate(language, max(1, config.notes // 8), config.seed + 1):
            tokens, labels, hidden = sample(note, config.hide, rng)
            logits, wide = raw.context(tokens, hidden)
            inputs.append(wide)
            alone.append(logits.argmax(axis=1))
            targets.append(labels)
    x, y = np.concatenate(inputs), np.concatenate(targets)
    size = len(tagger.LABELS)
    right = np.eye(size, dtype=np.float32)[y]

    def loss(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weights = flat.reshape(-1, size).astype(np.float32)
        chances = tagger.softmax(x @ weights)
        value = -np.log(chances[np.arange(len(y)), y] + 1e-12).mean() + RIDGE * (weights**2).sum()
        slope = x.T @ (chances - right) / len(y) + 2 * RIDGE * weights
        return float(value), slope.astype(np.float64).reshape(-1)

    start = np.zeros((x.shape[1], size))
    start[tagger.WINDOW * size : (tagger.WINDOW + 1) * size] = np.eye(size)  # nothing smoothed
    options = {"maxiter": 150}
    found = minimize(loss, start.reshape(-1), jac=True, method="L-BFGS-B", options=options)
    smoother: Floats = found.x.reshape(-1, size).astype(np.float32)
    smoothed = (x @ smoother).argmax(axis=1)
    return smoother, {
        "phi/unseen_accuracy": float((np.concatenate(alone) == y).mean()),
        "phi/smoothed_accuracy": float((smoothed == y).mean()),
        "phi/unseen_tokens": len(y),
    }


def _add_libraries(add: Add, entries: dict[str, int]) -> None:
    try:
        people = importlib.import_module("faker.providers.person")
        lists = importlib.import_module("zxcvbn.frequency_lists").FREQUENCY_LISTS
        jieba = importlib.import_module("jieba").__file__
    except ImportError as error:
        raise UsageError(
            f"training needs {error.name}: pip install -e '.[phi]' in the clone"
        ) from None
    for place in pkgutil.iter_modules(people.__path__):
        provider = importlib.import_module(f"{people.__name__}.{place.name}").Provider
        for name, value in vars(provider).items():
            bits = GIVEN * name.startswith("first_names") | FAMILY * name.startswith("last_names")
            if bits and isinstance(value, Iterable):
                latin = [word for word in value if isinstance(word, str) and max(word) < "\u0250"]
                add(value if place.name == "zh_CN" else latin, bits)
    census = importlib.import_module("names").full_path("dist.all.last")
    rare = (line.split()[0].lower() for line in Path(census).read_text("ascii").splitlines())
    add((word for word in rare if not entries.get(word, 0) & ORDINARY), FAMILY)
    add([*lists["female_names"], *lists["male_names"]], GIVEN)
    add(lists["surnames"], FAMILY)
    for rank, word in enumerate(lists["english_wikipedia"]):
        if rank < NAME_RANK or not entries.get(word, 0) & (GIVEN | FAMILY | PLACE):
            add([word], ORDINARY | FREQUENT * (rank < COMMON_RANK))
    _add_chinese(add, Path(str(jieba)).with_name("dict.txt"))


def _add_chinese(add: Add, dictionary: Path) -> None:
    """jieba's words by kind: nr a person, nrt a foreign name, ns a place, nt an organisation."""
    for line in dictionary.read_text("utf-8").splitlines():
        word, count, kind = line.split()
        if not 2 <= len(word) <= HAN_LENGTH or word.isascii():
            continue
        if kind in ("nrt", "ns"):
            add([word], GIVEN if kind == "nrt" else PLACE)
        elif kind not in ("nr", "nrfg", "nt") and int(count) >= HAN_COUNT:
            add([word], ORDINARY)
