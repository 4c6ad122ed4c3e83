"""Blocks of tokens: fairseq's, by a plain account of its rules, and their properties."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lite.data import blocks as blocks_module
from fairseq_lite.data.blocks import TokenBlocks, block_index
from fairseq_lite.data.indexed import ConcatDataset, IndexedDataset, MemoryDataset
from fairseq_lite.data.shorten import ShortenedDataset, shorten
from fairseq_lite.data.streams import FileStream, ItemStream, JoinedStream, stream_of
from fairseq_lite.errors import DataError
from tests.helpers.text import EOS, item_sizes, numbered, write_items

MODES = ("none", "complete", "complete_doc", "eos")


def plain_blocks(items: list[list[int]], mode: str, size: int) -> list[list[int]]:
    """The rules, one sentence at a time."""
    stream = [token for item in items for token in item]
    if mode == "none":
        return [stream[i : i + size] for i in range(0, len(stream), size)]
    if mode == "eos":
        return [list(item) for item in items]
    found: list[list[int]] = []
    current: list[int] = []
    for item in items:
        ends_document = mode == "complete_doc" and len(item) == 1
        if ends_document or (current and len(current) + len(item) > size):
            found.append(current)
            current = []
        if not ends_document:
            current = current + list(item)
    found.append(current)
    least = 2 if mode == "complete_doc" else 1
    return [block for block in found if len(block) >= least]


def read_blocks(blocks: TokenBlocks) -> list[list[int]]:
    tokens, sizes = blocks.gather(np.arange(len(blocks)))
    assert sizes.tolist() == blocks.sizes.tolist() and blocks.sizes.dtype == np.int32
    return [part.tolist() for part in np.split(tokens, np.cumsum(sizes))[:-1]]


@given(item_sizes, st.sampled_from(MODES), st.integers(1, 20), st.integers(1, 9))
def test_blocks_are_those_of_the_plain_rules(sizes, mode, size, step) -> None:
    items = numbered(sizes)
    old, blocks_module._ITEMS_PER_STEP = blocks_module._ITEMS_PER_STEP, step
    try:
        blocks = TokenBlocks(MemoryDataset.of(items), mode, size)
    finally:
        blocks_module._ITEMS_PER_STEP = old
    assert read_blocks(blocks) == plain_blocks(items, mode, size)


@given(st.lists(st.integers(0, 6), max_size=40), st.sampled_from(MODES), st.integers(1, 9))
def test_items_without_a_token_do_no_harm(sizes, mode, size) -> None:
    items = numbered(sizes)
    for step in (3, 1 << 18):
        old, blocks_module._ITEMS_PER_STEP = blocks_module._ITEMS_PER_STEP, step
        try:
            found = read_blocks(TokenBlocks(MemoryDataset.of(items), mode, size))
        finally:
            blocks_module._ITEMS_PER_STEP = old
        assert found == plain_blocks(items, mode, size)


@given(item_sizes, st.integers(1, 20))
def test_every_token_comes_once(sizes, size) -> None:
    items = numbered(sizes)
    stream = [token for item in items for token in item]
    data = MemoryDataset.of(items)
    for mode in ("none", "complete", "eos"):
        found = read_blocks(TokenBlocks(data, mode, size))
        assert [token for block in found for token in block] == stream
    kept = [t for item in items if len(item) > 1 for t in item]
    assert [t for b in read_blocks(TokenBlocks(data, "complete_doc", size)) for t in b] == kept


@given(item_sizes, st.integers(1, 20))
def test_lengths_of_blocks(sizes, size) -> None:
    data = MemoryDataset.of(numbered(sizes))
    filled = TokenBlocks(data, "none", size).sizes
    assert (filled[:-1] == size).all() and (filled <= size).all()
    for mode in ("complete", "complete_doc"):
        for block in read_blocks(TokenBlocks(data, mode, size)):
            assert len(block) <= size or block.count(EOS) == 1, "only one long sentence is longer"
            assert block[-1] == EOS


@given(item_sizes, st.sampled_from(MODES), st.integers(1, 20))
def test_what_comes_before_a_block(sizes, mode, size) -> None:
    """eos before the beginning of a sentence, else the token before it in the text."""
    items = numbered(sizes)
    stream = [token for item in items for token in item]
    before = {token: previous for previous, token in zip([EOS, *stream], stream, strict=False)}
    blocks = TokenBlocks(MemoryDataset.of(items), mode, size)
    found = blocks.before(np.arange(len(blocks)), EOS)
    for first, block in zip(found.tolist(), read_blocks(blocks), strict=True):
        # The ends of sentences are all the same token; a block of words tells where it is.
        if block[0] != EOS:
            assert first == before[block[0]]


def test_a_block_that_begins_with_an_item_follows_eos_even_where_items_lack_it() -> None:
    data = MemoryDataset.of([[5, 6], [7, 8], [9]])
    assert TokenBlocks(data, "none", 2).before(np.arange(3), EOS).tolist() == [EOS, EOS, EOS]
    assert TokenBlocks(data, "none", 3).before(np.arange(2), EOS).tolist() == [EOS, 7]


def test_a_wrong_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that may not be quite full, the mistake that is easiest to make."""
    items = numbered([3, 4, 3, 2, 5])
    following = blocks_module._next_block
    monkeypatch.setattr(
        blocks_module, "_next_block", lambda e, lengths, size: following(e, lengths, size - 1)
    )
    found = read_blocks(TokenBlocks(MemoryDataset.of(items), "complete", 10))
    assert found != plain_blocks(items, "complete", 10)


