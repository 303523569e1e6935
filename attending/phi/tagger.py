"""A small linear tagger for names, places and what has no shape of its own.

Each token is classified alone, from the words, shapes and labels of a few tokens around it: no
decision waits for another, so a mark depends on a bounded window. Weights are trained by
`attending phi train` on generated notes and stored as int8.
"""

import functools
import re
import threading
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from attending.errors import CheckpointError
from attending.linear import Floats, Ids, Linear, Rows
from attending.phi.spans import MARK, Canvas
from attending.phi.tokens import KINDS, TOKEN, Tokens

BUCKETS = 1 << 17
LABELS = ("none", "name", "location", "date", "age", "contact", "code")
"""`contact` is a telephone or fax number or an address on a network, `code` any other number."""
WINDOW = 3
ATOMS = 11
SEQUENCE = 6
ORDINARY = 8  # the bit of the fourth flag
FLAGS = ("given", "family", "place", "ordinary", "frequent", "medical")
CHUNK_REACH = 40  # characters over which a code's mark spreads inside one unbroken chunk
EPONYM = 0.97  # least probability of a name inside a medical phrase
WORD_CODE = 0.9  # and of a code without a digit
EXTENSIONS, BESIDE = 2, 0.05  # passes over, and least probability of, a marked name's neighbours
MONEY = re.compile(r"[$£€¥]\s?[\d,.]*$")
DATE_JOINTS = frozenset("/-.–．")
DATE_WORD = re.compile(r"jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|st|nd|rd|th|[年月日号初]")
HAN_SIGN, CAPITAL, LETTER, TAGGABLE = 1, 2, 4, 8
CACHE = 50_000  # words whose features are remembered
THRESHOLD = {
    "name": 0.2,
    "location": 0.25,
    "date": 0.45,
    "age": 0.3,
    "contact": 0.4,
    "code": 0.4,
}
"""Least probability that marks a token."""

Hash = np.uint64
Hashes = NDArray[np.uint64]


class Lexicon(NamedTuple):
    """Words and word sequences by hash, with what they may be: a bit each of `FLAGS`."""

    keys: NDArray[np.uint32]  # sorted
    flags: NDArray[np.uint8]

    @classmethod
    def build(cls, entries: Mapping[str, int]) -> "Lexicon":
        """From texts and their bits."""
        told: dict[int, int] = {}
        for text, bits in entries.items():
            words = [_hash(word.lower()) for word in TOKEN.findall(text)]
            if bits and 0 < len(words) <= SEQUENCE:
                key = int(_key([np.array([word], np.uint64) for word in words])[0])
                told[key] = told.get(key, 0) | bits
        keys = np.array(sorted(told), np.uint32)
        return cls(keys, np.array([told[int(key)] for key in keys], np.uint8))

    def save(self, path: Path, smoother: Floats) -> None:
        """Write it, and the smoother beside it."""
        tensors: dict[str, NDArray[Any]] = {"keys": self.keys, "flags": self.flags}
        save_file(tensors | {"smoother": smoother}, path)

    def find(self, keys: NDArray[np.uint32]) -> NDArray[np.uint8]:
        """The bits of keys, 0 for those not in it."""
        if not len(self.keys):
            return np.zeros(len(keys), np.uint8)
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[place] == keys, self.flags[place], 0).astype(np.uint8)


