"""The policy's loss by hand, by property, and through chunks of logits."""

from dataclasses import replace
from math import log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attending.model import scoring
from attending.rl import loss as policy
from attending.rl.batch import collate
from attending.rl.loss import Objective, Tokens, answer_values, differentiated, policy_loss
from attending.rl.shared import Shared
from attending.rl.types import Batch
from tests.model.tiny import build
from tests.rl.making import groups_of
from tests.rl.test_shared import M1

TOLD = Objective(num_samples=2, max_tokens=4)
GSPO = TOLD._replace(level="sequence", eps_low=0.5, eps_high=0.5)


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tokens(ratios: Tensor, advantages: Tensor, answers: list[int], apart: Tensor) -> Tokens:
    """With these pi / pi_old and pi_old / pi_sampler."""
    old = torch.full_like(ratios, -1.5)
    now = (old + ratios.log()).requires_grad_()
    return Tokens(now, old, old - apart.log(), advantages, torch.tensor(answers))


def test_two_answers_by_hand() -> None:
    told = tokens(row(2, 1.1, 0.5, 2), row(1, 1, -1, -1), [0, 0, 1, 1], row(1, 1, 1, 1))
    found = policy_loss(told, TOLD)
    # min(2, 1.28) + 1.1 + min(-0.5, -0.8) - 2 = -0.42, over 2 answers and l_max 4
    assert float(found.loss.detach()) == pytest.approx(0.0525)
    assert found.is_clipped.tolist() == [True, False, True, False]
    (slopes,) = torch.autograd.grad(found.loss, told.logprobs)
    assert slopes.tolist() == pytest.approx([0, -1.1 / 8, 0, 2 / 8])  # -r A / 8


def test_the_upper_bound_is_the_higher_one() -> None:
    told = tokens(row(1.25, 0.75), row(1, -1), [0, 1], row(1, 1))
    assert policy_loss(told, TOLD).is_clipped.tolist() == [False, True]


def test_importance_weights_by_hand() -> None:
    told = tokens(row(1, 1, 1), row(1, 1, -1), [0, 0, 1], row(3, 0.5, 1))
    found = policy_loss(told, TOLD)
    (slopes,) = torch.autograd.grad(found.loss, told.logprobs)
    assert slopes.tolist() == pytest.approx([-2 / 8, -0.5 / 8, 1 / 8])  # w = min(3, 2), 0.5, 1
    assert float(found.loss.detach()) == pytest.approx(-1.5 / 8)
    assert found.is_truncated.tolist() == [True, False, False]
    assert found.mismatch_k1.tolist() == pytest.approx([-log(3), log(2), 0])
    assert found.mismatch_k3.tolist() == pytest.approx([2 - log(3), log(2) - 0.5, 0])


def test_gspo_by_hand() -> None:
    told = tokens(row(2, 1, 0.9, 3), row(1, 1, -1, 1), [0, 0, 1, 2], row(1, 1, 1, 1))
    found = policy_loss(told, GSPO)
    # s = sqrt(2), 0.9 and 3, which is cut to 1.5; -(sqrt(2) - 0.9 + 1.5) / 2
    assert float(found.loss.detach()) == pytest.approx(-(sqrt(2) + 0.6) / 2)
    assert found.is_clipped.tolist() == [False, False, False, True]
    (slopes,) = torch.autograd.grad(found.loss, told.logprobs)
    assert slopes.tolist() == pytest.approx([-sqrt(2) / 4, -sqrt(2) / 4, 0.45, 0])


@pytest.mark.parametrize("told", [TOLD, GSPO])
def test_the_first_update_needs_no_old_ones(told: Objective) -> None:
    known = tokens(row(1, 1, 1), row(1, 1, -1), [0, 0, 1], row(3, 0.5, 1))
    found, wanted = policy_loss(known._replace(old=None), told), policy_loss(known, told)
    assert torch.equal(found.loss, wanted.loss) and torch.equal(found.mismatch_k3, wanted[4])
    slopes = (torch.autograd.grad(one.loss, known.logprobs)[0] for one in (found, wanted))
    assert torch.equal(*slopes)


def test_the_mismatch_is_the_divergence() -> None:
    """Both estimates' means over what the sampler draws are KL(sampler || old), exactly."""
    sampler, old = row(0.5, 0.3, 0.2), row(0.6, 0.3, 0.1)
    exact = float((sampler * (sampler / old).log()).sum())
    found = policy_loss(Tokens(old.log(), None, sampler.log(), old, torch.arange(3)), TOLD)
    for estimate in (found.mismatch_k1, found.mismatch_k3):
        assert float((sampler * estimate).sum()) == pytest.approx(exact)


@pytest.mark.parametrize("told", [TOLD, GSPO])
def test_exploding_ratios_stay_numbers(told: Objective) -> None:
    now = torch.tensor([-1.0, -1, -1], requires_grad=True)
    old = torch.tensor([-200.0, -200, -1])
    gains = torch.tensor([0.0, 1, -1])
    found = policy_loss(Tokens(now, old, old.flip(0), gains, torch.tensor([0, 1, 2])), told)
    (slopes,) = torch.autograd.grad(found.loss, now)
    assert all(bool(one.isfinite().all()) for one in (*found, slopes))


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[int], Tokens]:
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    count = sum(sizes)
    now, old, sampler = torch.tensor(random.normal(-1, 0.2, (3, count)))
    number = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    gains = torch.tensor(random.normal(size=len(sizes)))[number]
    return sizes, Tokens(now.requires_grad_(), old, sampler, gains, number)


