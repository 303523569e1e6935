"""The distribution a token is drawn from: by hand, and equal to transformers' own filters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.engine.sampler import Sampling, draw, probabilities
from attending.errors import CheckpointError, ConfigError

LOGITS = np.log(np.array([0.5, 0.25, 0.125, 0.125], dtype=np.float32))


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
    rng = np.random.default_rng(7)
    counts = np.bincount([draw(mass, rng) for _ in range(20_000)], minlength=4)
    assert counts[1] == 0
    # Five standard deviations of a binomial.
    assert np.all(np.abs(counts - 20_000 * mass) <= 5 * np.sqrt(20_000 * mass * (1 - mass)) + 1e-9)
    again = [[draw(mass, np.random.default_rng(seed)) for _ in range(1)] for seed in (1, 1)]
    assert again[0] == again[1]


def test_logits_that_are_not_numbers_stop_the_answer() -> None:
    with pytest.raises(CheckpointError, match="not numbers"):
        probabilities(np.array([0.0, np.nan], dtype=np.float32), Sampling(), ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"temprature": 1.0}, "Did you mean 'temperature'"),
        ({"stop": [""]}, "empty text"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_options_name_themselves(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling.build(options)