class Vocabulary:
    """Turns tokens into feature ids; a word's own hashes are computed once."""

    def __init__(self, lexicon: "Lexicon") -> None:
        """Knows no word yet but the one that stands outside of every text."""
        self.lexicon = lexicon
        self._index: dict[str, int] = {"": 0}
        self._atoms = np.zeros((CACHE + 1, ATOMS), np.uint64)
        self._traits = np.zeros(CACHE + 1, np.uint8)
        self._last: tuple[list[str], Hashes, NDArray[np.uint8]] = (
            [],
            self._atoms[:0],
            self._traits[:0],
        )
        self._lock = threading.Lock()

    def features(self, tokens: Tokens, hidden: NDArray[np.bool_] | None = None) -> Ids:
        """Feature ids of every token, [tokens, features].

        Args:
            tokens: Of a text.
            hidden: Tokens to treat as words never seen; for training, where every word is known.
        """
        own = self._lookup(tokens.words)[0]
        kinds = self._kinds(own[:, 0])
        if hidden is not None:
            own = own.copy()
            own[hidden, 0] = own[hidden, 3] = 1
            kinds[hidden] = 0
        count = len(own)
        padded = np.pad(own, ((WINDOW, WINDOW), (0, 0)))
        kinds = np.pad(kinds, WINDOW)
        forms = padded[:, 1] * Hash(4096) + kinds
        word = [padded[WINDOW + o : WINDOW + o + count, 0] for o in (0, 1, 2, 3, -3, -2, -1)]
        form = [forms[WINDOW + o : WINDOW + o + count] for o in (0, 1, 2, 3, -3, -2, -1)]
        kind = [kinds[WINDOW + o : WINDOW + o + count] for o in (0, 1, 2, 3, -3, -2, -1)]
        ending = [padded[WINDOW + o : WINDOW + o + count, 2] for o in (1, -1)]
        near = tokens.label.astype(Hash) * Hash(8) + np.minimum(tokens.distance, 1).astype(Hash)
        far = tokens.label.astype(Hash) * Hash(8) + tokens.distance.astype(Hash)
        column = tokens.column.astype(Hash)
        columns: list[tuple[Hashes, ...]] = [(own[:, atom],) for atom in range(ATOMS)]
        columns += [(part,) for part in (*word[1:], *form, *kind, *ending, near, far, column)]
        columns += [
            (word[-1], word[0]),
            (word[0], word[1]),
            (word[-2], word[-1]),
            (word[1], word[2]),
            (word[-1], word[1]),
            (word[-2], word[-1], word[0]),
            (word[-1], word[0], word[1]),
            (word[0], word[1], word[2]),
            (word[-3], word[-2], word[-1]),
            (word[1], word[2], word[3]),
            (form[-1], form[0]),
            (form[0], form[1]),
            (form[-1], form[0], form[1]),
            (form[-2], form[-1], form[0]),
            (form[0], form[1], form[2]),
            (form[-2], form[-1], form[0], form[1], form[2]),
            (word[-1], form[0]),
            (word[-1], form[0], form[1]),
            (word[-2], word[-1], form[0]),
            (word[-2], form[-1], form[0]),
            (form[-1], form[0], word[1]),
            (form[0], word[1]),
            (form[0], word[1], word[2]),
            (form[0], form[1], word[2]),
            (word[-1], form[0], word[1]),
            (form[-1], word[0]),
            (word[0], form[1]),
            (near, form[0]),
            (near, form[0], form[1]),
            (far, form[0]),
            (column, form[0]),
            (column, near, form[0]),
        ]
        joined = np.stack([_join(parts) for parts in columns], axis=1)
        return (_mix(joined, np.arange(len(columns))) & Hash(BUCKETS - 1)).astype(np.int32)

    def is_medical(self, tokens: Tokens) -> NDArray[np.bool_]:
        """Whether each token is in a sequence that is an eponym's, a drug's or a formula's."""
        kinds = self._kinds(self._lookup(tokens.words)[0][:, 0])
        found: NDArray[np.bool_] = (kinds & Hash(8 * 64)) > 0
        return found

    def traits(self, tokens: Tokens) -> NDArray[np.uint8]:
        """What each token is: the bits HAN_SIGN, CAPITAL, LETTER and TAGGABLE."""
        return self._lookup(tokens.words)[1]

    def _lookup(self, words: list[str]) -> tuple[Hashes, NDArray[np.uint8]]:
        """Hashes and traits of words, not to be changed; asked for several times of one list.

        Several threads may share a tagger: what one has read must not change when another forgets.
        """
        with self._lock:
            last, atoms, traits = self._last
            if words is last:
                return atoms, traits
            if len(self._index) + len(words) > CACHE:
                self._index = {"": 0}
            for word in set(words) - self._index.keys():
                self._atoms[len(self._index)] = _atoms(word)
                self._traits[len(self._index)] = _traits(word)
                self._index[word] = len(self._index)
            found = np.fromiter((self._index[word] for word in words), np.int64, len(words))
            self._last = (words, self._atoms[found], self._traits[found])
            return self._last[1:]

    def _kinds(self, words: Hashes) -> Hashes:
        """What the lexicon says of every token: of itself, and of the sequences that it is in."""
        count = len(words)
        alone = self.lexicon.find(_key([words]))
        inside = np.zeros(count, np.uint8)
        starts, ends = np.zeros((2, count), np.uint8)
        for length in range(2, SEQUENCE + 1):
            if count < length:
                break
            keys = _key([words[at : count - length + 1 + at] for at in range(length)])
            flags = self.lexicon.find(keys)
            for at in range(length):
                inside[at : count - length + 1 + at] |= flags
            if length == 2:
                starts[:-1], ends[1:] = flags & 8, flags & 8
        both = np.where(inside & 8, 1, 0) + np.where(inside & 3, 2, 0) + np.where(inside & 4, 4, 0)
        both += np.where(inside & 32, 8, 0)
        bits: Hashes = alone.astype(Hash) + both.astype(Hash) * Hash(64)
        bits += (starts > 0).astype(Hash) * Hash(1024) + (ends > 0).astype(Hash) * Hash(2048)
        return bits


