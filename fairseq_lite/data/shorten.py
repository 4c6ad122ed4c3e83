"""Sentences cut to a length before blocks are made of them (`--shorten-method`)."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import numpy.typing as npt

from fairseq_lite.data.indexed import Ids, TokenDataset, ranges

ShortenMethod = Literal["none", "truncate", "random_crop"]

# fairseq's range of seeds that are made of several numbers; a float: its rounding is part of them.
_SEEDS = 1e6


class ShortenedDataset(TokenDataset):
    """Items cut to a number of tokens, whatever is cut off: eos goes with the rest.

    Args:
        dataset: the items.
        length: tokens kept, at most.
        seed: keep a part from anywhere, by this seed, the epoch and the item; None: the beginning.

    The parts of the first epoch are fairseq's. fairseq takes the same ones in every epoch, since
    nothing tells its dataset which epoch it is.
    """

    def __init__(self, dataset: TokenDataset, length: int, seed: int | None = None) -> None:
        self.dataset = dataset
        self._length = length
        self._seed = seed
        self._epoch = 1

    def __str__(self) -> str:
        return str(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    @functools.cached_property
    def sizes(self) -> npt.NDArray[np.int32]:  # type: ignore[override]
        """Length of every item."""
        sizes: npt.NDArray[np.int32] = np.minimum(self.dataset.sizes, np.int32(self._length))
        return sizes

    def sizes_of(self, which: slice | Ids) -> Ids:
        return np.minimum(self.dataset.sizes_of(which), self._length)

    def set_epoch(self, epoch: int) -> None:
        """Take other parts from now on."""
        self._epoch = epoch

    def _gather(self, indices: Ids) -> tuple[Ids, Ids]:
        tokens, sizes = self.dataset.gather(indices)
        starts = np.cumsum(sizes) - sizes
        if self._seed is not None:
            for row in np.flatnonzero(sizes > self._length).tolist():
                starts[row] += self._offset(int(indices[row]), int(sizes[row]) - self._length)
        kept = np.minimum(sizes, self._length)
        return tokens[ranges(starts, kept)], kept

    def _offset(self, index: int, excess: int) -> int:
        seed = int(hash((self._seed, self._epoch - 1, index)) % _SEEDS)
        return int(np.random.RandomState(seed).randint(0, excess))


def shorten(dataset: TokenDataset, method: ShortenMethod, length: int, seed: int) -> TokenDataset:
    """The dataset with `--shorten-method` applied."""
    if method == "none":
        return dataset
    return ShortenedDataset(dataset, length, seed if method == "random_crop" else None)
