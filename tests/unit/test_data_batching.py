"""Batching: the same batches as fairseq's rule, and its properties over all inputs."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_lite.data import batching
from fairseq_lite.data.batching import batch_by_size, filter_by_size, ordered_indices, shuffled
from fairseq_lite.errors import DataError


def _slow(costs: list[int], max_tokens, max_sentences, multiple: int) -> list[list[int]]:
    """The rule, spelled out: take one example at a time; on overflow, cut at the last good size."""
    batches, current = [], []
    for index in range(len(costs)):
        current.append(index)
        while True:
            too_many = max_sentences is not None and len(current) > max_sentences
            too_long = max_tokens is not None and (
                len(current) * max(costs[i] for i in current) > max_tokens
            )
            if len(current) == 1 or not (too_many or too_long):
                break
            good = [k for k in range(1, len(current)) if k < multiple or k % multiple == 0]
            batches.append(current[: good[-1]])
            current = current[good[-1] :]
    while current:
        good = [k for k in range(1, len(current) + 1) if k < multiple or k % multiple == 0]
        batches.append(current[: good[-1]])
        current = current[good[-1] :]
    return batches


_limits = {
    "costs": st.lists(st.integers(1, 40), max_size=120),
    "max_tokens": st.none() | st.integers(1, 300),
    "max_sentences": st.none() | st.integers(1, 30),
    "multiple": st.sampled_from([1, 2, 3, 8]),
    "few": st.sampled_from([0, 10**9]),
    "sort": st.booleans(),
}


@settings(deadline=None, max_examples=300)
@given(**_limits)
def test_batches(costs, max_tokens, max_sentences, multiple, few, sort) -> None:
    costs = sorted(costs) if sort else costs
    indices = np.arange(len(costs), dtype=np.int64)
    old, batching._FEW = batching._FEW, few  # take the loop, or the windows
    try:
        batches = batch_by_size(
            indices,
            np.array(costs, dtype=np.int32),
            max_tokens=max_tokens,
            max_sentences=max_sentences,
            required_multiple=multiple,
        )
    finally:
        batching._FEW = old
    found = [b.tolist() for b in batches]
    assert [i for b in found for i in b] == list(range(len(costs)))  # every example once
    for batch in found:
        tokens = len(batch) * max(costs[i] for i in batch)
        assert max_tokens is None or tokens <= max_tokens or len(batch) == 1
        assert max_sentences is None or len(batch) <= max_sentences
        assert len(batch) < multiple or len(batch) % multiple == 0
    assert found == _slow(costs, max_tokens, max_sentences, multiple)


def test_order_is_shuffle_then_target_then_source() -> None:
    source = np.array([3, 1, 3, 1, 3, 1], dtype=np.int32)
    target = np.array([2, 2, 1, 1, 2, 2], dtype=np.int32)
    random = np.random.RandomState(5)
    expected = random.permutation(6)
    expected = expected[np.argsort(target[expected], kind="mergesort")]
    expected = expected[np.argsort(source[expected], kind="mergesort")]
    found = ordered_indices([source, target], shuffle=True, seed=5)
    assert found.tolist() == expected.tolist() and found.dtype == np.int64
    assert ordered_indices([source, target], shuffle=False, seed=5).tolist() == [3, 1, 5, 2, 0, 4]


def test_order_of_long_examples() -> None:
    lengths = np.array([70000, 2, 80000, 2], dtype=np.int32)
    assert ordered_indices([lengths], shuffle=False, seed=1).tolist() == [1, 3, 0, 2]


@given(st.integers(0, 300), st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_shuffle_is_that_of_a_list(count: int, seed: int) -> None:
    batches = [[i] for i in range(count)]
    np.random.seed(seed)
    np.random.shuffle(batches)
    assert shuffled(count, seed).tolist() == [b[0] for b in batches]


def test_filter() -> None:
    source, target = np.array([1, 9, 3, 4]), np.array([1, 1, 9, 4])
    kept, ignored = filter_by_size(np.array([3, 2, 1, 0]), [source, target], [5, 5])
    assert kept.tolist() == [3, 0] and ignored.tolist() == [2, 1]
    kept, ignored = filter_by_size(np.array([3, 2, 1, 0]), [source, target], [None, None])
    assert len(kept) == 4 and len(ignored) == 0
    with pytest.raises(DataError, match="example 2 has 3/9 tokens where 5/5 are allowed"):
        batching.require_fit(np.array([2, 1]), [source, target], [5, 5], "valid")


def test_nothing_in_nothing_out() -> None:
    assert batch_by_size(np.zeros(0, np.int64), np.zeros(0, np.int64), max_tokens=10) == []


def test_a_million_examples_are_quick() -> None:
    lengths = np.random.RandomState(0).randint(1, 100, 1_000_000).astype(np.int32)
    began = time.process_time()
    order = ordered_indices([lengths, lengths], shuffle=True, seed=1)
    batches = batch_by_size(order, lengths[order], max_tokens=4000, required_multiple=8)
    assert sum(map(len, batches)) == len(lengths)
    assert time.process_time() - began < 10
