"""Which examples make up a batch: pure functions over lengths, the same batches as fairseq's.

Order: a shuffle from the seed, then stable sorts by target and source length. Batches: as many
examples as fit `max_tokens`, counted with padding, in sizes below `required_multiple` or a multiple
of it. Nothing here reads an example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fairseq_lite.errors import DataError

Indices = npt.NDArray[np.int64]
_FEW = 16  # examples a batch; below it a plain loop beats a handful of numpy calls a batch


def permutation(count: int, seed: int) -> Indices:
    """The shuffle of `range(count)` that numpy's legacy generator gives for `seed`."""
    return np.random.RandomState(seed).permutation(count).astype(np.int64, copy=False)


def ordered_indices(sizes: Sequence[npt.NDArray[Any]], *, shuffle: bool, seed: int) -> Indices:
    """All examples, shortest first, ties in shuffled order.

    Args:
        sizes: lengths of each example; sorted by the first, ties by the second, and so on.
        shuffle: break the last ties at random; otherwise by position.
        seed: of the shuffle.
    """
    count = len(sizes[0])
    indices = permutation(count, seed) if shuffle else np.arange(count, dtype=np.int64)
    for lengths in reversed(sizes):
        indices = indices[_stable_argsort(lengths[indices])]
    return indices


def _stable_argsort(lengths: npt.NDArray[Any]) -> Indices:
    # numpy sorts 16-bit integers by radix, ten times as fast as merging wider ones.
    if len(lengths) and int(lengths.max()) < 1 << 16 and int(lengths.min()) >= 0:
        lengths = lengths.astype(np.uint16)
    return np.argsort(lengths, kind="stable")


def filter_by_size(
    indices: Indices,
    sizes: Sequence[npt.NDArray[Any]],
    max_positions: Sequence[int | None],
) -> tuple[Indices, Indices]:
    """Separate the examples that are too long.

    Args:
        indices: the examples, in order.
        sizes: lengths of every example of the dataset, one array a side.
        max_positions: the longest allowed on each side; None: no limit.

    Returns:
        The examples that fit, in order, and the others.
    """
    fits = np.ones(len(indices), dtype=bool)
    for lengths, limit in zip(sizes, max_positions, strict=True):
        if limit is not None:
            fits &= lengths[indices] <= limit
    if fits.all():
        return indices, indices[:0]
    return indices[fits], indices[~fits]


def require_fit(
    ignored: Indices,
    sizes: Sequence[npt.NDArray[Any]],
    max_positions: Sequence[int | None],
    name: str,
) -> None:
    """Refuse a split that has examples that are too long.

    Raises:
        DataError: there is one; the message names it and what to type.
    """
    if len(ignored):
        first = int(ignored[0])
        lengths = "/".join(str(int(s[first])) for s in sizes)
        limits = "/".join(str(p) for p in max_positions)
        raise DataError(
            f"{name}: {len(ignored):,} examples are too long; example {first} has {lengths} "
            f"tokens where {limits} are allowed; leave them out with "
            "--skip-invalid-size-inputs-valid-test, or raise --max-source-positions and "
            "--max-target-positions (in training also --max-tokens)"
        )


def batch_by_size(
    indices: Indices,
    num_tokens: npt.NDArray[Any],
    *,
    max_tokens: int | None = None,
    max_sentences: int | None = None,
    required_multiple: int = 1,
) -> list[Indices]:
    """Cut an order of examples into batches.

    Each batch takes as many examples as fit, rounded down to a size that is below
    `required_multiple` or a multiple of it; what is left over begins the next batch. The last,
    partial batch is kept.

    Args:
        indices: the examples, in order; shape (n,).
        num_tokens: cost of each of `indices`, in the same order: its length on the longer side.
        max_tokens: limit of size x longest cost in a batch. A single example above it stands alone.
        max_sentences: limit of examples in a batch.
        required_multiple: see above.

    Returns:
        Views into `indices`.
    """
    total = len(indices)
    if total == 0:
        return []
    # A cost is at least one token, or an empty example would divide by zero.
    costs = np.maximum(np.asarray(num_tokens, dtype=np.int64), 1)
    sentences = min(max_sentences or total, total)
    if max_tokens is None:
        ends = _ends_by_count(total, sentences, required_multiple)
    elif min(sentences, max_tokens / float(costs.mean())) < _FEW:
        ends = _ends_one_by_one(costs, max_tokens, sentences, required_multiple)
    else:
        ends = _ends_by_window(costs, max_tokens, sentences, required_multiple)
    starts = [0, *ends[:-1]]
    return [indices[start:end] for start, end in zip(starts, ends, strict=True)]


