"""Normalisation, the n-gram index and MinHash, against sets counted by hand."""

import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.errors import UsageError
from attending.overlap import NgramIndex, band_keys, minhash, ngrams, normalise, similarity

QUESTION = (
    "A 54-year-old man has crushing chest pain that spreads to his left arm; "
    "which test should be done first?"
)
FILLER = "The clinic opens at eight and patients wait in the hall until a nurse calls them by name."
words = st.lists(st.sampled_from(["alpha", "beta", "gamma", "delta", "胸", "痛", "5"]), max_size=40)


def plain_ngrams(tokens: list[str], n: int) -> list[tuple[str, ...]]:
    """The definition, without hashing."""
    width = min(n, len(tokens))
    return [tuple(tokens[at : at + width]) for at in range(len(tokens) - width + 1)]


def test_han_characters_are_tokens_and_other_scripts_give_words() -> None:
    assert normalise("患者BP为120/80mmHg。") == ["患", "者", "bp", "为", "120", "80mmhg"]
    assert normalise("𠮷野 〇 々") == ["𠮷", "野", "〇", "々"]


def test_case_width_punctuation_and_spacing_do_not_matter() -> None:
    assert normalise("Ｃhest  PAIN,\n(acute)!") == normalise("chest pain acute")
    assert normalise("fill in ____ here") == ["fill", "in", "here"]
    assert normalise(" \n…") == []


def test_simplified_and_traditional_characters_stay_different() -> None:
    assert normalise("头痛") != normalise("頭痛")


@given(st.text(max_size=60))
@settings(max_examples=300)
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(" ".join(once)) == once
    assert all(once)


@given(words, st.integers(1, 20))
def test_ngram_hashes_are_equal_exactly_where_the_ngrams_are(tokens: list[str], n: int) -> None:
    hashes, grams = ngrams(tokens, n).tolist(), plain_ngrams(tokens, n)
    assert len(hashes) == len(grams) == max(1, len(tokens) - n + 1)
    assert len(set(zip(hashes, grams, strict=True))) == len(set(hashes)) == len(set(grams))


def test_order_and_token_borders_matter() -> None:
    assert ngrams(["a", "b"], 2) != ngrams(["b", "a"], 2)
    assert ngrams(["ab", "c"], 2) != ngrams(["a", "bc"], 2)
    assert ngrams(["a"], 13) != ngrams(["a", "a"], 13)


def test_a_text_with_one_whole_question_is_found_with_its_run() -> None:
    index = NgramIndex()
    index.add("medqa/7", QUESTION)
    index.add("other", FILLER * 2)
    found = index.overlap(
        f"Notes from rounds. {QUESTION.upper()} See the next page for the answer."
    )
    size = len(normalise(QUESTION))
    assert found.ids == ("medqa/7",)
    assert found.longest_run == size
    assert found.share == pytest.approx((size - 12) / (3 + size + 7 - 12))


@given(st.lists(words, max_size=4), words, st.integers(1, 6))
def test_the_index_agrees_with_the_definition(
    known: list[list[str]], text: list[str], n: int
) -> None:
    index = NgramIndex(n)
    for number, tokens in enumerate(known):
        index.add(str(number), " ".join(tokens))
        index.overlap("asked in between")
    grams = plain_ngrams(text, n)
    sets = [set(plain_ngrams(tokens, n)) for tokens in known]
    hits = [any(gram in indexed for indexed in sets) for gram in grams]
    longest = run = 0
    for hit in hits:
        run = run + 1 if hit else 0
        longest = max(longest, run)
    found = index.overlap(" ".join(text))
    assert found.share == pytest.approx(sum(hits) / len(hits))
    assert found.longest_run == (longest + min(n, len(text)) - 1 if longest else 0)
    assert found.ids == tuple(str(i) for i, indexed in enumerate(sets) if indexed & set(grams))


def test_a_text_shorter_than_n_matches_the_whole_only() -> None:
    index = NgramIndex(13)
    index.add("short", "What is the dose of aspirin?")
    assert index.overlap("what is the dose of ASPIRIN") == (1.0, 6, ("short",))
    assert index.overlap("What is the dose of aspirin today?") == (0.0, 0, ())
    assert index.overlap("What is the dose") == (0.0, 0, ())
    assert index.overlap(f"What is the dose of aspirin? {FILLER}") == (0.0, 0, ())


def test_chinese_overlaps_by_characters() -> None:
    index = NgramIndex()
    index.add("zh", "患者男性，五十四岁，突发胸骨后压榨样疼痛两小时。")
    copied = index.overlap("病历摘要：男性五十四岁突发胸骨后压榨样疼痛，请给出诊断。")
    assert copied.ids == ("zh",)
    assert copied.longest_run == len("男性五十四岁突发胸骨后压榨样疼痛")
    assert index.overlap("患者女性，三十岁，咳嗽三天，无发热，无胸痛，无呼吸困难。").ids == ()


