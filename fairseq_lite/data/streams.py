"""The items of a dataset one after another, as one long sequence of tokens.

What a language model reads does not end where a sentence ends, so it is addressed by position. In
a file made by flite-preprocess the items lie one after another already: a stream of it copies
nothing and knows nothing but the file. Other datasets (joined, shortened, raw text) keep where each
of their items ends, 8 bytes an item.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from fairseq_lite.data.indexed import ConcatDataset, Ids, IndexedDataset, TokenDataset, ranges

Mask = npt.NDArray[np.bool_]


class TokenStream(ABC):
    """All items of a dataset, one after another.

    Attributes:
        num_items: the number of items.
        num_tokens: their total length.
    """

    num_items: int
    num_tokens: int

    @abstractmethod
    def edges(self, first: int, last: int) -> Ids:
        """Where the items `first` to `last - 1` begin, and where the last of them ends.

        Args:
            first: the first item.
            last: beyond the last item, and beyond `first`.

        Returns:
            Positions in tokens, shape (last - first + 1,).
        """

    @abstractmethod
    def read(self, starts: Ids, sizes: Ids) -> Ids:
        """The tokens of some ranges, one range after another; shape (sum(sizes),)."""

    @abstractmethod
    def begins_item(self, positions: Ids) -> Mask:
        """Whether an item begins at each of these positions."""


def stream_of(dataset: TokenDataset) -> TokenStream:
    """The stream of a dataset, the one that needs least memory."""
    if isinstance(dataset, IndexedDataset) and dataset.adjacent():
        return FileStream(dataset)
    if isinstance(dataset, ConcatDataset) and dataset.repeats == [1] * len(dataset.parts):
        return JoinedStream([stream_of(part) for part in dataset.parts])
    return ItemStream(dataset)


class FileStream(TokenStream):
    """A file whose items lie one after another: positions in it are positions in the stream."""

    def __init__(self, dataset: IndexedDataset) -> None:
        self._dataset = dataset
        self.num_items = len(dataset)
        self.num_tokens = dataset.num_tokens

    def edges(self, first: int, last: int) -> Ids:
        out = np.empty(last - first + 1, dtype=np.int64)
        out[:-1] = self._dataset.starts(slice(first, last))
        out[-1] = out[-2] + self._dataset.sizes_of(slice(last - 1, last))[0]
        return out

    def read(self, starts: Ids, sizes: Ids) -> Ids:
        return self._dataset.read(starts, sizes)

    def begins_item(self, positions: Ids) -> Mask:
        # numpy's own search would first copy the whole table, which is unaligned in the file.
        found = _search(self._dataset.starts, self.num_items, positions)
        inside = np.minimum(found, self.num_items - 1)
        begins: Mask = (found < self.num_items) & (self._dataset.starts(inside) == positions)
        return begins


class ItemStream(TokenStream):
    """Any dataset: a range is found among the items that cover it."""

    def __init__(self, dataset: TokenDataset) -> None:
        self._dataset = dataset
        self._ends = np.cumsum(dataset.sizes, dtype=np.int64)
        self.num_items = len(dataset)
        self.num_tokens = int(self._ends[-1]) if len(self._ends) else 0

    def edges(self, first: int, last: int) -> Ids:
        begin = self._ends[first - 1 : first] if first else np.zeros(1, dtype=np.int64)
        return np.concatenate([begin, self._ends[first:last]])

    def read(self, starts: Ids, sizes: Ids) -> Ids:
        filled = sizes > 0
        starts, sizes = starts[filled], sizes[filled]
        first = np.searchsorted(self._ends, starts, side="right")
        counts = np.searchsorted(self._ends, starts + sizes - 1, side="right") + 1 - first
        tokens, lengths = self._dataset.gather(ranges(first, counts))
        begins = np.cumsum(lengths) - lengths
        gathered = begins[np.cumsum(counts) - counts]  # where each range's first item now lies
        return tokens[ranges(gathered + starts - self._start_of(first), sizes)]

    def begins_item(self, positions: Ids) -> Mask:
        items = np.searchsorted(self._ends, positions, side="right")
        begins: Mask = self._start_of(items) == positions
        return begins

    def _start_of(self, items: Ids) -> Ids:
        return np.where(items > 0, self._ends[items - 1], 0)


class JoinedStream(TokenStream):
    """Streams one after another (`train`, `train1`, …)."""

    def __init__(self, parts: Sequence[TokenStream]) -> None:
        self._parts = list(parts)
        self._items = _edges_of([part.num_items for part in parts])
        self._tokens = _edges_of([part.num_tokens for part in parts])
        self.num_items, self.num_tokens = int(self._items[-1]), int(self._tokens[-1])

    def edges(self, first: int, last: int) -> Ids:
        out = np.empty(last - first + 1, dtype=np.int64)
        for part, item, token in zip(self._parts, self._items, self._tokens, strict=False):
            begin, end = max(first - item, 0), min(last - item, part.num_items)
            if begin < end:
                out[item + begin - first : item + end - first + 1] = token + part.edges(begin, end)
        return out

    def read(self, starts: Ids, sizes: Ids) -> Ids:
        out = np.empty(int(sizes.sum()), dtype=np.int64)
        places = np.cumsum(sizes) - sizes
        for part, token in zip(self._parts, self._tokens, strict=False):
            begin = np.maximum(starts, token)
            length = np.minimum(starts + sizes, token + part.num_tokens) - begin
            rows = np.flatnonzero(length > 0)
            if len(rows):
                begin, length = begin[rows], length[rows]
                there = ranges(places[rows] + begin - starts[rows], length)
                out[there] = part.read(begin - token, length)
        return out

    def begins_item(self, positions: Ids) -> Mask:
        out = np.zeros(len(positions), dtype=bool)
        for part, token in zip(self._parts, self._tokens, strict=False):
            rows = np.flatnonzero((positions >= token) & (positions < token + part.num_tokens))
            if len(rows):
                out[rows] = part.begins_item(positions[rows] - token)
        return out


def _edges_of(lengths: Sequence[int]) -> Ids:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _search(values: Callable[[Ids], Ids], count: int, wanted: Ids) -> Ids:
    """The first of `count` ascending values that is not below each of `wanted`; `count`: none."""
    low = np.zeros(len(wanted), dtype=np.int64)
    high = np.full(len(wanted), count, dtype=np.int64)
    while (open_ := low < high).any():
        middle = np.where(open_, (low + high) // 2, 0)
        below = open_ & (values(middle) < wanted)
        low = np.where(below, middle + 1, low)
        high = np.where(open_ & ~below, middle, high)
    return low
