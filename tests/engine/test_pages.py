"""Pages: held pages are nobody else's, what can be found is what was published, nothing is lost."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from attending.engine.pages import Key, Pages, page_keys
from attending.model.architecture import PAGE_TOKENS


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 127, 128, 129])
def test_every_whole_page_has_a_key_however_it_is_reached(length: int) -> None:
    ids = np.random.default_rng(0).integers(100_000, size=length).tolist()
    keys = page_keys(ids)
    assert len(keys) == length // PAGE_TOKENS == len(set(keys))
    for known in range(len(keys) + 1):
        assert page_keys(ids, keys[:known]) == keys
    assert page_keys(tuple(np.asarray(ids, dtype=np.int64))) == keys
    assert page_keys([*ids, 1])[: len(keys)] == keys


def test_a_key_names_its_page_and_all_before_it() -> None:
    a, b = [1] * PAGE_TOKENS, [2] * PAGE_TOKENS
    assert page_keys([*a, *b])[1] != page_keys([*b, *b])[1] != page_keys(b)[0]
    swapped = [*a[:-1], 3]
    assert page_keys(swapped)[0] != page_keys(a)[0]
    assert page_keys([256, *a[1:]]) != page_keys([1, *a[1:]]) != page_keys([0, *a[1:]])


def test_pages_run_out_and_come_back() -> None:
    pages = Pages(3)
    taken = [pages.take() for _ in range(4)]
    assert sorted(taken[:3]) == [0, 1, 2] and taken[3] is None  # type: ignore[type-var]
    pages.release([1])
    assert pages.num_available == 1 and pages.take() == 1


def test_a_page_that_nobody_holds_is_found_until_its_room_is_needed() -> None:
    pages, keys = Pages(2), page_keys([5] * 128)
    first, second = pages.take(), pages.take()
    assert first is not None and second is not None
    for page, key in zip((first, second), keys, strict=True):
        pages.publish(page, key)
    pages.release([first, second])
    assert pages.num_available == 2 and pages.count(keys) == 2
    assert pages.hold(keys) == [first, second] and pages.take() is None
    pages.release([first, second])
    assert pages.take() == second  # a text's last page goes first: the others do not need it
    assert pages.count(keys) == 1


def test_the_page_unused_for_longest_goes_first() -> None:
    pages = Pages(3)
    keys = [page_keys([i] * PAGE_TOKENS)[0] for i in range(3)]
    for key in keys:
        page = pages.take()
        assert page is not None
        pages.publish(page, key)
    held = {key: index for index, key in enumerate(keys)}
    for key in (keys[1], keys[0], keys[2]):
        pages.release([held[key]])
    pages.release(pages.hold([keys[1]]))  # used again
    gone = []
    for _ in keys:
        pages.take()
        gone.append(next(k for k in keys if not pages.count([k]) and k not in gone))
    assert gone == [keys[0], keys[2], keys[1]]


def test_of_two_pages_with_the_same_tokens_the_first_is_found_and_the_other_is_freed() -> None:
    pages, (key,) = Pages(2), page_keys([5] * 64)
    first, second = pages.take(), pages.take()
    assert first is not None and second is not None
    pages.publish(first, key)
    pages.publish(second, key)
    pages.release([second])
    assert pages.hold([key]) == [first] and pages.take() == second


def test_what_is_found_ends_at_the_first_page_that_is_missing() -> None:
    pages, keys = Pages(3), page_keys([5] * 192)
    for key in (keys[0], keys[2]):
        page = pages.take()
        assert page is not None
        pages.publish(page, key)
    assert pages.count(keys) == 1 and pages.count(keys[1:]) == 0 == pages.count([])


class Holding(RuleBasedStateMachine):
    """Against a model that notes who holds what and what each page's tokens are."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(5)
        self.held: list[list[int]] = []
        self.content: dict[int, Key] = {}
        self.keys = page_keys([7] * PAGE_TOKENS * 4)

    @rule()
    def take(self) -> None:
        before = self.pages.num_available
        page = self.pages.take()
        assert (page is None) == (before == 0)
        if page is not None:
            assert all(page not in pages for pages in self.held)
            self.content.pop(page, None)
            self.held.append([page])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.held))[0]
        key = data.draw(st.sampled_from(self.keys))
        if page not in self.content and key not in self.content.values():
            self.content[page] = key
            self.pages.publish(page, key)

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        keys = self.keys[data.draw(st.integers(0, 3)) :]
        found = self.pages.hold(keys[: self.pages.count(keys)])
        assert [self.content[page] for page in found] == keys[: len(found)]
        if found:
            self.held.append(found)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pages.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def nothing_is_lost(self) -> None:
        in_use = {page for pages in self.held for page in pages}
        assert self.pages.num_available == 5 - len(in_use)
        for page in in_use & self.content.keys():
            assert self.pages.count([self.content[page]]) == 1  # held pages stay findable


TestHolding = Holding.TestCase
TestHolding.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
