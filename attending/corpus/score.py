"""Two scores of a text, quality and medicine: linear models on hashed words and pairs of words.

`attending corpus` trains them first where a recipe has `samples`; what ships was made that way
(recipe `scorer`). Bad samples are good ones spoiled as web text is spoiled, unless they are given.
"""

import math
import random
import tomllib
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from attending import linear
from attending.corpus.read import glob, strings
from attending.corpus.recipe import SamplesConfig
from attending.corpus.split import draw
from attending.linear import Linear, Rows
from attending.overlap import ngrams, normalise

BUCKETS = 1 << 17
SHAPES = 2 * 6 * 16
MARKS = ",.;:?!，。；：？！、"
SAMPLE_CHARACTERS = 1_000
MIN_SAMPLE_CHARACTERS = 40
# The second label's probability is the score.
SCORES = {"quality": ("bad", "good"), "medical": ("general", "medical")}
SHIPPED = Path(str(resources.files("attending") / "corpus" / "scorer"))
HAN_START = "一"


def features(texts: Iterable[str]) -> dict[str, Rows]:
    """By score: hashes of each text's tokens and pairs of tokens (Han characters are tokens).

    For quality also the text's shape, which counts as much as a quarter of the tokens: it speaks
    where no word has been seen, as most Chinese words have not.
    """
    parts: dict[str, list[linear.Ids]] = {name: [] for name in SCORES}
    for text in texts:
        tokens = normalise(text)
        grams = [ngrams(tokens, n) for n in (1, 2) if len(tokens) >= n]
        row = np.concatenate([np.empty(0, np.uint64), *grams])
        words = (row % np.uint64(BUCKETS - SHAPES)).astype(np.int64)
        form = np.repeat(np.array(shape(text, tokens)), 1 + len(words) // 4)
        parts["medical"].append(words)
        parts["quality"].append(np.concatenate([words, BUCKETS - SHAPES + form]))
    starts = {name: np.cumsum([0, *map(len, rows)]) for name, rows in parts.items()}
    nothing = np.empty(0, np.int64)
    return {n: Rows(np.concatenate([nothing, *rows]), starts[n]) for n, rows in parts.items()}


def shape(text: str, tokens: Sequence[str]) -> list[int]:
    """Six numbers below SHAPES: measures in 16 grades each, apart for Chinese and others."""
    count = max(1, len(tokens))
    marks = sum(map(text.count, MARKS))
    symbols = sum(not (c.isalnum() or c.isspace()) for c in text) - marks
    measures = (
        20 * sum(token in _common() for token in tokens) / count,  # words that any prose has
        15 * len(set(tokens)) / count,
        40 * marks / count,
        40 * symbols / count,
        2 * math.log2(1 + count / (1 + text.count("\n"))),  # tokens a line
        1.5 * sum(map(len, tokens)) / count,
    )
    language = 16 * len(measures) * _is_chinese(text)
    return [language + 16 * i + min(15, int(value)) for i, value in enumerate(measures)]


@cache
def _common() -> frozenset[str]:
    return frozenset([*_phrases()["common_en"].split(), *_phrases()["common_zh"]])


class Scorer:
    """The trained scores of a folder."""

    def __init__(self, folder: Path = SHIPPED) -> None:
        """Load both; CheckpointError if they are not there."""
        self._models = {name: Linear.load(folder / f"{name}.safetensors") for name in SCORES}

    def score(self, text: str) -> dict[str, float]:
        """The probability that a text is good, and that it is medical, by name of the score."""
        rows = features([text])
        return {name: float(_share(model, rows[name])[0]) for name, model in self._models.items()}


def train(samples: SamplesConfig, root: str, folder: Path, seed: int = 0) -> dict[str, float]:
    """Train both scores and store them; returns metrics of the tenth of samples held out.

    Texts are cut to pieces of at most 1,000 characters, so that a long one does not count for
    more than it is read for. Where Chinese is rare, parts of its pieces are seen again and again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    good, bad, medical, general = (
        _balanced(sorted({p for g in globs for p in _pieces(root, g)}), generator)
        for globs in (samples.good, samples.bad, samples.medical, samples.general)
    )
    bad = bad or [
        (SPOILS[n % len(SPOILS)](text, generator), is_test)
        for n, (text, is_test) in enumerate(good)
    ]
    metrics: dict[str, float] = {}
    for name, (no, yes) in {"quality": (bad, good), "medical": (general, medical)}.items():
        labelled = [(text, label, d) for label, some in ((0, no), (1, yes)) for text, d in some]
        rows = features(text for text, _, is_test in labelled if not is_test)[name]
        targets = [label for _, label, is_test in labelled if not is_test]
        model = linear.fit(rows, targets, SCORES[name], buckets=BUCKETS, seed=seed, rate=1.0)
        model.save(folder / f"{name}.safetensors")
        model = Linear.load(folder / f"{name}.safetensors")  # as it was rounded
        for language, is_chinese in (("en", False), ("zh", True)):
            test = [(text, y) for text, y, d in labelled if d and _is_chinese(text) is is_chinese]
            if not test:
                continue
            shares = _share(model, features(text for text, _ in test)[name])
            labels = np.array([label for _, label in test])
            metrics |= {
                f"corpus/{name}_{language}_accuracy": float(((shares > 0.5) == labels).mean()),
                f"corpus/{name}_{language}_yes_above_0.2": float(
                    (shares[labels == 1] >= 0.2).mean()
                ),
                f"corpus/{name}_{language}_no_below_0.2": float((shares[labels == 0] < 0.2).mean()),
                f"corpus/{name}_{language}_tested": len(test),
            }
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _shuffled(text: str, generator: random.Random) -> str:
    """Its words, or Han characters, in another order."""
    units = list(text) if _is_chinese(text) else text.split()
    return ("" if _is_chinese(text) else " ").join(generator.sample(units, len(units)))


def _boilerplate(text: str, generator: random.Random) -> str:
    """The legal and the begging lines of a web page."""
    lines = _phrases()["boilerplate_zh" if _is_chinese(text) else "boilerplate_en"]
    return "\n".join(generator.sample(lines, min(len(lines), generator.randint(2, 6))))


def _navigation(text: str, generator: random.Random) -> str:
    """Menus, with a few of the text's words between."""
    items = _phrases()["menu_zh" if _is_chinese(text) else "menu_en"]
    own = generator.choices(text.split() or [text], k=4)
    chosen = generator.sample(items, generator.randint(8, len(items))) + own
    return generator.choice([" | ", " > ", "\n", "  "]).join(generator.sample(chosen, len(chosen)))


def _misread(text: str, generator: random.Random) -> str:
    """As a bad scan: letters lost, doubled, mistaken, words torn; cut in the middle."""
    rate, wrong = generator.uniform(0.08, 0.25), _phrases()["misread"]
    out = [
        generator.choice([wrong.get(c, " "), "", c + " ", c + c, generator.choice("|~^_*#")])
        if generator.random() < rate
        else c
        for c in text
    ]
    return "".join(out[: generator.randint(len(out) // 2, len(out))])


def _repeated(text: str, generator: random.Random) -> str:
    """One line again and again."""
    size = generator.randint(8, 60)
    start = generator.randrange(max(1, len(text) - size))
    line = text[start : start + size].replace("\n", " ")
    return "\n".join([line] * (SAMPLE_CHARACTERS // (2 * size)))


def _keyboard(text: str, generator: random.Random) -> str:
    """Keys hit at random; for Chinese, characters."""
    count = max(MIN_SAMPLE_CHARACTERS, len(text) // 2)
    if _is_chinese(text):
        return "".join(chr(ord(HAN_START) + generator.randrange(20_000)) for _ in range(count))
    return "".join(generator.choices("asdfghjklqwertyuiopzxcvbnm      ;,1234", k=count))


SPOILS = (
    *(_shuffled, _boilerplate, _navigation, _misread, _repeated, _keyboard),
    *(_shuffled, _misread),
)


@cache
def _phrases() -> dict[str, Any]:
    return tomllib.loads((SHIPPED / "phrases.toml").read_text("utf-8"))


def _is_chinese(text: str) -> bool:
    return sum(c >= HAN_START for c in text) * 4 > len(text)


def _share(model: Linear, rows: Rows) -> linear.Floats:
    """The second label's probability, [rows]."""
    logits = model.logits(rows)
    result: linear.Floats = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    return result


def _pieces(root: str, pattern: str) -> Iterable[str]:
    for path in glob(root, pattern):
        for _, text in strings(path):
            for start in range(0, len(text), SAMPLE_CHARACTERS):
                piece = text[start : start + SAMPLE_CHARACTERS].strip()
                if len(piece) >= MIN_SAMPLE_CHARACTERS:
                    yield piece


def _balanced(pieces: Sequence[str], generator: random.Random) -> list[tuple[str, bool]]:
    """Pieces and whether each is held out; of Chinese, parts until it is a tenth of all."""
    chinese = [piece for piece in pieces if _is_chinese(piece)]
    times = (len(pieces) - len(chinese)) // (9 * len(chinese)) if chinese else 0
    parts = [(piece, draw("sample", piece) % 10 == 0) for piece in pieces]
    for piece in chinese:
        for _ in range(times):
            size = generator.randint(MIN_SAMPLE_CHARACTERS, len(piece))
            start = generator.randint(0, len(piece) - size)
            parts.append((piece[start : start + size], draw("sample", piece) % 10 == 0))
    return parts
