import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from attending.model import scoring
from attending.model.scoring import (
    bits_interval,
    bits_per_byte,
    cross_entropy,
    measured,
    over_logits,
)


@pytest.mark.parametrize("tokens", [1, 7, 8, 29])
def test_chunked_equals_whole_logits(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CPU_CHUNK", 8)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    head = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(11, (tokens,)), torch.rand(tokens, dtype=torch.float64)
    total, values = over_logits(hidden, head, cross_entropy, weights, targets)
    (2.5 * total).backward()
    found = hidden.grad, head.grad
    hidden.grad = head.grad = None
    plain = F.cross_entropy(hidden @ head.T, targets, reduction="none")
    (2.5 * (weights * plain).sum()).backward()
    for ours, wanted in zip((*found, values), (hidden.grad, head.grad, plain), strict=True):
        assert ours is not None and wanted is not None
        assert torch.allclose(ours, wanted, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        again = over_logits(hidden, head, cross_entropy, weights, targets)
    assert torch.allclose(again[0], total) and torch.allclose(again[1], values)


def test_another_measure_with_rows_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "CPU_CHUNK", 4)
    torch.manual_seed(0)
    hidden = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    head = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(10, 5, dtype=torch.float64).log_softmax(-1)

    def divergence(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)

    total, _ = over_logits(hidden, head, divergence, torch.ones(10), teacher)
    total.backward()
    found, hidden.grad = hidden.grad, None
    divergence(hidden @ head.T, teacher).sum().backward()
    assert found is not None and hidden.grad is not None
    assert torch.allclose(found, hidden.grad, rtol=1e-10)


@pytest.mark.parametrize("is_function", [False, True])
def test_two_values_a_token_and_slopes_that_hang_on_them(
    is_function: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of sum of m^2 x: the slopes are 2 m x and m^2, known beforehand or chunk by chunk."""
    monkeypatch.setattr(scoring, "CPU_CHUNK", 4)
    torch.manual_seed(0)
    hidden = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    head = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def measure(logits: torch.Tensor) -> torch.Tensor:
        return torch.stack((logits.logsumexp(-1), logits[:, 0]), -1)

    def slopes(values: torch.Tensor, at: slice) -> torch.Tensor:
        assert len(values) == len(hidden[at])
        most, first = values.unbind(-1)
        return torch.stack((2 * most * first, most**2), -1)

    plain = measure(hidden @ head.T)
    known = slopes if is_function else slopes(plain.detach(), slice(None))
    total, values = over_logits(hidden, head, measure, known)
    found = torch.autograd.grad(total, (hidden, head))
    wanted = torch.autograd.grad((plain[:, 0] ** 2 * plain[:, 1]).sum(), (hidden, head))
    for ours, exact in zip((values, *found), (plain, *wanted), strict=True):
        assert torch.allclose(ours, exact, rtol=1e-9, atol=1e-12)
    assert torch.equal(measured(hidden, head, measure), values)
    with torch.no_grad():
        assert torch.allclose(over_logits(hidden, head, measure, known)[0], total)


def test_no_tokens_at_all() -> None:
    head = torch.randn(5, 6, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    total, values = over_logits(torch.zeros(0, 6), head, cross_entropy, torch.zeros(0), none)
    total.backward()
    assert not len(values) and head.grad is not None and not head.grad.any()
    assert not len(measured(torch.zeros(0, 6), head, cross_entropy, none))


def test_a_token_of_weight_nought_changes_no_gradient() -> None:
    torch.manual_seed(0)
    head = torch.randn(5, 6, requires_grad=True)
    hidden = torch.randn(3, 6)
    weights, targets = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 4, 2])
    over_logits(hidden, head, cross_entropy, weights, targets)[0].backward()
    with_it, head.grad = head.grad, None
    kept = torch.tensor([0, 2])
    over_logits(hidden[kept], head, cross_entropy, weights[kept], targets[kept])[0].backward()
    assert with_it is not None and head.grad is not None
    assert torch.allclose(with_it, head.grad)


def test_half_precision_makes_its_loss_in_float32() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(9, 6, dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(5, 6, dtype=torch.bfloat16, requires_grad=True)
    total, values = over_logits(hidden, head, cross_entropy, torch.ones(9), torch.zeros(9).long())
    total.backward()
    assert values.dtype == total.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_bits_per_byte_by_hand() -> None:
    nats, sizes = [math.log(2) * 8, math.log(2) * 4], [2, 4]
    assert bits_per_byte(nats, sizes) == pytest.approx(12 / 6)
    assert bits_interval(nats, sizes) == pytest.approx((1.0, 4.0))


def test_the_interval_has_the_width_of_the_normal_one() -> None:
    nats = np.random.default_rng(0).normal(100, 10, 400)
    low, high = bits_interval(nats.tolist(), [100] * 400)
    width = 2 * 1.96 * nats.std() / 100 / math.log(2) / math.sqrt(400)
    assert high - low == pytest.approx(width, rel=0.1)
    assert (low, high) == bits_interval(nats.tolist(), [100] * 400)
