"""The target as training reads it: by its engine, by torch, and from disk."""

from pathlib import Path

import numpy as np
import pytest
import torch

from attending.draft.loss import read
from attending.draft.target import (
    EngineTarget,
    Kept,
    Look,
    Scaled,
    TorchTarget,
    third_sizes,
)
from attending.engine.native.build import status
from attending.engine.runner import Span
from attending.engine.torch_runner import TorchRunner
from attending.errors import CheckpointError
from attending.model.decoder import Decoder
from attending.train.reader import Batch
from tests.draft.test_loss import DEEP, batch, models
from tests.engine.drafting import head, natively
from tests.engine.native_models import dequantised, random_model

native = pytest.mark.skipif(status().path is None, reason="no native engine here")


def close(one: Look, other: Look, tolerance: float) -> None:
    error, size = (one.features - other.features).abs(), other.features.abs().mean()
    assert error.mean() < 0.1 * tolerance * size and error.max() < 5 * tolerance * size
    assert (one.ids[:, 0] == other.ids[:, 0]).float().mean() > 0.97  # some are nearly even
    assert torch.allclose(one.shares[:, 0], other.shares[:, 0], atol=tolerance)


def in_words(one: Batch, model: Decoder) -> Batch:
    size = model.arch.vocab_size
    return Batch(one.ids % size, one.targets % size, one.weights, one.lengths, one.kinds)


