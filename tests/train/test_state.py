"""A state saved before anything was learnt changes nothing: AdamW counts updates, not saves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from attending.mesh import world
from attending.model.architecture import parse_config
from attending.model.decoder import init_weight
from attending.train import run
from attending.train.optimizer import adamw
from attending.train.parallel import build
from attending.train.reader import Batch
from attending.train.recipe import ComputeConfig, OptimizerConfig
from attending.train.state import TrainState
from attending.train.step import Gradients, accumulate, next_token_loss
from tests.train.making import LLAMA

CONFIG = OptimizerConfig(peak=1e-2, final=1e-2, warmup_tokens=0, skip_window=0)
NOTHING = Gradients(loss=0.0, by_kind={}, norm=0.0, tokens=4)  # as of groups that agree


class Still:
    """A reader that nothing is read from."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        assert not state

    def figures(self) -> dict[str, float]:
        return {}


def begun() -> TrainState:
    arch = parse_config(LLAMA)

    def draw(name: str, weight: torch.Tensor) -> None:
        init_weight(arch, name, weight, torch.Generator().manual_seed(len(name)))

    decoder = build(arch, draw, world(), torch.device("cpu"), ComputeConfig())
    return TrainState(decoder, adamw(decoder.named_parameters(), CONFIG), Still(), world())


def learn(state: TrainState, steps: int) -> list[torch.Tensor]:
    """The weights after so many updates."""
    torch.manual_seed(0)
    for _ in range(steps):
        ids, targets = torch.randint(384, (2, 12))
        one = Batch(ids, targets, torch.ones(12), [12], torch.zeros(12, dtype=torch.long))
        found = accumulate(state.decoder, [one], next_token_loss, 1, ["text"])
        state.update(found, 1e-2, CONFIG)
    return [weight.detach().clone() for weight in state.decoder.parameters()]


@pytest.mark.parametrize("before", [0, 2])
def test_a_state_saved_before_the_first_gradient_is_no_step(before: int, tmp_path: Path) -> None:
    whole = begun()
    for _ in range(before):
        whole.update(NOTHING, 1e-2, CONFIG)
    expected = learn(whole, 3)
    saved = begun()
    for _ in range(before):
        saved.update(NOTHING, 1e-2, CONFIG)
    saved.save(tmp_path, keep=1)
    resumed = begun()
    newest = run.newest(tmp_path)
    assert newest
    resumed.restore(newest)
    assert resumed.step == before
    for state in (saved, resumed):
        assert all(map(torch.equal, learn(state, 3), expected))
        assert all(float(slots["step"]) == 3 for slots in state.optimizer.state.values())


def test_a_state_saved_later_goes_on_counting(tmp_path: Path) -> None:
    expected = learn(begun(), 3)
    whole = begun()
    learn(whole, 3)
    whole.save(tmp_path, keep=1)
    newest = run.newest(tmp_path)
    resumed = begun()
    assert newest
    resumed.restore(newest)
    assert all(map(torch.equal, learn(resumed, 0), expected))
    assert all(float(slots["step"]) == 3 for slots in resumed.optimizer.state.values())
    assert all(map(torch.equal, learn(resumed, 2), learn(whole, 2)))
