"""Token datasets for tests: items written to files, and many of them at random."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.indexed import IndexedDataset, IndexedWriter, best_dtype

EOS = 2
FIRST = 4  # the first id that is a word


def write_items(
    prefix: Path, items: Sequence[Sequence[int]], vocabulary: int = 1000
) -> IndexedDataset:
    """Write items as flite-preprocess would, and open them."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    writer = IndexedWriter(prefix, best_dtype(vocabulary))
    for item in items:
        writer.add(item)
    writer.finalize()
    return IndexedDataset(prefix)


def numbered(sizes: Sequence[int]) -> list[list[int]]:
    """Sentences of these lengths whose words are all different; each but an empty one has eos."""
    words = iter(range(FIRST, FIRST + sum(sizes)))
    return [[next(words) for _ in range(n - 1)] + [EOS] * (n > 0) for n in sizes]


def dictionary_of(size: int) -> Dictionary:
    """A dictionary with so many symbols, the special ones included."""
    dictionary = Dictionary()
    for number in range(size - dictionary.nspecial):
        dictionary.add_symbol(f"w{number}", 1)
    return dictionary


def random_items(count: int, longest: int, seed: int = 1) -> list[list[int]]:
    """Sentences of random words, some of them empty lines."""
    generator = np.random.default_rng(seed)
    sizes = np.maximum(generator.integers(-1, longest, count), 0)
    return [[*generator.integers(FIRST, 20, n).tolist(), EOS] for n in sizes]


item_sizes = st.lists(st.integers(1, 12) | st.just(1), max_size=60)
