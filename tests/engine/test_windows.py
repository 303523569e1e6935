"""Windowed layers: what no later token sees is given back, and never shows in an answer."""

from collections.abc import Callable
from operator import mul
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.engine.pages import Cache, page_keys, pages_for
from attending.engine.sampler import Sampling
from attending.engine.scheduler import Request, Scheduler
from attending.engine.server import EngineOptions, _fitting_tokens
from attending.engine.torch_runner import TorchRunner
from attending.model.architecture import PAGE_TOKENS, Architecture, page_bytes, parse_config
from tests.engine.serving import (
    GREEDY,
    Notebook,
    Told,
    Watched,
    assert_same,
    decoder,
    plainly,
    rows_of,
    serve,
    text,
)

pytestmark = pytest.mark.usefixtures("one_thread")

HYBRID: dict[str, dict[str, Any]] = {
    "baichuan_m1": {"num_swa_key_value_heads": 4, "num_swa_attention_heads": 4},
    "qwen2": {},
    "qwen3": {},
}
"""Each with a full and a windowed layer, see `serving.CONFIG`."""


def m1() -> Architecture:
    """The 14B's attention."""
    return parse_config(
        {
            "model_type": "baichuan_m1",
            "vocab_size": 133120,
            "hidden_size": 5120,
            "num_hidden_layers": 40,
            "intermediate_size": 17408,
            "num_attention_heads": 20,
            "num_key_value_heads": 2,
            "num_swa_attention_heads": 40,
            "num_swa_key_value_heads": 8,
            "sliding_window": 8192,
            "sliding_window_layers": list(range(1, 40, 2)),
            "max_position_embeddings": 32768,
        }
    )


def windowed(window: int, layers: int = 1) -> Architecture:
    """Qwen2 without a layer that sees everything."""
    config = {"sliding_window": window, "max_window_layers": 0, "num_hidden_layers": layers}
    return decoder("qwen2", **config).arch


# How many pages.


def test_groups_of_layers_are_their_windows_full_attention_first() -> None:
    assert m1().windows == (None, 8192)
    assert decoder("llama").arch.windows == (None,)
    assert windowed(20, layers=3).windows == (20,)
    assert Notebook(1, windows=(None, 7, 300)).arch.windows == (None, 7, 300)


def test_pages_of_each_group_are_what_its_sequences_can_hold() -> None:
    # 8,192 of the window and 256 new touch at most (8192 + 256 - 2) / 64 rounded up, + 1 pages.
    assert pages_for(m1(), 32 * 32768, 32) == (32 * 512, 32 * 133)
    assert pages_for(m1(), 32 * 32768, 1, 512) == (32 * 512, 137)
    assert pages_for(m1(), 100, 32) == (2, 2)  # no longer than a full layer's two pages
    assert pages_for(decoder("llama").arch, 129, 4) == (3,)
    assert pages_for(windowed(100), 64, 4) == (3,)  # 99 before a token lie in three pages
    assert pages_for(windowed(1000), 64, 4) == (8,)  # the whole context


def test_a_page_costs_what_its_groups_layers_hold() -> None:
    assert page_bytes(m1(), 2) == (20 * 2 * 2 * 256 * 65 * 2, 20 * 2 * 8 * 128 * 65 * 2)
    assert page_bytes(windowed(20, layers=3), 4) == (3 * 2 * 2 * 8 * 64 * 4,)


