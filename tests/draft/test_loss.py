"""The unrolled loss: against drafting with a cache, slot by slot, and to full acceptance."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attending.draft.estimate import operations
from attending.draft.loss import Unrolled, UnrolledLoss, alive, read, unroll
from attending.draft.recipe import DraftConfig
from attending.draft.target import TorchTarget
from attending.draft.watch import Foreseen, figures, foresee
from attending.model import scoring
from attending.model.architecture import parse_config
from attending.model.attend import Packed, Paged, PagePool, Rows
from attending.model.decoder import Decoder, Features
from attending.model.eagle import Eagle
from attending.model.eagle_files import choose_vocabulary, eagle_config
from attending.train.reader import Batch
from attending.train.step import accumulate
from tests.train.making import LLAMA, M1

STEPS = 4
DEEP = {**LLAMA, "num_hidden_layers": 8, "initializer_range": 0.2}
DEEP_M1 = {**M1, "num_hidden_layers": 8, "initializer_range": 0.2}


def models(model: dict[str, Any], size: int = 200, **how: Any) -> tuple[Decoder, Eagle]:
    """A frozen target and a draft that is not at its start."""
    target = Decoder(parse_config(model)).double()
    target.init_weights(torch.Generator().manual_seed(0))
    target.requires_grad_(False)
    eagle = Eagle(eagle_config(target.arch, size, **how)).double()
    counts = np.random.default_rng(1).integers(1000, size=target.arch.vocab_size)
    d2t, t2d = choose_vocabulary(counts, size, [1])
    eagle.d2t.copy_(torch.from_numpy(d2t))
    eagle.t2d.copy_(torch.from_numpy(t2d))
    eagle.init_weights(target.head_weight(), target.model.norm.weight, seed=1)
    return target, eagle


def seen_by(target: Decoder) -> TorchTarget:
    """All of its distribution."""
    return TorchTarget(target, target.arch.vocab_size)


def batch(lengths: tuple[int, ...] = (9, 6), context: tuple[int, ...] = (3, 2)) -> Batch:
    """Dialogues whose first so many targets are a prompt's."""
    random = torch.Generator().manual_seed(2)
    whole = [torch.randint(0, 384, (length + 1,), generator=random) for length in lengths]
    weights = torch.ones(sum(lengths))
    for start, count in zip(np.cumsum([0, *lengths]), context, strict=False):
        weights[start : start + count] = 0
    ids, targets = (torch.cat([one[at] for one in whole]) for at in (slice(-1), slice(1, None)))
    return Batch(ids, targets, weights, list(lengths), torch.zeros(sum(lengths), dtype=torch.int64))


def drafted(target: Decoder, eagle: Eagle, one: Batch, slot: int, steps: int) -> list[Tensor]:
    """States of a chain that begins at a slot of a single dialogue, as an engine makes them.

    The prompt's pass fills the cache, then each step appends one row: the text's next token beside
    the head's own last state.
    """
    asked = Features(eagle.config.layers)
    target(one.ids, Packed(one.lengths), asked)
    features, embed = asked.whole()[: slot + 1], target.model.embed_tokens
    pool, pages = PagePool(eagle.arch, [2], torch.float64), [torch.tensor([1])]
    first = Paged(pool, [Rows(0, pages, slot + 1)])
    # The feature of position t is beside the token of t + 1.
    found = [eagle(embed(one.targets[: slot + 1]), eagle.fc(features), first)[-1]]
    for step in range(1, steps):
        row = Paged(pool, [Rows(slot + step, pages, 1)])
        found.append(eagle(embed(one.targets[slot + step][None]), found[-1][None], row)[0])
    return found


@pytest.mark.parametrize("model", [DEEP, DEEP_M1])
@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_training_sees_what_drafting_with_a_cache_sees(model: dict[str, Any], gated: bool) -> None:
    target, eagle = models(model, gated=gated)
    together = batch()
    seen = read(seen_by(target), eagle, together)
    found = {
        (step, int(slot)): state
        for step, slots, states in unroll(eagle, together, seen, STEPS)
        for slot, state in zip(slots, states, strict=True)
    }
    starts = 0, 9
    for place, length in enumerate(together.lengths):
        alone = batch()
        at = slice(starts[place], starts[place] + length)
        alone = Batch(
            alone.ids[at], alone.targets[at], alone.weights[at], [length], alone.kinds[at]
        )
        for slot in range(length - STEPS):
            chain = drafted(target, eagle, alone, slot, STEPS)
            for step, wanted in enumerate(chain):
                if (step, starts[place] + slot) in found:
                    assert torch.allclose(found[step, starts[place] + slot], wanted, rtol=1e-9)
    # A slot is followed exactly as long as a row that counts is ahead: 9 rows, 3 of them prompt.
    lived = [[slot for step, slot in found if step == n and slot < 9] for n in range(STEPS)]
    assert lived == [[*range(9)], [*range(7)], [*range(6)], [*range(5)]]


