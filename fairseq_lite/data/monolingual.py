"""Blocks of a language model as source and target, and the batches a model reads.

The target is the block, the source the same shifted right by one: every token is predicted from
those before it. The first one is predicted from eos, or, in the middle of a sentence, from the
token before the block.

Source: fairseq's `MonolingualDataset`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fairseq_lite.data.block_batches import (
    BatchSlices,
    SortedBlocks,
    draw,
    make_batches,
    sort_blocks,
)
from fairseq_lite.data.blocks import TokenBlocks
from fairseq_lite.data.collate import pad_sequences
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.indexed import Ids
from fairseq_lite.errors import DataError

logger = logging.getLogger(__name__)

_LONGER_MODEL = "--max-target-positions (in training also --max-tokens)"

Sample = dict[str, Any]
MaxPositions = int | Sequence[int | None] | None


class Examples(NamedTuple):
    """Some examples, one after another.

    Attributes:
        source: what the model reads; shape (sum(sizes),).
        target: what it predicts there.
        sizes: the length of each.
    """

    source: Ids
    target: Ids
    sizes: Ids


@dataclass(frozen=True)
class Layout:
    """How examples become a matrix.

    Attributes:
        pad: what fills rows.
        columns: at least so many (`--pad-to-fixed-length`).
        rows: at least so many (`--pad-to-fixed-bsz`); the further ones are padding.
        multiple: the number of columns is a multiple of this.
    """

    pad: int
    columns: int = 0
    rows: int = 0
    multiple: int = 1

    def matrix(self, tokens: Ids, sizes: Ids) -> torch.Tensor:
        """Sequences as rows, padded on the right; int64, shape (B, T)."""
        missing = max(self.rows - len(sizes), 0)
        sizes = np.concatenate([sizes, np.zeros(missing, dtype=np.int64)]) if missing else sizes
        return torch.from_numpy(
            pad_sequences(tokens, sizes, self.pad, multiple=self.multiple, length=self.columns)
        )


class BlockDataset(ABC):
    """What a language model learns from: blocks that can be ordered, batched and collated.

    Args:
        layout: how batches are laid out.
        extra: tokens that each example has besides its block (a bos).
    """

    def __init__(self, layout: Layout, extra: int = 0) -> None:
        self.layout = layout
        self.extra = extra

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def sizes_of(self, which: slice | Ids) -> Ids:
        """Tokens in some blocks, without those of `extra`, which fairseq does not count either."""

    @abstractmethod
    def read(self, indices: Ids) -> Examples:
        """Some examples, with those tokens."""

    @property
    def sizes(self) -> Ids:
        """Tokens in every block."""
        return self.sizes_of(slice(None))

    def set_epoch(self, epoch: int) -> None:  # noqa: B027
        """Called before each epoch."""

    def __getitem__(self, index: int) -> Sample:
        """One example: its id, source and target as int64 tensors."""
        source, target, _ = self.read(np.array([index]))
        return {
            "id": int(index),
            "source": torch.from_numpy(source),
            "target": torch.from_numpy(target),
        }

    # -- batches ---------------------------------------------------------------------------------

    def ordered(self, seed: int) -> SortedBlocks:
        """All blocks, shortest first, those of equal length in an order drawn by `seed`."""
        return sort_blocks(self, draw(len(self), seed))

    def batches(
        self,
        *,
        max_tokens: int | None = None,
        max_sentences: int | None = None,
        required_multiple: int = 1,
        max_positions: MaxPositions = None,
        skip_invalid: bool = False,
        seed: int = 1,
        name: str = "dataset",
    ) -> BatchSlices:
        """The batches of one pass, shortest first, as fairseq makes them.

        Args:
            max_tokens: limit of size x longest block in a batch.
            max_sentences: limit of blocks in a batch.
            required_multiple: sizes are below this or a multiple of it.
            max_positions: the longest example a model takes.
            skip_invalid: leave longer ones out, with a warning, instead of raising.
            seed: of the order of blocks of equal length.
            name: the split, for messages.

        Raises:
            DataError: an example is longer than `max_positions`.
        """
        blocks = self.ordered(seed)
        limit = _tightest(max_positions)
        if limit is not None:
            # --max-tokens limits blocks, as it counts them; a model must also take what is added.
            blocks, ignored = blocks.up_to(limit - (0 if limit == max_tokens else self.extra))
            if len(ignored):
                cure = "--max-tokens" if limit == max_tokens else _LONGER_MODEL
                self._report(ignored, limit, skip_invalid, name, cure)
        return make_batches(
            blocks,
            max_tokens=max_tokens,
            max_sentences=max_sentences,
            required_multiple=required_multiple,
        )

    def _report(
        self,
        ignored: npt.NDArray[Any],
        limit: int,
        skip: bool,
        name: str,
        cure: str = _LONGER_MODEL,
    ) -> None:
        if not skip:
            longest = int(self.sizes_of(ignored[-1:])[0]) + self.extra
            raise DataError(
                f"{name}: {len(ignored):,} blocks are too long; block {int(ignored[-1])} has "
                f"{longest} tokens where {limit} are allowed; leave them out with "
                "--skip-invalid-size-inputs-valid-test, lower --tokens-per-sample (with "
                f"--shorten-method truncate it cuts sentences too), or raise {cure}"
            )
        logger.warning(
            "%s samples have invalid sizes and will be skipped, max_positions=%s, "
            "first few sample ids=%s",
            f"{len(ignored):,}",
            limit,
            ignored[:10].tolist(),
        )

    # -- batches to tensors ----------------------------------------------------------------------

    def collate(self, examples: Sequence[int] | npt.NDArray[Any] | Sequence[Sample]) -> Sample:
        """Read examples and pad them on the right.

        Args:
            examples: positions in the dataset, or samples as `self[i]` gives them.

        Returns:
            fairseq's sample: "id" (B,), "nsentences", "ntokens", "net_input" {"src_tokens" (B, T),
            "src_lengths" (B,)} and "target" (B, T). With `Layout.rows` the matrices and
            "src_lengths" may have further rows, of padding. No examples: an empty dict.
        """
        if len(examples) == 0:
            return {}
        ids, (source, target, sizes) = self._examples(examples)
        src_tokens = self.layout.matrix(source, sizes)
        src_lengths = torch.zeros(len(src_tokens), dtype=torch.int64)
        src_lengths[: len(ids)] = torch.from_numpy(sizes)
        return {
            "id": torch.from_numpy(ids),
            "nsentences": len(ids),
            "ntokens": int(sizes.sum()),
            "net_input": {"src_tokens": src_tokens, "src_lengths": src_lengths},
            "target": self.layout.matrix(target, sizes),
        }

    def _examples(self, examples: Any) -> tuple[Ids, Examples]:
        if isinstance(examples[0], Mapping):
            ids = np.array([int(e["id"]) for e in examples], dtype=np.int64)
            source, target = (
                [np.asarray(e[side], dtype=np.int64) for e in examples]
                for side in ("source", "target")
            )
            sizes = np.array([len(s) for s in source], dtype=np.int64)
            return ids, Examples(np.concatenate(source), np.concatenate(target), sizes)
        ids = np.asarray(examples, dtype=np.int64)
        return ids, self.read(ids)


class MonolingualDataset(BlockDataset):
    """Blocks of one text.

    Args:
        blocks: the blocks.
        source_dictionary: symbols of the source.
        target_dictionary: symbols of the target: the same, or the first of them; the others
            become unknown.
        layout: how batches are laid out.
        bos: ids put before source and target (`--add-bos-token`), or None.
    """

    def __init__(
        self,
        blocks: TokenBlocks,
        source_dictionary: Dictionary,
        target_dictionary: Dictionary,
        layout: Layout,
        bos: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(layout, extra=0 if bos is None else 1)
        self.blocks = blocks
        self._eos = source_dictionary.eos()
        self._bos = bos
        self._num_targets = len(target_dictionary)
        self._cut = len(target_dictionary) != len(source_dictionary)
        self._unk = target_dictionary.unk()

    def __len__(self) -> int:
        return len(self.blocks)

    def sizes_of(self, which: slice | Ids) -> Ids:
        return self.blocks.sizes_of(which)

    def set_epoch(self, epoch: int) -> None:
        self.blocks.set_epoch(epoch)

    def read(self, indices: Ids) -> Examples:
        target, sizes = self.blocks.gather(indices)
        source = shift_right(target, sizes, self.blocks.before(indices, self._eos))
        if self._cut:
            target = np.where(target < self._num_targets, target, self._unk)
        if self._bos is not None:
            starts = np.cumsum(sizes) - sizes
            source, target = (
                np.insert(tokens, starts, bos)
                for tokens, bos in zip((source, target), self._bos, strict=True)
            )
            sizes = sizes + 1
        return Examples(source, target, sizes)


def shift_right(tokens: Ids, sizes: Ids, first: Ids) -> Ids:
    """Shift every sequence right by one: `first` comes in, its last token drops out."""
    out = np.empty_like(tokens)
    out[1:] = tokens[:-1]
    filled = sizes > 0
    out[(np.cumsum(sizes) - sizes)[filled]] = first[filled]
    return out


def _tightest(limits: MaxPositions) -> int | None:
    if limits is None or isinstance(limits, int):
        return limits
    given = [limit for limit in limits if limit is not None]
    return min(given, default=None)