@pytest.mark.parametrize("told", [TOLD, GSPO])
@given(drawn=answers(), data=st.data())
def test_permuted_answers_have_permuted_gradients(
    told: Objective, drawn: tuple[list[int], Tokens], data: st.DataObject
) -> None:
    sizes, known = drawn
    order = data.draw(st.permutations(range(len(sizes))))
    rows = torch.cat([(known.answers == number).nonzero()[:, 0] for number in order])
    number = torch.arange(len(sizes)).repeat_interleave(torch.tensor([sizes[i] for i in order]))
    assert known.old is not None
    moved = Tokens(
        known.logprobs.detach()[rows].requires_grad_(),
        known.old[rows],
        known.sampler[rows],
        known.advantages[rows],
        number,
    )
    found, wanted = policy_loss(moved, told), policy_loss(known, told)
    assert torch.allclose(found.loss, wanted.loss, rtol=1e-9)
    ours = torch.autograd.grad(found.loss, moved.logprobs)[0]
    theirs = torch.autograd.grad(wanted.loss, known.logprobs)[0]
    assert torch.allclose(ours, theirs[rows], rtol=1e-9)


@pytest.mark.parametrize("told", [TOLD, GSPO])
@given(drawn=answers())
def test_the_gradient_is_that_of_the_formula(
    told: Objective, drawn: tuple[list[int], Tokens]
) -> None:
    """-w r A / (N l_max) where the ratio is not clipped; 1/|o| for 1/l_max in GSPO."""
    sizes, known = drawn
    found = policy_loss(known, told)
    slopes = torch.autograd.grad(found.loss, known.logprobs)[0]
    now, old = known.logprobs.detach(), known.old
    assert old is not None
    at = 0
    for size in sizes:
        mine = slice(at, at + size)
        logs, weigh, share = (now - old)[mine], (old - known.sampler)[mine], 1 / 4
        if told is GSPO:
            logs, weigh, share = logs.mean(), weigh.mean(), 1 / size
        scale = weigh.exp().clamp(max=2) * logs.exp() * share
        wanted = -scale * known.advantages[mine] / 2
        wanted = wanted.masked_fill(found.is_clipped[mine], 0)
        assert torch.allclose(slopes[mine], wanted, rtol=1e-9)
        at += size


GROUPS = groups_of([[5, 4, 1, 6], [3, 2, 7]], vocab=30)
KINDS = {"case 0": 0, "case 1": 1}
CHUNKED = [TOLD._replace(num_samples=5, max_tokens=8), GSPO._replace(num_samples=5)]


def states(batch: Batch) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(len(batch.ids), 6, dtype=torch.float64, requires_grad=True)
    return hidden, torch.randn(30, 6, dtype=torch.float64, requires_grad=True)


def whole(hidden: Tensor, head: Tensor, batch: Batch, told: Objective) -> tuple[Tensor, Tensor]:
    logs = (hidden @ head.T).log_softmax(-1)[batch.at]
    own = logs.gather(-1, batch.targets[:, None])[:, 0]
    known = Tokens(own, batch.old, batch.sampler, batch.advantages, batch.answers)
    return policy_loss(known, told).loss, -(logs.exp() * logs).sum(-1)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("told", CHUNKED, ids=["token", "sequence"])
def test_chunks_equal_whole_logits(
    told: Objective, is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "CPU_CHUNK", 8)
    batch = collate(GROUPS, KINDS)
    hidden, head = states(batch)
    if not is_first:
        logs = answer_values(hidden, head, batch).logprobs
        batch = replace(batch, old=logs + 0.3 * torch.randn(len(logs)).double())
    loss, entropies = whole(hidden, head, batch, told)
    wanted = torch.autograd.grad(2.5 * loss, (hidden, head))
    found, values = differentiated(hidden, head, batch, told)
    slopes = torch.autograd.grad(2.5 * found.loss, (hidden, head))
    for ours, exact in zip(
        (found.loss, values.entropies, *slopes), (loss, entropies, *wanted), strict=True
    ):
        assert torch.allclose(ours, exact, rtol=1e-9, atol=1e-12)
    assert all(one.abs().max() > 1e-3 for one in slopes)
    assert not values.logprobs.requires_grad and not found.mismatch_k3.requires_grad


@pytest.mark.parametrize(("told", "times"), [*zip(CHUNKED, (1, 2), strict=True)])
def test_logits_are_made_in_chunks_and_not_too_often(
    told: Objective, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "CPU_CHUNK", 8)
    seen, measure = [], policy._measure

    def look(logits: Tensor, *rows: Tensor) -> Tensor:
        seen.append(len(logits))
        return measure(logits, *rows)

    monkeypatch.setattr(policy, "_measure", look)
    batch = collate(GROUPS, KINDS)
    differentiated(*states(batch), batch, told)
    assert seen == [8, 8, 4] * times


@pytest.mark.parametrize("told", CHUNKED, ids=["token", "sequence"])
def test_a_step_is_the_same_however_it_is_cut(told: Objective) -> None:
    """N is the whole step's: two passes add up to one, and leaving out what has no gain is free."""
    model = build(M1, dtype=torch.float64)
    weights = list(model.parameters())

    def gradient(*batches: Batch) -> list[Tensor]:
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            hidden = model(batch.ids, Shared(batch.groups))
            total = total + differentiated(hidden, model.head_weight(), batch, told)[0].loss
        return list(torch.autograd.grad(total, weights))

    flat = [[replace(one, advantage=0.0) for one in GROUPS[0]], GROUPS[1]]
    turned = [GROUPS[1], GROUPS[0][::-1]]
    pairs = [
        (gradient(collate(GROUPS, KINDS)), gradient(*(collate([g], KINDS) for g in GROUPS))),
        (gradient(collate(GROUPS, KINDS)), gradient(collate(turned, KINDS))),
        (gradient(collate(flat, KINDS)), gradient(collate(flat[1:], KINDS))),
    ]
    for ours, theirs in pairs:
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
