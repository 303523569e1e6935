"""An answer depends on its own request alone, whatever else is being served."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from attending.engine.sampler import Sampling
from attending.engine.scheduler import Request, Scheduler
from attending.engine.torch_runner import TorchRunner
from attending.model.architecture import PAGE_TOKENS
from attending.model.attend import Packed, Paged, Rows
from tests.engine.serving import (
    BORDERS,
    Notebook,
    Told,
    Watched,
    assert_same,
    paged,
    plainly,
    rows_of,
    serve,
    text,
)
from tests.model.tiny import FAMILIES, build, configs, pool_of, tables

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
SPANS = (1, 2, 5, 63, 64, 65, 100, 128, 130, 200)
penalties = st.sampled_from([0.0, -1.0, 0.5, 2.0])


pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def samplings(draw: st.DrawFn, vocab: int) -> Sampling:
    return Sampling(
        temperature=draw(st.sampled_from([0.0, 0.7, 1.5])),
        top_k=draw(st.sampled_from([0, 3])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        presence_penalty=draw(penalties),
        frequency_penalty=draw(penalties),
        logit_bias=draw(st.sampled_from([(), ((vocab - 1, 2.0), (0, -5.0))])),
        seed=draw(st.integers(0, 3)),
        max_tokens=draw(st.integers(0, 8)),
    )


@st.composite
def crowds(draw: st.DrawFn, vocab: int, longest: int = 140) -> list[tuple[int, Request]]:
    """Requests with the step each arrives before; many begin alike."""
    lengths = st.one_of(st.sampled_from(BORDERS), st.integers(1, longest))
    crowd = []
    for _ in range(draw(st.integers(2, 6))):
        length = draw(lengths)
        shared = draw(st.sampled_from([0, 1, *BORDERS, longest]))
        own = text(length, seed=draw(st.integers(0, 2)), vocab=vocab)
        ids = (text(longest, seed=9, vocab=vocab)[:shared] + own)[:length]
        request = Request(
            ids,
            draw(samplings(vocab)),
            draw(st.sampled_from([frozenset(), frozenset({1, 2})])),
            num_top=draw(st.sampled_from([None, 0, 2])),
            num_prompt_top=draw(st.sampled_from([None, None, 0, 1])),
        )
        crowd.append((draw(st.integers(0, 12)), request))
    return crowd


def arrive(scheduler: Scheduler, crowd: list[tuple[int, Request]], most_tokens: int) -> list[Told]:
    """Each before its step; a step never has more tokens than it may."""
    told: dict[int, Told] = {}
    place: dict[int, int] = {}
    runner = scheduler._runner
    assert isinstance(runner, Watched)
    for step in itertools.count():
        for index, (arrival, request) in enumerate(crowd):
            if arrival == step:
                handle = scheduler.submit(request)
                told[handle], place[handle] = Told(), index
        outputs = scheduler.step()
        for output in outputs:
            told[output.handle].add(output)
        assert not runner.steps or sum(len(s.ids) for s in runner.steps[-1]) <= most_tokens
        is_idle = not scheduler.num_running and not scheduler.num_waiting
        if is_idle and len(told) == len(crowd):
            break
        assert step < 5_000, "nothing moves any more"
    assert scheduler.pages.num_available == scheduler.pages.num_pages
    for handle, got in told.items():
        request = crowd[place[handle]][1]
        assert got.cached_tokens % PAGE_TOKENS == 0 and got.cached_tokens < len(request.ids)
        assert not got.cached_tokens or request.num_prompt_top is None or len(request.ids) == 1
    return [told[h] for h in sorted(told, key=place.__getitem__)]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_request_in_a_crowd_is_answered_as_if_it_were_alone(
    family: str, data: st.DataObject
) -> None:
    config = data.draw(configs(family)) | {"max_position_embeddings": 512}
    model = build(config, dtype=torch.float64)
    crowd = data.draw(crowds(config["vocab_size"]))
    most_tokens = data.draw(st.sampled_from([7, 64, 100, 256]))
    scheduler = Scheduler(
        Watched(paged(model, data.draw(st.integers(3, 14)))),
        max_running=data.draw(st.sampled_from([1, 2, 32])),
        step_tokens=most_tokens,
    )
    rows = rows_of(model)
    told = arrive(scheduler, crowd, most_tokens)
    for got, (_, request) in zip(told, crowd, strict=True):
        assert_same(got, plainly(rows, request, scheduler.context))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "baichuan_m1"])
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_crowd_that_leaves_its_windows_behind_is_answered_as_if_each_were_alone(
    family: str, data: st.DataObject
) -> None:
    window, layers = data.draw(st.sampled_from(SPANS)), data.draw(st.integers(1, 3))
    config = data.draw(configs(family)) | {
        "max_position_embeddings": 512,
        "num_hidden_layers": layers,
        "sliding_window": window,
        "sliding_window_layers": sorted(data.draw(st.sets(st.integers(0, layers - 1)))),
        "use_sliding_window": True,
        "max_window_layers": data.draw(st.integers(0, layers - 1)),
    }
    model = build(config, dtype=torch.float64)
    crowd = data.draw(crowds(config["vocab_size"], longest=330))
    most_tokens = data.draw(st.sampled_from([7, 64, 100, 256]))
    num_pages = [
        data.draw(st.integers(6, 14)) if kind is None else data.draw(pages_of(kind))
        for kind in model.arch.windows
    ]
    scheduler = Scheduler(
        Watched(TorchRunner(model, num_pages)),
        max_running=data.draw(st.sampled_from([2, 32])),
        step_tokens=most_tokens,
    )
    rows = rows_of(model)
    told = arrive(scheduler, crowd, most_tokens)
    for got, (_, request) in zip(told, crowd, strict=True):
        assert_same(got, plainly(rows, request, scheduler.context))


def pages_of(window: int) -> st.SearchStrategy[int]:
    """From the least that a sequence can go on with."""
    least = -(-max(window - 1, 1) // PAGE_TOKENS) + 1
    return st.integers(least, least + 6)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_answer_is_a_function_of_its_own_text(data: st.DataObject) -> None:
    """Many more crowds, over pages that hold nothing but the text: see `Notebook`."""
    drawn = sorted(data.draw(st.sets(st.sampled_from(SPANS), max_size=2)))
    full = () if drawn and data.draw(st.booleans()) else (None,)
    windows = (*full, *drawn)
    num_pages = tuple(
        data.draw(st.integers(3, 9)) if window is None else data.draw(pages_of(window))
        for window in windows
    )
    notebook = Notebook(num_pages, vocab=20, windows=windows)
    most_tokens = data.draw(st.sampled_from([1, 7, 64, 100]))
    scheduler = Scheduler(
        Watched(notebook),
        max_running=data.draw(st.sampled_from([1, 2, 5, 32])),
        step_tokens=most_tokens,
    )
    crowd = [
        (arrival, Request(r.ids, r.sampling, r.stop_ids, r.num_top))
        if data.draw(st.booleans())
        else (arrival, r)
        for arrival, r in data.draw(crowds(20))
    ]

    def rows(ids: Sequence[int]) -> NDArray[np.float32]:
        return np.stack([notebook.row(ids[: at + 1]) for at in range(len(ids))])

    told = arrive(scheduler, crowd, most_tokens)
    for got, (_, request) in zip(told, crowd, strict=True):
        assert_same(got, plainly(rows, request, scheduler.context))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_single_rows_of_any_lengths_as_one_batch_equal_one_by_one(
    family: str, data: st.DataObject
) -> None:
    config = data.draw(configs(family)) | {"max_position_embeddings": 512}
    if config.get("sliding_window"):
        config["sliding_window"] = data.draw(st.sampled_from([1, 5, 63, 64, 65, 130]))
    model = build(config, dtype=torch.float64)
    lengths = data.draw(
        st.lists(st.one_of(st.sampled_from(BORDERS), st.integers(1, 200)), min_size=2, max_size=9)
    )
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randint(config["vocab_size"], (n,), generator=generator) for n in lengths]
    pool = pool_of(model, 4 * len(texts))
    for kept in (pool.keys, pool.values, pool.raw_keys, pool.raw_values):
        for layer in kept:  # what others left behind
            layer.normal_(generator=generator)
    order = torch.randperm(4 * len(texts), generator=generator)
    orders = [order[4 * i : 4 * i + -(-n // PAGE_TOKENS)] for i, n in enumerate(lengths)]
    # All but the last token are there; one text in some batches is read whole beside the others.
    whole = data.draw(st.integers(-1, len(texts) - 1))
    rows = []
    for index, (ids, table) in enumerate(zip(texts, orders, strict=True)):
        done = 0 if index == whole else len(ids) - 1
        if done:
            model(ids[:done], Paged(pool, [Rows(0, tables(model.arch, table, 0), done)]))
        rows.append(Rows(done, tables(model.arch, table, done), len(ids) - done))
    new = torch.cat([ids[row.cached :] for ids, row in zip(texts, rows, strict=True)])
    together = model.logits(model(new, Paged(pool, rows)))
    alone = [
        model.logits(model(ids, Packed([len(ids)])))[row.cached :]
        for ids, row in zip(texts, rows, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


def test_one_that_gives_its_pages_back_within_a_step_is_not_run_in_it() -> None:
    """An answer is planned before an older prompt, which then needs the page it just took."""
    notebook = Notebook(num_pages=7)
    scheduler = Scheduler(Watched(notebook), step_tokens=3)
    old = Request(text(300), Sampling(temperature=0.0, max_tokens=2))
    young = Request((1,), Sampling(temperature=0.0, max_tokens=200))
    told = serve(scheduler, old, young)
    assert scheduler.counters.preempted > 0
    for got, request in zip(told, (old, young), strict=True):
        assert_same(got, plainly(lambda ids: notebook.row(ids)[None], request, 448))
