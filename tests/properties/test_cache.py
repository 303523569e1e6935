"""A cached forward equals an uncached one, for every architecture and every way to cut it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.model.architecture import PAGE_TOKENS
from attending.model.attend import Packed, Paged, Rows
from attending.model.decoder import Decoder
from tests.model.tiny import FAMILIES, build, configs, pool_of, tables

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def uncached(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return decoder.logits(decoder(ids, Packed([len(ids)])))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_any_chunking_equals_one_forward(family: str, data: st.DataObject) -> None:
    config = data.draw(configs(family))
    decoder = build(config, dtype=torch.float64)
    # Up to three pages, so that chunks cross, end on and start on page borders.
    total = data.draw(st.integers(1, 3 * PAGE_TOKENS))
    cuts = data.draw(st.sets(st.integers(1, total), max_size=6)) | {total}
    ids = torch.randint(config["vocab_size"], (total,), generator=torch.Generator().manual_seed(1))
    pool = pool_of(decoder, 4)
    pages = torch.tensor([2, 0, 3])  # not in order: the table is what counts
    parts = []
    for start, end in itertools.pairwise([0, *sorted(cuts)]):
        attend = Paged(pool, [Rows(start, tables(decoder.arch, pages, start), end - start)])
        parts.append(decoder.logits(decoder(ids[start:end], attend)))
    torch.testing.assert_close(torch.cat(parts), uncached(decoder, ids), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_a_mixed_batch_equals_one_by_one(family: str, data: st.DataObject) -> None:
    config = data.draw(configs(family))
    decoder = build(config, dtype=torch.float64)
    lengths = data.draw(st.lists(st.integers(1, 80), min_size=2, max_size=4))
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(config["vocab_size"], (n,), generator=generator) for n in lengths]
    # One step in which some sequences decode one token and others prefill the whole.
    cached = [data.draw(st.sampled_from([0, n - 1, n // 2])) for n in lengths]
    pool = pool_of(decoder, 2 * len(texts))
    orders = [torch.tensor([2 * i + 1, 2 * i]) for i in range(len(texts))]
    for text, done, table in zip(texts, cached, orders, strict=True):
        if done:
            decoder(text[:done], Paged(pool, [Rows(0, tables(decoder.arch, table, 0), done)]))
    rows = [
        Rows(done, tables(decoder.arch, table, done), len(text) - done)
        for text, done, table in zip(texts, cached, orders, strict=True)
    ]
    new = torch.cat([text[done:] for text, done in zip(texts, cached, strict=True)])
    together = decoder.logits(decoder(new, Paged(pool, rows)))
    alone = [uncached(decoder, t)[done:] for t, done in zip(texts, cached, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_packed_equals_unpacked(family: str, data: st.DataObject) -> None:
    config = data.draw(configs(family))
    decoder = build(config, dtype=torch.float64)
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(config["vocab_size"], (n,), generator=generator) for n in lengths]
    packed = decoder.logits(decoder(torch.cat(texts), Packed(lengths)))
    alone = torch.cat([uncached(decoder, text) for text in texts])
    torch.testing.assert_close(packed, alone, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_a_prefix_shared_by_whole_pages_continues_as_its_own(
    family: str, data: st.DataObject
) -> None:
    config = data.draw(configs(family))
    decoder = build(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    prefix, one, two = (
        torch.randint(config["vocab_size"], (n,), generator=generator)
        for n in (PAGE_TOKENS, 30, 50)
    )
    pool = pool_of(decoder, 3)
    groups = len(decoder.arch.windows)
    first, second = torch.tensor([0, 1]), torch.tensor([0, 2])
    decoder(torch.cat((prefix, one)), Paged(pool, [Rows(0, [first] * groups, 94)]))
    # The second text takes page 0 as it is and writes to a page of its own.
    attend = Paged(pool, [Rows(PAGE_TOKENS, [second] * groups, 50)])
    continued = decoder.logits(decoder(two, attend))
    whole = uncached(decoder, torch.cat((prefix, two)))[PAGE_TOKENS:]
    torch.testing.assert_close(continued, whole, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_every_branch_of_a_draft_tree_equals_its_own_sequence(
    family: str, data: st.DataObject
) -> None:
    config = data.draw(configs(family))
    decoder = build(config, dtype=torch.float64)
    past = data.draw(st.integers(1, 70))
    size = data.draw(st.integers(1, 8))
    parents = tuple(data.draw(st.integers(-1, i - 1)) for i in range(size))
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(config["vocab_size"], (past,), generator=generator)
    tree = torch.randint(config["vocab_size"], (size,), generator=generator)
    pool, pages = pool_of(decoder, 2), torch.tensor([1, 0])
    decoder(text, Paged(pool, [Rows(0, tables(decoder.arch, pages, 0), past)]))
    rows = Rows(
        past, tables(decoder.arch, pages, past), size, depths=tuple(depths), parents=parents
    )
    drafted = decoder.logits(decoder(tree, Paged(pool, [rows])))
    for leaf in range(size):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        alone = uncached(decoder, torch.cat((text, tree[path])))
        torch.testing.assert_close(drafted[leaf], alone[-1], **CLOSE)
