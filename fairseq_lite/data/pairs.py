"""Pairs of source and target sequences, and the batches a translation model reads."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fairseq_lite.data import batching
from fairseq_lite.data.collate import (
    append_missing,
    drop_last,
    eos_to_beginning,
    pad_sequences,
    prepend_missing,
)
from fairseq_lite.data.dictionary import Dictionary
from fairseq_lite.data.indexed import TokenDataset
from fairseq_lite.errors import DataError

logger = logging.getLogger(__name__)

Indices = npt.NDArray[np.int64]
Sample = dict[str, Any]
MaxPositions = int | Sequence[int | None] | None


class PairDataset:
    """A source dataset and, unless there is nothing to learn from, its target.

    Args:
        src: the source sequences, each ending in eos.
        tgt: the target sequences, or None.
        src_dict: symbols of the source.
        tgt_dict: symbols of the target; those of the source when None.
        left_pad_source: pad sources on the left.
        left_pad_target: pad targets on the left.
        shuffle: break ties of length at random when examples are ordered.
        pad_to_multiple: make the padded length a multiple of this.
        num_buckets: pad to at most so many different lengths a side; 0: as long as needed.
        remove_eos_from_source: drop the eos at the end of sources.
        append_eos_to_target: add an eos to targets that have none.
        append_bos: begin both sides with bos.

    Raises:
        DataError: the two sides have unequal numbers of sequences.
    """

    def __init__(
        self,
        src: TokenDataset,
        tgt: TokenDataset | None,
        src_dict: Dictionary,
        tgt_dict: Dictionary | None = None,
        *,
        left_pad_source: bool = True,
        left_pad_target: bool = False,
        shuffle: bool = True,
        pad_to_multiple: int = 1,
        num_buckets: int = 0,
        remove_eos_from_source: bool = False,
        append_eos_to_target: bool = False,
        append_bos: bool = False,
    ) -> None:
        if tgt is not None and len(src) != len(tgt):
            raise DataError(
                f"{src} has {len(src):,} sequences, {tgt} has {len(tgt):,}: "
                "source and target must have equally many; preprocess them again"
            )
        self.src, self.tgt = src, tgt
        self.src_dict = src_dict
        self.tgt_dict = src_dict if tgt_dict is None else tgt_dict
        self.left_pad_source, self.left_pad_target = left_pad_source, left_pad_target
        self.shuffle = shuffle
        self.pad_to_multiple = pad_to_multiple
        self.remove_eos_from_source = remove_eos_from_source
        self.append_eos_to_target = append_eos_to_target
        self.append_bos = append_bos
        self.bucketed = num_buckets > 0 and len(src) > 0
        self.src_sizes = _to_buckets(src.sizes, num_buckets) if self.bucketed else src.sizes
        self.tgt_sizes: npt.NDArray[Any] | None = None
        if tgt is not None:
            self.tgt_sizes = _to_buckets(tgt.sizes, num_buckets) if self.bucketed else tgt.sizes

    def __len__(self) -> int:
        return len(self.src)

    def __getitem__(self, index: int) -> Sample:
        """One example: its id, source and target (None without one) as int64 tensors."""
        target = None if self.tgt is None else torch.from_numpy(self.tgt[index])
        return {"id": int(index), "source": torch.from_numpy(self.src[index]), "target": target}

    # -- lengths and batches -----------------------------------------------------------------------

    @property
    def side_sizes(self) -> list[npt.NDArray[Any]]:
        """Lengths of all examples, one array a side."""
        return [self.src_sizes] if self.tgt_sizes is None else [self.src_sizes, self.tgt_sizes]

    @property
    def sizes(self) -> npt.NDArray[Any]:
        """Lengths of all examples; shape (n, 2), or (n, 1) without a target."""
        return np.stack(self.side_sizes, axis=1)

    def num_tokens(self, indices: npt.ArrayLike | None = None) -> npt.NDArray[Any]:
        """What examples cost in a batch: the length of their longer side."""
        wanted: Any = slice(None) if indices is None else np.asarray(indices)
        source: npt.NDArray[Any] = self.src_sizes[wanted]
        if self.tgt_sizes is None:
            return source
        longer: npt.NDArray[Any] = np.maximum(source, self.tgt_sizes[wanted])
        return longer

    def ordered_indices(self, seed: int = 1) -> Indices:
        """All examples, shortest source first, ties by target, then as shuffled by `seed`."""
        sizes = [self.num_tokens()] if self.bucketed else self.side_sizes
        return batching.ordered_indices(sizes, shuffle=self.shuffle, seed=seed)

    def filter_indices(
        self, indices: Indices, max_positions: MaxPositions
    ) -> tuple[Indices, Indices]:
        """Separate the examples longer than `max_positions` (one number, or one a side)."""
        return batching.filter_by_size(indices, self.side_sizes, self._limits(max_positions))

    def _limits(self, max_positions: MaxPositions) -> list[int | None]:
        if max_positions is None or isinstance(max_positions, int):
            return [max_positions] * len(self.side_sizes)
        return list(max_positions)[: len(self.side_sizes)]

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
    ) -> list[Indices]:
        """The batches of one pass, shortest first, as fairseq makes them.

        Args:
            max_tokens: limit of size x longest length in a batch.
            max_sentences: limit of examples in a batch.
            required_multiple: sizes are below this or a multiple of it.
            max_positions: the longest example allowed, one number or one a side.
            skip_invalid: leave longer examples out, with a warning, instead of raising.
            seed: of the shuffle.
            name: the split, for messages.

        Raises:
            DataError: an example is longer than `max_positions`.
        """
        indices, ignored = self.filter_indices(self.ordered_indices(seed), max_positions)
        if len(ignored):
            if not skip_invalid:
                batching.require_fit(ignored, self.side_sizes, self._limits(max_positions), name)
            logger.warning(
                "%s samples have invalid sizes and will be skipped, max_positions=%s, "
                "first few sample ids=%s",
                f"{len(ignored):,}",
                max_positions,
                ignored[:10].tolist(),
            )
        cut = batching.batch_in_buckets if self.bucketed else batching.batch_by_size
        return cut(
            indices,
            self.num_tokens(indices),
            max_tokens=max_tokens,
            max_sentences=max_sentences,
            required_multiple=required_multiple,
        )

    # -- batches to tensors ------------------------------------------------------------------------

    def collate(self, examples: Sequence[int] | npt.NDArray[Any] | Sequence[Sample]) -> Sample:
        """Read examples and pad them, longest source first.

        Args:
            examples: positions in the dataset, or samples as `self[i]` gives them.

        Returns:
            fairseq's sample: "id" (B,), "nsentences", "ntokens" (of the target, or of the source
            without one), "net_input" {"src_tokens" (B, S), "src_lengths" (B,),
            "prev_output_tokens" (B, T)} and "target" (B, T), or None. No examples: an empty dict.
        """
        if len(examples) == 0:
            return {}
        ids, (source, source_sizes), target = self._read(examples)
        if self.remove_eos_from_source:
            source, source_sizes = drop_last(source, source_sizes, self.src_dict.eos())
        if self.append_bos:
            source, source_sizes = prepend_missing(source, source_sizes, self.src_dict.bos())
        src_tokens = pad_sequences(
            source,
            source_sizes,
            self.src_dict.pad(),
            left_pad=self.left_pad_source,
            multiple=self.pad_to_multiple,
            length=int(self.src_sizes[ids].max()) if self.bucketed else 0,
        )
        src_lengths = (src_tokens != self.src_dict.pad()).sum(axis=1)
        order = np.argsort(-src_lengths, kind="stable")
        sample: Sample = {
            "id": torch.from_numpy(ids[order]),
            "nsentences": len(ids),
            "ntokens": int(src_lengths.sum()),
            "net_input": {
                "src_tokens": torch.from_numpy(src_tokens[order]),
                "src_lengths": torch.from_numpy(src_lengths[order]),
            },
            "target": None,
        }
        if target is not None:
            self._add_target(sample, *target, ids, order)
        return sample

    def _add_target(
        self, sample: Sample, target: Indices, sizes: Indices, ids: Indices, order: Indices
    ) -> None:
        dictionary = self.tgt_dict
        if self.append_eos_to_target:
            target, sizes = append_missing(target, sizes, dictionary.eos())
        if self.append_bos:
            target, sizes = prepend_missing(target, sizes, dictionary.bos())
        length = 0
        if self.bucketed and self.tgt_sizes is not None:
            length = int(self.tgt_sizes[ids].max())
        matrices = [
            pad_sequences(
                tokens,
                sizes,
                dictionary.pad(),
                left_pad=self.left_pad_target,
                multiple=self.pad_to_multiple,
                length=length,
            )[order]
            for tokens in (target, eos_to_beginning(target, sizes, dictionary.eos()))
        ]
        sample["ntokens"] = int((matrices[0] != dictionary.pad()).sum())
        sample["target"] = torch.from_numpy(matrices[0])
        sample["net_input"]["prev_output_tokens"] = torch.from_numpy(matrices[1])

    def _read(
        self, examples: Any
    ) -> tuple[Indices, tuple[Indices, Indices], tuple[Indices, Indices] | None]:
        if isinstance(examples[0], Mapping):
            ids = np.array([int(e["id"]) for e in examples], dtype=np.int64)
            source = _flatten([e["source"] for e in examples])
            has_target = examples[0].get("target") is not None
            return ids, source, _flatten([e["target"] for e in examples]) if has_target else None
        ids = np.asarray(examples, dtype=np.int64)
        return ids, self.src.gather(ids), None if self.tgt is None else self.tgt.gather(ids)


def _flatten(sequences: Sequence[Any]) -> tuple[Indices, Indices]:
    arrays = [np.asarray(s, dtype=np.int64) for s in sequences]
    return np.concatenate(arrays), np.array([len(a) for a in arrays], dtype=np.int64)


def _to_buckets(sizes: npt.NDArray[Any], num_buckets: int) -> npt.NDArray[Any]:
    """Each length rounded up to one of `num_buckets` quantiles of all lengths."""
    quantiles = np.percentile(sizes, np.linspace(0, 100, num_buckets + 1), method="lower")[1:]
    bounds = np.unique(quantiles).astype(sizes.dtype)
    return bounds[np.searchsorted(bounds, sizes)]
