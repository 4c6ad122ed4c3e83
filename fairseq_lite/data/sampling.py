"""Several languages as one dataset, small ones seen more often than their size says.

A language with a share p of all blocks is drawn with probability p^alpha, made to sum to one: alpha
1 leaves the shares as they are, alpha 0 gives every language the same. The total stays that of the
data. A language that grows is sampled with replacement, one that shrinks without; with alpha 1
every block comes exactly once an epoch. What is drawn depends on the seed and the epoch alone: a
resumed run reads what the uninterrupted one would have read.

Source: fairseq's `multilingual_language_modeling` and `ResamplingDataset`, whose draws these are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fairseq_lite.data.block_batches import SortedBlocks
from fairseq_lite.data.indexed import Ids, ranges
from fairseq_lite.data.monolingual import BlockDataset, Examples

Floats = npt.NDArray[np.float64]

_MAGIC = 42  # fairseq's, part of the seed of every draw


def sampling_probabilities(counts: Sequence[int], alpha: float) -> Floats:
    """The share of each language in what is drawn.

    Args:
        counts: blocks of each language.
        alpha: exponent of their shares.
    """
    shares: Floats = np.asarray(counts, dtype=np.float64)
    powers: Floats = (shares / shares.sum()) ** alpha
    probabilities: Floats = powers / powers.sum()
    return probabilities


def size_ratios(counts: Sequence[int], alpha: float) -> Floats:
    """How much larger or smaller each language becomes."""
    probabilities = sampling_probabilities(counts, alpha)
    ratios = probabilities * sum(counts) / np.asarray(counts)
    # fairseq rounds, so that a ratio of 1 is 1 and nothing is drawn twice.
    return np.array([round(ratio, 8) for ratio in ratios.tolist()])


def draw_blocks(count: int, ratio: float, seed: int, epoch: int) -> Ids:
    """The blocks of one language in one epoch.

    Args:
        count: how many it has.
        ratio: how many of them to draw, as a share.
        seed: of the run.
        epoch: the epoch.
    """
    generator = np.random.RandomState([_MAGIC, seed % (1 << 32), epoch])
    size = int(np.ceil(count * ratio))
    return generator.choice(count, size, replace=ratio > 1.0).astype(np.int64)


class LanguageMixture(BlockDataset):
    """The blocks of several datasets one after another, all or some of each.

    Args:
        parts: one dataset a language, laid out alike.
        chosen: which blocks of each part to take, in which order; None: all of all parts.
        epoch: the epoch they were chosen for.
    """

    def __init__(
        self,
        parts: Sequence[BlockDataset],
        chosen: Sequence[Ids] | None = None,
        epoch: int = 1,
    ) -> None:
        super().__init__(parts[0].layout, parts[0].extra)
        self.parts = list(parts)
        self._chosen = chosen
        self._epoch = epoch
        lengths = [len(part) for part in parts] if chosen is None else [len(c) for c in chosen]
        self._starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def set_epoch(self, epoch: int) -> None:
        for part in self.parts:
            part.set_epoch(epoch)

    def ordered(self, seed: int) -> SortedBlocks:
        """As in the base class; another order in each epoch, as there are other blocks."""
        return super().ordered(seed + self._epoch)

    def sizes_of(self, which: slice | Ids) -> Ids:
        indices = np.arange(*which.indices(len(self))) if isinstance(which, slice) else which
        sizes = np.empty(len(indices), dtype=np.int64)
        for part, rows, blocks in self._by_part(indices):
            sizes[rows] = self.parts[part].sizes_of(blocks)
        return sizes

    def read(self, indices: Ids) -> Examples:
        found = [
            (rows, self.parts[part].read(blocks)) for part, rows, blocks in self._by_part(indices)
        ]
        sizes = np.zeros(len(indices), dtype=np.int64)
        for rows, examples in found:
            sizes[rows] = examples.sizes
        starts = np.cumsum(sizes) - sizes
        source, target = (np.empty(int(sizes.sum()), dtype=np.int64) for _ in range(2))
        for rows, examples in found:
            places = ranges(starts[rows], examples.sizes)
            source[places], target[places] = examples.source, examples.target
        return Examples(source, target, sizes)

    def _by_part(self, indices: Ids) -> list[tuple[int, Ids, Ids]]:
        """For each part that is concerned: its number, the rows it fills, its own blocks."""
        which = np.searchsorted(self._starts, indices, side="right") - 1
        found = []
        for part in np.unique(which).tolist():
            rows = np.flatnonzero(which == part)
            blocks = indices[rows] - self._starts[part]
            if self._chosen is not None:
                blocks = self._chosen[part][blocks]
            found.append((part, rows, blocks))
        return found
