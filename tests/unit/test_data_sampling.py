"""Languages mixed: shares, draws by seed and epoch, and reading across languages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lite.data.blocks import TokenBlocks
from fairseq_lite.data.indexed import MemoryDataset
from fairseq_lite.data.monolingual import Layout, MonolingualDataset
from fairseq_lite.data.sampling import (
    LanguageMixture,
    draw_blocks,
    sampling_probabilities,
    size_ratios,
)
from tests.helpers.text import dictionary_of, numbered

DICTIONARY = dictionary_of(1000)
COUNTS = [900, 90, 10]


def text(sizes: list[int], bos: tuple[int, int] | None = None) -> MonolingualDataset:
    blocks = TokenBlocks(MemoryDataset.of(numbered(sizes)), "eos", 1)
    return MonolingualDataset(blocks, DICTIONARY, DICTIONARY, Layout(1), bos)


def test_shares_of_languages() -> None:
    assert sampling_probabilities(COUNTS, 1.0) == pytest.approx([0.9, 0.09, 0.01])
    assert sampling_probabilities(COUNTS, 0.0) == pytest.approx([1 / 3] * 3)
    roots = np.sqrt([0.9, 0.09, 0.01])
    assert sampling_probabilities(COUNTS, 0.5) == pytest.approx(roots / roots.sum())
    assert size_ratios(COUNTS, 1.0).tolist() == [1.0, 1.0, 1.0], "rounded, as 1/3 * 3 may not be 1"
    ratios = size_ratios(COUNTS, 0.3)
    assert ratios[0] < 1 < ratios[1] < ratios[2]
    assert float(ratios @ np.array(COUNTS)) == pytest.approx(sum(COUNTS)), "as much data as before"


def test_draws_are_those_of_fairseq() -> None:
    """`ResamplingDataset` seeds numpy's legacy generator with 42, the seed and the epoch."""
    generator = np.random.RandomState([42, 7, 3])
    expected = generator.choice(20, 50, replace=True)
    assert draw_blocks(20, 2.5, seed=7, epoch=3).tolist() == expected.tolist()
    generator = np.random.RandomState([42, 7, 3])
    expected = generator.choice(20, 7, replace=False)
    assert draw_blocks(20, 0.31, seed=7, epoch=3).tolist() == expected.tolist()


@given(st.integers(1, 60), st.integers(0, 9), st.integers(1, 5))
def test_draws_depend_on_seed_and_epoch_and_repeat_no_block_where_a_language_shrinks(
    count, seed, epoch
) -> None:
    once = draw_blocks(count, 1.0, seed, epoch)
    assert sorted(once.tolist()) == list(range(count))
    assert once.tolist() == draw_blocks(count, 1.0, seed, epoch).tolist()
    half = draw_blocks(count, 0.5, seed, epoch)
    assert len(half) == -(-count // 2) == len(set(half.tolist()))
    if count > 40:
        assert half.tolist() != draw_blocks(count, 0.5, seed, epoch + 1).tolist()
        assert half.tolist() != draw_blocks(count, 0.5, seed + 1, epoch).tolist()


def test_a_mixture_reads_each_block_from_its_language() -> None:
    parts = [text([3, 5, 2], bos=(7, 7)), text([4], bos=(8, 8)), text([6, 1], bos=(9, 9))]
    chosen = [np.array([2, 0]), np.array([0, 0, 0]), np.array([1])]
    mixture = LanguageMixture(parts, chosen)
    assert len(mixture) == 6 and mixture.sizes.tolist() == [2, 3, 4, 4, 4, 1]
    assert mixture.sizes_of(np.array([5, 0])).tolist() == [1, 2]
    where = [(0, 2), (0, 0), (1, 0), (1, 0), (1, 0), (2, 1)]
    order = np.array([5, 1, 4, 0])
    source, target, sizes = mixture.read(order)
    alone = [parts[p].read(np.array([b])) for p, b in (where[i] for i in order)]
    assert source.tolist() == [t for a in alone for t in a.source]
    assert target.tolist() == [t for a in alone for t in a.target]
    assert sizes.tolist() == [int(a.sizes[0]) for a in alone]
    assert mixture.collate(order)["net_input"]["src_tokens"][:, 0].tolist() == [9, 7, 8, 7]
    assert mixture.extra == 1


def test_a_mixture_of_everything() -> None:
    parts = [text([3, 5]), text([]), text([6, 1])]
    mixture = LanguageMixture(parts)
    assert mixture.sizes.tolist() == [3, 5, 6, 1]
    tokens = mixture.read(np.arange(4)).target.tolist()
    assert tokens == [t for part in parts for t in part.read(np.arange(len(part))).target]


def test_the_order_of_equal_blocks_changes_with_the_epoch() -> None:
    """fairseq's `SortDataset`: the tie is broken by a permutation of seed + epoch."""
    orders = []
    for epoch in (1, 2):
        mixture = LanguageMixture([text([2] * 30)], epoch=epoch)
        np.random.seed(7 + epoch)
        expected = np.lexsort([np.random.permutation(30), mixture.sizes])
        orders.append(np.concatenate(list(mixture.batches(max_sentences=8, seed=7))).tolist())
        assert orders[-1] == expected.tolist()
    assert orders[0] != orders[1]


def test_the_epoch_reaches_every_part() -> None:
    class Cropped(MemoryDataset):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    data = Cropped.of(numbered([3, 4]))
    blocks = TokenBlocks(data, "eos", 1)
    LanguageMixture([MonolingualDataset(blocks, DICTIONARY, DICTIONARY, Layout(1))]).set_epoch(5)
    assert data.epoch == 5
