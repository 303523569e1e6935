"""The linear classifier: it learns, repeats exactly, survives its file, refuses what is wrong."""

from pathlib import Path

import numpy as np
import pytest

from attending import linear
from attending.errors import CheckpointError, UsageError
from attending.linear import Linear, Rows

BUCKETS = 64


def rows(*lists: list[int]) -> Rows:
    starts = np.cumsum([0, *map(len, lists)])
    return Rows(np.array([i for one in lists for i in one], np.int64), starts)


def separable(count: int = 200, seed: int = 0) -> tuple[Rows, list[int]]:
    """Label 1 draws its features from the upper half."""
    generator = np.random.default_rng(seed)
    targets = [n % 2 for n in range(count)]
    return rows(*(generator.integers(32 * y, 32 * y + 32, 6).tolist() for y in targets)), targets


def trained(seed: int = 0) -> Linear:
    found, targets = separable()
    return linear.fit(found, targets, ("low", "high"), buckets=BUCKETS, seed=seed, batch=32)


def test_it_separates_what_can_be_separated() -> None:
    test, targets = separable(100, seed=1)
    assert (trained().logits(test).argmax(axis=1) == targets).all()


def test_logits_are_the_mean_of_weights_plus_bias_by_hand() -> None:
    weights = np.arange(8, dtype=np.float32).reshape(4, 2)
    model = Linear(("a", "b"), weights, np.array([1, -1], np.float32))
    assert model.logits(rows([0, 3], [2, 2, 1], [])) == pytest.approx(
        np.array([[4, 3], [10 / 3 + 1, 13 / 3 - 1], [1, -1]], np.float32)
    )


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    assert trained().weights.tobytes() == trained().weights.tobytes()
    assert trained().weights.tobytes() != trained(seed=1).weights.tobytes()


def test_what_is_loaded_is_what_was_saved_within_half_a_step(tmp_path: Path) -> None:
    model, path = trained(), tmp_path / "m.safetensors"
    model.save(path)
    loaded = Linear.load(path)
    step = np.abs(model.weights).max(axis=0) / 127
    assert loaded.labels == model.labels and (loaded.bias == model.bias).all()
    assert (np.abs(loaded.weights - model.weights) <= step / 2 + 1e-7).all()
    loaded.save(tmp_path / "again.safetensors")
    assert (Linear.load(tmp_path / "again.safetensors").weights == loaded.weights).all()


def test_what_is_no_model_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(b"no")
    for name in ("m", "absent"):
        with pytest.raises(CheckpointError, match=f"{name} is no linear model"):
            Linear.load(tmp_path / name)


@pytest.mark.parametrize("bad", [-1, BUCKETS])
def test_features_outside_the_buckets_are_refused(bad: int) -> None:
    with pytest.raises(UsageError, match="modulo"):
        trained().logits(rows([bad]))


def test_a_label_without_example_is_refused() -> None:
    with pytest.raises(UsageError, match="no example for high"):
        linear.fit(rows([1], [2]), [0, 0], ("low", "high"), buckets=BUCKETS)
    with pytest.raises(UsageError, match="some rows"):
        linear.fit(rows([1], [2]), [0], ("low",), buckets=BUCKETS)
