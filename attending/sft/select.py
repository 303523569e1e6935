"""Which conversations to train on: whole instructions, once each, of every kind of task.

Baichuan-M2 (arXiv 2509.02208, section 3.2) drops incomplete and ambiguous instructions, embeds all
prompts, clusters them and draws from every cluster. Here rules and MinHash drop, and prompts are
embedded by their words and pairs of words (TF-IDF, truncated SVD), without a neural network.

All is fitted on s = min(n, 65,536) of n prompts. Time: O(n) hashing, O(n log n) sorting, and
O((n + 25 s) k) products for k clusters. Memory: O(n) band keys (0.5 GB for two million) and O(s k).
"""

import json
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from importlib import resources
from math import log
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt
from scipy.sparse import csr_matrix, diags, linalg

from attending.config import Config
from attending.overlap import band_keys, minhash, ngrams, normalise

Floats = NDArray[np.float32]
Places = NDArray[np.int32]
TABLE = tomllib.loads((resources.files("attending.sft") / "select.toml").read_text("utf-8"))
SIGNS = {name: re.compile(pattern) for name, pattern in TABLE.items()}
SHORT = 50  # tokens of a prompt in which [DIAGNOSIS] is a place to fill in
HASHES, RECALL = 128, 0.95  # of a signature; share of the pairs at the threshold to be compared
FEATURES, DIMS, FITTED, CHUNK = 2**18, 64, 65_536, 8_192
ROUNDS, TOLD = 25, 6  # of k-means; words that a cluster is told by


class SelectConfig(Config):
    """How conversations are chosen."""

    similarity: float = Field(0.8, gt=0, le=1)
    """Jaccard similarity of two prompts' n-grams from which they are duplicates."""
    ngram: PositiveInt = 3
    """Tokens of an n-gram; instructions are short."""
    keep: Literal["first", "longest"] = "first"
    """Of near-duplicates: the first, or the one with the longest answer."""
    clusters: PositiveInt = 64
    """Clusters of prompts, at most."""
    budget: NonNegativeInt = 0
    """Conversations to draw, as many from each cluster as far as it has them; 0 takes all."""
    budgets: dict[str, NonNegativeInt] = Field(default={})
    """The same for single sources, by name; `budget` is for those that are not named here."""
    seed: NonNegativeInt = 0
    """Of the clusters and of the draw."""


class Dropped(NamedTuple):
    """A conversation that is not trained on."""

    at: int
    reason: str  # a fault's name, near_duplicate, or not_drawn
    twin: int | None = None  # the conversation that a duplicate repeats


class Cluster(NamedTuple):
    """Prompts that are alike."""

    size: int
    drawn: int
    words: tuple[str, ...]  # more frequent here than elsewhere, the most telling first


class Selection(NamedTuple):
    """Every conversation is kept or dropped; in their order."""

    kept: list[int]
    dropped: list[Dropped]
    clusters: list[Cluster]  # the largest first


def select(samples: Sequence[Mapping[str, Any]], config: SelectConfig) -> Selection:
    """Choose among conversations, each with `messages`; which comes first decides no draw.

    Those of `budgets` have a `source` too: faults, duplicates and clusters are found among all, the
    draw is each source's own, so that a small source is not lost beside a large one.
    """
    told = [exchange(sample["messages"]) for sample in samples]
    dropped = [Dropped(at, why) for at, one in enumerate(told) if (why := fault(*one))]
    faulty = {one.at for one in dropped}
    whole = [at for at in range(len(told)) if at not in faulty]
    if config.keep == "longest":
        whole.sort(key=lambda at: -len(told[at][1]))
    twins = duplicates([told[at][0] for at in whole], config)
    dropped += [Dropped(whole[a], "near_duplicate", whole[b]) for a, b in twins.items()]
    left = [at for place, at in enumerate(whole) if place not in twins]
    left.sort(key=lambda at: _digest("\0".join(told[at]), config.seed))  # by chance
    labels, words = cluster([told[at][0] for at in left], config)
    pools: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for at, label in zip(left, labels.tolist(), strict=True):
        source = samples[at].get("source", "")
        pools[source if source in config.budgets else ""][label].append(at)
    kept = set[int]()
    for source, members in pools.items():
        budget = config.budgets.get(source, config.budget) or len(left)
        shares = deal([*map(len, members.values())], budget)
        for own, share in zip(members.values(), shares, strict=True):
            kept.update(own[:share])
    dropped += [Dropped(at, "not_drawn") for at in {*left} - kept]
    label_of = dict(zip(left, labels.tolist(), strict=True))
    sizes, drawn = Counter(label_of.values()), Counter(label_of[at] for at in kept)
    clusters = [Cluster(size, drawn[label], words[label]) for label, size in sizes.items()]
    clusters.sort(key=lambda row: (-row.size, row.words))
    return Selection(sorted(kept), sorted(dropped, key=lambda one: one.at), clusters)


