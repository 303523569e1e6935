"""The losses of Baichuan-M1's post-training, and DPO beside them: pure functions of tensors.

Sums over answers or values of tokens go in; one loss a pair, answer or token comes out, never a
mean: what a step averages over is the loop's business. Everything is in nats.

Shapes: P pairs, Q questions, G chains of thought sampled to each, T tokens of a sampled answer.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the field's name for it)


class Sums(NamedTuple):
    """Of answers y, over their tokens; each [P]."""

    ratios: Tensor
    """m(y) = sum of log pi(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t)."""
    divergences: Tensor
    """D(y) = sum of KL(pi_ref(. | x, y_<t) || pi(. | x, y_<t)) over the whole vocabulary."""


class PairLoss(NamedTuple):
    """Of chosen answers y_w and rejected ones y_l; each [P]."""

    losses: Tensor
    margins: Tensor
    """The chosen answer's reward less the other's; without gradient."""


def dpo(chosen: Sums, rejected: Sums, beta: float) -> PairLoss:
    """Direct preference optimization (Rafailov 2023, arXiv 2305.18290, eq. 7).

    -log sigmoid(beta (m(y_w) - m(y_l))); the implicit reward is beta m(y).
    """
    return _preferred(chosen, rejected, beta, torch.zeros_like(chosen.ratios))


def tdpo1(chosen: Sums, rejected: Sums, beta: float) -> PairLoss:
    """Token-level DPO, first form (Zeng 2024, arXiv 2404.11999).

    -log sigmoid(beta (m(y_w) - m(y_l) - (D(y_l) - D(y_w)))). Baichuan-M1's report cites the paper
    and gives neither the form nor the numbers that it took.
    """
    return _preferred(chosen, rejected, beta, rejected.divergences - chosen.divergences)


def tdpo2(chosen: Sums, rejected: Sums, beta: float, alpha: float) -> PairLoss:
    """Token-level DPO, second form (Zeng 2024).

    -log sigmoid(beta (m(y_w) - m(y_l) - alpha (D(y_l) - stopgrad(D(y_w))))). The chosen answer's
    divergence is not pushed up, as in the first form; so two equal answers do leave a gradient,
    that of alpha D(y_l), wherever the model has left the reference.
    """
    penalty = alpha * (rejected.divergences - chosen.divergences.detach())
    return _preferred(chosen, rejected, beta, penalty)


def bradley_terry(chosen: Tensor, rejected: Tensor) -> PairLoss:
    """Of a reward model's scores [P] (Ouyang 2022, arXiv 2203.02155, eq. 1).

    -log sigmoid(r(x, y_w) - r(x, y_l)). Baichuan-M1's own loss is not published.
    """
    return PairLoss(-F.logsigmoid(chosen - rejected), (chosen - rejected).detach())


def _preferred(chosen: Sums, rejected: Sums, beta: float, penalty: Tensor) -> PairLoss:
    margins = beta * (chosen.ratios - rejected.ratios)
    return PairLoss(-F.logsigmoid(margins - beta * penalty), margins.detach())


class EloLoss(NamedTuple):
    """Of sampled chains of thought; each [Q, G]."""

    losses: Tensor
    """To differentiate; the number itself means nothing."""
    bounds: Tensor
    """-log pi(A | Q, CoT), whose mean is the bound that ELO minimises; without gradient."""
    advantages: Tensor
    """log pi(A | Q, CoT) - b; without gradient."""


def elo(answers: Tensor, thoughts: Tensor, *, direct_term: bool) -> EloLoss:
    """Exploratory log-likelihood optimization (Baichuan-M1, arXiv 2502.12671, eqs. 1-3).

    The bound is -E log pi(A | Q, CoT) over chains that the model samples. The paper prints its
    gradient as -E (log pi(A | Q, CoT) - b) grad log pi(CoT | Q), which is `direct_term=False`. The
    exact one has another term, which it neither prints nor speaks of: -E grad log pi(A | Q, CoT),
    learning the answer behind the chain. `direct_term=True` adds it.

    The paper does not say what b is, nor whether it divides by lengths. Here b is the mean over a
    question's chains, each chain's own among them, which makes the expected gradient of the first
    term (G - 1) / G of itself; nothing is divided.

    `answers` [Q, G] are log pi(A | Q, CoT), summed over the true answer's tokens; `thoughts` [Q, G]
    log pi(CoT | Q), summed over the sampled ones.
    """
    known = answers.detach()
    advantages = known - known.mean(1, keepdim=True)
    losses = -advantages * thoughts
    return EloLoss(losses - answers if direct_term else losses, -known, advantages)


class Advantages(NamedTuple):
    """Of an answer's tokens, each [T]; the returns are what the values should have been."""

    advantages: Tensor
    returns: Tensor


def token_rewards(score: float, logprobs: Tensor, reference: Tensor, penalty: float) -> Tensor:
    """[T]: -penalty (log pi(y_t) - log pi_ref(y_t)), and the answer's score at its last token.

    Ziegler 2019, arXiv 1909.08593, eq. 2; both log-probabilities [T], of what was sampled.
    """
    rewards = -penalty * (logprobs - reference)
    rewards[-1] += score
    return rewards


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Advantages:
    """Generalized advantage estimation (Schulman 2016, arXiv 1506.02438, eq. 16); both [T].

    A_t = sum of (gamma lam)^k delta_{t+k} with delta_t = r_t + gamma V_{t+1} - V_t; behind its
    last token the answer has ended and nothing is worth anything.
    """
    advantages, later, value = torch.empty_like(values), 0.0, 0.0
    for t in reversed(range(len(values))):
        later = float(rewards[t]) + gamma * value - float(values[t]) + gamma * lam * later
        advantages[t], value = later, float(values[t])
    return Advantages(advantages, advantages + values)


class Sampled(NamedTuple):
    """What was known of tokens when they were sampled, the critic's values too; each [T]."""

    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


class PpoLoss(NamedTuple):
    """Of sampled tokens; each [T]."""

    policy: Tensor
    value: Tensor
    """The critic's error."""
    is_clipped: Tensor
    """Where the ratio left the interval on the side that pays: there is no gradient."""


def ppo(
    logprobs: Tensor, values: Tensor, sampled: Sampled, *, clip: float, value_clip: float
) -> PpoLoss:
    """Proximal policy optimization (Schulman 2017, arXiv 1707.06347, eq. 7).

    -min(r A, clamp(r, 1 - clip, 1 + clip) A) with r = pi / pi_old. The critic's error is half the
    larger of (V - R)^2 and (V_c - R)^2, where V_c stays within `value_clip` of the old value: so
    OpenAI's code has it, not the paper. Baichuan-M1 published no number of its PPO.
    `logprobs` and the critic's `values`, each [T], are those of now.
    """
    ratios, gains = (logprobs - sampled.logprobs).exp(), sampled.advantages
    plain, clipped = ratios * gains, ratios.clamp(1 - clip, 1 + clip) * gains
    kept = sampled.values + (values - sampled.values).clamp(-value_clip, value_clip)
    errors = torch.maximum((values - sampled.returns) ** 2, (kept - sampled.returns) ** 2)
    return PpoLoss(-torch.minimum(plain, clipped), errors / 2, (clipped < plain).detach())
