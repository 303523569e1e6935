"""Signed rounding on small blocks: by hand, and that it never does worse than where it starts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attending.errors import UsageError
from attending.model.attend import Packed
from attending.model.decoder import rotation
from attending.quantize.gptq import Hessian, solve
from attending.quantize.grid import Grid, Steps
from attending.quantize.recipe import QuantizeConfig
from attending.quantize.signed import Fitted, SignedRounding, Start, fit
from tests.model.tiny import build


def linear(weight: Tensor) -> nn.Module:
    block = nn.Sequential(nn.Linear(weight.shape[1], len(weight), bias=False))
    block[0].weight.data = weight
    return block.requires_grad_(False)


def fitted(block: nn.Module, x: Tensor, grid: Grid, steps: int = 40, **options: Any) -> Fitted:
    layers = [name for name, part in block.named_modules() if isinstance(part, nn.Linear)]
    config = SignedRounding(steps=steps, batch=4)
    return fit(block, block, x, block(x), layers, grid, config, **options)


@pytest.fixture
def mlp() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32)).requires_grad_(False)
    return block, torch.randn(8, 16, 8) @ torch.randn(8, 32)  # inputs of few directions


def test_two_inputs_that_agree_by_hand() -> None:
    """As GPTQ's: [0.4, 0.3] rounds to [0, 1] or [1, 0] where both inputs are the same."""
    block = linear(torch.tensor([[0.4, 0.3, -8.0]]))
    x = torch.ones(4, 1, 3) * torch.tensor([1.0, 1.0, 0.0])
    found = fitted(block, x, Grid(4, None))
    assert found.before == pytest.approx(0.49)
    values = found.layers["0"].values.int() - 8
    assert values[0].tolist()[:2] in ([0, 1], [1, 0])
    assert found.after < 0.1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("whole_zeros", [True, False])
def test_it_closes_most_of_the_gap_and_tells_it_truly(
    mlp: tuple[nn.Module, Tensor], symmetric: bool, whole_zeros: bool
) -> None:
    block, x = mlp
    grid = Grid(4, 32, symmetric, whole_zeros=whole_zeros)
    untouched = [part.clone() for part in block.parameters()]
    seen: list[tuple[int, float]] = []
    found = fitted(block, x, grid, progress=lambda step, error: seen.append((step, error)))
    assert all(map(torch.equal, block.parameters(), untouched))
    assert found.after < (0.35 if symmetric else 0.65) * found.before
    assert [step for step, _ in seen] == list(range(1, 41)) and seen[-1][1] < 0.7 * seen[0][1]
    target = block(x)
    for name, quantised in found.layers.items():
        plain, layer = grid.plain(block.get_submodule(name).weight), block.get_submodule(name)
        moved = (quantised.values.int() - plain.values.int()).abs()
        assert moved.any() and (not symmetric or moved.float().mean() < 0.5)
        assert torch.equal(quantised.scales.half().float(), quantised.scales)
        assert not whole_zeros or torch.equal(quantised.zeros.round(), quantised.zeros)
        layer.weight.data = quantised.weight()
    after = float((block(x) - target).square().mean())
    assert after == pytest.approx(found.after, rel=1e-4)


def test_the_same_seed_gives_the_same_bits(mlp: tuple[nn.Module, Tensor]) -> None:
    first, same, other = (fitted(*mlp, Grid(4, 32), seed=seed) for seed in (3, 3, 4))
    for name, quantised in first.layers.items():
        assert all(map(torch.equal, quantised, same.layers[name]))
    assert first.after != other.after


def test_start_and_end_are_compared_over_some_samples(mlp: tuple[nn.Module, Tensor]) -> None:
    block, x = mlp
    config = SignedRounding(steps=1, rate=1e-9, compared=3)
    found = fit(block, block, x, block(x), ["0"], Grid(4, 32), config)
    target = block(x)
    block.get_submodule("0").weight.data = found.layers["0"].weight()
    each = (block(x) - target).square().flatten(1).mean(1)
    assert found.before == found.after == pytest.approx(float(each[[0, 4, 7]].mean()), rel=1e-4)


def test_it_never_does_worse_than_its_start(mlp: tuple[nn.Module, Tensor]) -> None:
    """With steps far too large, what comes out is the plain rounding or something better."""
    block, x = mlp
    layers = ["0", "2"]
    for rate in (5.0, 1.0, 1e-9):
        config = SignedRounding(steps=3, batch=3, rate=rate)
        found = fit(block, block, x, block(x), layers, Grid(4, 32), config)
        assert found.after <= found.before
    for name in layers:  # of the last, which cannot move
        plain = Grid(4, 32).plain(block.get_submodule(name).weight)
        assert all(map(torch.equal, found.layers[name], plain))


