"""Batches of blocks: fairseq's order and sizes, source and target, padding, what is left out."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lite.data import block_batches
from fairseq_lite.data.batching import batch_by_size
from fairseq_lite.data.block_batches import draw, make_batches, sort_blocks
from fairseq_lite.data.blocks import TokenBlocks
from fairseq_lite.data.indexed import MemoryDataset
from fairseq_lite.data.iterators import EpochBatchIterator
from fairseq_lite.data.monolingual import Layout, MonolingualDataset, shift_right
from fairseq_lite.errors import DataError
from tests.helpers.text import EOS, dictionary_of, item_sizes, numbered

BOS, PAD, UNK = 0, 1, 3
DICTIONARY = dictionary_of(400)


def dataset(
    items: Sequence[Sequence[int]], mode: str = "none", size: int = 8, **fields: object
) -> MonolingualDataset:
    layout = Layout(PAD, **{k: fields.pop(k) for k in list(fields) if hasattr(Layout, k)})
    target = fields.pop("target", DICTIONARY)
    blocks = TokenBlocks(MemoryDataset.of(items), mode, size)
    return MonolingualDataset(blocks, DICTIONARY, target, layout, **fields)  # type: ignore[arg-type]


# -- order and batches ---------------------------------------------------------------------------


def fairseq_order(sizes: np.ndarray, seed: int) -> list[int]:
    """`MonolingualDataset.ordered_indices`: sorted by size, ties by the number each draws."""
    np.random.seed(seed)
    return np.lexsort([np.random.permutation(len(sizes)), sizes]).tolist()


@given(item_sizes, st.integers(0, 50), st.sampled_from([2, 7, 1 << 20]))
def test_blocks_are_ordered_as_in_fairseq(sizes, seed, step) -> None:
    data = MemoryDataset.of(numbered(sizes))
    old, block_batches._STEP = block_batches._STEP, step
    try:
        found = sort_blocks(data, draw(len(data), seed))
    finally:
        block_batches._STEP = old
    assert found.order.tolist() == fairseq_order(data.sizes, seed)
    lengths, counts = np.unique(data.sizes, return_counts=True)
    assert found.lengths.tolist() == lengths.tolist()
    assert found.counts.tolist() == counts.tolist()


def test_long_lengths_are_ordered_too() -> None:
    data = MemoryDataset.of([[5] * n for n in (70000, 3, 70001, 3, 70000)])
    found = sort_blocks(data, draw(5, 1))
    assert found.order.tolist() == fairseq_order(data.sizes, 1)


@given(
    st.lists(st.integers(0, 40), max_size=150),
    st.none() | st.integers(1, 300),
    st.none() | st.integers(1, 30),
    st.sampled_from([1, 2, 3, 8]),
)
def test_batches_are_those_of_the_rule_one_by_one(sizes, tokens, sentences, multiple) -> None:
    data = MemoryDataset.of([[5] * n for n in sizes])
    blocks = sort_blocks(data, draw(len(sizes), 1))
    limits = {
        "max_tokens": tokens, "max_sentences": sentences, "required_multiple": multiple
    }  # fmt: skip
    found = make_batches(blocks, **limits)
    expected = batch_by_size(blocks.order, data.sizes[blocks.order], **limits)
    assert [b.tolist() for b in found] == [b.tolist() for b in expected]
    assert len(found) == len(expected)


def test_batches_are_a_sequence_of_slices() -> None:
    found = make_batches(sort_blocks(MemoryDataset.of([[5]] * 10), draw(10, 1)), max_sentences=4)
    assert [len(b) for b in found] == [4, 4, 2]
    assert found[-1].tolist() == found[2].tolist()
    assert [b.tolist() for b in found[1:]] == [found[1].tolist(), found[2].tolist()]
    with pytest.raises(IndexError):
        found[3]
    assert found[0].dtype == np.int32, "half the memory, where it is enough"


def test_blocks_that_are_too_long(caplog: pytest.LogCaptureFixture) -> None:
    data = dataset(numbered([3, 9, 5, 12]), "eos")
    with pytest.raises(DataError, match=r"valid: 2 blocks are too long; block 3 has 12 tokens whe"):
        data.batches(max_sentences=4, max_positions=8, name="valid")
    with pytest.raises(DataError, match=r"lower --tokens-per-sample .* or raise --max-tokens$"):
        data.batches(max_tokens=8, max_positions=8)
    with caplog.at_level(logging.WARNING):
        kept = data.batches(max_sentences=4, max_positions=(8, None), skip_invalid=True)
    assert sorted(np.concatenate(list(kept)).tolist()) == [0, 2]
    assert "2 samples have invalid sizes" in caplog.text
    assert len(data.batches(max_sentences=4, max_positions=12)) == 1


def test_a_bos_needs_room_in_the_model_but_not_in_max_tokens() -> None:
    """fairseq counts blocks; a model would stumble over the token that comes on top."""
    data = dataset(numbered([8]), bos=(BOS, BOS))
    with pytest.raises(DataError, match="has 9 tokens where 8 are allowed"):
        data.batches(max_sentences=1, max_positions=8)
    assert len(data.batches(max_tokens=8, max_positions=8)) == 1
    assert len(data.batches(max_tokens=8, max_positions=9)) == 1


@given(item_sizes, st.integers(1, 9), st.integers(1, 3))
def test_every_token_is_a_target_once_an_epoch_on_some_rank(sizes, size, world) -> None:
    items = numbered(sizes)
    data = dataset(items, "none", size)
    seen: list[int] = []
    for rank in range(world):
        epochs = EpochBatchIterator(
            data, data.batches(max_tokens=24), world_size=world, rank=rank, epoch=3
        )
        for sample in epochs.next_epoch_itr():
            if sample is not None:
                target = sample["target"]
                seen += target[target != PAD].tolist()
                assert sample["ntokens"] == int((target != PAD).sum())
    assert sorted(seen) == sorted(token for item in items for token in item)


# -- source and target ---------------------------------------------------------------------------


def test_a_batch() -> None:
    data = dataset([[5, 6, 7, EOS], [8, EOS], [9, 10, 11, 12, EOS]], "none", 4)
    sample = data.collate(np.array([2, 0, 1], dtype=np.int32))
    assert sample["id"].tolist() == [2, 0, 1]
    assert sample["net_input"]["src_tokens"].tolist() == [
        [10, 11, 12, PAD],
        [EOS, 5, 6, 7],
        [EOS, 8, EOS, 9],
    ]
    assert sample["target"].tolist() == [[11, 12, EOS, PAD], [5, 6, 7, EOS], [8, EOS, 9, 10]]
    assert sample["net_input"]["src_lengths"].tolist() == [3, 4, 4]
    assert (sample["nsentences"], sample["ntokens"]) == (3, 11)
    assert sample["target"].dtype == sample["id"].dtype == torch.int64
    assert data.collate([]) == {}


def test_collating_samples_is_collating_their_positions() -> None:
    data = dataset(numbered([3, 9, 5]), "complete", 8)
    by_position, by_sample = data.collate([1, 0]), data.collate([data[1], data[0]])
    for key in ("id", "target"):
        assert torch.equal(by_position[key], by_sample[key])
    for key, value in by_position["net_input"].items():
        assert torch.equal(value, by_sample["net_input"][key])


@given(item_sizes.filter(len), st.sampled_from(["none", "complete", "eos"]), st.integers(1, 9))
def test_the_source_is_the_target_shifted_right(sizes, mode, size) -> None:
    data = dataset(numbered(sizes), mode, size)
    for index in range(len(data)):
        sample = data[index]
        assert sample["source"][1:].tolist() == sample["target"][:-1].tolist()
        first = data.blocks.before(np.array([index]), EOS)
        assert sample["source"][0] == first[0]


def test_bos_of_source_and_target() -> None:
    data = dataset([[5, 6, EOS], [7, EOS]], "eos", bos=(BOS, 9))
    sample = data.collate([0, 1])
    assert sample["net_input"]["src_tokens"].tolist() == [[BOS, EOS, 5, 6], [BOS, EOS, 7, PAD]]
    assert sample["target"].tolist() == [[9, 5, 6, EOS], [9, 7, EOS, PAD]]
    assert sample["ntokens"] == 7 and data.sizes.tolist() == [3, 2], "batches count blocks"


def test_targets_beyond_the_output_dictionary_are_unknown() -> None:
    data = dataset([[5, 300, 7, EOS]], "eos", target=DICTIONARY.truncated(7))
    sample = data.collate([0])
    assert sample["net_input"]["src_tokens"].tolist() == [[EOS, 5, 300, 7]]
    assert sample["target"].tolist() == [[5, UNK, UNK, EOS]]


def test_fixed_shapes() -> None:
    data = dataset([[5, EOS], [6, 7, EOS]], "eos", columns=5, rows=4, multiple=2)
    sample = data.collate([0, 1])
    assert sample["target"].shape == sample["net_input"]["src_tokens"].shape == (4, 6)
    assert sample["target"][2:].eq(PAD).all() and sample["target"][:, 3:].eq(PAD).all()
    assert sample["net_input"]["src_lengths"].tolist() == [2, 3, 0, 0]
    assert (sample["nsentences"], sample["ntokens"]) == (2, 5)
    assert dataset(numbered([9]), "eos", columns=5).collate([0])["target"].shape == (1, 9)


def test_shift_right_of_several_sequences() -> None:
    tokens, sizes = np.array([5, 6, 7, 8]), np.array([2, 0, 1, 1])
    assert shift_right(tokens, sizes, np.array([2, 2, 4, 2])).tolist() == [2, 5, 4, 2]


def test_a_truncated_dictionary() -> None:
    small = DICTIONARY.truncated(6)
    assert len(small) == 6 and len(DICTIONARY) == 400
    assert small.symbols == DICTIONARY.symbols[:6]
    assert small.index("w1") == 5 and small.index("w2") == small.unk() == UNK
    assert (small.pad(), small.eos(), small.nspecial) == (1, 2, 4)
