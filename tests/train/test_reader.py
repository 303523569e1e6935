import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.errors import ConfigError
from attending.shards import Shards
from attending.train.reader import POOL, PackedReader, Row, gather, whole
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
    batch, at = gather(shards, row), 0
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
        batch = gather(plain, [piece])
    finally:
        plain.index = before
    ids = shards.document(3).tolist()
    assert batch.targets.tolist() == ids
    assert batch.ids.tolist() == [index["end_of_text"], *ids[:-1]]


def test_a_domain_without_documents_is_refused(shards: Shards) -> None:
    with pytest.raises(ConfigError, match=r"'legal'.*it has: general, medical"):
        PackedReader(shards, {"legal": 1.0}, 0)
