"""The scheduler: what is shared, cut, taken away and cancelled never shows in an answer."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from attending.engine.sampler import Sampling
from attending.engine.scheduler import SCORED_ROWS, Request, Scheduler
from attending.errors import CheckpointError, ContextError, UsageError
from attending.model.architecture import PAGE_TOKENS
from attending.model.attend import Packed
from tests.engine.serving import (
    BORDERS,
    GREEDY,
    Failing,
    Notebook,
    Odd,
    Told,
    Watched,
    assert_same,
    decoder,
    paged,
    plainly,
    rows_of,
    serve,
    text,
)
from tests.model.tiny import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")


# One at a time.


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_that_goes_on_equals_one_from_scratch(family: str) -> None:
    model = decoder(family)
    scheduler = Scheduler(paged(model, 8))
    prompt = text(100)
    for more in ((), (3, 1, 4), (1, 5)):
        # Each turn repeats what was said; the last one departs from it in the middle.
        prompt = (*(prompt if more != (1, 5) else prompt[:70]), *more)
        request = Request(prompt, GREEDY)
        (told,) = serve(scheduler, request)
        assert_same(told, plainly(rows_of(model), request, 512))
        prompt = (*prompt, *told.tokens)
    assert told.cached_tokens == PAGE_TOKENS


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others() -> None:
    scheduler = Scheduler(paged(decoder("qwen3"), 8))
    first, second, other, free, freer = (
        told.tokens
        for told in serve(
            scheduler,
            *(
                Request((1, 2, 3), Sampling(temperature=1.0, seed=seed, max_tokens=30))
                for seed in (5, 5, 6, None, None)
            ),
        )
    )
    assert first == second != other
    assert free != freer  # without a seed each answer draws its own


def test_an_answer_ends_at_its_limit_at_the_end_of_the_context_and_at_a_stop_id() -> None:
    scheduler = Scheduler(Notebook(num_pages=2))
    limited, full, last, asked = serve(
        scheduler,
        Request(text(10), GREEDY),
        Request(text(120), Sampling(temperature=0.0)),
        Request(text(127), Sampling(temperature=0.0)),
        Request(text(120), Sampling(temperature=0.0, max_tokens=9)),
    )
    assert [len(t.tokens) for t in (limited, full, last, asked)] == [20, 8, 1, 8]
    assert {t.finish for t in (limited, full, last, asked)} == {"length"}
    stop = limited.tokens[4]
    at = limited.tokens.index(stop)
    (stopped,) = serve(scheduler, Request(text(10), GREEDY, frozenset({stop})))
    assert (stopped.tokens, stopped.finish) == (limited.tokens[: at + 1], "stop")
    exact = Sampling(temperature=0.0, max_tokens=at + 1)
    (both,) = serve(scheduler, Request(text(10), exact, frozenset({stop})))
    assert both.finish == "stop"


def test_context_is_the_least_of_what_is_asked_the_model_and_the_pages() -> None:
    assert Scheduler(Notebook(num_pages=2)).context == 128
    assert Scheduler(Notebook(num_pages=100)).context == 512
    assert Scheduler(Notebook(num_pages=100), context=100).context == 100
    scheduler = Scheduler(Notebook(num_pages=1), context=10)
    (told,) = serve(scheduler, Request((1, 2, 3), Sampling(temperature=0.0)))
    assert len(told.tokens) == 7 and told.finish == "length"


@pytest.mark.parametrize("length", [0, 128, 500])
def test_prompts_that_are_empty_or_too_long_are_refused(length: int) -> None:
    scheduler = Scheduler(Notebook(num_pages=2))
    with pytest.raises(ContextError, match=f"the prompt is {length} tokens; 1 to 127 fit here"):
        scheduler.submit(Request((1,) * length, GREEDY))
    assert scheduler.num_waiting == 0


@pytest.mark.parametrize(
    ("ids", "bias"),
    [((1, 50), ()), ((-1,), ()), ((1,), ((50, 1.0),)), ((1,), ((-1, 1.0),))],
)
def test_ids_that_the_vocabulary_does_not_have_are_refused(
    ids: tuple[int, ...], bias: tuple[tuple[int, float], ...]
) -> None:
    scheduler = Scheduler(Notebook(num_pages=2))
    with pytest.raises(UsageError, match="token ids must be 0 to 49"):
        scheduler.submit(Request(ids, Sampling(logit_bias=bias)))
    assert scheduler.num_waiting == 0


def test_the_repetition_penalty_sees_prompt_and_answer() -> None:
    scheduler = Scheduler(paged(decoder("llama"), 8))
    harsh = Sampling(temperature=0.0, repetition_penalty=10.0, max_tokens=20)
    (told,) = serve(scheduler, Request(tuple(range(25)), harsh))
    assert len({*range(25), *told.tokens}) == 45  # 50 in all: nothing said twice


def test_presence_and_frequency_penalties_see_the_answer_alone() -> None:
    runner = Notebook(num_pages=2)
    likely = int(runner.row((7,) * 30).argmax())
    prompt = (likely, *(7,) * 29)
    first = int(runner.row(prompt).argmax())
    bias = ((first, 100.0),)
    spoken = Sampling(temperature=0.0, max_tokens=5, logit_bias=bias, presence_penalty=2.0)
    (told,) = serve(Scheduler(runner), Request((first, *prompt), spoken))
    assert told.tokens == [first] * 5  # 100 outweighs one presence penalty of 2, however often
    counted = spoken.replace(presence_penalty=0.0, frequency_penalty=2.0, max_tokens=60)
    (told,) = serve(Scheduler(runner), Request((first, *prompt), counted))
    assert told.tokens[:40] == [first] * 40 and told.tokens[-1] != first


# Prefixes.


@pytest.mark.parametrize("length", BORDERS)
@pytest.mark.parametrize("family", ["llama", "baichuan_m1"])
def test_whole_pages_of_a_beginning_are_found_but_never_the_whole_prompt(
    family: str, length: int
) -> None:
    model = decoder(family)
    runner = Watched(paged(model, 8))
    scheduler = Scheduler(runner)
    request = Request(text(length), GREEDY.replace(max_tokens=3), num_top=2)
    (first,) = serve(scheduler, request)
    runner.steps.clear()
    (second,) = serve(scheduler, request)
    wanted = (length - 1) // PAGE_TOKENS * PAGE_TOKENS
    assert (first.cached_tokens, second.cached_tokens) == (0, wanted)
    assert runner.num_tokens == length - wanted + 2
    for told in (first, second):
        assert_same(told, plainly(rows_of(model), request, 512))
    counters = scheduler.counters
    assert (counters.prompt_tokens, counters.cached_tokens) == (2 * length, wanted)
    assert counters.output_tokens == 6 and counters.preempted == counters.cancelled == 0


def test_pages_of_an_answer_are_found_by_the_next_turn() -> None:
    runner = Watched(Notebook(num_pages=8))
    scheduler = Scheduler(runner)
    (first,) = serve(scheduler, Request(text(60), GREEDY.replace(max_tokens=80)))
    prompt = (*text(60), *first.tokens, 1, 2, 3)
    request = Request(prompt, GREEDY)
    (second,) = serve(scheduler, request)
    assert second.cached_tokens == 128
    assert_same(second, plainly(lambda ids: runner._runner.row(ids)[None], request, 512))  # type: ignore[attr-defined]


def test_equal_prompts_that_come_together_are_computed_once() -> None:
    runner = Watched(Notebook(num_pages=30))
    scheduler = Scheduler(runner, step_tokens=50)
    one = Request(text(300), GREEDY.replace(max_tokens=1))
    told = serve(scheduler, *[one] * 4)
    assert [t.cached_tokens for t in told] == [0, 256, 256, 256]
    assert runner.num_tokens == 300 + 3 * 44
    assert len({tuple(t.tokens) for t in told}) == 1


def test_those_that_wait_for_a_page_go_on_when_its_writer_is_cancelled() -> None:
    runner = Watched(Notebook(num_pages=30))
    scheduler = Scheduler(runner, step_tokens=50)
    request = Request(text(300), GREEDY.replace(max_tokens=2))
    handles = [scheduler.submit(request) for _ in range(3)]
    for _ in range(3):
        assert scheduler.step() == []
    assert (scheduler.num_running, scheduler.num_waiting) == (1, 2)
    assert scheduler.cancel(handles[0])
    told = {handle: Told() for handle in handles[1:]}
    while scheduler.num_running or scheduler.num_waiting:
        for output in scheduler.step():
            told[output.handle].add(output)
    assert [t.cached_tokens for t in told.values()] == [128, 256]  # what was whole is kept
    assert scheduler.pages.num_available == 30


def test_one_that_waits_for_a_page_does_not_hold_up_those_behind_it() -> None:
    scheduler = Scheduler(Notebook(num_pages=30), step_tokens=60)
    long = Request(text(400), GREEDY.replace(max_tokens=1))
    other = Request(text(10, seed=1), GREEDY.replace(max_tokens=1))
    scheduler.submit(long)
    scheduler.step()
    waits, passes = scheduler.submit(long), scheduler.submit(other)
    order = []
    while scheduler.num_running or scheduler.num_waiting:
        order += [output.handle for output in scheduler.step()]
    assert order.index(passes) < order.index(waits)


def test_a_prompt_that_is_scored_is_computed_anew_and_still_shared_afterwards() -> None:
    runner = Watched(Notebook(num_pages=12))
    scheduler = Scheduler(runner)
    scored = Request(text(200), GREEDY.replace(max_tokens=1), num_prompt_top=0)
    plain = Request(text(200), GREEDY.replace(max_tokens=1))
    told = [serve(scheduler, r)[0] for r in (plain, scored, plain)]
    assert [t.cached_tokens for t in told] == [0, 0, 192]
    assert runner.num_tokens == 200 + 200 + 8


# Steps.


def test_a_long_prompt_is_read_beside_the_answers_and_does_not_starve_them() -> None:
    model = decoder("baichuan_m1")
    runner = Watched(paged(model, 16))
    scheduler = Scheduler(runner, step_tokens=30)
    answers = [Request(text(5, seed=s), GREEDY) for s in range(3)]
    told = {scheduler.submit(request): Told() for request in answers}
    for output in scheduler.step():
        told[output.handle].add(output)
    runner.steps.clear()
    long = Request(text(200, seed=9), GREEDY.replace(max_tokens=2))
    told[scheduler.submit(long)] = Told()
    while scheduler.num_running:
        before = scheduler.num_running
        outputs = scheduler.step()
        for output in outputs:
            told[output.handle].add(output)
        if len(runner.steps) <= 7:  # 27 tokens of the prompt beside 3 answers: 8 steps
            assert sorted(output.handle for output in outputs) == [1, 2, 3] and before >= 3
            assert sorted(len(span.ids) for span in runner.steps[-1]) == [1, 1, 1, 27]
            assert [span.num_logits for span in runner.steps[-1]] == [1, 1, 1, 0]
    assert max(sum(len(span.ids) for span in spans) for spans in runner.steps) == 30
    for got, request in zip(told.values(), [*answers, long], strict=True):
        assert_same(got, plainly(rows_of(model), request, 512))


def test_never_more_sequences_than_allowed_and_first_come_first_served() -> None:
    runner = Watched(Notebook(num_pages=40))
    scheduler = Scheduler(runner, max_running=3)
    requests = [Request(text(20, seed=s), GREEDY.replace(max_tokens=4)) for s in range(10)]
    handles = [scheduler.submit(request) for request in requests]
    ended = []
    while scheduler.num_running or scheduler.num_waiting:
        outputs = scheduler.step()
        assert len(runner.steps[-1]) <= 3
        ended += [output.handle for output in outputs if output.finish]
    assert ended == handles
    assert scheduler.step() == [] and scheduler.counters.steps == len(runner.steps)


def test_more_answers_than_a_step_has_room_for_all_end() -> None:
    runner = Watched(Notebook(num_pages=40))
    scheduler = Scheduler(runner, step_tokens=3)
    requests = [Request(text(9, seed=s), GREEDY.replace(max_tokens=6)) for s in range(10)]
    for told, request in zip(serve(scheduler, *requests), requests, strict=True):
        assert_same(told, plainly(lambda ids: runner._runner.row(ids)[None], request, 512))  # type: ignore[attr-defined]
    assert max(sum(len(span.ids) for span in spans) for spans in runner.steps) == 3


# Few pages.


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same_when_pages_run_out(family: str) -> None:
    model = decoder(family)
    scheduler = Scheduler(Watched(paged(model, 4)), step_tokens=90)
    requests = [
        # Each is let in with two pages and comes to need three.
        Request(text(20, seed=s), Sampling(temperature=t, seed=s, max_tokens=115), num_top=2)
        for s, t in enumerate((0.0, 1.0))
    ] + [Request(text(50, seed=7), Sampling(seed=1, max_tokens=90), num_top=0, num_prompt_top=1)]
    told = serve(scheduler, *requests)
    assert scheduler.counters.preempted > 0
    for got, request in zip(told, requests, strict=True):
        assert_same(got, plainly(rows_of(model), request, 256))
    assert scheduler.counters.prompt_tokens == sum(len(r.ids) for r in requests)  # once each
    assert scheduler.counters.output_tokens == 320


def test_the_youngest_gives_way_and_the_oldest_never() -> None:
    scheduler = Scheduler(Notebook(num_pages=4))
    sampling = GREEDY.replace(max_tokens=150)
    handles = [scheduler.submit(Request(text(60, seed=s), sampling)) for s in range(4)]
    gaps = dict.fromkeys(handles, 0)
    ended = []
    while scheduler.num_running or scheduler.num_waiting:
        outputs = {output.handle: output for output in scheduler.step()}
        for handle in handles:
            if handle not in ended and handle not in outputs:
                gaps[handle] += 1
        ended += [output.handle for output in outputs.values() if output.finish]
    assert gaps[1] == 0 and ended[0] == 1 and sorted(ended) == handles
    assert scheduler.counters.preempted > 0


def test_scoring_that_is_cut_off_begins_again() -> None:
    runner = Notebook(num_pages=7)
    scheduler = Scheduler(Watched(runner), step_tokens=4)
    old = Request(text(60), GREEDY.replace(max_tokens=200))
    scored = Request(text(300, seed=1), GREEDY.replace(max_tokens=2), num_prompt_top=1)
    told = serve(scheduler, old, scored)
    assert scheduler.counters.preempted > 0

    def rows(ids: Sequence[int]) -> NDArray[np.float32]:
        return np.stack([runner.row(ids[: at + 1]) for at in range(len(ids))])

    for got, request in zip(told, (old, scored), strict=True):
        assert_same(got, plainly(rows, request, 448))


@pytest.mark.parametrize(
    ("windows", "num_pages"),
    [((None,), (6,)), ((None, 70), (6, 4)), ((None, 1, 65), (6, 5, 5)), ((130,), (5,))],
)
def test_two_thousand_requests_with_cancellations_leave_nothing_behind(
    windows: tuple[int | None, ...], num_pages: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(11)
    runner = Notebook(num_pages, vocab=11, windows=windows)
    scheduler = Scheduler(Watched(runner), max_running=6, step_tokens=70)
    beginnings = [text(140, seed=s, vocab=11) for s in range(3)]
    told: dict[int, tuple[Request, Told]] = {}
    cancelled = answered = 0
    for _ in range(2000):
        ids = (
            *beginnings[rng.integers(3)][: rng.choice([0, 1, 63, 64, 65, 128, 140])],
            *text(int(rng.integers(1, 5)), seed=int(rng.integers(9)), vocab=11),
        )
        is_long, scored = rng.random() < 0.1, 0 if rng.random() < 0.05 else None
        most = 140 if is_long else 4
        sampling = Sampling(temperature=1.0, seed=int(rng.integers(99)), max_tokens=most)
        stops = frozenset() if is_long else frozenset({3})
        request = Request(ids, sampling, stops, num_prompt_top=scored)
        told[scheduler.submit(request)] = (request, Told())
        for _ in range(rng.integers(0, 24)):
            for output in scheduler.step():
                told[output.handle][1].add(output)
        if told and rng.random() < 0.4:
            handle = int(rng.choice(list(told)))
            was_open = told.pop(handle)[1].finish is None
            assert scheduler.cancel(handle) == was_open
            assert not scheduler.cancel(handle)
            cancelled += was_open
        for handle in [h for h, (_, t) in told.items() if t.finish]:
            request, got = told.pop(handle)
            got.prompt, answered = None, answered + 1  # scores have tests of their own
            plain = Request(request.ids, request.sampling, request.stop_ids)
            assert_same(got, plainly(lambda ids: runner.row(ids)[None], plain, 512))
            assert not scheduler.cancel(handle)
    while scheduler.num_running or scheduler.num_waiting:
        for output in scheduler.step():
            told[output.handle][1].add(output)
    pages = scheduler.pages
    assert cancelled > 100 and answered > 1000 and scheduler.counters.preempted > 0
    assert scheduler.counters.cancelled == cancelled
    assert pages.num_available == pages.num_pages == sum(num_pages)
    for group, count in zip(pages.groups, num_pages, strict=True):
        assert not any(group._holders)
        assert len(group._free) + len(group._idle) == len({*group._free, *group._idle}) == count
        assert len(group._key_of) == len(group._page_of) == len(group._idle)
    assert not scheduler._running and not scheduler._waiting


# Failure and cancellation.


def test_a_request_that_fails_ends_with_its_error_and_the_others_go_on() -> None:
    notebook = Notebook(num_pages=12)
    scheduler = Scheduler(Failing(notebook, token=49))
    sampling = GREEDY.replace(max_tokens=5, logit_bias=((49, -1e9),))
    good = [Request(text(30, seed=s, vocab=49), sampling) for s in range(2)]
    bad = Request((*text(70, vocab=49), 49), sampling)
    first, failed, second = serve(scheduler, good[0], bad, good[1])
    assert isinstance(failed.error, CheckpointError) and "not numbers" in str(failed.error)
    assert failed.tokens == [] and failed.finish is None
    for told, request in ((first, good[0]), (second, good[1])):
        assert_same(told, plainly(lambda ids: notebook.row(ids)[None], request, 512))
    assert not scheduler.cancel(2)


def test_cancelled_requests_say_nothing_more_and_give_everything_back() -> None:
    scheduler = Scheduler(Notebook(num_pages=6), max_running=2, step_tokens=40)
    request = [Request(text(100, seed=s), GREEDY) for s in range(3)]
    answering, reading, waiting = (scheduler.submit(r) for r in request)
    while not (outputs := scheduler.step()):
        pass
    assert {o.handle for o in outputs} == {answering}
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)
    held = scheduler.pages.num_available
    assert scheduler.cancel(waiting) and scheduler.pages.num_available == held
    assert scheduler.cancel(reading) and scheduler.pages.num_available > held
    assert {o.handle for o in scheduler.step()} == {answering}
    assert scheduler.cancel(answering)
    assert [scheduler.cancel(h) for h in (answering, reading, waiting, 99, 0)] == [False] * 5
    assert scheduler.step() == [] and scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.counters.cancelled == 3 and scheduler.pages.num_available == 6
    (told,) = serve(scheduler, request[1])
    assert told.cached_tokens == 0 and len(told.tokens) == 20


def test_leaving_an_answer_in_the_middle_does_not_disturb_the_next() -> None:
    model = decoder("baichuan_m1")
    scheduler = Scheduler(paged(model, 8))
    request = Request(tuple(range(40)) * 2, GREEDY)
    handle = scheduler.submit(request)
    for _ in range(3):
        scheduler.step()
    assert scheduler.cancel(handle)
    (told,) = serve(scheduler, request)
    assert told.cached_tokens == PAGE_TOKENS
    assert_same(told, plainly(rows_of(model), request, 512))


# Scores.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 2, 128, 129, 200])
def test_prompt_scores_are_log_softmax_of_an_uncached_forward(family: str, length: int) -> None:
    model = decoder(family)
    runner = Watched(paged(model, 8))
    ids = text(length)
    (told,) = serve(Scheduler(runner), Request(ids, Sampling(max_tokens=0), num_prompt_top=3))
    assert told.tokens == [] and told.finish == "length"
    assert max(span.num_logits for spans in runner.steps for span in spans) <= SCORED_ROWS
    assert told.prompt is not None and len(told.prompt) == length and told.prompt[0] is None
    with torch.no_grad():
        hidden = model(torch.tensor(ids), Packed([length]))
        wanted = model.logits(hidden).log_softmax(-1)
    for at, found in enumerate(told.prompt[1:], start=1):
        assert found is not None and found.id == ids[at]
        row = wanted[at - 1]
        assert found.logprob == pytest.approx(float(row[ids[at]]), abs=1e-5)
        assert found.rank == int((row > row[ids[at]]).sum()) + 1
        best = row.topk(3)
        assert [i for i, _ in found.top] == best.indices.tolist()
        assert [v for _, v in found.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_an_answers_scores_are_the_models_own_before_any_filter() -> None:
    model = decoder("qwen3")
    bent = Sampling(temperature=0.0, top_k=1, logit_bias=((7, 99.0),), max_tokens=4)
    request = Request(text(70), bent, num_top=2, num_prompt_top=0)
    (told,) = serve(Scheduler(paged(model, 4)), request)
    assert told.tokens == [7] * 4
    with torch.no_grad():
        ids = [*request.ids, *told.tokens]
        wanted = model.logits(model(torch.tensor(ids), Packed([len(ids)]))).log_softmax(-1)
    assert [s.logprob for s in told.scores] == pytest.approx(wanted[69:73, 7].tolist(), abs=1e-5)
    assert all(s.id == 7 and len(s.top) == 2 for s in told.scores)
    assert told.prompt is not None and len(told.prompt) == 70


# Grammars.


def test_a_grammar_is_asked_once_a_token_and_keeps_its_place_when_pages_run_out() -> None:
    scheduler = Scheduler(Notebook(num_pages=4))
    grammars = [Odd(), Odd(), Odd()]
    told = serve(
        scheduler,
        *(
            Request(text(60, seed=s), Sampling(seed=s, max_tokens=80), grammar=grammar)
            for s, grammar in enumerate(grammars)
        ),
    )
    assert scheduler.counters.preempted > 0
    for got, grammar in zip(told, grammars, strict=True):
        assert got.tokens == grammar.chosen
        assert [token % 2 for token in got.tokens] == [1] * 6 + [0] * 74
