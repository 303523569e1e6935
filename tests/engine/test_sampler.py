"""The distribution a token is drawn from: by hand, and equal to transformers' own filters."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from attending.engine.sampler import Sampling, candidates, choose, draw, score
from attending.errors import CheckpointError, ConfigError, UsageError

LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.125], dtype=np.float32))


def probabilities(
    row: NDArray[np.float32],
    sampling: Sampling,
    history: Sequence[int],
    num_prompt: int = 0,
    allowed: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    ids, mass = candidates(row, sampling, history, num_prompt, allowed)
    dense = np.zeros(row.size)
    dense[np.asarray(ids)] = mass / mass.sum(dtype=np.float64)
    assert np.all(np.diff(ids) > 0)  # a draw walks them in the vocabulary's order
    return dense


def distribution(history: tuple[int, ...] = (), **options: object) -> list[float]:
    sampling = Sampling.build({"temperature": 1.0, **options})
    return [round(float(p), 6) for p in probabilities(LOGITS, sampling, history)]


def test_by_hand() -> None:
    assert distribution() == [0.5, 0.25, 0.125, 0.125]
    assert distribution(temperature=0.5) == pytest.approx(
        [16 / 22, 4 / 22, 1 / 22, 1 / 22], abs=1e-6
    )
    assert distribution(temperature=0.0) == [1, 0, 0, 0]
    assert distribution(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=1e-6)
    assert distribution(top_k=3) == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0], abs=1e-6)
    assert distribution(top_p=0.5) == [1, 0, 0, 0]
    assert distribution(top_p=0.51) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=1e-6)
    assert distribution(min_p=0.3) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=1e-6)
    # All logits are negative, so a penalty of 2 squares the probability of what was seen.
    assert distribution((0, 0), repetition_penalty=2.0) == pytest.approx(
        [0.25 / 0.75, 0.25 / 0.75, 0.125 / 0.75, 0.125 / 0.75], abs=1e-6
    )


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.floats(-9, 9, width=32), min_size=2, max_size=30, unique=True),
    history=st.lists(st.integers(0, 1), max_size=4),
    temperature=st.floats(0.1, 3),
    top_k=st.integers(0, 8),
    top_p=st.floats(0.05, 1.0),
    min_p=st.floats(0.0, 0.9),
    penalty=st.floats(0.5, 2),
)
def test_the_filters_equal_transformers(
    logits: list[float],
    history: list[int],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    penalty: float,
) -> None:
    told = [v * penalty if v < 0 else v / penalty for v in logits]  # what was seen may tie then
    gaps = np.diff(np.sort([told[i] if i in history else v for i, v in enumerate(logits)]))
    assume(gaps.min() > 1e-4)  # float32 and float64 may order closer ones differently
    warpers = pytest.importorskip("transformers.generation.logits_process")
    chain = [warpers.RepetitionPenaltyLogitsProcessor(penalty)] if history else []
    chain.append(warpers.TemperatureLogitsWarper(temperature))
    chain += [warpers.TopKLogitsWarper(top_k)] if top_k else []
    chain += [warpers.TopPLogitsWarper(top_p), warpers.MinPLogitsWarper(min_p)]
    scores = torch.tensor([logits], dtype=torch.float64)
    ids = torch.tensor([history], dtype=torch.int64)
    for warper in chain:
        scores = warper(ids, scores)
    sampling = Sampling.build(
        {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": penalty,
        }
    )
    ours = probabilities(np.array(logits, dtype=np.float32), sampling, history)
    np.testing.assert_allclose(ours, scores.softmax(-1)[0].numpy(), atol=1e-6)


def test_draws_follow_the_distribution_and_the_seed() -> None:
    mass = np.array([0.5, 0.0, 0.3, 0.2])
    row = np.log(mass, out=np.full(4, -np.inf), where=mass > 0).astype(np.float32)
    rng = np.random.default_rng(7)
    warm = Sampling(temperature=1.0)
    counts = np.bincount([choose(row, warm, (), rng.random()) for _ in range(20_000)], minlength=4)
    assert counts[1] == 0
    # Five standard deviations of a binomial.
    assert np.all(np.abs(counts - 20_000 * mass) <= 5 * np.sqrt(20_000 * mass * (1 - mass)) + 1e-9)


def test_draws_from_many_blocks_follow_the_distribution() -> None:
    row = np.random.default_rng(5).standard_normal(1500).astype(np.float32) * 2
    mass = probabilities(row, Sampling(temperature=1.3), ())
    rng = np.random.default_rng(9)
    drawn = [choose(row, Sampling(temperature=1.3), (), rng.random()) for _ in range(30_000)]
    groups = np.add.reduceat(mass, np.arange(0, 1500, 50))
    counts = np.bincount(np.array(drawn) // 50, minlength=30)
    squares = ((counts - 30_000 * groups) ** 2 / (30_000 * groups)).sum()
    assert 5.0 < squares < 75.0  # chi squared with 29 degrees: beyond these one in a million


def test_logits_that_are_not_numbers_stop_the_answer() -> None:
    with pytest.raises(CheckpointError, match="not numbers"):
        choose(np.array([0.0, np.nan], dtype=np.float32), Sampling(), (), 0.5)
    for rows in ([np.inf, 0.0], [-np.inf, -np.inf], [np.nan, np.inf]):
        for sampling in (Sampling(temperature=0.0), Sampling(top_p=0.9), Sampling(top_k=1)):
            with pytest.raises(CheckpointError, match="not numbers"):
                choose(np.array(rows, dtype=np.float32), sampling, (), 0.5)
    with pytest.raises(CheckpointError, match="not numbers"):
        score(np.array([0.0, np.nan], dtype=np.float32), 0, 0)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_options_that_leave_nothing_fail_and_those_that_leave_one_token_take_it(
    temperature: float,
) -> None:
    row = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    never = Sampling(temperature=temperature, logit_bias=((1, -math.inf), (2, -math.inf)))
    assert choose(row, never, (), 0.999) == 0
    with pytest.raises(UsageError, match="no token may follow"):
        choose(row, never, (), 0.5, 0, np.array([False, True, True]))
    with pytest.raises(UsageError, match="no token may follow"):
        choose(row, Sampling(temperature=temperature), (), 0.5, 0, np.zeros(3, dtype=np.bool_))
    assert choose(row, never.replace(logit_bias=((0, 1e300),)), (), 0.999) == 0
    nothing = never.replace(logit_bias=tuple((i, -math.inf) for i in range(3)))
    with pytest.raises(UsageError, match="leave no token") if temperature else nullcontext():
        choose(row, nothing, (), 0.5)


def test_a_temperature_next_to_zero_is_zero() -> None:
    row = np.array([1.0, 3.0, 2.999, -3e38, -np.inf], dtype=np.float32)
    for temperature in (1e-5, 1e-40, 5e-324):
        for options in ({}, {"top_p": 0.9}, {"min_p": 0.5}, {"top_k": 2}):
            sampling = Sampling.build({"temperature": temperature, **options})
            assert choose(row, sampling, (), 0.999) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"temprature": 1.0}, "Did you mean 'temperature'"),
        ({"stop": [""]}, "empty text"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"seed": -1}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
    ],
)
def test_bad_options_name_themselves(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling.build(options)


def oracle(
    scores: Sequence[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> NDArray[np.float64]:
    """By a full sort in Python's numbers; not where a border is met within rounding."""
    scaled = [x / temperature for x in scores]
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: top_k or None]
    weights = {i: math.exp(scaled[i] - max(scaled)) for i in ranked}
    total = math.fsum(weights.values())
    kept, before = [], 0.0
    for i in ranked:
        assume(top_p == 1 or abs(before - top_p) > 1e-6)
        assume(min_p in (0, 1) or abs(weights[i] - min_p) > 1e-6)
        if (top_p == 1 or before < top_p) and weights[i] >= min_p:
            kept.append(i)
        before += weights[i] / total
    mass = np.zeros(len(scores))
    mass[kept] = [weights[i] for i in kept]
    mass /= mass.sum()
    return mass