def test_an_index_without_texts_and_texts_without_tokens_overlap_nothing() -> None:
    assert NgramIndex().overlap(QUESTION) == (0.0, 0, ())
    index = NgramIndex()
    index.add("a", QUESTION)
    assert index.overlap("...") == (0.0, 0, ())


def test_n_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        NgramIndex(0).overlap("a b c")


@pytest.mark.parametrize(("shared", "own"), [(0, 300), (100, 300), (300, 200), (900, 50), (500, 0)])
def test_the_estimate_is_the_known_jaccard_within_its_binomial_error(shared: int, own: int) -> None:
    true = shared / (shared + 2 * own)
    both = [f"s{i}" for i in range(shared)]
    a = ngrams(both + [f"a{i}" for i in range(own)], 1)
    b = ngrams([f"b{i}" for i in range(own)] + both, 1)
    estimate = similarity(minhash(a, 1024), minhash(b, 1024))
    assert abs(estimate - true) <= 3 * (true * (1 - true) / 1024) ** 0.5


def test_permutations_err_independently_so_more_of_them_help_as_promised() -> None:
    errors = []
    for seed in range(150):
        tokens = [f"{seed}-{i}" for i in range(300)]  # J = 100 / 300
        a, b = ngrams(tokens[:200], 1), ngrams(tokens[100:], 1)
        errors.append(similarity(minhash(a, 128, seed), minhash(b, 128, seed)) - 1 / 3)
    promised = (1 / 3 * 2 / 3 / 128) ** 0.5
    assert abs(np.mean(errors)) < 3 * promised / 150**0.5
    assert 0.8 < np.std(errors) / promised < 1.2


def test_every_member_is_the_least_equally_often() -> None:
    grams = ngrams([f"t{i}" for i in range(8)], 1)
    least = np.array([minhash(grams[i : i + 1], 8000, seed=3) for i in range(8)]).argmin(axis=0)
    counts = np.bincount(least, minlength=8)
    assert ((counts - 1000) ** 2 / 1000).sum() < 24.3  # chi-square, 7 degrees, p = 0.001


@given(words, words)
def test_a_signature_depends_on_the_set_alone(a: list[str], b: list[str]) -> None:
    one, two = ngrams(a + b, 1), ngrams(b + a + a, 1)
    assert similarity(minhash(one, 16), minhash(two, 16)) == 1.0


def test_another_seed_gives_other_permutations() -> None:
    grams = ngrams(normalise(QUESTION), 2)
    assert (minhash(grams, 64, seed=1) == minhash(grams, 64, seed=2)).mean() < 0.3


def test_long_texts_are_read_in_blocks_without_a_seam() -> None:
    grams = ngrams([str(i) for i in range(10_000)], 3)
    pieces = [minhash(grams[a:b], 32) for a, b in pairwise([0, 1000, 5000, len(grams)])]
    assert np.array_equal(minhash(grams, 32), np.min(pieces, axis=0))


def test_signatures_of_different_sizes_are_not_compared() -> None:
    grams = ngrams(normalise(QUESTION), 5)
    with pytest.raises(ValueError, match="broadcast"):
        similarity(minhash(grams, 64), minhash(grams, 128))


def test_bands_share_a_key_as_often_as_the_formula_says() -> None:
    rows, num_bands, true, met = 4, 8, 0.6, 0
    for seed in range(300):
        tokens = [f"{seed}-{i}" for i in range(200)]  # 120 shared of 200
        a, b = (minhash(ngrams(part, 1), 32, seed) for part in (tokens[:160], tokens[40:]))
        keys_a, keys_b = band_keys(a, rows), band_keys(b, rows)
        assert keys_a.shape == (num_bands,)
        met += bool((keys_a == keys_b).any())
        equal = (a == b).reshape(num_bands, rows).all(axis=1)
        assert np.array_equal(keys_a == keys_b, equal)
    promised = 1 - (1 - true**rows) ** num_bands
    assert abs(met / 300 - promised) < 3 * (promised * (1 - promised) / 300) ** 0.5


def test_equal_rows_in_different_bands_have_different_keys() -> None:
    assert len(set(band_keys(np.full(32, 7, np.uint32), 4).tolist())) == 8


def test_rows_must_divide_the_signature() -> None:
    with pytest.raises(ValueError, match="reshape"):
        band_keys(np.zeros(128, np.uint32), 7)


def test_hashes_are_the_same_in_every_process() -> None:
    code = (
        "from attending.overlap import *;"
        f"g = ngrams(normalise({QUESTION!r}), 5); s = minhash(g, 8, 1);"
        "print(g.tolist(), s.tolist(), band_keys(s, 2).tolist())"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1]
    # Stored signatures stay comparable: a new numpy or platform must give these numbers too.
    signature = minhash(ngrams(normalise(QUESTION), 5), 4)
    assert signature.tolist() == [393921022, 457643811, 14385415, 80921971]
