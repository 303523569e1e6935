"""The loss by part, against whole logits and by hand."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from attending.midtrain.loss import DIVERGENCES, MixedLoss, forward_kl, reverse_kl, weigh
from attending.midtrain.recipe import PartConfig
from attending.model.architecture import parse_config
from attending.model.attend import Packed
from attending.model.decoder import Decoder
from attending.train.reader import Batch
from attending.train.step import accumulate, next_token_loss
from tests.train.making import LLAMA, M1

NAMES = ["medical", "notes", "general"]
PARTS = [
    PartConfig(share=2, domain="medical"),
    PartConfig(share=1, sources=("notes",), loss="masked_cross_entropy", weight=0.5),
    PartConfig(share=2, domain="general", loss="self_constraint", weight=2.0),
]
LENGTHS = [7, 5, 9, 4]
KINDS = [0, 1, 2, 2]


def made(model: dict[str, Any], seed: int) -> Decoder:
    decoder = Decoder(parse_config(model)).double()
    decoder.init_weights(torch.Generator().manual_seed(seed))
    return decoder


def batch(lengths: list[int] = LENGTHS, kinds: list[int] = KINDS, seed: int = 0) -> Batch:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 384, (sum(lengths) + 1,), generator=random)
    weights = torch.ones(sum(lengths))
    weights[7:10] = 0  # context before a note
    each = torch.repeat_interleave(torch.tensor(kinds), torch.tensor(lengths))
    return Batch(ids[:-1], ids[1:], weights, lengths, each)


def loss_of(teacher: Decoder | None, divergence: str = "reverse") -> MixedLoss:
    constrained = torch.tensor([part.loss == "self_constraint" for part in PARTS])
    return MixedLoss(constrained, teacher, DIVERGENCES[divergence])  # type: ignore[index]


def test_divergences_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    there = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    back = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert reverse_kl(p.log() + 3, q.log() - 1).item() == pytest.approx(there, rel=1e-6)
    assert forward_kl(p.log() + 3, q.log() - 1).item() == pytest.approx(back, rel=1e-6)


def test_weights_are_the_parts_and_only_notes_are_masked() -> None:
    weighed = weigh(replace(batch(), weights=torch.zeros(25)), PARTS)
    assert weighed.weights.tolist() == [1.0] * 7 + [0.0] * 5 + [2.0] * 13
    assert weigh(batch(), PARTS).weights[7:12].tolist() == [0.0] * 3 + [0.5] * 2


@pytest.mark.parametrize("model", [LLAMA, M1])
@pytest.mark.parametrize("divergence", ["reverse", "forward"])
def test_chunks_and_kinds_equal_whole_logits(model: dict[str, Any], divergence: str) -> None:
    decoder, teacher = made(model, 0), made(model, 1).requires_grad_(False)
    mixed = weigh(batch(), PARTS)
    value, values = loss_of(teacher, divergence)(decoder, mixed, 0.1)
    value.backward()  # type: ignore[no-untyped-call]
    found = [p.grad.clone() for p in decoder.parameters()]  # type: ignore[union-attr]
    decoder.zero_grad()

    def logits(of: Decoder) -> Tensor:
        return of.logits(of(mixed.ids, Packed(LENGTHS))).log_softmax(-1)

    mine, theirs = logits(decoder), logits(teacher)
    told = -mine.gather(1, mixed.targets[:, None])[:, 0]
    first, second = (mine, theirs) if divergence == "reverse" else (theirs, mine)
    near = (first.exp() * (first - second)).sum(-1)
    wanted = torch.where(mixed.kinds == 2, near, told)
    assert torch.allclose(values, wanted.detach(), rtol=1e-9)
    whole = (wanted * mixed.weights.double() * 0.1).sum()
    whole.backward()  # type: ignore[no-untyped-call]
    assert value.item() == pytest.approx(whole.item(), rel=1e-9)
    for one, parameter in zip(found, decoder.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(one, parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_model_at_its_teacher_does_not_move_on_constrained_text() -> None:
    decoder, teacher = made(LLAMA, 0), made(LLAMA, 0).requires_grad_(False)
    only = weigh(batch([9, 4], [2, 2]), PARTS)
    found = accumulate(decoder, [only], loss_of(teacher), 1, NAMES)
    assert found.loss == pytest.approx(0, abs=1e-12) and found.norm == pytest.approx(0, abs=1e-12)


def test_without_constrained_text_the_teacher_is_not_asked() -> None:
    decoder = made(LLAMA, 0)
    plain = batch([7], [0])
    ours = accumulate(decoder, [weigh(plain, PARTS)], loss_of(None), 1, NAMES)
    decoder.zero_grad()
    theirs = accumulate(decoder, [plain], next_token_loss, 1, NAMES)
    assert ours == theirs


def test_a_text_without_a_target_does_not_change_the_gradient() -> None:
    decoder, teacher = made(LLAMA, 0), made(LLAMA, 1).requires_grad_(False)
    mixed = weigh(batch(), PARTS)
    accumulate(decoder, [mixed], loss_of(teacher), 1, NAMES)
    alone = [p.grad.clone() for p in decoder.parameters()]  # type: ignore[union-attr]
    decoder.zero_grad()
    silent = batch([11], [1], seed=5)
    silent = weigh(replace(silent, weights=torch.zeros(11)), PARTS)
    accumulate(decoder, [mixed, silent], loss_of(teacher), 1, NAMES)
    for one, parameter in zip(alone, decoder.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.allclose(one, parameter.grad, rtol=1e-9, atol=1e-14)
