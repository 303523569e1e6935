import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.errors import ConfigError
from attending.shards import CONTEXT, Shards, ShardWriter, write_index
from attending.train.reader import POOL, PackedReader, Row, by_domain, by_part, gather, whole
from tests.train.making import column, make_corpus, make_tokenizer

MIXED = {"general": 3.0, "medical": 1.0}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("reader")
    return Shards(make_corpus(folder / "corpus", make_tokenizer(folder / "tokenizer")) / "train")


def rows(reader: PackedReader, count: int, context: int) -> list[Row]:
    return [reader.row(context) for _ in range(count)]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(0, 5), st.integers(0, 30))
def test_a_reader_goes_on_where_its_state_was_taken(
    shards: Shards, context: int, seed: int, before: int
) -> None:
    first, second = PackedReader(shards, MIXED, seed), PackedReader(shards, {"medical": 1}, 99)
    rows(first, before, context)
    second._seed = seed
    second.restore(json.loads(json.dumps(first.state())))
    assert rows(first, 20, context) == rows(second, 20, context)
    assert first.state() == second.state()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 300))
def test_every_row_is_full_and_of_one_domain(shards: Shards, context: int) -> None:
    for row in rows(PackedReader(shards, MIXED, 0), 30, context):
        assert sum(piece.stop - piece.start for piece in row) == context
        assert len({int(shards.record(piece.document)["domain"]) for piece in row}) == 1


def test_an_epoch_has_every_target_once(shards: Shards) -> None:
    reader = PackedReader(shards, {"general": 1.0}, 0)
    own = np.flatnonzero(column(shards, "domain") == 0)
    seen: Counter[tuple[int, int]] = Counter()
    while reader.epochs["general"] < 3:
        for document, start, stop in reader.row(50):
            seen.update((document, place) for place in range(start, stop))
    wanted = {(n, i) for n in own.tolist() for i in range(1, int(shards.record(n)["tokens"]))}
    assert set(seen) == wanted
    assert max(seen.values()) <= 3
    # What is missing from the third round is still in the pool.
    assert sum(3 - count for count in seen.values()) <= POOL * int(column(shards, "tokens").max())


def test_rows_follow_the_mixture_closely(shards: Shards) -> None:
    domains = [
        int(shards.record(row[0].document)["domain"])
        for row in rows(PackedReader(shards, MIXED, 0), 400, 64)
    ]
    for stop in range(4, 401, 4):
        assert abs(domains[:stop].count(1) - stop / 4) <= 1


def test_another_mixture_counts_from_where_it_begins(shards: Shards) -> None:
    reader = PackedReader(shards, {"general": 1.0}, 0)
    rows(reader, 50, 64)
    reader.remix({"general": 1.0, "medical": 1.0})
    domains = [int(shards.record(row[0].document)["domain"]) for row in rows(reader, 20, 64)]
    assert domains.count(1) == 10  # and not twenty, to make up for the first fifty


def test_few_documents_are_cut_where_rows_are_long(shards: Shards) -> None:
    reader = PackedReader(shards, MIXED, 0)
    taken = rows(reader, 60, 512)
    assert reader.num_cuts <= len(taken)  # at most one a row; most are short
    pieces = [piece for row in taken for piece in row]
    whole_ones = [piece for piece in pieces if piece == whole(shards, piece.document)]
    assert len(whole_ones) > 0.7 * len(pieces)