class Tagger:
    """A trained tagger at work."""

    def __init__(self, model: Linear, lexicon: Lexicon, smoother: Floats) -> None:
        """Raises CheckpointError where the weights are not a tagger's."""
        if model.labels != LABELS or len(model.weights) != BUCKETS:
            raise CheckpointError(
                f"the tagger has labels {model.labels} and {len(model.weights)} buckets, expected "
                f"{LABELS} and {BUCKETS}: train it anew, or reinstall."
            )
        self._model = model
        self._smoother = smoother
        self._vocabulary = Vocabulary(lexicon)
        self._least = np.array([THRESHOLD[name] for name in LABELS[1:]], np.float32)

    def paint(self, text: str, tokens: Tokens, canvas: Canvas) -> None:
        """Mark the tokens whose probability reaches the threshold."""
        if not tokens.words:
            return
        chances = self.probabilities(tokens)[:, 1:]
        best = chances.argmax(axis=1)
        scores = chances[np.arange(len(best)), best]
        sure = scores >= self._least[best]
        for _ in range(EXTENSIONS):  # what a marked neighbour makes likely
            for step in (1, -1):
                beside = np.roll(sure, step) & (np.roll(best, step) < 2)
                beside[0 if step == 1 else -1] = False
                label = np.roll(best, step)
                chance = chances[np.arange(len(best)), label]
                more = beside & ~sure & (chance >= BESIDE)
                best, scores = np.where(more, label, best), np.where(more, chance, scores)
                sure |= more
        traits = self._vocabulary.traits(tokens)
        is_name = sure & (best == 0)
        sure &= (traits & TAGGABLE) > 0
        sure &= ~(is_name & self._vocabulary.is_medical(tokens) & (scores < EPONYM))
        sure &= ~(is_name & _lone_letters(is_name, (traits & LETTER) > 0))
        for index in np.flatnonzero(sure).tolist():
            name, word = LABELS[1 + best[index]], tokens.words[index]
            start, end = int(tokens.starts[index]), int(tokens.ends[index])
            if name in ("code", "contact") or word.isdigit():
                start, end = _chunk(text, start, end)
                if not _may_number(name, text, start, end, float(scores[index])):
                    continue
            if name == "age" and not _is_old(word):
                continue
            if name == "date" and word.isdigit() and not _may_date(tokens.words, index):
                continue
            category = _category(name, tokens, index)
            canvas.paint(start, end, category, float(min(scores[index], 0.9)))

    def ordinary(self, words: Iterable[str]) -> set[str]:
        """Those of some single words that are ordinary ones too, by the lexicon."""
        listed = sorted(words)
        hashes = np.array([_hash(word.lower()) for word in listed], np.uint64)
        flags = self._vocabulary.lexicon.find(_key([hashes]))
        return {word for word, bits in zip(listed, flags.tolist(), strict=True) if bits & ORDINARY}

    def probabilities(self, tokens: Tokens) -> Floats:
        """Of every label, [tokens, labels]: the model's, then smoothed by those around."""
        _, wide = self.context(tokens)
        return softmax(wide @ self._smoother)

    def context(
        self, tokens: Tokens, hidden: NDArray[np.bool_] | None = None
    ) -> tuple[Floats, Floats]:
        """The model's logits for every token alone, and what the smoother weighs.

        That is log-probabilities of the tokens near, and a 1; the same where the token is a Han
        character, and where it begins with a capital, else 0.
        """
        logits = self._model.logits(rows(self._vocabulary.features(tokens, hidden)))
        logs = np.log(softmax(logits) + 1e-4).astype(np.float32)
        count = len(logs)
        padded = np.pad(logs, ((WINDOW, WINDOW), (0, 0)))
        near = [padded[at : at + count] for at in range(2 * WINDOW + 1)]
        wide = np.concatenate([*near, np.ones((count, 1), np.float32)], axis=1)
        traits = self._vocabulary.traits(tokens)[:, None]
        parts = [wide, wide * ((traits & HAN_SIGN) > 0), wide * ((traits & CAPITAL) > 0)]
        return logits, np.concatenate(parts, axis=1)


