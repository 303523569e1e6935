"""With a draft every answer is the one without, token for token, however it was drafted."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.engine.runner import Shape
from attending.engine.sampler import Sampling
from attending.engine.scheduler import Request, Scheduler
from tests.engine.drafting import (
    CHAIN,
    TREE,
    Foreteller,
    Recorded,
    drafted,
    head,
    natively,
    speculating,
)
from tests.engine.native_models import random_model
from tests.engine.serving import assert_same, decoder, plainly, rows_of, serve, text
from tests.model.tiny import FAMILIES, build, configs
from tests.properties.test_batching import arrive, crowds

pytestmark = pytest.mark.usefixtures("one_thread")
shapes = st.sampled_from([Shape(1), CHAIN, Shape(7), TREE, Shape(2, 3, 9)])


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_crowd_with_a_draft_is_answered_as_if_each_were_alone_without(
    family: str, data: st.DataObject
) -> None:
    """Chunks, shared beginnings, preemption, windows, penalties; rounds of every length."""
    config = data.draw(configs(family)) | {"max_position_embeddings": 512}
    model, shape = build(config, dtype=torch.float64), data.draw(shapes)
    crowd = data.draw(crowds(config["vocab_size"]))
    rows, most_tokens = rows_of(model), data.draw(st.sampled_from([16, 64, 256]))
    pages = [data.draw(st.integers(4, 14))] * len(model.arch.windows)
    context = min(512, 64 * pages[0])
    wanted = [plainly(rows, request, context) for _, request in crowd]
    texts = [(*r.ids, *told.tokens) for told, (_, r) in zip(wanted, crowd, strict=True)]
    runner = drafted(model, pages, shape)
    scheduler = speculating(
        Foreteller(runner, shape, texts),
        max_running=data.draw(st.sampled_from([1, 2, 32])),
        step_tokens=most_tokens,
    )
    told = arrive(scheduler, crowd, most_tokens)
    for got, want in zip(told, wanted, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [CHAIN, TREE])
def test_a_real_draft_changes_no_answer(family: str, shape: Shape) -> None:
    """Its own proposals, over several pages, beside a reader of a long prompt."""
    model = decoder(family)
    requests = [
        Request(
            text(60, seed=9) + text(10 * i, seed=i),
            Sampling(temperature=t, seed=i, max_tokens=40),
            speculate=i != 3,
        )
        for i, t in enumerate((0.0, 0.8, 0.0, 0.8, 1.5), start=1)
    ]
    rows = rows_of(model)
    scheduler = speculating(Recorded(drafted(model, 12, shape)), step_tokens=64)
    told = serve(scheduler, *requests)
    for got, request in zip(told, requests, strict=True):
        assert_same(got, plainly(rows, request, scheduler.context))
    assert scheduler.speculation is not None and scheduler.speculation.rounds > 20


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv", ["float16", "int8"])
def test_natively_a_draft_changes_no_bit(family: str, kv: str) -> None:
    """Log-probabilities too: they come from the very logits that one row alone has."""
    model = random_model(family)
    requests = [
        Request(
            text(100, seed=9)[: 64 + 7 * i] + text(20 + i, seed=i),
            Sampling(temperature=t, seed=i, max_tokens=40),
            num_top=2,
        )
        for i, t in enumerate((0.0, 0.8, 0.0, 1.2, 0.8))
    ]
    alone = []
    runner = natively(model, head(model), Shape(5), kv=kv)
    for request in requests:
        (told,) = serve(Scheduler(natively(model, None, kv=kv)), request)
        alone.append(told)
    texts = [(*r.ids, *told.tokens) for told, r in zip(alone, requests, strict=True)]
    for drafter in (Recorded(runner), Foreteller(runner, Shape(5), texts)):
        scheduler = speculating(drafter, step_tokens=48)
        crowd = serve(scheduler, *requests)
        assert [told.tokens for told in crowd] == [told.tokens for told in alone]
        assert [told.scores for told in crowd] == [told.scores for told in alone]
        assert scheduler.speculation is not None and scheduler.speculation.rounds > 10
