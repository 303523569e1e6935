"""The policy's loss: Baichuan-M2's improved GRPO (arXiv 2509.02208, eq. 2), as a pure function.

    J = 1/N sum_i 1/l_max sum_t w_it min(r_it A_i, clip(r_it, 1 - eps_low, 1 + eps_high) A_i)

over N = B G answers o_i, with r_it = pi(o_it) / pi_old(o_it). How it differs from GRPO
(DeepSeekMath, arXiv 2402.03300, eq. 3), J = 1/N sum_i 1/|o_i| sum_t [min(r A, clip(r, 1 - eps,
1 + eps) A) - beta KL(pi || pi_ref)] with A = (R - mean R) / std R:

1. No KL: the term beta (pi_ref/pi - log(pi_ref/pi) - 1) is gone, and the reference model with it.
2. Clip higher: 1 - eps_low and 1 + eps_high instead of 1 -+ eps, so that rare tokens can gain and
   entropy lasts (DAPO, arXiv 2503.14476, which takes 0.2 and 0.28; M2 gives no numbers).
3. Length normalised by a constant: 1/l_max instead of 1/|o_i|, which made long wrong answers cheap
   (Dr. GRPO, arXiv 2503.20783). Notes on M2 by others have 1/(l_max |o_i|); its own text and what
   it cites mean the constant.
4. No deviation: A = R - mean R, see `advantage.group_mean` (Dr. GRPO).
5. 1/N is explicit, N the answers of a whole step over all ranks and passes, unscored and flat ones
   too. verl's `seq-mean-token-sum-norm` sums over a micro-batch and leaves 1/N to the learning
   rate, which then depends on how a step is cut.
6. Not in M2: the sampler is not the trainer (another engine, 8-bit weights), so each token is
   weighed by w = min(pi_old / pi_sampler, C), without gradient: truncated importance sampling
   (Ionides 2008; Yao 2025, "Your efficient RL framework secretly brings you off-policy RL
   training"). The mismatch is told by KL(pi_sampler || pi_old).

GSPO (arXiv 2507.18071, eqs. 5-7; Baichuan-M3's update) is the level "sequence": one ratio an
answer, s_i = (pi(o_i) / pi_old(o_i))^(1/|o_i|), and J = 1/N sum_i min(s_i A_i, clip(s_i) A_i), so
1/|o_i| stands where 1/l_max stood. Its eps are 3e-4 and 4e-4. The paper has no w; here it is the
answer's, (pi_old(o_i) / pi_sampler(o_i))^(1/|o_i|), at most C.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from attending.model.scoring import measured, over_logits
from attending.rl.types import Batch

FARTHEST = 20.0  # log-ratios beyond it are cut: e^20 says it all, e^90 is infinite in float32


class Objective(NamedTuple):
    """What a step is told, the same for all of its passes."""

    num_samples: int
    """N."""
    max_tokens: int
    """l_max, the most that an answer may have."""
    eps_low: float = 0.2
    eps_high: float = 0.28
    level: Literal["token", "sequence"] = "token"
    most_weight: float = 2.0
    """C."""


class Tokens(NamedTuple):
    """Of sampled ids, each [K], in nats; `old` is None where nothing was updated since sampling."""

    logprobs: Tensor
    """log pi now, with gradient."""
    old: Tensor | None
    """log pi_old, by the trainer."""
    sampler: Tensor
    """log pi_sampler, by the engine."""
    advantages: Tensor
    answers: Tensor
    """int64, the number of each one's answer."""


class PolicyLoss(NamedTuple):
    """A pass's part of -J, and what to watch of each token, [K] and without gradient."""

    loss: Tensor
    """A scalar; those of all passes and ranks add up to -J."""
    is_clipped: Tensor
    """Where the ratio left the interval on the side that pays; its mean is the clip share."""
    is_truncated: Tensor
    """Where w was cut to C."""
    mismatch_k1: Tensor
    """log pi_sampler - log pi_old; its mean estimates the KL without bias, but may be negative."""
    mismatch_k3: Tensor
    """e^d - 1 - d with d = log pi_old - log pi_sampler: never negative, and of less variance."""