def test_it_goes_on_from_gptq() -> None:
    torch.manual_seed(1)
    block = linear(torch.randn(16, 32))
    x = torch.randn(8, 16, 8) @ torch.randn(8, 32) + 0.1 * torch.randn(8, 16, 32)
    hessian, grid = Hessian(32), Grid(4, 32)
    hessian.add(x)
    solved = solve(block.get_submodule("0").weight, hessian.matrix(), grid)
    start = Start(solved.targets, Steps(solved.quantised.scales, solved.quantised.zeros))
    config = SignedRounding(steps=1, batch=8, rate=1e-9)
    held = fit(block, block, x, block(x), ["0"], grid, config, starts={"0": start})
    assert torch.equal(held.layers["0"].values, solved.quantised.values)
    config = SignedRounding(steps=40, batch=8, rate=1e-3, range_rate=0.0)
    found = fit(block, block, x, block(x), ["0"], grid, config, starts={"0": start})
    assert found.after <= found.before == held.after < 0.3 * fitted(block, x, grid, 1).before
    assert torch.equal(found.layers["0"].scales, solved.quantised.scales)


def test_it_learns_what_gptq_was_not_told() -> None:
    """GPTQ saw other inputs: from where it ended there is something to learn, with its scales."""
    torch.manual_seed(1)
    block = linear(torch.randn(16, 32))
    x = torch.randn(8, 16, 8) @ torch.randn(8, 32) + 0.1 * torch.randn(8, 16, 32)
    hessian, grid = Hessian(32), Grid(4, 32)
    hessian.add(torch.randn(64, 32))
    solved = solve(block.get_submodule("0").weight, hessian.matrix(), grid)
    start = Start(solved.targets, Steps(solved.quantised.scales, solved.quantised.zeros))
    config = SignedRounding(steps=200, batch=8, rate=5e-3, range_rate=0.0)
    found = fit(block, block, x, block(x), ["0"], grid, config, starts={"0": start})
    assert found.after < 0.8 * found.before
    assert torch.equal(found.layers["0"].scales, solved.quantised.scales)


def test_a_decoder_block_with_its_rotations() -> None:
    config = {"model_type": "qwen2", "vocab_size": 16, "hidden_size": 32, "rope_theta": 1e4}
    config |= {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config |= {"max_position_embeddings": 64, "num_key_value_heads": 2}
    decoder = build(config).requires_grad_(False)
    block = decoder.model.layers[0]

    def forward(x: Tensor) -> Tensor:
        attend = Packed([x.shape[1]] * len(x))
        angles = {8: rotation(attend.positions, decoder.model.frequencies[8], 1.0)}
        out: Tensor = block(x.flatten(0, 1), angles, attend)
        return out.reshape(x.shape)

    x = torch.randn(6, 10, 32, generator=torch.Generator().manual_seed(0))
    names = [name for name, part in block.named_modules() if isinstance(part, nn.Linear)]
    assert len(names) == 7
    found = fit(block, forward, x, forward(x), names, Grid(4, 32), SignedRounding(steps=30))
    assert set(found.layers) == set(names) and found.after < 0.6 * found.before


def test_recipes() -> None:
    """AutoRound's light and best; its default is ours."""
    fast, best = (QuantizeConfig.load(name, "quantize") for name in ("fast", "best"))
    assert (fast.signed.steps, fast.signed.rate, fast.calibration.samples) == (50, 5e-3, 128)
    assert best.search == 0
    assert (best.signed.steps, best.signed.rate, best.calibration.samples) == (1000, None, 512)
    assert SignedRounding().steps == 200
    assert SignedRounding.build({"steps": 5, "rate": 0.01}).batch == 8


def test_what_cannot_be_fitted(mlp: tuple[nn.Module, Tensor]) -> None:
    block, x = mlp
    config = SignedRounding(steps=1)
    with pytest.raises(UsageError, match="no layers to quantise"):
        fit(block, block, x, block(x), [], Grid(4, 32), config)
    with pytest.raises(UsageError, match="not finite"):
        fit(block, block, x * torch.nan, block(x), ["0"], Grid(4, 32), config)
    with pytest.raises(UsageError, match="do not divide 32 inputs"):
        fit(block, block, x, block(x), ["0"], Grid(4, 64), config)