@pytest.mark.parametrize("make", [m1, lambda: windowed(100), lambda: decoder("llama").arch])
def test_a_server_fits_the_pages_of_all_groups_in_a_quarter_of_the_memory(
    make: Callable[[], Architecture], monkeypatch: pytest.MonkeyPatch
) -> None:
    arch = make()
    weights, pages = 4 * arch.num_parameters(), page_bytes(arch, 4)
    model: Any = SimpleNamespace(arch=arch, weight_bytes=weights, page_bytes=pages)

    def size(tokens: int) -> int:
        return sum(map(mul, pages_for(arch, tokens, 4), page_bytes(arch, 4)))

    most = 4 * arch.context
    for room in (size(64), size(most) // 2, size(most) - 1, size(most), size(most) + 9**9):
        memory = {"memory_bytes": 4 * room + weights}
        monkeypatch.setattr("attending.mesh.hardware", lambda memory=memory: memory)
        tokens = _fitting_tokens(model, EngineOptions(max_running=4))
        assert size(tokens) <= max(room, size(64))
        assert tokens == most or size(tokens + 64) > room
        assert (tokens == most) == (room >= size(most))


def test_memory_bounds_an_answer_only_where_a_layer_sees_everything() -> None:
    for num_pages, context in (((3, 8), 192), ((8, 3), 512), ((8, 2), 128), ((8, 1), 64)):
        scheduler = Scheduler(Notebook(num_pages, windows=(None, 100)))
        assert scheduler.context == context, num_pages
    assert Scheduler(Notebook(3, windows=(100,))).context == 512
    assert Scheduler(Notebook(3, windows=(100,)), context=300).context == 300
    assert Scheduler(Notebook(2, windows=(100,))).context == 128


# What is held.


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 66, 100, 128, 200])
@pytest.mark.parametrize("step_tokens", [1, 50, 256])
def test_a_long_sequence_holds_what_its_window_spans(window: int, step_tokens: int) -> None:
    notebook = Notebook((8, 8), windows=(None, window))
    runner = Watched(notebook)
    scheduler = Scheduler(runner, step_tokens=step_tokens)
    request = Request(text(300), Sampling(temperature=0.0))
    (told,) = serve(scheduler, request)
    assert_same(told, plainly(lambda ids: notebook.row(ids)[None], request, 512))
    for (span,) in runner.steps:
        held = (span.pages[1] >= 0).sum()
        assert held <= -(-(window + len(span.ids)) // PAGE_TOKENS) + 1
        assert (span.pages[0] >= 0).all()


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 66, 100, 128, 200])
def test_the_least_pages_are_enough_for_any_length_and_step(window: int) -> None:
    (least,) = pages_for(windowed(window), 1, 1, step_tokens=1)
    notebook = Notebook((least,), windows=(window,))
    scheduler = Scheduler(Watched(notebook))
    requests = [Request(text(300, seed=s), Sampling(temperature=0.0)) for s in range(2)]
    told = serve(scheduler, *requests)
    for got, request in zip(told, requests, strict=True):
        assert len(got.tokens) == 212
        assert_same(got, plainly(lambda ids: notebook.row(ids)[None], request, 512))


def test_an_answer_that_goes_on_gives_its_pages_to_others() -> None:
    notebook = Notebook((16, 5), windows=(None, 65))
    scheduler = Scheduler(Watched(notebook), step_tokens=64)
    # Two whole contexts together would need 16 pages of each group.
    requests = [Request(text(20, seed=s), Sampling(temperature=0.0)) for s in range(2)]
    handles = [scheduler.submit(request) for request in requests]
    told = {handle: Told() for handle in handles}
    most = 0
    while scheduler.num_running or scheduler.num_waiting:
        for output in scheduler.step():
            told[output.handle].add(output)
        most = max(most, 5 - scheduler.pages.groups[1].num_available)
    assert scheduler.counters.preempted == 0 and most <= 4
    for got, request in zip(told.values(), requests, strict=True):
        assert_same(got, plainly(lambda ids: notebook.row(ids)[None], request, 512))