def test_slots_live_while_a_row_ahead_counts() -> None:
    # Rows 0..4, row 3 counts: slot 2 meets it in step 0, slot 1 in step 1, slot 0 in step 2.
    weights = torch.tensor([0.0, 0, 0, 1, 0])
    ids = torch.zeros(5, dtype=torch.int64)
    found = alive(Batch(ids, ids, weights, [5], ids), 4)
    assert [one.tolist() for one in found] == [[0, 1, 2, 3, 4], [0, 1], [0], []]


@pytest.mark.parametrize("model", [DEEP, DEEP_M1])
def test_the_loss_by_hand(model: dict[str, Any]) -> None:
    target, eagle = models(model)
    one = batch((9,), (3,))
    found = accumulate(eagle, [one], UnrolledLoss(seen_by(target), STEPS, 0.8), 1, ["answers"])
    ids = torch.cat((one.ids, one.targets[-1:]))
    total, inside = torch.zeros((), dtype=torch.float64), 0
    for slot in range(8):
        states = drafted(target, eagle, one, slot, min(STEPS, 8 - slot))
        for step, state in enumerate(states):
            if not one.weights[slot + 1 + step]:
                continue  # the token to foresee, slot + 2 + step of the text, is the prompt's
            read_ids = ids[: slot + 2 + step]
            logits = target.logits(target(read_ids, Packed([len(read_ids)])))[-1]
            if not eagle.t2d[logits.argmax()]:
                continue
            inside += 1
            shares = logits[eagle.used].softmax(0)
            logs = eagle.logits(state).log_softmax(0)
            total = total - 0.8**step * (shares * logs).sum()
    assert 0 < inside < 26  # some rows count, and some of the likeliest tokens are not the draft's
    loss = total / 6  # targets of the answer
    assert found.loss == pytest.approx(loss.item(), rel=1e-9)
    grads = {name: p.grad for name, p in eagle.named_parameters()}
    eagle.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in eagle.named_parameters():
        own = grads[name]
        assert own is not None and parameter.grad is not None
        assert torch.allclose(own, parameter.grad, rtol=1e-8, atol=1e-12), name


def test_chunks_and_passes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    target, eagle = models(DEEP)
    loss, found = UnrolledLoss(seen_by(target), STEPS, 0.8), []
    one, other = batch((12,), (2,)), batch((7, 5), (3, 1))
    ids, targets, weights = (
        torch.cat((getattr(one, k), getattr(other, k))) for k in ("ids", "targets", "weights")
    )
    both = Batch(ids, targets, weights, [12, 7, 5], torch.zeros(24, dtype=torch.int64))
    for chunk, passes in ((256, [both]), (5, [both]), (256, [one, other])):
        monkeypatch.setattr(scoring, "CPU_CHUNK", chunk)
        eagle.zero_grad()
        told = accumulate(eagle, passes, loss, 1, ["answers"])
        grads = [p.grad.clone() for p in eagle.parameters() if p.grad is not None]
        found.append((told.loss, told.norm, grads))
    for value, norm, grads in found[1:]:
        assert (value, norm) == pytest.approx(found[0][:2], rel=1e-9)
        assert all(
            torch.allclose(a, b, rtol=1e-8, atol=1e-13)
            for a, b in zip(grads, found[0][2], strict=True)
        )


def test_a_batch_of_which_nothing_counts_has_a_loss_of_nought() -> None:
    target, eagle = models(DEEP)
    found = accumulate(eagle, [batch((5,), (5,))], UnrolledLoss(seen_by(target)), 1, ["answers"])
    assert (found.loss, found.norm) == (0.0, 0.0)