def rows(features: Ids) -> Rows:
    """Feature ids [tokens, features] as the linear model takes them."""
    count, width = features.shape
    kind = np.int32 if count * width < 2**31 else np.int64
    return Rows(features.reshape(-1), np.arange(count + 1, dtype=kind) * width)


@functools.cache
def shipped() -> Tagger:
    """The tagger that comes with this package."""
    return load(Path(str(resources.files("attending.phi") / "weights")))


def load(folder: Path) -> Tagger:
    """A tagger that `attending phi train` has written; CheckpointError if it is none."""
    words = load_file(folder / "lexicon.safetensors")
    return Tagger(
        Linear.load(folder / "tagger.safetensors"),
        Lexicon(words["keys"], words["flags"]),
        words["smoother"],
    )


def softmax(logits: Floats) -> Floats:
    """Probabilities, [rows, labels]."""
    chances: Floats = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    return chances


def _category(name: str, tokens: Tokens, index: int) -> str:
    """What a label, or the head of the column, says of a number; `id` if nothing does."""
    told = KINDS[tokens.column[index]] or KINDS[tokens.label[index]]
    if name == "contact":
        return told if told in ("fax", "email", "url", "ip") else "phone"
    if name == "code":
        return told if told in MARK and told not in ("name", "location", "date", "age") else "id"
    return name


def _chunk(text: str, start: int, end: int) -> tuple[int, int]:
    """Extend over letters, digits and joining marks on both sides, a bounded way."""
    low, high = max(0, start - CHUNK_REACH), min(len(text), end + CHUNK_REACH)
    while start > low and _joins(text, start - 1):
        start -= 1
    while end < high and _joins(text, end):
        end += 1
    return start, end


def _joins(text: str, at: int) -> bool:
    sign = text[at]
    if sign.isascii() and sign.isalnum():
        return True
    between = 0 < at < len(text) - 1 and text[at - 1].isalnum() and text[at + 1].isalnum()
    return sign in "-–_./·" and between and text[at + 1].isascii() and text[at - 1].isascii()