@native
@pytest.mark.parametrize("family", ["llama", "qwen3", "baichuan_m1"])
def test_the_engine_sees_what_torch_sees(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On its own 8-bit weights; several dialogues, more than there are pages for at once."""
    model = random_model(family, num_hidden_layers=4)
    layers, one = (1, 2, 3), batch((90, 70, 40, 9), (3, 2, 30, 1))
    monkeypatch.setattr("attending.draft.target.ROWS", 64)  # the first two take two steps each
    one = in_words(one, model)
    runner = natively(model, None, pages=3, activations="float32", features=layers)
    dequantised(model, "w8")
    found = EngineTarget(runner, model, 5).look(one)
    wanted = TorchTarget(model, 5).look(one)
    assert found.features.shape == (209, 3 * model.arch.hidden_size)
    assert found.ids.shape == found.shares.shape == (int((one.weights > 0).sum()), 5)
    close(found, wanted, 2e-2)  # the cache has 16 bits


@native
def test_looking_changes_no_bit_and_a_drafter_can_be_looked_at_too() -> None:
    model = random_model("llama", num_hidden_layers=4)
    eagle, ids = head(model), np.arange(80) % 50
    alone = natively(model, None, features=eagle.config.layers)
    both = natively(model, eagle)
    pages = (np.arange(2),)
    for start, end in ((0, 70), (70, 80)):
        span = Span(ids[start:end], start, pages, 3)
        seen = [runner.observe([span]) for runner in (alone, both)]
        assert np.array_equal(seen[0].features, seen[1].features)
        assert np.array_equal(seen[0].logits, seen[1].logits)
        assert np.array_equal(seen[0].logits, alone.step([span]))
        assert seen[0].features.any(axis=1).all()


class Counted:
    """How many dialogues were looked at."""

    def __init__(self, decoder: Decoder) -> None:
        self._target = TorchTarget(decoder, 7)
        self.ends, self.num_likeliest, self.lengths = decoder, 7, list[int]()
        self.path = self._target.path

    def look(self, one: Batch) -> Look:
        self.lengths += one.lengths
        found = self._target.look(one)
        giant = found.features.clone()
        giant[np.cumsum([0, *one.lengths[:-1]])] *= 1e6  # more than 16 bits hold
        return found._replace(features=giant)


def test_what_is_kept_is_read_once(tmp_path: Path) -> None:
    target, _ = models(DEEP)
    counted = Counted(target)
    one, other = batch((9, 6), (3, 2)), batch((5,), (1,))
    kept = Kept(counted, tmp_path, "m")
    looks = [kept.look(one), kept.look(one)]
    assert counted.lengths == [9, 6]
    for name in ("features", "ids", "shares"):
        assert torch.equal(getattr(looks[0], name), getattr(looks[1], name))
    wanted = counted.look(one)
    rows = wanted.features.unflatten(-1, (3, -1)).square().mean(-1).sqrt()
    error = (looks[0].features - wanted.features).unflatten(-1, (3, -1)).abs().amax(-1)
    assert (error < 4e-3 * rows).all()
    assert torch.equal(looks[0].ids, wanted.ids)
    assert torch.allclose(looks[0].shares, wanted.shares, rtol=1e-3, atol=1e-6)
    # By another process; its last record was cut off on the way.
    counted.lengths.clear()
    index = tmp_path / "features.bin.index"
    index.write_bytes(index.read_bytes()[:-1])
    again = Kept(counted, tmp_path, "m")
    assert torch.equal(again.look(one).features, looks[0].features)
    assert counted.lengths == [6]
    again.look(other)
    assert counted.lengths == [6, 5]
    # What decides a look decides where it is found.
    Kept(counted, tmp_path, "another model").look(other)
    assert counted.lengths == [6, 5, 5]


@pytest.mark.parametrize("harm", ["cut", "emptied", "another's"])
def test_kept_looks_that_are_damaged_are_said(tmp_path: Path, harm: str) -> None:
    target, _ = models(DEEP)
    counted, one = Counted(target), batch((9, 6), (3, 2))
    Kept(counted, tmp_path, "m").look(one)
    file = tmp_path / "features.bin"
    held = file.read_bytes()
    file.write_bytes({"cut": held[:-1], "emptied": b"", "another's": held[::-1]}[harm])
    with pytest.raises(CheckpointError, match=r"features\.bin does not hold what .* remove both"):
        Kept(counted, tmp_path, "m").look(one)


def test_features_come_at_one_size_and_the_head_takes_it_on() -> None:
    target, eagle = models(DEEP)
    plain, one = TorchTarget(target, 384), batch((40, 20), (3, 2))
    look = plain.look(one)
    scales = third_sizes(look)
    assert scales.shape == (3 * target.arch.hidden_size,)
    seen = Scaled(plain, scales)
    thirds = seen.look(one).features.unflatten(-1, (3, -1)).square().mean(-1).sqrt()
    assert torch.allclose(thirds.median(0).values, torch.ones(3, dtype=torch.float64))
    wanted = eagle.fc(look.features)
    eagle.scale_features(scales)
    assert torch.allclose(eagle.fc(seen.look(one).features), wanted)
    eagle.scale_features(1 / scales)
    assert torch.allclose(eagle.fc(look.features), wanted)


def test_shares_are_of_the_words_that_the_draft_has() -> None:
    """Of the likeliest tokens those that are draft words, to one; the others have none."""
    target, eagle = models(DEEP)
    one = batch((9,), (3,))
    seen = read(TorchTarget(target, 6), eagle, one)
    whole = read(TorchTarget(target, 384), eagle, one)
    assert torch.equal(seen.is_inside, whole.is_inside)
    is_inside = seen.is_inside[one.weights > 0]  # where the likeliest is a draft word
    assert 0 < int(is_inside.sum()) < len(is_inside)
    assert torch.allclose(seen.shares[is_inside].sum(-1), torch.ones(1, dtype=torch.float64))
    for few, every in zip(seen.shares, whole.shares, strict=True):
        held = few > 0
        assert int(held.sum()) <= 6
        assert torch.allclose(few[held], every[held] / every[held].sum())


def test_torch_runs_what_the_engine_of_torch_runs() -> None:
    """The decoder stands for torch's runner: the same logits, packed or on pages."""
    model = random_model("llama", num_hidden_layers=4)
    one = batch((9,), (3,))
    one = in_words(one, model)
    found = TorchTarget(model, 3).look(one)
    runner = TorchRunner(model, [1])
    logits = torch.from_numpy(runner.step([Span(one.ids.numpy(), 0, (np.arange(1),), 6)]))
    assert torch.equal(logits.topk(3).indices, found.ids)
    assert torch.allclose(logits.softmax(-1).gather(1, found.ids), found.shares, atol=1e-5)
