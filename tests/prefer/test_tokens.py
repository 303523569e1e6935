from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from attending.model import scoring
from attending.prefer import tokens
from attending.prefer.losses import Sums, dpo, elo, tdpo1, tdpo2
from attending.prefer.tokens import Beside, Values, chained, compared, summed

SEGMENTS = torch.arange(4).repeat_interleave(torch.tensor([5, 9, 1, 7]))  # two pairs
Loss = Callable[[Values], Tensor]


def of_pairs(loss: Callable[..., Any], **numbers: float) -> Loss:
    def total(values: Values) -> Tensor:
        ratios = summed(values.logprobs - values.reference, SEGMENTS, 4).view(2, 2)
        apart = summed(values.divergences, SEGMENTS, 4).view(2, 2)
        sides = (Sums(ratios[:, side], apart[:, side]) for side in range(2))
        found: Tensor = loss(*sides, **numbers).losses.mean()
        return found

    return total


def of_chains(direct_term: bool) -> Loss:
    is_answer = torch.arange(len(SEGMENTS)) % 3 == 0

    def total(values: Values) -> Tensor:
        sums = (summed(values.logprobs * kind, SEGMENTS, 4) for kind in (is_answer, ~is_answer))
        answers, thoughts = (one.view(2, 2) for one in sums)
        return elo(answers, thoughts, direct_term=direct_term).losses.mean()

    return total


LOSSES = {
    "dpo": of_pairs(dpo, beta=0.3),
    "tdpo1": of_pairs(tdpo1, beta=0.3),
    "tdpo2": of_pairs(tdpo2, beta=0.3, alpha=0.5),
    "elo": of_chains(direct_term=False),
    "elo with the direct term": of_chains(direct_term=True),
}


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, ...]:
    """Hidden states, head, targets, and the reference's states and head, of another width."""
    monkeypatch.setattr(scoring, "CPU_CHUNK", 8)
    torch.manual_seed(0)
    hidden, theirs = torch.randn(22, 6).double(), torch.randn(22, 4).double()
    head, their_head = torch.randn(11, 6).double(), torch.randn(11, 4).double()
    return (
        hidden.requires_grad_(),
        head.requires_grad_(),
        torch.randint(11, (22,)),
        theirs,
        their_head,
    )


def whole(
    hidden: Tensor, head: Tensor, targets: Tensor, theirs: Tensor, their_head: Tensor
) -> Values:
    logs, reference = (hidden @ head.T).log_softmax(-1), (theirs @ their_head.T).log_softmax(-1)
    at = torch.arange(len(targets))
    divergences = F.kl_div(logs, reference, log_target=True, reduction="none").sum(-1)
    return Values(logs[at, targets], reference[at, targets], divergences)


@pytest.mark.parametrize("name", LOSSES)
def test_chained_equals_whole_logits(name: str, states: tuple[Tensor, ...]) -> None:
    hidden, head, targets, theirs, their_head = states
    plain = whole(*states)
    wanted = torch.autograd.grad(2.5 * LOSSES[name](plain), (hidden, head))
    line, values, told = chained(
        hidden, head, targets, lambda v: (LOSSES[name](v), "told"), Beside(theirs, their_head)
    )
    found = torch.autograd.grad(2.5 * line, (hidden, head))
    assert told == "told" and not any(value.requires_grad for value in values)
    for ours, exact in zip((*values, *found), (*plain, *wanted), strict=True):
        assert torch.allclose(ours, exact, rtol=1e-9, atol=1e-12)
    assert all(gradient.abs().max() > 1e-3 for gradient in found)


def test_never_all_logits_at_once(
    states: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, measure = [], tokens._measure

    def look(their_head: Tensor | None, logits: Tensor, *rows: Tensor) -> Tensor:
        seen.append(len(logits))
        return measure(their_head, logits, *rows)

    monkeypatch.setattr(tokens, "_measure", look)
    hidden, head, targets, *beside = states
    chained(hidden, head, targets, lambda v: (LOSSES["tdpo2"](v), None), Beside(*beside))
    assert seen == [8, 8, 6] * 2


def test_without_a_reference_its_side_is_nought(states: tuple[Tensor, ...]) -> None:
    hidden, head, targets, *_ = states
    values = compared(hidden, head, targets, None)
    assert torch.allclose(values.logprobs, whole(*states).logprobs.detach(), rtol=1e-12)
    assert not values.reference.any() and not values.divergences.any()


def test_the_divergence_by_hand() -> None:
    """Reference 1/2, 1/2 against 3/4, 1/4: (ln 2/3 + ln 2) / 2 = ln(4/3) / 2 = 0.1438410."""
    hidden, head = torch.ones(1, 1).double(), torch.tensor([[3.0], [1.0]]).double().log()
    their_head = torch.zeros(2, 1).double()
    values = compared(hidden, head, torch.tensor([0]), Beside(hidden, their_head))
    assert [float(one) for one in values] == pytest.approx([-0.2876821, -0.6931472, 0.1438410])
