"""Numbers by hand; sigmoid at -1, -0.5, -0.75: 0.2689414, 0.3775407, 0.3208213."""

import itertools
from math import log

import pytest
import torch
from torch import Tensor

from attending.prefer.losses import (
    Sampled,
    Sums,
    bradley_terry,
    dpo,
    elo,
    gae,
    ppo,
    tdpo1,
    tdpo2,
    token_rewards,
)


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def near(found: Tensor | None, *wanted: float) -> bool:
    assert found is not None
    return found.flatten().tolist() == pytest.approx(wanted, abs=1e-7)


@pytest.fixture
def pair() -> tuple[Sums, Sums]:
    """m(y_w) = 3, m(y_l) = 1, D(y_w) = 1, D(y_l) = 2."""
    return Sums(row(3.0), row(1.0)), Sums(row(1.0), row(2.0))


def test_dpo_by_hand(pair: tuple[Sums, Sums]) -> None:
    found = dpo(*pair, beta=0.5)
    found.losses.sum().backward()
    assert near(found.losses, 0.3132617)  # ln(1 + e^-1): margin 0.5 (3 - 1)
    assert near(found.margins, 1.0) and not found.margins.requires_grad
    assert near(pair[0].ratios.grad, -0.1344707)  # -0.5 sigmoid(-1)
    assert near(pair[1].ratios.grad, 0.1344707)


def test_tdpo1_by_hand(pair: tuple[Sums, Sums]) -> None:
    found = tdpo1(*pair, beta=0.5)
    found.losses.sum().backward()
    assert near(found.losses, 0.4740770)  # ln(1 + e^-0.5): 0.5 (2 - (2 - 1))
    assert near(found.margins, 1.0)  # the implicit reward has no divergence in it
    assert near(pair[0].ratios.grad, -0.1887703)  # -0.5 sigmoid(-0.5)
    assert near(pair[0].divergences.grad, -0.1887703)  # the chosen one's is pushed up
    assert near(pair[1].divergences.grad, 0.1887703)


def test_tdpo2_by_hand(pair: tuple[Sums, Sums]) -> None:
    found = tdpo2(*pair, beta=0.5, alpha=0.5)
    found.losses.sum().backward()
    assert near(found.losses, 0.3868710)  # ln(1 + e^-0.75): 0.5 (2 - 0.5 (2 - 1))
    assert near(pair[0].ratios.grad, -0.1604107)  # -0.5 sigmoid(-0.75)
    assert pair[0].divergences.grad is None  # stopped
    assert near(pair[1].divergences.grad, 0.0802053)  # 0.5 0.5 sigmoid(-0.75)


def test_tdpo2_without_alpha_is_dpo(pair: tuple[Sums, Sums]) -> None:
    assert torch.equal(tdpo2(*pair, beta=0.5, alpha=0.0).losses, dpo(*pair, beta=0.5).losses)


def test_equal_answers_leave_no_gradient_but_tdpo2s_pull_to_the_reference() -> None:
    for loss in (dpo, tdpo1):
        ratio, divergence = row(3.0), row(2.0)
        same = Sums(ratio, divergence)
        loss(same, same, beta=0.5).losses.sum().backward()
        assert near(ratio.grad, 0.0)
        assert divergence.grad is None or near(divergence.grad, 0.0)
    ratio, divergence = row(3.0), row(2.0)
    same = Sums(ratio, divergence)
    tdpo2(same, same, beta=0.5, alpha=0.5).losses.sum().backward()
    assert near(ratio.grad, 0.0) and near(divergence.grad, 0.125)  # 0.5 0.5 sigmoid(0)


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = row(2.0, 1.0), row(1.0, 1.0)
    found = bradley_terry(chosen, rejected)
    found.losses.sum().backward()
    assert near(found.losses, 0.3132617, log(2)) and near(found.margins, 1.0, 0.0)
    assert near(chosen.grad, -0.2689414, -0.5) and near(rejected.grad, 0.2689414, 0.5)


