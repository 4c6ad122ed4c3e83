"""Blocks of tokens: what one example of a language model is (`--sample-break-mode`).

| mode | a block |
|---|---|
| `none` | the next `tokens_per_sample` tokens, wherever sentences end |
| `complete` | as many whole sentences as fit; a longer sentence stands alone |
| `complete_doc` | the same, not beyond the end of a document; documents end at an empty line |
| `eos` | one sentence |

An index of blocks is two numbers a block (none at all for `eos`), whatever the number of sentences,
and is found without a loop over them: 200 million sentences take seconds, and no array of their
number is made.

Source: fairseq's `TokenBlockDataset` and its `token_block_utils_fast`, whose blocks these are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from fairseq_lite.data.indexed import Ids, TokenDataset
from fairseq_lite.data.streams import TokenStream, stream_of

BreakMode = Literal["none", "complete", "complete_doc", "eos"]

DOCUMENT_SEPARATOR = 1  # tokens; an empty line is its eos alone
_ITEMS_PER_STEP = 1 << 18  # items looked at together: 2 MB of positions, which stay in the cache


class TokenBlocks(TokenDataset):
    """A dataset cut into blocks.

    Args:
        dataset: the sentences.
        mode: where blocks end, see above.
        size: tokens in a block, at most; `eos` does not need it.
    """

    def __init__(self, dataset: TokenDataset, mode: BreakMode, size: int) -> None:
        self.dataset = dataset
        self.mode = mode
        if mode != "eos":
            self._stream = stream_of(dataset)
            self._starts, self._sizes = block_index(self._stream, mode, size)

    def __str__(self) -> str:
        return str(self.dataset)

    def __len__(self) -> int:
        return len(self.dataset) if self.mode == "eos" else len(self._sizes)

    @property
    def sizes(self) -> npt.NDArray[np.int32]:  # type: ignore[override]
        """Tokens in each block."""
        return self.dataset.sizes if self.mode == "eos" else self._sizes

    def sizes_of(self, which: slice | Ids) -> Ids:
        if self.mode == "eos":
            return self.dataset.sizes_of(which)
        sizes: Ids = self._sizes[which].astype(np.int64)
        return sizes

    def _gather(self, indices: Ids) -> tuple[Ids, Ids]:
        if self.mode == "eos":
            return self.dataset.gather(indices)
        sizes = self.sizes_of(indices)
        return self._stream.read(self._starts[indices], sizes), sizes

    def before(self, indices: Ids, eos: int) -> Ids:
        """What a model reads before the first token of each block, to predict it.

        That is eos where the block begins with a sentence, else the token before the block; shape
        (len(indices),).
        """
        out = np.full(len(indices), eos, dtype=np.int64)
        if self.mode != "none":  # blocks of every other mode begin with a sentence
            return out
        starts = self._starts[indices]
        within = ~self._stream.begins_item(starts)
        out[within] = self._stream.read(starts[within] - 1, np.ones(int(within.sum()), np.int64))
        return out

    def set_epoch(self, epoch: int) -> None:
        """Tell a dataset that changes with the epoch."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def block_index(
    stream: TokenStream, mode: BreakMode, size: int
) -> tuple[Ids, npt.NDArray[np.int32]]:
    """Where the blocks of a stream begin, and how long they are.

    Args:
        stream: the tokens.
        mode: "none", "complete" or "complete_doc".
        size: tokens in a block, at most.

    Returns:
        Positions in tokens, int64, and lengths, int32.
    """
    if mode == "none":
        starts = np.arange(0, stream.num_tokens, size, dtype=np.int64)
        sizes = np.minimum(stream.num_tokens - starts, size).astype(np.int32)
        return starts, sizes
    found = list(_whole_sentences(stream, size, documents=mode == "complete_doc"))
    return (
        np.concatenate([np.zeros(0, np.int64), *(starts for starts, _ in found)]),
        np.concatenate([np.zeros(0, np.int32), *(sizes for _, sizes in found)]),
    )


def _whole_sentences(
    stream: TokenStream, size: int, documents: bool
) -> Iterator[tuple[Ids, npt.NDArray[np.int32]]]:
    """The blocks of `complete` and `complete_doc`, a window of the stream at a time."""
    first, step = 0, _ITEMS_PER_STEP
    while first < stream.num_items:
        last = min(first + step, stream.num_items)
        edges = stream.edges(first, last)
        lengths = np.diff(edges)
        following = _next_block(edges, lengths, size)
        # A block that reaches the end of the window may go on beyond it: the next one begins there.
        complete = int(np.searchsorted(edges[:-1], edges[-1] - size))
        limit = len(lengths) if last == stream.num_items else complete
        if limit == 0:
            step *= 2
            continue
        separators = lengths == (DOCUMENT_SEPARATOR if documents else -1)
        if documents:
            following = _up_to_separators(following, separators)
        begins, end = _chain(following, limit)
        starts = edges[begins]
        sizes = edges[following[begins]] - starts
        kept = (sizes > (1 if documents else 0)) & ~separators[begins]
        yield starts[kept], sizes[kept].astype(np.int32)
        first, step = first + end, _ITEMS_PER_STEP


def _next_block(edges: Ids, lengths: Ids, size: int) -> npt.NDArray[np.int32]:
    """For each item: where the next block begins when a block begins at this item."""
    fitting = np.searchsorted(edges, edges[:-1] + size, side="right") - 1
    # At least one item that is not empty, however long it is.
    least = np.arange(1, len(edges))
    if not lengths.all():
        least = np.searchsorted(edges, edges[:-1], side="right")
    return np.minimum(np.maximum(fitting, least), len(lengths)).astype(np.int32)


def _up_to_separators(
    following: npt.NDArray[np.int32], separators: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int32]:
    """The same where no block goes beyond a separator; separators are steps of their own."""
    count = len(following)
    positions = np.arange(count, dtype=np.int32)
    own = np.where(separators, positions, np.int32(count))
    next_separator = np.minimum.accumulate(own[::-1])[::-1]
    return np.where(separators, positions + 1, np.minimum(following, next_separator))


def _chain(following: npt.NDArray[np.int32], limit: int) -> tuple[Ids, int]:
    """Go from block to block: the items below `limit` where one begins, and the item after."""
    # Gives Python's integers several times as fast as the array does.
    steps = memoryview(following)  # type: ignore[arg-type]
    begins = []
    at = 0
    while at < limit:
        begins.append(at)
        at = steps[at]
    return np.array(begins, dtype=np.int64), at
