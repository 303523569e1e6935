"""One prompt for all of its answers gives what a sequence for each gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attending.model.attend import Packed
from attending.model.decoder import Decoder
from attending.rl.batch import collate
from attending.rl.shared import Shared
from attending.rl.types import Sample
from tests.model.tiny import FAMILIES, build, configs
from tests.rl.making import groups_of

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
M1 = {
    "model_type": "baichuan_m1",
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_swa_attention_heads": 4,
    "num_swa_key_value_heads": 2,
    "sliding_window": 3,
    "sliding_window_layers": [1],
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
Shape = list[int]
shapes = st.lists(
    st.tuples(
        st.one_of(st.integers(1, 12), st.sampled_from([63, 64, 130])),
        st.lists(st.integers(1, 9), min_size=1, max_size=4),
    ).map(lambda found: [found[0], *found[1]]),
    min_size=1,
    max_size=3,
)


def together(model: Decoder, groups: list[list[Sample]]) -> Tensor:
    batch = collate(groups, {f"case {i}": 0 for i in range(len(groups))})
    hidden: Tensor = model(batch.ids, Shared(batch.groups))
    return model.logits(hidden[batch.at])


def apart(model: Decoder, groups: list[list[Sample]]) -> Tensor:
    found = []
    for one in (sample.rollout for group in groups for sample in group):
        ids = torch.tensor([*one.prompt, *one.ids[:-1]])
        found.append(model(ids, Packed([len(ids)]))[len(one.prompt) - 1 :])
    return model.logits(torch.cat(found))


def check(model: Decoder, groups: list[list[Sample]]) -> None:
    """Logits, and the gradients of one sum of them by every weight."""
    weights = list(model.parameters())
    found, wanted = together(model, groups), apart(model, groups)
    torch.testing.assert_close(found, wanted, **CLOSE)
    slopes = torch.randn(wanted.shape, dtype=wanted.dtype)
    both = (torch.autograd.grad(logits, weights, slopes) for logits in (found, wanted))
    for ours, theirs in zip(*both, strict=True):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * max(scale, 1.0))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_shared_prompts_equal_separate_sequences(family: str, data: st.DataObject) -> None:
    config = data.draw(configs(family)) | {"max_position_embeddings": 256}
    model = build(config, dtype=torch.float64)
    check(model, groups_of(data.draw(shapes), config["vocab_size"], data.draw(st.integers(0, 9))))


@pytest.mark.parametrize("window", [1, 2, 3, 5, 7, 8, 64])
def test_baichuan_m1_with_windows_around_the_prompts_end(window: int) -> None:
    model = build(M1 | {"sliding_window": window}, dtype=torch.float64)
    check(model, groups_of([[4, 6, 1, 3], [1, 1, 1], [9, 2]], 30))


def test_an_answer_does_not_see_its_siblings() -> None:
    model = build(M1, dtype=torch.float64)
    groups = groups_of([[4, 6, 5]], 30)
    other = groups_of([[4, 6, 5]], 30, seed=1)[0][1].rollout.ids
    was = together(model, groups)
    sibling = groups[0][1].rollout
    changed = type(sibling)("case 0", sibling.prompt, other, sibling.logprobs, "stop", 0, 0)
    now = together(model, [[groups[0][0], Sample(changed, 0.0, 0.0)]])
    assert torch.equal(was[:6], now[:6]) and not torch.equal(was[7:], now[7:])


def test_positions_by_hand() -> None:
    attend = Shared([[3, 2, 0, 1], [1, 2]])
    assert attend.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    rows = torch.arange(1.0, 10)[:, None, None]
    before, _ = attend.previous(build(M1).arch.layers[0], rows, rows)
    # the first of both answers follows the prompt's last row, 3
    assert before.flatten().tolist() == [0, 1, 2, 3, 4, 3, 0, 7, 8]


def test_no_mask_spans_the_batch() -> None:
    model = build(M1, dtype=torch.float64)
    attend = Shared([[20, 6, 6, 4], [20, 6, 5]])
    model(torch.zeros(67, dtype=torch.int64), attend)
    assert {tuple(mask.shape) for mask in attend._masks.values()} == {(6, 26), (20, 20), (6, 8)}


def test_half_precision_is_attended_to_in_float32() -> None:
    model = build(M1)
    wide = together(model, groups_of([[4, 6, 5]], 30))
    half = together(model.to(torch.bfloat16), groups_of([[4, 6, 5]], 30))
    assert half.dtype == torch.float32 and float((wide - half).detach().abs().max()) < 0.3