# Begun so, neither target ever wavers between two tokens.
@pytest.mark.parametrize(("model", "sure", "first"), [(DEEP, 12.0, 7), (DEEP_M1, 40.0, 120)])
def test_one_dialogue_is_foreseen_whole_once_it_is_known_by_heart(
    model: dict[str, Any], sure: float, first: int
) -> None:
    target, eagle = models(model, size=384)
    target.model.norm.weight.fill_(sure)
    eagle.init_weights(target.head_weight(), target.model.norm.weight, seed=1)
    ids = [first, 3, 250]
    with torch.no_grad():
        for _ in range(20):
            hidden = target(torch.tensor(ids), Packed([len(ids)]))
            ids.append(int(target.logits(hidden[-1]).argmax()))
    assert len(set(ids)) > 10  # no single word over and over
    told, weights = torch.tensor(ids), torch.ones(22)
    weights[:2] = 0
    one = Batch(told[:-1], told[1:], weights, [22], torch.zeros(22, dtype=torch.int64))
    [before] = foresee(seen_by(target), eagle, one, 7)
    assert before.agrees.shape == (19, 7) and before.rounds(7)[1] > 10
    wanted = [min(7, left) for left in range(19, 0, -1)]
    optimizer = torch.optim.AdamW(eagle.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(300):
        accumulate(eagle, [one], UnrolledLoss(seen_by(target)), 1, ["answers"])
        optimizer.step()
        optimizer.zero_grad()
        [after] = foresee(seen_by(target), eagle, one, 7)
        if after.accepted(7).tolist() == wanted:
            break
    assert after.accepted(7).tolist() == wanted
    assert after.rounds(7) == (19, 3)  # 8 tokens a round: 7 of the draft's and one of the target's
    figured = figures("text", [after], seed=0)
    assert all(figured[f"heldout/text_acceptance@{n}"] == 1 for n in range(1, 8))


def test_acceptance_and_rounds_by_hand() -> None:
    # Five tokens after the first; the chains of depth 2 that begin at each place.
    agrees = np.array([[1, 0], [1, 1], [0, 1], [1, 1], [1, 0]], np.bool_)
    one = Foreseen(agrees)
    assert one.accepted(2).tolist() == [1, 2, 0, 2, 1]
    assert one.accepted(1).tolist() == [1, 1, 0, 1, 1]
    # Depth 2: round 1 takes one and the target's own (2 tokens), then none and its own, then 2.
    assert one.rounds(2) == (5, 3)
    told = figures("text", [one, one], seed=0)
    assert told["heldout/text_acceptance@1"] == pytest.approx(4 / 5)
    # A second token is tried where the first was right and there is one: places 0, 1 and 3.
    assert told["heldout/text_acceptance@2"] == pytest.approx(2 / 3)
    assert told["heldout/text_tokens_per_round@2"] == pytest.approx(5 / 3)


def test_later_steps_keep_their_own_keys() -> None:
    attend = Unrolled([3, 2], torch.device("cpu"))
    assert attend.positions.tolist() == [0, 1, 2, 0, 1]
    [spec] = parse_config({**LLAMA, "num_hidden_layers": 1}).layers
    attend(spec, *(torch.randn(5, n, 8) for n in (4, 2, 2)))
    attend.follow(torch.tensor([1, 3]))
    assert attend.positions.tolist() == [2, 1]
    with pytest.raises(NotImplementedError):
        attend.previous(spec, torch.zeros(1), torch.zeros(1))


def test_a_draft_begins_near_no_guess_at_all_although_its_target_shouts() -> None:
    """A stream of large states and a head that is sure: as targets have them."""
    target, eagle = models({**LLAMA, "tie_word_embeddings": False})
    with torch.no_grad():
        target.model.embed_tokens.weight.mul_(300.0)
        target.model.norm.weight.mul_(200.0)
    one = batch((40,), (3,))
    losses = []
    for is_softened in (False, True):
        eagle.init_weights(target.head_weight(), target.model.norm.weight, 0)
        features = read(seen_by(target), eagle, one).features
        assert torch.equal(eagle.fc(features), features.unflatten(-1, (3, -1))[:, -1])
        if is_softened:
            eagle.soften(features)
            heard = eagle.fc(features).square().mean(-1).sqrt()
            assert float(heard.detach().median()) == pytest.approx(0.4)
        losses.append(
            float(accumulate(eagle, [one], UnrolledLoss(seen_by(target), 1, 1.0), 1, ["a"]).loss)
        )
    words = math.log(len(eagle.d2t))
    assert losses[1] < 1.1 * words < losses[0]


def test_a_row_of_a_new_draft_looks_at_itself() -> None:
    """Of rows with other tokens its own query is nearest to its own key, in every head."""
    _, eagle = models({**LLAMA, "hidden_size": 256, "head_dim": 64})
    attention = eagle.midlayer.self_attn
    drawn = torch.randn(2, 32, 256, generator=torch.Generator().manual_seed(0)).double()
    rows = eagle.midlayer.beside(*drawn.to(attention.q_proj.weight))
    spec = attention.spec
    keys = attention.k_proj(rows).unflatten(-1, (spec.num_kv_heads, -1))
    keys = keys.repeat_interleave(spec.num_heads // spec.num_kv_heads, 1)
    queries = attention.q_proj(rows).unflatten(-1, (spec.num_heads, -1))
    nearest = torch.einsum("tnh,snh->nts", queries, keys).argmax(-1)
    assert torch.equal(nearest, torch.arange(32).expand_as(nearest))


def test_the_operations_are_those_that_torch_counts() -> None:
    """Forward and backward, of a dialogue of which a third is a prompt."""
    target, eagle = models(DEEP, size=384)
    one = batch((90,), (30,))
    with FlopCounterMode(display=False) as counter:
        UnrolledLoss(seen_by(target), STEPS)(eagle, one, 1.0)[0].backward()
    told = {"model": "m", "prompts": {"p": {"path": "p"}}, "epochs": 1.0, "context": 90}
    told |= {"unroll": STEPS, "batch": {"tokens": 90, "micro_tokens": 90}}
    told |= {
        "optimizer": {"peak": 1e-2, "final": 1e-3, "warmup_tokens": 0},
        "state": {"every_tokens": 90},
    }
    config = DraftConfig.build({**told, "heldout": {"every_tokens": 90}})
    look, own = operations(target.arch, eagle.config, config, answers=60 / 90)
    # Torch does not count a processor's fused attention, and counts what a mask leaves out.
    assert counter.get_total_flops() / 90 == pytest.approx(look + own, rel=0.2)
