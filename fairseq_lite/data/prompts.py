"""Lines of text behind a start symbol: what a language model scores, or goes on from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fairseq_lite.data.indexed import Ids, MemoryDataset
from fairseq_lite.data.monolingual import BlockDataset, Examples, Layout


class PromptDataset(BlockDataset):
    """Lines in memory.

    Args:
        lines: the ids of each, without an end symbol.
        start: what every source begins with.
        end: what every target ends with; padding where the end is not scored.
        pad: fills rows.
    """

    def __init__(
        self, lines: Sequence[npt.NDArray[np.int64]], *, start: int, end: int, pad: int
    ) -> None:
        super().__init__(Layout(pad))
        self.lines = MemoryDataset.of(lines)
        self.start, self.end = start, end

    def __len__(self) -> int:
        return len(self.lines)

    def sizes_of(self, which: slice | Ids) -> Ids:
        """Tokens of some lines, the start symbol included."""
        return self.lines.sizes_of(which) + 1

    def read(self, indices: Ids) -> Examples:
        tokens, sizes = self.lines.gather(indices)
        ends = np.cumsum(sizes)
        return Examples(
            np.insert(tokens, ends - sizes, self.start),
            np.insert(tokens, ends, self.end),
            sizes + 1,
        )


def without_end(lines: Sequence[npt.NDArray[np.int64]], eos: int) -> list[npt.NDArray[np.int64]]:
    """Lines without the end symbol that a dictionary puts behind them."""
    return [line[:-1] if len(line) and line[-1] == eos else line for line in lines]
