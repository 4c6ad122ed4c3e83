"""Blocks that come with the tokens before them (`--context-window`).

What the model reads in front of a block is not scored: there is padding in the target. Every
context is read from the data itself, so neither the order of blocks nor a shard changes it.

The windows of two blocks overlap, and what a model computes for the overlap cannot be used twice:
its positions differ, and so does what it sees before it.

Source: fairseq's `LMContextWindowDataset`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq_lite.data.batching import batch_by_size
from fairseq_lite.data.indexed import Ids, ranges
from fairseq_lite.data.monolingual import BlockDataset, Examples, Sample

logger = logging.getLogger(__name__)


class ContextWindow(BlockDataset):
    """Blocks with as much of the text before them as there is room for.

    Args:
        blocks: what is scored.
        window: the most tokens a context has.
        longest: the most tokens context and block have together, where the block leaves room.
    """

    def __init__(self, blocks: BlockDataset, window: int, longest: int) -> None:
        super().__init__(blocks.layout)
        self.blocks = blocks
        own = blocks.sizes + blocks.extra
        ends = np.cumsum(own, dtype=np.int64)
        self._starts = ends - own
        room = np.maximum(longest - own, 0)
        self._contexts = np.minimum(np.minimum(room, window), self._starts)
        self._own = own

    def __len__(self) -> int:
        return len(self.blocks)

    def sizes_of(self, which: slice | Ids) -> Ids:
        """Tokens in some blocks, contexts included."""
        sizes: Ids = self._own[which] + self._contexts[which]
        return sizes

    def read(self, indices: Ids) -> Examples:
        contexts, own = self._contexts[indices], self._own[indices]
        first = np.searchsorted(self._starts, self._starts[indices] - contexts, side="right") - 1
        # Blocks a context lies in; consecutive blocks need each of them once.
        needed = np.unique(ranges(first, indices - first + 1))
        source, target, sizes = self.blocks.read(needed)
        starts = (np.cumsum(sizes) - sizes)[np.searchsorted(needed, indices)]
        places = ranges(starts - contexts, contexts + own)
        scored = np.ones(len(places), dtype=bool)
        rows = np.cumsum(contexts + own) - (contexts + own)
        scored[ranges(rows, contexts)] = False
        return Examples(
            source[places], np.where(scored, target[places], self.layout.pad), contexts + own
        )

    def batches(self, **limits: Any) -> Sequence[npt.NDArray[Any]]:  # type: ignore[override]
        """As `BlockDataset.batches`, in the order of the text: neighbours are read together."""
        indices = np.arange(len(self), dtype=np.int64)
        sizes = self.sizes
        longest = limits.get("max_positions")
        if longest is not None:
            ignored = indices[sizes > longest]
            if len(ignored):
                self._report(ignored, longest, limits["skip_invalid"], limits["name"])
            indices = indices[sizes <= longest]
        return batch_by_size(
            indices,
            sizes[indices],
            max_tokens=limits.get("max_tokens"),
            max_sentences=limits.get("max_sentences"),
            required_multiple=limits.get("required_multiple", 1),
        )

    def collate(self, examples: Any) -> Sample:
        """As `BlockDataset.collate`; "ntokens" counts what is scored."""
        sample = super().collate(examples)
        if sample:
            sample["ntokens"] = int(sample["target"].ne(self.layout.pad).sum())
        return sample