@settings(max_examples=300, deadline=None)
@given(
    # Few values, so that many tie; more tokens than there are in a block.
    logits=st.lists(st.sampled_from([-3.0, -1.0, 0.0, 0.5, 2.0]), min_size=2, max_size=600),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 5, 63, 64, 65, 299, 400]),
    top_p=st.sampled_from([1.0, 0.01, 0.3, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.2, 1.0]),
    is_masked=st.booleans(),
)
def test_filters_by_threshold_equal_filters_by_a_full_sort_where_many_tie(
    logits: list[float],
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    is_masked: bool,
) -> None:
    row = np.array(logits, dtype=np.float32)
    allowed = np.arange(row.size) % 3 != 1 if is_masked else None
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    scores = [-math.inf if is_masked and i % 3 == 1 else x for i, x in enumerate(logits)]
    wanted = oracle(scores, temperature, top_k, top_p, min_p)
    found = probabilities(row, sampling, (), allowed=allowed)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    size=st.sampled_from([2, 255, 256, 257, 2047, 2048, 5000]),
    scale=st.sampled_from([0.01, 1.0, 3.0, 12.0]),
    temperature=st.floats(0.2, 2.5),
    top_k=st.sampled_from([0, 0, 1, 20, 500, 1024, 1300]),
    top_p=st.sampled_from([1.0, 1e-9, 0.3, 0.9, 0.95, 0.9999, 1 - 1e-9]),
    min_p=st.sampled_from([0.0, 0.0, 1e-6, 0.05, 1.0]),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_the_same_number_draws_the_token_of_an_oracle(
    seed: int,
    size: int,
    scale: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    uniform: float,
) -> None:
    row = (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)
    row[:: size // 2 + 1] = -np.inf
    row[1::7] = row[1]  # ties
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    edges = np.cumsum(oracle(row.tolist(), temperature, top_k, top_p, min_p))
    token = choose(row, sampling, (), uniform)
    below = edges[token - 1] if token else 0.0
    assert below - 1e-6 <= uniform <= edges[token] + 1e-6
    assert edges[token] > below
    unseen = sampling.replace(logit_bias=((0, 0.0),))  # the way of edited logits
    kept = row.copy()
    assert choose(row, unseen, (), uniform) == token
    np.testing.assert_array_equal(row, kept)  # not written to
    cold = sampling.replace(temperature=0.0)
    assert choose(row, cold, (), uniform) == row.tolist().index(max(row.tolist()))


def test_more_ties_than_the_nucleus_first_looks_at() -> None:
    row = np.zeros(1000, dtype=np.float32)
    mass = probabilities(row, Sampling(temperature=1.0, top_p=0.3), ())
    assert np.flatnonzero(mass).tolist() == list(range(300))
    mass = probabilities(row, Sampling(temperature=1.0, top_k=70), ())
    assert np.flatnonzero(mass).tolist() == list(range(70))


def test_penalties_and_biases_by_hand() -> None:
    row = np.array([1.0, 2.0, -1.0, 0.0], dtype=np.float32)
    history, num_prompt = [3, 3, 0, 1, 1, 2], 2  # the answer is 0, 1, 1, 2

    def logs(**options: object) -> list[float]:
        sampling = Sampling.build({"temperature": 1.0, **options})
        mass = probabilities(row, sampling, history, num_prompt)
        return [float(x) for x in np.log(mass) - np.log(mass[3])]  # against the last token

    assert logs() == pytest.approx([1, 2, -1, 0])
    assert logs(presence_penalty=0.5) == pytest.approx([0.5, 1.5, -1.5, 0])
    assert logs(frequency_penalty=0.5) == pytest.approx([0.5, 1.0, -1.5, 0])
    assert logs(frequency_penalty=-1.0, presence_penalty=0.25) == pytest.approx(
        [1.75, 3.75, -0.25, 0]
    )
    # Repetition counts the prompt: bias first, then the penalty, then presence.
    assert logs(repetition_penalty=2.0, logit_bias=((3, 1.0),)) == pytest.approx(
        [0.5 - 0.5, 1 - 0.5, -2 - 0.5, 0]
    )
    assert logs(
        repetition_penalty=2.0, presence_penalty=1.0, logit_bias=((3, 4.0), (0, -3.0), (0, 1.0))
    ) == pytest.approx([-2 - 1 - 2, 1 - 1 - 2, -2 - 1 - 2, 0])
    assert logs(logit_bias=((2, 50.0),))[2] == pytest.approx(49.0)


def test_only_what_a_grammar_allows_is_taken_whatever_the_bias() -> None:
    row = np.array([5.0, 1.0, 2.0, 0.0], dtype=np.float32)
    allowed = np.array([False, True, True, False, True, True])  # masks come in whole words
    biased = Sampling(temperature=0.0, logit_bias=((0, 100.0), (1, 0.5)))
    assert probabilities(row, biased, (), allowed=allowed).tolist() == [0, 0, 1, 0]
    warm = biased.replace(temperature=1.0, logit_bias=(), top_k=3)
    share = 1 / (1 + math.e)
    assert probabilities(row, warm, (), allowed=allowed) == pytest.approx([0, share, 1 - share, 0])


def test_temperature_zero_takes_the_first_of_the_likeliest_after_penalties() -> None:
    row = np.array([1.0, 3.0, 3.0], dtype=np.float32)
    cold = Sampling(temperature=0.0, top_p=0.1, min_p=1.0)
    assert probabilities(row, cold, ()).tolist() == [0, 1, 0]
    shy = cold.replace(presence_penalty=0.1)
    assert probabilities(row, shy, [1], 0).tolist() == [0, 0, 1]
    assert probabilities(row, shy, [1], 1).tolist() == [0, 1, 0]


def test_a_draw_never_takes_a_token_without_mass() -> None:
    mass = np.array([0.0, 0.25, 0.0, 0.75, 0.0])
    for uniform in (0.0, 0.1, 0.25 - 1e-9, 0.25, 0.3, 1 - 2**-53):
        assert draw(mass, uniform) == (1 if uniform < 0.25 else 3)
    wide = np.zeros(1000, dtype=np.float32)
    wide[[300, 700, 701, 999]] = 0.25
    ends = [0.0, 0.25, 0.5, 0.75, 1 - 2**-53]
    assert [draw(wide, uniform) for uniform in ends] == [300, 700, 701, 999, 999]


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.integers(-480, 480).map(lambda i: i / 16), min_size=1, max_size=90),
    num_top=st.integers(0, 100),
    data=st.data(),
)
def test_a_score_is_the_logarithm_of_the_softmax(
    logits: list[float], num_top: int, data: st.DataObject
) -> None:
    token = data.draw(st.integers(0, len(logits) - 1))
    row = np.array(logits, dtype=np.float32)
    found = score(row, token, num_top)
    total = math.log(math.fsum(math.exp(x) for x in row.tolist()))
    assert found.id == token
    assert found.logprob == pytest.approx(logits[token] - total, abs=1e-6)
    assert found.rank == 1 + sum(x > logits[token] for x in logits)
    ranked = sorted(range(row.size), key=lambda i: (-logits[i], i))[:num_top]
    assert [i for i, _ in found.top] == ranked
    assert [v for _, v in found.top] == pytest.approx([logits[i] - total for i in ranked], abs=1e-6)
    np.testing.assert_array_equal(row, np.array(logits, dtype=np.float32))  # not written to


def test_a_score_of_a_whole_vocabulary_is_exact_to_a_millionth() -> None:
    row = np.random.default_rng(2).standard_normal(50_000).astype(np.float32) * 3
    wide = row.astype(np.float64)
    logprobs = wide - wide.max() - math.log(math.fsum(np.exp(wide - wide.max())))
    found = score(row, 17, 300)
    assert found.logprob == pytest.approx(logprobs[17], abs=1e-6)
    ranked = np.argsort(-wide, kind="stable")[:300]
    assert [i for i, _ in found.top] == ranked.tolist()
    assert [v for _, v in found.top] == pytest.approx(logprobs[ranked].tolist(), abs=1e-6)


def test_a_score_of_huge_logits_does_not_overflow() -> None:
    assert score(np.array([3e38, -3e38], dtype=np.float32), 0, 1).logprob == 0.0
