"""How well language models predict a text: `flite-eval-lm`.

- *Loss*: minus the mean log-probability of a token in base 2; of a word with `--remove-bpe`, the
  end of a line being one of them. *Perplexity*: 2 to the power of it.
- *Word-level perplexity*: 2 to the power of the bits of everything scored, ends of lines included,
  divided by the number of words of the text as it was before it was segmented. Words are what
  whitespace separates. It compares models with different segmentations, where `<unk>` is rare.
- *Bits per byte*: the same bits divided by the bytes of that text in UTF-8, one for the end of each
  line included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq_lite.criteria.cross_entropy import perplexity
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.generation.words import Ids, Joining, Scores


@dataclass(frozen=True)
class Scored:
    """What was scored of one example.

    Attributes:
        id: its number in the split.
        tokens: (T,).
        log_probs: (T,), natural, fp32.
    """

    id: int
    tokens: Ids
    log_probs: Scores


def scored_examples(
    sample: dict[str, Any], log_probs: npt.NDArray[np.float32], pad: int, skip: int = 0
) -> Iterator[Scored]:
    """The examples of a batch.

    Args:
        sample: the batch.
        log_probs: (B, T), of its target.
        pad: marks what is not scored.
        skip: leave out the first tokens of every example (a start symbol).
    """
    target = sample["target"].cpu().numpy()
    for row, number in enumerate(sample["id"].tolist()):
        wanted = target[row] != pad
        yield Scored(number, target[row][wanted][skip:], log_probs[row][wanted][skip:])


@dataclass
class Perplexity:
    """Sums over everything scored.

    Attributes:
        join: how pieces make the units of the loss; None: every token is one.
        bits: minus the log-probabilities, in base 2.
        units: tokens, or words with `join`.
    """

    join: Joining | None = None
    bits: float = 0.0
    units: int = 0

    def add(self, one: Scored) -> None:
        """Take in an example."""
        self.bits -= float(one.log_probs.sum(dtype=np.float64)) / math.log(2)
        self.units += len(one.tokens)
        if self.join is not None:
            self.units -= int(self.join.to_next(one.tokens).sum())

    @property
    def loss(self) -> float:
        """In base 2; 0 where there is nothing."""
        return self.bits / self.units if self.units else 0.0

    @property
    def perplexity(self) -> float:
        """2 to the power of the loss."""
        return perplexity(self.loss)


@dataclass
class TextSize:
    """Words and bytes of the text that was scored, put together from its blocks.

    Args:
        dictionary: of the tokens.
        decode: symbols with spaces between them, back to text.
    """

    dictionary: Dictionary
    decode: Callable[[str], str]
    _blocks: dict[int, npt.NDArray[np.int32]] = field(default_factory=dict)

    def add(self, one: Scored) -> None:
        """Take in an example."""
        self._blocks[one.id] = one.tokens.astype(np.int32)

    def count(self) -> tuple[int, int]:
        """Words and bytes. A word that a missing block cuts counts as one."""
        words = size = 0
        for line, ended in self._lines():
            text = self.decode(self.dictionary.string(line))
            words += len(text.split())
            size += len(text.encode()) + ended
        return words, size

    def _lines(self) -> Iterator[tuple[npt.NDArray[np.int32], bool]]:
        """The lines of the text, and whether their end is there."""
        for tokens in self._runs():
            ends = np.flatnonzero(tokens == self.dictionary.eos()) + 1
            for line in np.split(tokens, ends):
                if len(line):
                    yield line, bool(line[-1] == self.dictionary.eos())

    def _runs(self) -> Iterator[npt.NDArray[np.int32]]:
        """Blocks that follow each other, joined: a block may end within a word."""
        numbers = sorted(self._blocks)
        run: list[npt.NDArray[np.int32]] = []
        for number, following in zip(numbers, [*numbers, None][1:], strict=True):
            run.append(self._blocks[number])
            if following != number + 1:
                yield np.concatenate(run)
                run = []