def exchange(messages: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """What users said before the last assistant turn, and that turn; a tool's call as JSON."""
    ends = [at for at, turn in enumerate(messages) if turn["role"] == "assistant"]
    last = messages[ends[-1]] if ends else {}
    said = [turn for turn in messages[: ends[-1] if ends else None] if turn["role"] == "user"]
    answer = last.get("content") or json.dumps(last.get("tool_calls") or "", ensure_ascii=False)
    return "\n".join(turn.get("content") or "" for turn in said).strip(), answer.strip()


def fault(prompt: str, answer: str) -> str:
    """Why an instruction is incomplete or ambiguous, or its answer none; empty if they are fine."""
    for name, text in (("prompt", prompt), ("answer", answer)):
        if not re.search(r"\w", text):
            return f"no_{name}"
    tokens = normalise(prompt)
    plain = SIGNS["paragraphs"].sub("\n\n", SIGNS["code"].sub("0", prompt))
    has = {name: bool(sign.search(plain)) for name, sign in SIGNS.items()}
    is_open = has["colon"] and not has["label"] and (has["announced"] or not has["paragraphs"])
    is_unfilled = has["unfilled"] or (has["capitals"] and len(tokens) < SHORT)
    faults = {
        "cut_prompt": has["middle"] or is_open,
        "cut_answer": SIGNS["middle"].search(answer) or SIGNS["colon"].search(answer),
        "missing_picture": has["picture"] and not has["stand_in"],
        "missing_text": has["nothing_after"] and not has["paragraphs"],
        "placeholder": is_unfilled and not has["wanted"],
        "blank": has["blank"] and not has["cloze"],
        "echo": tokens == normalise(answer),
    }
    return next((name for name, is_so in faults.items() if is_so), "")


def duplicates(texts: Sequence[str], config: SelectConfig) -> dict[int, int]:
    """The places of near-duplicates, each with the earlier text that it repeats and that stays.

    One has all the words of the other, and none more that makes another question of it: what asks
    the same about another disease is no duplicate. MinHash finds the pairs: compared is the first
    text with an equal band, for each band, so that templates cost no more than other texts.
    """

    @lru_cache(4096)
    def parts(at: int) -> tuple[frozenset[str], frozenset[int]]:
        tokens = normalise(texts[at])
        return frozenset(tokens), frozenset(ngrams(tokens, config.ngram).tolist())

    def is_twin(one: int, other: int) -> bool:
        (words, grams), (others, theirs) = parts(one), parts(other)
        is_alike = len(grams & theirs) >= share * len(grams | theirs)
        more = words ^ others if words <= others or words >= others else {"0"}
        return is_alike and not any(map(SIGNS["decisive"].search, more))

    share = config.similarity
    found = (n for n in (16, 8, 4, 2) if 1 - (1 - share**n) ** (HASHES / n) >= RECALL)
    rows = next(found, 1)
    keys = np.empty((len(texts), HASHES // rows), np.uint64)
    for at, text in enumerate(texts):
        keys[at] = band_keys(minhash(ngrams(normalise(text), config.ngram), HASHES), rows)
    for band in keys.T:
        _, first, place = np.unique(band, return_index=True, return_inverse=True)
        band[:] = first[place]
    twins = dict[int, int]()
    for at, firsts in enumerate(keys):
        others = sorted({twins.get(one, one) for one in {*firsts.tolist()} - {at}})
        if (twin := next((one for one in others if is_twin(at, one)), None)) is not None:
            twins[at] = twin
    return twins


def cluster(
    texts: Sequence[str], config: SelectConfig
) -> tuple[Places, dict[int, tuple[str, ...]]]:
    """A label for each text, and each label's telling words; fitted on the first of the texts."""
    fitted, rng = texts[:FITTED], np.random.default_rng(config.seed)
    labels = np.zeros(len(texts), np.int32)
    if min(config.clusters, len(texts)) > 1:
        matrix = features(fitted)
        seen = np.bincount(matrix.indices, minlength=FEATURES)
        idf = diags((np.log((1 + len(fitted)) / (1 + seen)) + 1).astype(np.float32))
        begin = rng.standard_normal(len(fitted)).astype(np.float32)  # or ARPACK draws its own
        basis = linalg.svds(_unit(matrix @ idf), min(DIMS, len(fitted) - 1), v0=begin)[2].T
        centres = _centres(_unit(matrix @ idf @ basis), config.clusters, rng)
        parts = [texts[at : at + CHUNK] for at in range(0, len(texts), CHUNK)]
        labels = np.concatenate([_near(_unit(features(p) @ idf @ basis), centres) for p in parts])
    return labels, telling(fitted, labels[:FITTED].tolist())


def features(texts: Sequence[str]) -> csr_matrix:
    """1 + log of how often each word and each pair of words comes, hashed, [texts, features]."""
    rows = [np.concatenate([ngrams(own, n) for n in (1, 2)]) for own in map(normalise, texts)]
    ids, starts = np.concatenate(rows) % FEATURES, np.cumsum([0, *map(len, rows)])
    ones = np.ones(len(ids), np.float32)
    matrix = csr_matrix((ones, ids.astype(np.int32), starts), (len(rows), FEATURES))
    matrix.sum_duplicates()
    matrix.data = 1 + np.log(matrix.data)
    return matrix


def telling(texts: Sequence[str], labels: Sequence[int]) -> dict[int, tuple[str, ...]]:
    """Each label's words by p log(p / q): p is their share of its texts, q of all texts."""
    own, every = defaultdict[int, Counter[str]](Counter), Counter[str]()
    for text, label in zip(texts, labels, strict=True):
        words = {*normalise(text)}
        own[label].update(words)
        every.update(words)
    told, sizes = {}, Counter(labels)
    for label, counts in own.items():
        size, most = sizes[label], len(texts) / sizes[label]
        order = sorted(
            (-n / size * log(n * most / every[word]), word) for word, n in counts.items()
        )
        told[label] = tuple(word for _, word in order[:TOLD])
    return told


def deal(sizes: Sequence[int], budget: int) -> list[int]:
    """Water-filling: equal shares of a budget, none over its size, what is left dealt on."""
    shares, left = [0] * len(sizes), budget
    for done, at in enumerate(sorted(range(len(sizes)), key=lambda at: sizes[at])):
        shares[at] = min(sizes[at], left // (len(sizes) - done))
        left -= shares[at]
    return shares


def _centres(rows: Floats, count: int, rng: np.random.Generator) -> Floats:
    """Spherical k-means, begun by k-means++ (Arthur, Vassilvitskii 2007); [count at most, dims]."""
    chosen, distance = [0], np.full(len(rows), 2.0)
    while len(chosen) < count:
        distance = np.minimum(distance, 1 - rows @ rows[chosen[-1]])
        distance[distance < 1e-6] = 0
        if not distance.any():  # all others are where a centre is
            break
        chosen.append(int(rng.choice(len(rows), p=distance / distance.sum())))
    centres = rows[chosen]
    for _ in range(ROUNDS):
        member = np.eye(len(centres), dtype=np.float32)[_near(rows, centres)]
        is_empty = ~member.astype(bool).any(axis=0, keepdims=True).T
        centres = np.where(is_empty, centres, _unit(member.T @ rows))
    return centres


def _near(rows: Floats, centres: Floats) -> Places:
    return np.asarray((rows @ centres.T).argmax(axis=1), np.int32)


def _unit(rows: Any) -> Any:
    """Rows of length 1, sparse or not; a row of zeros stays."""
    squares = rows.multiply(rows).sum(axis=1) if hasattr(rows, "multiply") else (rows**2).sum(1)
    return diags(1 / np.sqrt(np.maximum(np.ravel(squares), 1e-24))).astype(np.float32) @ rows


def _digest(text: str, seed: int) -> bytes:
    told = text.encode("utf-8", "surrogatepass")
    return blake2b(told, digest_size=16, key=seed.to_bytes(8, "big")).digest()