def test_a_long_document_is_spread_over_many_rows(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    shards = Shards(make_corpus(tmp_path / "corpus", tokenizer, documents=200) / "train")
    reader = PackedReader(shards, MIXED, 0)
    first = [row[0].document for row in rows(reader, 60, 8)]
    assert max(Counter(first).values()) <= 3


def test_order_depends_on_the_seed_alone(shards: Shards) -> None:
    one, two, other = (PackedReader(shards, MIXED, seed) for seed in (1, 1, 2))
    assert rows(one, 10, 64) == rows(two, 10, 64) != rows(other, 10, 64)


def test_a_batch_predicts_each_token_from_the_one_before(shards: Shards) -> None:
    row = PackedReader(shards, MIXED, 0).row(64)
    batch, at = gather(shards, row, by_domain(shards.index)), 0
    for (document, start, stop), length in zip(row, batch.lengths, strict=True):
        ids = shards.document(document).tolist()
        assert batch.ids[at : at + length].tolist() == ids[start - 1 : stop - 1]
        assert batch.targets[at : at + length].tolist() == ids[start:stop]
        assert set(batch.kinds[at : at + length].tolist()) == {
            int(shards.record(document)["domain"])
        }
        at += length
    assert at == len(batch.ids) == 64


def test_without_a_begin_the_first_token_follows_the_end_before(shards: Shards) -> None:
    index = {**shards.index, "begin_of_text": None}
    plain = PackedReader(shards, MIXED, 0).shards
    before, plain.index = plain.index, index
    try:
        piece = whole(plain, 3)
        batch = gather(plain, [piece], by_domain(plain.index))
    finally:
        plain.index = before
    ids = shards.document(3).tolist()
    assert batch.targets.tolist() == ids
    assert batch.ids.tolist() == [index["end_of_text"], *ids[:-1]]


def test_a_domain_without_documents_is_refused(shards: Shards) -> None:
    with pytest.raises(ConfigError, match=r"'legal'.*it has: general, medical"):
        PackedReader(shards, {"legal": 1.0}, 0)


@dataclass
class Chosen:
    domain: str | None = None
    sources: tuple[str, ...] = ()


def test_parts_are_drawn_by_source_before_domain(shards: Shards) -> None:
    parts = {"rest": Chosen("general"), "sums": Chosen(sources=("sums",))}
    groups = by_part(shards.index, parts)
    reader = PackedReader(shards, {"rest": 1.0, "sums": 1.0}, 0, groups)
    seen: dict[int, set[tuple[int, int]]] = {0: set(), 1: set()}
    for row in rows(reader, 40, 64):
        batch = reader.batch([row])
        (kind,) = set(batch.kinds.tolist())
        records = [shards.record(piece.document) for piece in row]
        seen[kind] |= {(int(one["source"]), int(one["domain"])) for one in records}
    assert seen == {0: {(0, 0)}, 1: {(1, 0)}}


def test_parts_that_the_corpus_lacks_are_refused(shards: Shards) -> None:
    with pytest.raises(ConfigError, match=r"part a: the corpus has no source 'sum'.*'sums'"):
        by_part(shards.index, {"a": Chosen(sources=("sum",))})
    with pytest.raises(ConfigError, match="part a: the corpus has no domain 'law'"):
        by_part(shards.index, {"a": Chosen("law")})
    with pytest.raises(ConfigError, match="part b: another part has the source 'sums' already"):
        by_part(shards.index, {"a": Chosen(sources=("sums",)), "b": Chosen(sources=("sums",))})


@settings(max_examples=20, deadline=None)
@given(st.integers(130, 300), st.integers(0, 3))
def test_dialogues_are_never_cut_and_come_once_an_epoch(
    shards: Shards, context: int, seed: int
) -> None:
    groups = by_domain(shards.index)
    reader = PackedReader(shards, {"medical": 1.0}, seed, groups, cuts=False)
    own = np.flatnonzero(column(shards, "domain") == 1)
    seen: Counter[int] = Counter()
    while len(seen) < len(own):
        row = reader.row(context)
        assert 0 < sum(piece.stop - piece.start for piece in row) <= context
        assert all(piece == whole(shards, piece.document) for piece in row)
        seen.update(piece.document for piece in row)
    assert set(seen) == set(own.tolist())
    assert reader.num_cuts == 0 and "data/cuts" not in reader.figures()


def test_what_is_context_has_no_weight(tmp_path: Path, shards: Shards) -> None:
    ids = shards.document(0).copy()
    flagged = ids.copy()
    flagged[: len(ids) // 2] |= CONTEXT
    with ShardWriter(tmp_path, 1000) as writer:
        writer.add(flagged, 1, 0, 0)
    facts = {**shards.index, "has_context": True}
    facts.pop("shards")
    write_index(tmp_path, writer.shards, **facts)
    read = Shards(tmp_path)
    read.verify()
    assert np.array_equal(read.document(0), ids)
    assert read.trained(0).tolist() == [i >= len(ids) // 2 for i in range(len(ids))]
    batch = gather(read, [whole(read, 0)], by_domain(read.index))
    plain = gather(shards, [whole(shards, 0)], by_domain(shards.index))
    assert batch.ids.tolist() == plain.ids.tolist()
    assert batch.targets.tolist() == plain.targets.tolist()
    assert batch.weights.tolist() == read.trained(0)[1:].astype(float).tolist()


def test_an_epoch_of_dialogues_ends_before_the_next_begins(shards: Shards) -> None:
    reader = PackedReader(shards, {"general": 1.0}, 0, by_domain(shards.index), cuts=False)
    own = np.flatnonzero(column(shards, "domain") == 0).tolist()
    seen: list[int] = []
    while len(seen) < 3 * len(own):
        seen += [piece.document for piece in reader.row(200)]
    for epoch in range(3):
        assert sorted(seen[epoch * len(own) : (epoch + 1) * len(own)]) == own