def batch_in_buckets(
    indices: Indices,
    num_tokens: npt.NDArray[Any],
    *,
    max_tokens: int | None = None,
    max_sentences: int | None = None,
    required_multiple: int = 1,
) -> list[Indices]:
    """As `batch_by_size`, for costs that take few values: every batch of a cost has one size.

    The size of a batch is the largest that `max_tokens` allows at its longest cost, rounded down
    to `required_multiple` unless `max_sentences` sets it; so there are few shapes in all.
    """
    costs = np.maximum(np.asarray(num_tokens, dtype=np.int64), 1)
    limits = np.full(len(costs), max_sentences or len(costs), dtype=np.int64)
    if max_tokens is not None:
        limits = np.minimum(limits, np.maximum(max_tokens // costs, 1))
    if max_sentences is None:
        rounded = limits - limits % required_multiple
        limits = np.where(limits >= required_multiple, rounded, limits)
    batches = []
    start = 0
    while start < len(costs):
        tightest = np.minimum.accumulate(limits[start : start + int(limits[start])])
        fit = int((np.arange(1, len(tightest) + 1) <= tightest).sum())
        batches.append(indices[start : start + fit])
        start += fit
    return batches


def _allowed(size: int, multiple: int) -> int:
    """The largest allowed batch size up to `size`."""
    return size if size < multiple else size - size % multiple


def _ends_by_count(total: int, sentences: int, multiple: int) -> list[int]:
    step = _allowed(sentences, multiple)
    ends = list(range(step, total + 1, step))
    done = ends[-1] if ends else 0
    while done < total:
        done += _allowed(total - done, multiple)
        ends.append(done)
    return ends


def _ends_by_window(
    costs: npt.NDArray[np.int64], max_tokens: int, sentences: int, multiple: int
) -> list[int]:
    total = len(costs)
    counts = np.arange(1, sentences + 1, dtype=np.int64)
    ends: list[int] = []
    start = 0
    while start < total:
        # No batch is longer than if all its examples cost as much as the first one.
        most = min(sentences, max(max_tokens // int(costs[start]), 1), total - start)
        longest = np.maximum.accumulate(costs[start : start + most])
        fit = int(np.searchsorted(longest * counts[:most], max_tokens, side="right"))
        start += _allowed(max(fit, 1), multiple)
        ends.append(start)
    return ends


def _ends_one_by_one(
    costs: npt.NDArray[np.int64], max_tokens: int, sentences: int, multiple: int
) -> list[int]:
    values = costs.tolist()
    total = len(values)
    ends: list[int] = []
    start = position = longest = 0
    while start < total:
        size = position - start
        cost = values[position] if position < total else 0
        larger = cost if cost > longest else longest
        if position < total and size < sentences and (size + 1) * larger <= max_tokens:
            longest = larger
            position += 1
            continue
        start += _allowed(max(size, 1), multiple)
        ends.append(start)
        # What was left over begins the next batch and already fits it.
        longest = max(values[start:position], default=0)
        position = max(position, start)
    return ends


def shuffled(count: int, seed: int) -> Indices:
    """The order of batches in an epoch; `seed` is the run's seed plus the epoch.

    The same order as numpy's legacy generator gives a list of `count` batches.
    """
    order = np.arange(count, dtype=np.int64)
    np.random.RandomState(seed).shuffle(order)
    return order