# What is found again.


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_the_longest_beginning_that_can_go_on_is_found(data: st.DataObject) -> None:
    windows = data.draw(st.sampled_from([(None,), (None, 1), (None, 100), (65, 200), (128,)]))
    length = data.draw(st.integers(0, 9))
    keys = page_keys([3] * PAGE_TOKENS * length)
    cache = Cache(windows, [9] * len(windows), 64)
    there = []
    for group in cache.groups:
        there.append(data.draw(st.sets(st.integers(0, max(0, length - 1)), max_size=length)))
        there[-1] |= data.draw(st.sampled_from([set(), set(range(length))]))
        for index in there[-1] & set(range(length)):
            page = group.take()
            assert page is not None
            group.publish(page, keys[index])
            group.release([page])

    def goes_on(pages: int) -> bool:
        """A token at the end reads the `window - 1` before it, and M1's the raw row of the last."""
        for window, mine in zip(windows, there, strict=True):
            end = pages * PAGE_TOKENS
            first = 0 if window is None else max(0, min(end - window + 1, end - 1))
            if not {at // PAGE_TOKENS for at in range(first, end)} <= mine:
                return False
        return True

    wanted = max(pages for pages in range(length + 1) if goes_on(pages))
    assert cache.find(keys) == wanted
    table = cache.hold(keys[:wanted])
    for window, held in zip(windows, table, strict=True):
        gone = 0 if window is None else max(0, wanted * 64 + 1 - max(window, 2)) // 64
        assert [page < 0 for page in held] == [at < gone for at in range(wanted)]
    cache.release(table)
    assert cache.num_available == cache.num_pages and table == [[] for _ in windows]


@pytest.mark.parametrize("window", [1, 40, 65, 130])
@pytest.mark.parametrize("family", HYBRID)
def test_a_beginning_whose_early_pages_are_gone_goes_on_rightly(family: str, window: int) -> None:
    model = decoder(family, sliding_window=window, **HYBRID[family])
    runner = Watched(TorchRunner(model, (16, 6)))
    scheduler = Scheduler(runner, step_tokens=64)
    rows = rows_of(model)
    long = Request(text(330), GREEDY.replace(max_tokens=3), num_top=1)
    serve(scheduler, long)
    # Another text takes the room of the oldest idle pages: those that the window left first.
    serve(scheduler, Request(text(150, seed=1), GREEDY.replace(max_tokens=3)))
    runner.steps.clear()
    (again,) = serve(scheduler, long)
    assert again.cached_tokens == 320
    (span,) = runner.steps[0]
    gone = max(0, 321 - max(window, 2)) // 64
    assert (span.pages[1] < 0).sum() == gone > 0
    assert_same(again, plainly(rows, long, 512))
    # A shorter beginning of it ends where the window's pages are no more: it is computed anew.
    short = Request(text(330)[:140], GREEDY.replace(max_tokens=3), num_top=1)
    (told,) = serve(scheduler, short)
    assert told.cached_tokens < 128
    assert_same(told, plainly(rows, short, 512))
    (once_more,) = serve(scheduler, short)
    assert once_more.cached_tokens == 128
    assert_same(once_more, plainly(rows, short, 512))


def test_a_windowed_page_that_is_given_back_is_shared_while_it_is_idle() -> None:
    runner = Watched(Notebook((16, 16), windows=(None, 70)))
    scheduler = Scheduler(runner, step_tokens=50)
    one = Request(text(300), GREEDY.replace(max_tokens=1))
    told = serve(scheduler, *[one] * 3, Request(text(300)[:100], GREEDY.replace(max_tokens=1)))
    assert [t.cached_tokens for t in told] == [0, 256, 256, 64]
    assert runner.num_tokens == 300 + 2 * 44 + 36


def test_no_step_reads_a_page_that_was_given_back() -> None:
    """Every page that no sequence of a step holds is filled with what is not a number."""
    model = decoder("baichuan_m1", sliding_window=66)
    inner = TorchRunner(model, (8, 6))

    class Spoiling:
        arch, num_pages = inner.arch, inner.num_pages

        def step(self, spans: Any) -> Any:
            for spec in inner.arch.layers:
                group = inner.arch.windows.index(spec.window)
                held = {int(page) for span in spans for page in span.pages[group]}
                free = sorted(set(range(inner.num_pages[group])) - held)
                pool = inner._pools[0]
                for kept in (pool.keys, pool.values, pool.raw_keys, pool.raw_values):
                    kept[spec.index][free] = np.nan
            return inner.step(spans)

    request = Request(text(200), Sampling(temperature=0.0, max_tokens=200), num_top=1)
    (told,) = serve(Scheduler(Spoiling(), step_tokens=90), request)
    assert_same(told, plainly(rows_of(model), request, 512))
