"""How much is drafted, how it is checked, and that a draft sees what it was trained on."""

import copy
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy import stats

from attending.draft.loss import UnrolledLoss
from attending.draft.target import TorchTarget
from attending.draft.watch import foresee
from attending.engine.native.runner import NativeRunner
from attending.engine.runner import Proposal, Shape, Span
from attending.engine.sampler import Sampling, candidates
from attending.engine.scheduler import Request, Scheduler
from attending.engine.speculate import Seconds, Speculation, extended, follower
from attending.engine.torch_runner import TorchRunner
from attending.errors import UsageError
from attending.model.decoder import Decoder
from attending.model.eagle import Eagle
from attending.train.reader import Batch
from attending.train.step import accumulate
from tests.engine.drafting import (
    CHAIN,
    TREE,
    Foreteller,
    drafted,
    head,
    natively,
    speculating,
)
from tests.engine.native_models import dequantised, random_model
from tests.engine.serving import GREEDY, Notebook, Odd, decoder, plainly, rows_of, serve, text
from tests.model.tiny import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")


def by_heart(model: Decoder, prompt: Sequence[int], answer: Sequence[int]) -> Eagle:
    """A draft that was trained on nothing but one answer, until it foresees all of it."""
    eagle = head(model, words=model.arch.vocab_size).requires_grad_(True)
    count, told = len(prompt) + len(answer) - 1, torch.tensor([*prompt, *answer])
    weights, sources = torch.ones(count), torch.zeros(count, dtype=torch.int64)
    weights[: len(prompt) - 1] = 0
    one = Batch(told[:-1], told[1:], weights, [count], sources)
    seen = TorchTarget(model, model.arch.vocab_size)
    optimizer = torch.optim.AdamW(eagle.parameters(), lr=1e-2, weight_decay=0)
    for step in range(200):
        accumulate(eagle, [one], UnrolledLoss(seen, 3), 1, ["answers"])
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            [found] = foresee(seen, eagle, one, 3)
            if found.rounds(3)[1] == -(-(len(answer) - 1) // 4):
                break
    return eagle.requires_grad_(False)


@pytest.fixture(scope="module")
def sure() -> tuple[Decoder, Request, tuple[int, ...], Eagle]:
    """A model that never wavers, a prompt, its answer, and a draft that knows both."""
    model = decoder("llama", num_hidden_layers=4).requires_grad_(False)
    model.model.norm.weight.mul_(12.0)
    request = Request(text(66, seed=3), Sampling(temperature=0.0, max_tokens=21))
    answer = tuple(plainly(rows_of(model), request, 512).tokens)
    assert len(set(answer)) > 5  # no single word over and over
    return model, request, answer, by_heart(model, request.ids, answer)


@pytest.mark.parametrize("step_tokens", [256, 9])
def test_a_draft_that_knows_the_answer_is_accepted_whole(
    sure: tuple[Decoder, Request, tuple[int, ...], Eagle], step_tokens: int
) -> None:
    """Prompt in chunks or at once; the second time its first page is found in the cache."""
    model, request, answer, eagle = sure
    scheduler = speculating(TorchRunner(model, [8], eagle, CHAIN), step_tokens=step_tokens)
    speculation = scheduler.speculation
    assert speculation is not None
    for rounds in (5, 10):  # 21 tokens: the first from the prompt, then 5 rounds of 4
        (told,) = serve(scheduler, request)
        assert tuple(told.tokens) == answer
        assert speculation.rounds == rounds
    assert told.cached_tokens == 64
    assert speculation.acceptance_length == 4
    assert speculation.acceptance == [1, 1, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_natively_proposed_is_what_torch_proposes(family: str) -> None:
    model, ids = random_model(family, num_hidden_layers=4), text(100)
    eagle, found = head(model), []
    native = natively(model, eagle, Shape(4), activations="float32")
    dequantised(model, "w8")
    for runner in (native, TorchRunner(model, native.num_pages, eagle, Shape(4))):
        tokens = []
        for start, end in ((0, 64), (64, 70), *((at, at + 1) for at in range(70, 100))):
            pages = (np.arange(2),) * len(native.num_pages)
            runner.step([Span(np.array(ids[start:end]), start, pages, 0)])
            if end < 100:
                [one] = runner.propose([Span(np.array([ids[end]]), end, pages)], 4)
                tokens.append(one.ids)
        found.append(np.array(tokens))
    assert (found[0] == found[1]).mean() > 0.9  # keys and values are float16, and the draft 8 bits


def test_natively_too_a_draft_that_knows_the_answer_is_accepted_whole() -> None:
    """But for what its own 8 bits cost; the second time from the cache, round for round."""
    model = decoder("llama", num_hidden_layers=4).requires_grad_(False)
    model.model.norm.weight.mul_(12.0)
    dequantised(model, "w8")
    request = Request(text(66, seed=3), Sampling(temperature=0.0, max_tokens=21))
    (plain,) = serve(Scheduler(natively(model, None, activations="float32")), request)
    eagle = by_heart(model, request.ids, plain.tokens)
    scheduler = speculating(natively(model, eagle, activations="float32"))
    speculation, rounds = scheduler.speculation, list[int]()
    assert speculation is not None
    for _ in range(2):
        (told,) = serve(scheduler, request)
        assert told.tokens == plain.tokens
        rounds.append(speculation.rounds)
    assert rounds[0] <= 6 and rounds[1] == 2 * rounds[0]  # 5 if all is accepted


def test_a_tree_finds_what_a_chain_misses(
    sure: tuple[Decoder, Request, tuple[int, ...], Eagle],
) -> None:
    model, request, answer, eagle = sure
    eagle, generator = copy.deepcopy(eagle), torch.Generator().manual_seed(0)
    noise = torch.randn(eagle.lm_head.weight.shape, generator=generator)
    eagle.lm_head.weight.add_(0.1 * noise)  # no longer sure
    lengths = []
    for shape in (CHAIN, Shape(3, 4, 12)):
        scheduler = speculating(TorchRunner(model, [8], eagle, shape))
        (told,) = serve(scheduler, request)
        assert tuple(told.tokens) == answer and scheduler.speculation is not None
        lengths.append(scheduler.speculation.acceptance_length)
    assert lengths[0] < lengths[1]


@pytest.mark.parametrize("family", ["llama", "baichuan_m1"])
@pytest.mark.parametrize("kind", ["torch", "native"])
def test_what_is_proposed_does_not_depend_on_how_the_text_was_read(kind: str, family: str) -> None:
    """Nor on what was proposed and taken back: the draft's own keys and states follow."""
    model, ids = decoder(family), text(100)
    eagle, found = head(model), []
    for cuts in ([99], [40, 99], [64, 70, 99], [1, 63, 65, 98, 99]):
        runner: TorchRunner | NativeRunner
        if kind == "torch":
            runner = TorchRunner(model, [3, 3], eagle, Shape(4, 2, 6))
        else:
            runner = natively(model, eagle, Shape(4), pages=3)
        pages = (np.arange(2),) * len(model.arch.windows)
        for start, end in zip([0, *cuts], cuts, strict=False):
            wrong = np.arange(3) % 50  # proposals that are taken back
            runner.step([Span(np.array([*ids[start:end], *wrong]), start, pages, 0)])
        found += runner.propose([Span(np.array(ids[99:]), 99, pages)], 4)
    for one in found[1:]:
        assert one.ids.tolist() == found[0].ids.tolist() and one.parents == found[0].parents


def test_sampled_answers_have_the_distribution_of_the_model() -> None:
    """Of the first two tokens, over many seeds, each drafted: chi-square against the exact one."""
    notebook, prompt, count = Notebook(64, vocab=4), text(3, vocab=4), 800
    sampling = Sampling(temperature=0.9, top_p=0.9, repetition_penalty=1.2, max_tokens=3)
    likely = max(range(4), key=lambda token: float(notebook.row(prompt)[token]))
    foreteller = Foreteller(notebook, Shape(2), [(*prompt, likely, 1, 2)], errors=0.2)
    scheduler = speculating(foreteller)
    seen: dict[tuple[int, ...], int] = {}
    requests = [Request(prompt, sampling.replace(seed=seed)) for seed in range(count)]
    crowds = [serve(scheduler, *requests[at : at + 32]) for at in range(0, count, 32)]
    for told in itertools.chain(*crowds):
        seen[tuple(told.tokens[1:])] = seen.get(tuple(told.tokens[1:]), 0) + 1
    expected: dict[tuple[int, ...], float] = {}

    def spread(ids: tuple[int, ...], share: float, left: int) -> None:
        if not left:
            place = ids[len(prompt) + 1 :]
            expected[place] = expected.get(place, 0) + share * count
            return
        kept, mass = candidates(notebook.row(ids), sampling, ids, len(prompt))
        for token, part in zip(kept, mass / mass.sum(), strict=True):
            spread((*ids, int(token)), share * float(part), left - 1)

    spread(prompt, 1.0, 3)
    assert set(seen) <= set(expected) and foreteller.proposed == count
    order = [place for place in expected if expected[place] >= 5]
    rest = count - sum(seen.get(place, 0) for place in order)
    found = [*(seen.get(place, 0) for place in order), rest]
    wanted = [*(expected[place] for place in order), count - sum(expected[p] for p in order)]
    assert stats.chisquare(found, wanted).pvalue > 0.001


def test_a_grammar_sees_only_what_was_chosen() -> None:
    plain, foretold = Odd(), Odd()
    ids = text(20)
    (wanted,) = serve(Scheduler(Notebook(8)), Request(ids, GREEDY, grammar=plain))
    foreteller = Foreteller(Notebook(8), CHAIN, [(*ids, *wanted.tokens)], errors=0.5)
    (told,) = serve(speculating(foreteller), Request(ids, GREEDY, grammar=foretold))
    assert told.tokens == wanted.tokens
    assert foretold.chosen == plain.chosen == told.tokens


def test_an_answer_ends_where_it_would_without_a_draft() -> None:
    ids = text(20)
    (whole,) = serve(Scheduler(Notebook(8)), Request(ids, GREEDY))
    stops = frozenset({whole.tokens[9]})
    (wanted,) = serve(Scheduler(Notebook(8)), Request(ids, GREEDY, stops))
    foreteller = Foreteller(Notebook(8), Shape(7), [(*ids, *whole.tokens)], errors=0.0)
    (told,) = serve(speculating(foreteller), Request(ids, GREEDY, stops))
    assert (told.tokens, told.finish) == (wanted.tokens, "stop")


def test_a_short_answer_shortens_no_others() -> None:
    """Of two that are served together one has two tokens left, the other many."""
    ids, other, notebook = text(20), text(20, seed=5), Notebook(8)
    short = GREEDY.replace(max_tokens=3)
    (brief,) = serve(Scheduler(notebook), Request(ids, short))
    (whole,) = serve(Scheduler(notebook), Request(other, GREEDY))
    told = [(*ids, *brief.tokens, 0, 0, 0, 0), (*other, *whole.tokens)]
    scheduler = speculating(Foreteller(Notebook(8), Shape(4), told, errors=0.0))
    handles = [scheduler.submit(Request(i, s)) for i, s in ((ids, short), (other, GREEDY))]
    scheduler.step()  # the prompts, and a token of each
    round_ = scheduler.step()
    assert [o.token for o in round_ if o.handle == handles[0]] == brief.tokens[1:]
    assert [o.token for o in round_ if o.handle == handles[1]] == whole.tokens[1:6]
    assert scheduler.speculation is not None
    assert scheduler.speculation.tried.tolist() == [2, 1, 1, 1]


def test_cancelled_and_unwilling_requests() -> None:
    ids, notebook = text(20), Notebook(8)
    (whole,) = serve(Scheduler(notebook), Request(ids, GREEDY))
    foreteller = Foreteller(Notebook(8), CHAIN, [(*ids, *whole.tokens)], errors=0.0)
    scheduler = speculating(foreteller)
    one = scheduler.submit(Request(ids, GREEDY, speculate=False))
    other = scheduler.submit(Request(ids, GREEDY))
    outputs = [scheduler.step(), scheduler.step()]
    mine = [o.token for told in outputs for o in told if o.handle == other]
    assert mine == whole.tokens[:5] and foreteller.proposed == 1
    assert [o.token for told in outputs for o in told if o.handle == one] == whole.tokens[:2]
    assert scheduler.cancel(other) and scheduler.cancel(one)
    assert scheduler.pages.num_available == scheduler.pages.num_pages
    (told,) = serve(scheduler, Request(ids, GREEDY))
    assert told.tokens == whole.tokens


def test_what_leaves_no_room_is_refused_or_not_drafted() -> None:
    model = decoder("llama")
    runner = drafted(model, 1, Shape(5, 8, 40))
    with pytest.raises(UsageError, match="a draft of 40 tokens at once: a step has 32"):
        speculating(runner, step_tokens=32)
    with pytest.raises(UsageError, match=r"the context 64; take fewer"):
        speculating(drafted(model, 1, Shape(63)), step_tokens=256)
    # A context of one page: a chain is cut where the answer must end, a tree is left.
    for shape in (Shape(7), TREE):
        scheduler = speculating(drafted(model, 1, shape))
        request = Request(text(50), Sampling(temperature=0.0))
        (told,) = serve(scheduler, request)
        assert told.tokens == plainly(rows_of(model), request, 64).tokens


def test_rows_that_follow() -> None:
    pages = (np.arange(3),)
    chain = extended(Span(np.array([7]), 62, pages), Proposal(np.array([8, 9])))
    assert (chain.ids.tolist(), chain.num_logits, len(chain.pages[0])) == ([7, 8, 9], 3, 2)
    assert (follower(chain, 0, 8), follower(chain, 1, 9), follower(chain, 0, 9)) == (1, 2, None)
    tree = extended(Span(np.array([7]), 0, pages), Proposal(np.array([8, 9, 8]), (0, 0, 2)))
    assert tree.parents == (-1, 0, 0, 2)
    assert (follower(tree, 0, 9), follower(tree, 2, 8), follower(tree, 1, 8)) == (2, 3, None)


def test_times_lie_on_a_line() -> None:
    seconds = Seconds()
    assert seconds.at(3) == 0 and seconds.measured == (0, 0)
    seconds.add(2, 1.0)
    assert (seconds.at(1), seconds.at(9)) == (1.0, 1.0)
    for value in (1.5, 9.0, 1.6):  # what was held up does not count
        seconds.add(4, value)
    assert (seconds.at(3), seconds.at(6), seconds.at(1)) == pytest.approx((1.25, 2.0, 1.0))
    assert seconds.measured == (2, 4)


def test_more_rows_never_take_less() -> None:
    """What says so is older than the machine's present speed, or was held up."""
    seconds = Seconds()
    seconds.add(1, 3.0)
    seconds.add(4, 2.0)
    assert [seconds.at(rows) for rows in (1, 2, 4, 9)] == [2.0, 2.0, 2.0, 2.0]
    for value in (9.0, 8.0, 7.0, 9.0):
        seconds.add(4, value)
    assert [seconds.at(rows) for rows in (1, 4)] == [3.0, 7.0]


class Clockwork:
    """A drafter without weights whose steps take as long as they should."""

    shape = Shape(4)

    def __init__(self, right: float, row: float, draft: float) -> None:
        self.now, self.slow, self._row, self._draft = 0.0, 1.0, row, draft
        self.random, self.right, self.stall = np.random.default_rng(0), right, 0.0
        self.speculation = Speculation(self, clock=lambda: self.now)  # type: ignore[arg-type]
        self.depths: list[int] = []

    def step(self, spans: Sequence[Span]) -> None:
        self.now += self.slow * (1.0 + self._row * sum(len(span.ids) for span in spans))

    def propose(self, spans: Sequence[Span], depth: int) -> list[Proposal]:
        self.now += self.slow * self._draft * depth + self.stall
        self.stall = 0.0
        return [Proposal(np.zeros(depth, np.int64)) for _ in spans]

    def run(self, rounds: int, batch: int) -> None:
        span = Span(np.zeros(1, np.int64), 5, (np.zeros(1, np.int64),))
        for _ in range(rounds):
            depth = self.speculation.depth(batch, batch, 4)
            self.depths.append(depth)
            spans = [span] * batch
            if depth:
                found = self.speculation.propose(spans, depth)
                spans = [extended(span, one) for one in found]
            self.speculation.step(spans, depth)
            for one in spans if depth else ():
                accepted = int((self.random.random(depth) < self.right).cumprod().sum())
                self.speculation.keep(one, range(accepted + 1), is_over=False)


@pytest.mark.parametrize(
    ("right", "row", "draft", "wanted"),
    [
        (0.95, 0.01, 0.02, 4),  # cheap and mostly right: as deep as it goes
        (0.05, 0.10, 0.10, 0),  # wrong and dear: not at all
        (0.50, 0.10, 0.05, 2),  # 1.875 / 1.4 for three rows, 1.75 / 1.3 for two ...
    ],
)
def test_the_depth_follows_what_is_measured(
    right: float, row: float, draft: float, wanted: int
) -> None:
    clockwork = Clockwork(right, row, draft)
    clockwork.run(400, 1)
    settled = clockwork.depths[200:]
    assert abs(max(set(settled), key=settled.count) - wanted) <= (wanted == 2)
    assert settled.count(clockwork.depths[-2]) > 0.6 * len(settled)
    assert clockwork.depths[:4] == [0, 1, 1, 1]  # both were tried
    assert len({*settled}) > 1  # and others are looked at


def test_depths_that_are_not_tried_are_not_thought_better_again() -> None:
    """Of 32 users: 32 / 1.4 alone, 48 / 1.85 at depth 1, 56 / 2.3 at depth 2, less beyond."""
    clockwork = Clockwork(0.5, 0.0125, 0.05)
    clockwork.run(1500, 32)
    settled = clockwork.depths[500:]
    assert settled.count(1) > 0.9 * len(settled)


@pytest.mark.parametrize("batch", [8, 32])
def test_looking_at_what_does_not_pay_costs_little(batch: int) -> None:
    """A round at depth 4 takes five times as long as one without a draft."""
    clockwork = Clockwork(0.5, 1.0, 0.05)
    clockwork.run(1000, batch)
    plain = (1 + batch) * 1000
    assert clockwork.depths.count(0) > 950 and clockwork.depths[10:].count(1) > 1
    # What they wrote is not counted: it would take less.
    assert clockwork.now < 1.05 * plain


def test_what_was_slow_once_is_looked_at_again() -> None:
    """Eight plain steps were slow while something else computed: it must not keep that name."""
    clockwork = Clockwork(0.3, 0.2, 0.05)
    clockwork.run(100, 4)
    clockwork.slow = 3.0
    clockwork.run(8, 4)
    clockwork.slow = 1.0
    clockwork.run(200, 4)
    assert clockwork.depths[-100:].count(0) > 85


def test_a_first_proposal_that_was_held_up_turns_no_draft_down() -> None:
    clockwork = Clockwork(0.9, 0.01, 0.05)
    clockwork.stall = 100.0
    clockwork.run(60, 1)
    assert clockwork.depths[10:].count(0) < 5


def test_what_was_not_run_is_not_taken_for_tried() -> None:
    clockwork = Clockwork(0.9, 0.01, 0.05)
    told, span = clockwork.speculation, Span(np.zeros(1, np.int64), 5, (np.zeros(1, np.int64),))
    for _ in range(40):  # there is no room for what it would propose
        assert told.depth(1, 1, 0) == 0
        told.step([span], 0)
    assert (told.depth(1, 1, 4), told.latest, told.break_even(32)) == (1, 0, 0)
    clockwork.run(100, 1)
    assert told.latest == clockwork.depths[-1] and max(clockwork.depths) == 4
    assert all(told.depth(1, 1, 2) <= 2 for _ in range(50))


def test_break_even_is_where_more_users_gain_nothing() -> None:
    """Rows cost 0.1 of a step: with batch b, tau(1) / (1 + 0.2 b + d) against 1 / (1 + 0.1 b)."""
    clockwork = Clockwork(0.5, 0.1, 0.05)
    assert clockwork.speculation.break_even(32) == 0
    clockwork.run(200, 1)
    assert clockwork.speculation.break_even(32) == 1  # nothing is said of what was not measured
    for batch in (4, 16):
        clockwork.run(200, batch)
    # 1.5 (1 + 0.1 b) > 1.05 + 0.2 b while b < 9.
    assert 6 <= clockwork.speculation.break_even(32) <= 11
    clockwork.depths.clear()
    clockwork.run(100, 24)
    assert clockwork.depths.count(0) > 80