# -- where the tokens lie ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def items() -> list[list[int]]:
    sizes = np.random.default_rng(3).integers(1, 9, 80).tolist()
    return numbered(sizes)


def streams(folder: Path, items: list[list[int]]) -> list[tuple[type, object]]:
    whole = write_items(folder / "whole", items)
    parts = [write_items(folder / f"part{i}", items[a:b]) for i, (a, b) in
             enumerate([(0, 30), (30, 30), (30, 31), (31, 80)])]  # fmt: skip
    return [
        (FileStream, whole),
        (ItemStream, MemoryDataset.of(items)),
        (JoinedStream, ConcatDataset(parts)),
        (JoinedStream, ConcatDataset([parts[0], MemoryDataset.of(items[30:])])),
        (ItemStream, ShortenedDataset(whole, 100)),
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_blocks_are_the_same_wherever_the_text_lies(tmp_path, items, mode, size) -> None:
    expected = plain_blocks(items, mode, size)
    for kind, data in streams(tmp_path, items):
        assert type(stream_of(data)) is kind
        blocks = TokenBlocks(data, mode, size)
        assert read_blocks(blocks) == expected
        some = np.array([len(blocks) - 1, 0, len(blocks) // 2, 0])
        tokens, sizes = blocks.gather(some)
        assert tokens.tolist() == [t for i in some.tolist() for t in expected[i]]
        assert sizes.tolist() == [len(expected[i]) for i in some.tolist()]
        first = TokenBlocks(MemoryDataset.of(items), mode, size).before(some, EOS)
        assert blocks.before(some, EOS).tolist() == first.tolist()


def test_edges_of_a_stream(tmp_path, items) -> None:
    ends = np.cumsum([len(item) for item in items])
    starts = ends - [len(item) for item in items]
    for _, data in streams(tmp_path, items):
        stream = stream_of(data)
        assert (stream.num_items, stream.num_tokens) == (len(items), ends[-1])
        for first, last in ((0, 80), (0, 1), (29, 32), (79, 80), (30, 31)):
            expected = [*starts[first:last].tolist(), int(ends[last - 1])]
            assert stream.edges(first, last).tolist() == expected
        positions = np.arange(stream.num_tokens)
        assert stream.begins_item(positions).tolist() == np.isin(positions, starts).tolist()


def test_ranges_of_a_file_are_read_as_slices_and_by_position(tmp_path) -> None:
    data = write_items(tmp_path / "x", [list(range(4, 504))])
    for size in (2, 63, 64, 100):
        starts = np.array([300, 7, 0])
        expected = [4 + s + i for s in starts.tolist() for i in range(size)]
        assert data.read(starts, np.full(3, size)).tolist() == expected
    assert data.read(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []


def test_a_file_with_gaps_is_read_item_by_item(tmp_path) -> None:
    write_items(tmp_path / "x", [[5, 6, 2], [7, 2], [8, 9, 2]])
    index = bytearray((tmp_path / "x.idx").read_bytes())
    index[-16:] = np.array([10, 6], dtype="<i8").tobytes()  # the last two items change places
    (tmp_path / "x.idx").write_bytes(index)
    data = IndexedDataset(tmp_path / "x")
    assert not data.adjacent() and isinstance(stream_of(data), ItemStream)
    assert read_blocks(TokenBlocks(data, "none", 8)) == [[5, 6, 2, 8, 9, 7, 2, 8]]


def test_ids_beyond_the_dictionary_are_found_in_blocks_too(tmp_path) -> None:
    data = write_items(tmp_path / "x", numbered([5] * 20))
    blocks = TokenBlocks(data, "none", 10)
    data._limit = 20
    with pytest.raises(DataError, match="does not fit the dictionary of 20"):
        blocks.gather(np.array([9]))


def test_an_empty_text_has_no_block(tmp_path) -> None:
    for data in (write_items(tmp_path / "x", []), MemoryDataset.of([])):
        for mode in MODES:
            assert len(TokenBlocks(data, mode, 8)) == 0
    starts, sizes = block_index(stream_of(MemoryDataset.of([])), "complete", 8)
    assert len(starts) == len(sizes) == 0


def test_sizes_stay_in_the_file(tmp_path) -> None:
    """A corpus of hundreds of millions of sentences must not be copied into every rank."""
    data = write_items(tmp_path / "x", numbered([3, 1, 2]))
    for mode in ("none", "complete", "complete_doc"):
        TokenBlocks(data, mode, 3).gather(np.array([0]))
    blocks = TokenBlocks(data, "eos", 1)
    blocks.gather(np.array([1]))
    assert blocks.sizes_of(np.array([2, 0])).tolist() == [2, 3]
    assert "sizes" not in vars(data)
    assert data.sizes.tolist() == [3, 1, 2] and "sizes" in vars(data)


# -- shortened sentences -------------------------------------------------------------------------


def test_truncated_items_lose_their_end() -> None:
    data = ShortenedDataset(MemoryDataset.of([[5, 6, 7, 2], [8, 2], [2]]), 3)
    assert data.sizes.tolist() == [3, 2, 1] and len(data) == 3
    assert [data[i].tolist() for i in range(3)] == [[5, 6, 7], [8, 2], [2]]
    assert data.gather([2, 0])[0].tolist() == [2, 5, 6, 7]
    assert data.sizes_of(np.array([1, 0])).tolist() == [2, 3]


def fairseq_crop(item: list[int], length: int, seed: int, epoch: int, index: int) -> list[int]:
    """fairseq's `RandomCropDataset`: a seed of three numbers, hashed, sets numpy's generator."""
    np.random.seed(int(hash((seed, epoch, index)) % 1e6))
    excess = len(item) - length
    start = np.random.randint(0, excess) if excess > 0 else 0
    return item[start : start + length]


def test_random_crops_are_those_of_fairseq_and_change_with_the_epoch() -> None:
    items = numbered([40, 3, 90, 41, 70])
    data = shorten(MemoryDataset.of(items), "random_crop", 10, seed=7)
    first = [data[i].tolist() for i in range(5)]
    assert first == [fairseq_crop(item, 10, 7, 0, i) for i, item in enumerate(items)]
    assert data.gather([4, 2])[0].tolist() == first[4] + first[2], "whatever they are read with"
    blocks = TokenBlocks(data, "none", 10)
    blocks.set_epoch(2)
    second = [data[i].tolist() for i in range(5)]
    assert second == [fairseq_crop(item, 10, 7, 1, i) for i, item in enumerate(items)]
    assert second != first and second[1] == first[1]
    blocks.set_epoch(1)
    assert [data[i].tolist() for i in range(5)] == first
    assert shorten(data, "none", 5, seed=1) is data


@given(item_sizes, st.integers(1, 6), st.sampled_from(MODES))
def test_blocks_of_shortened_sentences(sizes, length, mode) -> None:
    items = numbered(sizes)
    with tempfile.TemporaryDirectory() as folder:
        data = shorten(write_items(Path(folder) / "x", items), "truncate", length, seed=1)
        found = read_blocks(TokenBlocks(data, mode, length))
    # What counts as a separator is what has one token now.
    assert found == plain_blocks([item[:length] for item in items], mode, length)