def policy_loss(tokens: Tokens, told: Objective) -> PolicyLoss:
    """The loss of sampled tokens; see above."""
    old = tokens.logprobs.detach() if tokens.old is None else tokens.old
    apart = (old - tokens.sampler).clamp(max=FARTHEST)
    logs, log_weights, share = tokens.logprobs - old, apart, torch.ones_like(old) / told.max_tokens
    if told.level == "sequence":
        share = 1 / torch.bincount(tokens.answers)[tokens.answers].to(old.dtype)
        logs, log_weights = (_summed(one * share, tokens.answers) for one in (logs, apart))
    ratios, weights = logs.clamp(max=FARTHEST).exp(), log_weights.exp()
    plain = ratios * tokens.advantages
    clipped = ratios.clamp(1 - told.eps_low, 1 + told.eps_high) * tokens.advantages
    kept = weights.clamp(max=told.most_weight) * share
    return PolicyLoss(
        -(kept * torch.minimum(plain, clipped)).sum() / told.num_samples,
        (clipped < plain).detach(),
        weights > told.most_weight,
        -apart,
        apart.exp() - 1 - apart,
    )


def _summed(values: Tensor, answers: Tensor) -> Tensor:
    """[K]: at each token, the sum over its answer."""
    return torch.zeros_like(values).index_add(0, answers, values)[answers]


class Values(NamedTuple):
    """Of K targets, in nats; each [K], without gradient."""

    logprobs: Tensor
    entropies: Tensor
    """Of the whole next-token distribution."""


def answer_values(hidden: Tensor, head: Tensor, batch: Batch) -> Values:
    """What hidden states [T, D] and the head [V, D] say of a batch's targets, chunk by chunk."""
    return Values(*measured(hidden[batch.at], head, _measure, batch.targets).unbind(-1))


def differentiated(
    hidden: Tensor, head: Tensor, batch: Batch, told: Objective
) -> tuple[PolicyLoss, Values]:
    """The loss of a batch, differentiable by hidden states and head, without all logits at once.

    A token's gradient by its logits is its slope, d loss / d log pi, times that of log pi. At level
    "token" the slope hangs on the token alone, so the logits are made once; a sequence's ratio
    needs all of its tokens, so there they are made twice, first for the values.
    """

    def slopes(values: Tensor, at: slice = slice(None)) -> Tensor:
        with torch.enable_grad():
            leaves = values[:, 0].detach().requires_grad_()
            loss = policy_loss(_tokens(batch, leaves, at), told).loss
        (found,) = torch.autograd.grad(loss, leaves)
        return torch.stack((found, torch.zeros_like(found)), -1)

    states = hidden[batch.at]
    is_local = told.level == "token"
    known = slopes if is_local else slopes(measured(states, head, _measure, batch.targets))
    line, both = over_logits(states, head, _measure, known, batch.targets)
    values = Values(*both.unbind(-1))
    found = policy_loss(_tokens(batch, values.logprobs), told)
    return found._replace(loss=line + (found.loss - line).detach()), values


def _tokens(batch: Batch, logprobs: Tensor, at: slice = slice(None)) -> Tokens:
    old = None if batch.old is None else batch.old[at]
    rest = batch.sampler[at], batch.advantages[at], batch.answers[at]
    return Tokens(logprobs, old, *rest)


def _measure(logits: Tensor, targets: Tensor) -> Tensor:
    """[C, V] and [C] -> [C, 2], see `Values`."""
    logs = logits.log_softmax(-1)
    fixed = logs.detach()
    entropies = -(fixed.exp() * fixed).sum(-1)
    return torch.stack((logs.gather(-1, targets[:, None])[:, 0], entropies), -1)