def test_elo_by_hand() -> None:
    answers, thoughts = row(-1, -3, -2, -2), row(-4, -6, -5, -1)
    found = elo(answers.view(2, 2), thoughts.view(2, 2), direct_term=False)
    found.losses.sum().backward()
    assert near(found.advantages, 1, -1, 0, 0)  # both baselines are -2
    assert near(found.bounds, 1, 3, 2, 2)
    assert near(found.losses, 4, -6, 0, 0)
    assert near(thoughts.grad, -1, 1, 0, 0) and answers.grad is None


def test_elo_with_the_direct_term_by_hand() -> None:
    answers, thoughts = row(-1, -3, -2, -2), row(-4, -6, -5, -1)
    found = elo(answers.view(2, 2), thoughts.view(2, 2), direct_term=True)
    found.losses.sum().backward()
    assert near(found.losses, 5, -3, 2, 2)
    assert near(thoughts.grad, -1, 1, 0, 0) and near(answers.grad, -1, -1, -1, -1)


@pytest.mark.parametrize("group", [2, 3])
def test_the_expectation_of_elo_is_the_bounds_gradient(group: int) -> None:
    """Three possible chains, all groups of them: the first term comes out as (G - 1) / G."""
    chains, known = row(0.3, -0.2, 0.5), row(-0.4, 0.1, 1.2)
    logs, answers = chains.log_softmax(0), torch.nn.functional.logsigmoid(known)
    exact = torch.autograd.grad(-(logs.exp() * answers).sum(), (chains, known), retain_graph=True)
    mean = torch.zeros((), dtype=torch.float64)
    for drawn in map(list, itertools.product(range(3), repeat=group)):
        losses = elo(answers[drawn][None], logs[drawn][None], direct_term=True).losses
        mean = mean + logs[drawn].sum().exp().detach() * losses.mean()
    found = torch.autograd.grad(mean, (chains, known))
    assert torch.allclose(found[0], exact[0] * (group - 1) / group, rtol=1e-9)
    assert torch.allclose(found[1], exact[1], rtol=1e-9)


def test_token_rewards_by_hand() -> None:
    with torch.no_grad():
        found = token_rewards(2.0, row(-1, -3), row(-2, -1), penalty=0.5)
    assert near(found, -0.5, 3.0)  # -0.5 (-1 + 2), then 2 - 0.5 (-3 + 1)


def test_gae_by_hand() -> None:
    rewards, values = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])
    found = gae(rewards, values, gamma=1.0, lam=0.5)  # deltas 1+2-1, 0+3-2, 2+0-3
    assert near(found.advantages, 2.25, 0.5, -1.0)  # 2 + 0.5 0.5, 1 - 0.5, -1
    assert near(found.returns, 3.25, 2.5, 2.0)
    found = gae(rewards, values, gamma=0.5, lam=1.0)  # deltas 1+1-1, 0+1.5-2, -1
    assert near(found.advantages, 0.5, -1.0, -1.0)


def test_ppos_policy_by_hand() -> None:
    logprobs, values = row(log(2), log(2), log(0.5), 0.0), row(0, 0, 0, 0)
    sampled = Sampled(
        *(one.detach() for one in (row(0, 0, 0, 0), values, row(1, -1, -1, 3), values))
    )
    found = ppo(logprobs, values, sampled, clip=0.2, value_clip=1.0)
    found.policy.sum().backward()
    assert near(found.policy, -1.2, 2.0, 0.8, -3.0)
    assert found.is_clipped.tolist() == [True, False, True, False]
    assert near(logprobs.grad, 0.0, 2.0, 0.0, -3.0)


def test_ppos_critic_by_hand() -> None:
    values, logprobs = row(5.0, 1.5, 0.0), row(0, 0, 0)
    nought = logprobs.detach()
    sampled = Sampled(nought, row(1, 1, 3).detach(), nought, row(2, 2, 0).detach())
    found = ppo(logprobs, values, sampled, clip=0.2, value_clip=1.0)
    found.value.sum().backward()
    assert near(found.value, 4.5, 0.125, 2.0)  # (5-2)^2 / 2, (1.5-2)^2 / 2, (2-0)^2 / 2
    assert near(values.grad, 3.0, -0.5, 0.0)  # the last is clipped: moving on changes nothing
