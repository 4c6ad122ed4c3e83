"""Batches of a language model's blocks: the same as fairseq's, in linear time and little memory.

fairseq sorts blocks by length, those of equal length by a number that each one draws. So the costs
of a batch ascend, and how many blocks there are of each length says where batches end: nothing is
computed block by block. 200 million sentences as blocks of their own are put into batches within
half a minute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import numpy as np
import numpy.typing as npt

from fairseq_lite.data.indexed import Ids

Order = npt.NDArray[np.signedinteger[Any]]  # 32 bits where they suffice

_STEP = 1 << 20  # blocks sorted together: what fits the cache


class Blocks(Protocol):
    """What is sorted."""

    def __len__(self) -> int: ...

    def sizes_of(self, which: slice | Ids) -> Ids:
        """Tokens in some of the blocks."""
        ...


@dataclass(frozen=True)
class SortedBlocks:
    """Blocks, shortest first.

    Attributes:
        order: the blocks; shape (n,).
        lengths: the lengths that occur, ascending.
        counts: how many blocks there are of each of `lengths`.
    """

    order: Order
    lengths: Ids
    counts: Ids

    def up_to(self, limit: int) -> tuple[SortedBlocks, Order]:
        """The blocks of at most `limit` tokens, and the others."""
        kinds = int(np.searchsorted(self.lengths, limit, side="right"))
        kept = int(self.counts[:kinds].sum())
        fitting = SortedBlocks(self.order[:kept], self.lengths[:kinds], self.counts[:kinds])
        return fitting, self.order[kept:]


class BatchSlices(Sequence[Order]):
    """Batches as slices of one order: no object a batch.

    Args:
        order: the blocks of all batches, one batch after another.
        ends: where each batch ends.
    """

    def __init__(self, order: Order, ends: Ids) -> None:
        self._order = order
        self._ends = ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> Order: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Order]: ...
    def __getitem__(self, index: int | slice) -> Order | Sequence[Order]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        index %= len(self)
        return self._order[self._ends[index - 1] if index else 0 : self._ends[index]]


def draw(count: int, seed: int) -> Order:
    """The order of `range(count)` by a number each of them draws.

    numpy's legacy generator, seeded, gives a permutation: the numbers drawn.
    """
    kind = np.dtype(np.int32 if count <= np.iinfo(np.int32).max else np.int64)
    numbers = np.arange(count, dtype=kind)
    np.random.RandomState(seed).shuffle(numbers)
    order = np.empty(count, dtype=kind)
    for start in range(0, count, _STEP):
        some = numbers[start : start + _STEP]
        order[some] = np.arange(start, start + len(some), dtype=kind)
    return order


def sort_blocks(blocks: Blocks, tied: Order) -> SortedBlocks:
    """Sort blocks by length, those of equal length as in `tied`.

    A counting sort, a part of the blocks at a time: only the result, and for a moment the lengths
    in 16 bits, have the number of blocks.
    """
    total = _count_lengths(blocks)
    lengths = _narrow_lengths(blocks, longest=len(total) - 1)
    place = np.cumsum(total) - total  # where the next block of each length goes
    order = np.empty(len(tied), dtype=tied.dtype)
    for some in _parts(tied):
        keys = lengths[some]
        by_length = np.argsort(keys, kind="stable")
        ascending = keys[by_length]
        counts = np.bincount(keys, minlength=len(total))
        within = np.arange(len(some)) - (np.cumsum(counts) - counts)[ascending]
        order[place[ascending] + within] = some[by_length]
        place += counts
    occurring = np.flatnonzero(total)
    return SortedBlocks(order, occurring, total[occurring])


def _count_lengths(blocks: Blocks) -> Ids:
    total = np.zeros(1, dtype=np.int64)
    for start in range(0, len(blocks), _STEP):
        counts = np.bincount(blocks.sizes_of(slice(start, start + _STEP)))
        if len(counts) > len(total):
            counts, total = total, counts
        total[: len(counts)] += counts
    return total


def _narrow_lengths(blocks: Blocks, longest: int) -> npt.NDArray[Any]:
    """The lengths of all blocks, close together: they are about to be read in random order.

    In 16 bits where that is enough, which numpy sorts by radix, ten times as fast as it merges.
    """
    kind = np.dtype(np.uint16 if longest < 1 << 16 else np.int64)
    lengths = np.empty(len(blocks), dtype=kind)
    for start in range(0, len(blocks), _STEP):
        lengths[start : start + _STEP] = blocks.sizes_of(slice(start, start + _STEP))
    return lengths


def _parts(order: Order) -> Iterator[Order]:
    return (order[start : start + _STEP] for start in range(0, len(order), _STEP))


def make_batches(
    blocks: SortedBlocks,
    *,
    max_tokens: int | None = None,
    max_sentences: int | None = None,
    required_multiple: int = 1,
) -> BatchSlices:
    """Cut sorted blocks into batches; those of `batching.batch_by_size`.

    Args:
        blocks: the blocks, shortest first.
        max_tokens: limit of size x longest block in a batch; a single longer block stands alone.
        max_sentences: limit of blocks in a batch.
        required_multiple: sizes are below this or a multiple of it.
    """
    runs = list(_ends(blocks, max_tokens, max_sentences or len(blocks.order), required_multiple))
    return BatchSlices(blocks.order, np.concatenate([np.zeros(0, np.int64), *runs]))


def _ends(
    blocks: SortedBlocks, max_tokens: int | None, max_sentences: int, multiple: int
) -> Iterator[Ids]:
    """Where batches end: those within one length at once, those of several lengths singly."""
    run_ends = np.cumsum(blocks.counts).tolist()
    # Blocks of one length that make a batch; an empty block costs a token, as in batch_by_size.
    limits = [
        max_sentences if max_tokens is None else min(max_tokens // max(length, 1), max_sentences)
        for length in blocks.lengths.tolist()
    ]
    start, run = 0, 0
    while run < len(run_ends):
        size = _allowed(max(limits[run], 1), multiple)
        full = (run_ends[run] - start) // size
        if full:
            yield np.arange(1, full + 1, dtype=np.int64) * size + start
            start += full * size
        while start < run_ends[run]:
            start += _allowed(_largest(start, run, run_ends, limits), multiple)
            yield np.array([start], dtype=np.int64)
        while run < len(run_ends) and run_ends[run] <= start:
            run += 1


def _largest(start: int, run: int, run_ends: list[int], limits: list[int]) -> int:
    """The most blocks from `start` on, of this length and longer ones, that fit a batch."""
    size = 1
    for end, limit in zip(run_ends[run:], limits[run:], strict=True):
        size = max(size, min(end - start, limit))
        if limit <= end - start:
            break
    return size


def _allowed(size: int, multiple: int) -> int:
    """The largest allowed batch size up to `size`."""
    return size if size < multiple else size - size % multiple
