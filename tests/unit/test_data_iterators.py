"""Iterators: every batch once, equal steps on all ranks, exact resume."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_lite.data.iterators import EpochBatchIterator, GroupedIterator
from fairseq_lite.errors import DataError


class _Ids:
    """A dataset whose samples are the indices asked for."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def collate(self, batch):
        return list(batch)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def _iterator(count: int, **options) -> EpochBatchIterator:
    return EpochBatchIterator(_Ids(), [[k] for k in range(count)], **options)


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 40),
    world=st.integers(1, 5),
    workers=st.sampled_from([0, 1, 3]),
    stop=st.integers(0, 50),
    world_after=st.integers(1, 5),
)
def test_every_batch_once_also_across_a_resume(count, world, workers, stop, world_after) -> None:
    ranks = [_iterator(count, world_size=world, rank=r, num_workers=workers) for r in range(world)]
    epochs = [it.next_epoch_itr() for it in ranks]
    steps = len(epochs[0])
    assert {len(e) for e in epochs} == {steps} == {-(-count // world)}
    stop = min(stop, steps)
    seen = [next(e) for e in epochs for _ in range(stop)]
    states = [it.state_dict() for it in ranks]
    assert all(s == states[0] for s in states)
    again = [_iterator(count, world_size=world_after, rank=r) for r in range(world_after)]
    for iterator in again:
        iterator.load_state_dict(states[0])
        if stop < steps:
            seen += list(iterator.next_epoch_itr())
        else:
            assert (iterator.epoch, iterator.iterations_in_epoch) == (2, 0)
    assert sorted(b[0] for b in seen if b is not None) == list(range(count))
    if world == world_after:
        rest = [list(e) for e in epochs]
        for iterator, expected in zip(again, rest, strict=True):
            iterator.load_state_dict(states[0])
            if stop < steps:
                assert list(iterator.next_epoch_itr()) == expected
    for iterator in (*ranks, *again):
        iterator.close()


def test_order_is_that_of_seed_plus_epoch() -> None:
    iterator = _iterator(20, seed=3)
    for epoch in (1, 2):
        expected = list(range(20))
        np.random.RandomState(3 + epoch).shuffle(expected)
        assert [b[0] for b in iterator.next_epoch_itr()] == expected
        assert iterator.epoch == epoch
    assert [b[0] for b in iterator.next_epoch_itr(shuffle=False)] == list(range(20))
    assert iterator.dataset.epochs == [1, 2, 3]


def test_short_ranks_get_none() -> None:
    given = [
        list(_iterator(5, world_size=3, rank=r).next_epoch_itr(shuffle=False)) for r in (0, 1, 2)
    ]
    assert given == [[[0], [3]], [[1], [4]], [[2], None]]


def test_state_is_fairseqs() -> None:
    iterator = _iterator(4)
    epoch = iterator.next_epoch_itr()
    next(epoch)
    assert iterator.state_dict() == {
        "version": 2,
        "epoch": 1,
        "iterations_in_epoch": 1,
        "shuffle": True,
        "batches_done": 1,
    }
    list(epoch)
    assert iterator.end_of_epoch() and iterator.next_epoch_idx == 2
    assert iterator.state_dict() == {
        "version": 2,
        "epoch": 2,
        "iterations_in_epoch": 0,
        "shuffle": True,
    }


def test_a_state_that_does_not_fit() -> None:
    with pytest.raises(DataError, match="--reset-dataloader"):
        _iterator(4).load_state_dict({"version": 2, "epoch": 1, "iterations_in_epoch": 4})
    old = _iterator(4)
    old.load_state_dict({"epoch": 1, "iterations_in_epoch": 4})
    assert old.next_epoch_itr().n == 0 and old.epoch == 2


def test_fairseqs_state_resumes() -> None:
    whole = list(_iterator(9).next_epoch_itr())
    iterator = _iterator(9)
    iterator.load_state_dict({"version": 2, "epoch": 1, "iterations_in_epoch": 4, "shuffle": True})
    assert iterator.iterations_in_epoch == 4 and iterator.next_epoch_idx == 1
    rest = iterator.next_epoch_itr()
    assert (rest.n, len(rest)) == (4, 9) and list(rest) == whole[4:]


def test_groups() -> None:
    iterator = _iterator(7)
    epoch = iterator.next_epoch_itr(shuffle=False)
    groups = GroupedIterator(epoch, 3)
    assert len(groups) == 3 and next(groups) == [[0], [1], [2]]
    assert (groups.n, epoch.n) == (1, 3)
    assert list(groups) == [[[3], [4], [5]], [[6]]] and not groups.has_next()
    assert iterator.end_of_epoch()
    resumed = _iterator(7)
    resumed.load_state_dict({"version": 2, "epoch": 1, "iterations_in_epoch": 3, "shuffle": False})
    groups = GroupedIterator(resumed.next_epoch_itr(shuffle=False), 3)
    assert (groups.n, len(groups)) == (1, 3) and next(groups) == [[3], [4], [5]]


def test_groups_that_skip_the_remainder_end_the_epoch() -> None:
    iterator = _iterator(7)
    groups = GroupedIterator(iterator.next_epoch_itr(shuffle=False), 3, skip_remainder=True)
    assert list(groups) == [[[0], [1], [2]], [[3], [4], [5]]]
    assert iterator.end_of_epoch() and iterator.next_epoch_idx == 2


def test_remainder_may_be_skipped() -> None:
    iterator = _iterator(7, skip_remainder=True)
    assert len(list(iterator.next_epoch_itr(shuffle=False))) == 6 and len(iterator) == 6


def test_an_error_in_a_worker_reaches_the_reader() -> None:
    def fail(batch):
        raise DataError("broken item")

    for workers in (0, 2):
        with pytest.raises(DataError, match="broken item"):
            next(_iterator(3, num_workers=workers, collate=fail).next_epoch_itr())


def test_reading_ahead_ends_with_the_epoch() -> None:
    others = set(threading.enumerate())
    iterator = _iterator(100, num_workers=2)
    next(iterator.next_epoch_itr())
    iterator.close()
    list(iterator.next_epoch_itr())
    mine = [t for t in threading.enumerate() if t not in others]
    for thread in mine:
        thread.join(10)
    assert not any(t.is_alive() for t in mine)


def test_first_batch() -> None:
    assert _iterator(3).first_batch() == [0]
    with pytest.raises(DataError, match="no batch"):
        _iterator(0).first_batch()