def _lone_letters(names: NDArray[np.bool_], letters: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Single letters that no other part of a name stands near: initials of nobody."""
    padded = np.pad(names & ~letters, 2)
    near = padded[:-4] | padded[1:-3] | padded[3:-1] | padded[4:]
    lone: NDArray[np.bool_] = letters & ~near
    return lone


def _may_number(name: str, text: str, start: int, end: int, score: float) -> bool:
    """No amount of money; a code without a digit only if sure; a contact with two digits."""
    digits = sum(map(str.isdigit, text[start:end]))
    if MONEY.search(text, max(0, start - 16), start):
        return False
    if name == "code":
        return digits > 0 or score >= WORD_CODE
    return name != "contact" or (digits > 1 and text.count(".", start, end) < 3)


def _may_date(words: list[str], index: int) -> bool:
    """Whether a number can be a part of a date, by what joins it to the numbers beside it."""
    low = high = index
    while (
        low > 1 and index - low < 6 and words[low - 1] in DATE_JOINTS and words[low - 2].isdigit()
    ):
        low -= 2
    while (
        high + 2 < len(words)
        and high - index < 6
        and words[high + 1] in DATE_JOINTS
        and words[high + 2].isdigit()
    ):
        high += 2
    numbers = [int(word) for word in words[low : high + 1 : 2]]
    if len(numbers) == 1:
        around = "".join(words[max(0, index - 3) : index + 4]).lower()
        return len(words[index]) in (6, 8) or bool(DATE_WORD.search(around))
    small = sorted(number for number in numbers if number <= 31)
    if len(numbers) == 2:
        joint = words[low + 1]
        return joint in "/-" and (
            (small[:1] <= [12] and len(small) == 2 and 0 not in small)
            or max(numbers) in range(1900, 2100)
        )
    return len(numbers) == 3 and len(small) >= 2 and 0 not in small[-2:] and small[0] <= 12


def _is_old(word: str) -> bool:
    return 90 <= int(word) < 130 if word.isdigit() else not word.isdecimal()


def _traits(word: str) -> int:
    """Taggable is no white space or mark; a LETTER is a single Latin one."""
    return (
        HAN_SIGN * (len(word) == 1 and word > "\u2e80")
        | CAPITAL * word[0].isupper()
        | LETTER * (len(word) == 1 and word.isascii())
        | TAGGABLE * word.isalnum()
    )


def _atoms(word: str) -> list[int]:
    """Hashes of a word: itself and its shape and ending, then what only it needs."""
    low = word.lower()
    kind = _shape(word)
    masked = "0" * len(word) if word.isdigit() and len(word) > 2 else low
    parts = [low[-3:], masked, low[:1], low[:2], low[:3], low[-1:], low[-2:], low[-4:]]
    parts.append(f"{kind}{len(word)}")
    tail = [crc32(f"{place}{part}".encode()) + 1 for place, part in enumerate(parts, 2)]
    return [_hash(low), _hash(kind), *tail]


def _shape(word: str) -> str:
    if word.isdigit():
        return f"9{min(len(word), 12)}"
    if not word.isascii() and not word.isalpha():
        return word
    if len(word) == 1 and ord(word) > 0x2E80:
        return "han"
    if word.isalpha():
        case = (
            "X" if word.isupper() else "x" if word.islower() else "Xx" if word.istitle() else "xX"
        )
        return f"{case}{min(len(word), 3)}" if case in "Xx" and len(case) == 1 else case
    return word


def _join(parts: tuple[Hashes, ...]) -> Hashes:
    total = parts[0]
    for part in parts[1:]:
        total = (total ^ (total >> Hash(29))) * Hash(0x9E3779B97F4A7C15) + part
    return total


def _mix(values: Hashes, place: NDArray[np.int64]) -> Hashes:
    """Spread values, each place in another way (the finaliser of SplitMix64)."""
    mixed: Hashes = values + (place.astype(Hash) + Hash(1)) * Hash(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> Hash(30))) * Hash(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> Hash(27)
    return mixed


def _key(words: list[Hashes]) -> NDArray[np.uint32]:
    return (_mix(_join(tuple(words)), np.array([len(words)])) >> Hash(32)).astype(np.uint32)


def _hash(text: str) -> int:
    return crc32(f"0{text}".encode()) + 1
