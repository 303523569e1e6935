"""Shards: what is written is read back, across every border, and damage is found."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attending.errors import CheckpointError
from attending.shards import Shards, ShardWriter, write_index

END = 0
FACTS = {"begin_of_text": None, "end_of_text": END, "tokenizer_sha256": "ab"}
FACTS |= {"sources": ["a"], "domains": ["general"]}


def write(folder: Path, lengths: list[int], limit: int) -> list[np.ndarray]:
    """Documents of the given lengths, each with its own numbers, ending with END."""
    documents = [np.array([*([n + 1] * (size - 1)), END], "<u4") for n, size in enumerate(lengths)]
    with ShardWriter(folder, limit) as writer:
        for number, ids in enumerate(documents):
            writer.add(ids, 3 * number, 0, 0)
    write_index(folder, writer.shards, **FACTS)
    return documents


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), max_size=12), limit=st.integers(1, 20), data=st.data())
def test_every_document_and_slice_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], limit: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    documents = write(folder, lengths, limit)
    shards = Shards(folder)
    whole = np.concatenate([np.empty(0, "<u4"), *documents])
    assert (shards.num_tokens, shards.num_documents) == (len(whole), len(documents))
    for number, ids in enumerate(documents):
        assert np.array_equal(shards.document(number), ids)
        assert int(shards.record(number)["bytes"]) == 3 * number
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert np.array_equal(shards.slice(start, stop), whole[start:stop])
    shards.verify()
    for one in shards.shards:  # full, or of one document that does not fit
        assert one.tokens <= limit or one.documents == 1


def test_a_slice_inside_a_shard_is_no_copy(tmp_path: Path) -> None:
    write(tmp_path, [5, 5, 5], 10)
    shards = Shards(tmp_path)
    assert isinstance(shards.slice(2, 9).base, np.memmap) and len(shards.shards) == 2
    assert not isinstance(shards.slice(2, 12), np.memmap)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 99)])
def test_what_is_not_there_is_an_index_error(tmp_path: Path, start: int, stop: int) -> None:
    write(tmp_path, [5, 5], 10)
    with pytest.raises(IndexError):
        Shards(tmp_path).slice(start, stop)
    with pytest.raises(IndexError):
        Shards(tmp_path).document(2)


def test_a_writer_that_fails_leaves_no_shard(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, 100) as writer:
        writer.add(np.array([1, END], "<u4"), 1, 0, 0)
        raise RuntimeError
    assert not list(tmp_path.glob("*.bin")) and not writer.shards


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_damage_is_found(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, [5, 5], 10)
    path = tmp_path / f"00000.{suffix}"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="00000 is damaged"):
        Shards(tmp_path).verify()
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f"00000.{suffix} is absent or not whole"):
        Shards(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Shards(tmp_path)
