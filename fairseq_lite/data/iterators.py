"""One epoch after another of batches: sharded by rank, resumable at any batch, read ahead.

Every rank takes the same number of steps; where the batches do not divide evenly the last ranks
get None and run a dummy batch of weight zero. Batches are read ahead by threads: the data is
memory-mapped and laid out by numpy, so there is nothing that a second process would do faster, and
nothing is copied or forked.
"""

from __future__ import annotations

import concurrent.futures
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from fairseq_lite.data.batching import shuffled
from fairseq_lite.errors import DataError

T = TypeVar("T")
Batch = Sequence[int] | npt.NDArray[Any]
Collate = Callable[[Any], Any]

_VERSION = 2  # of the state, fairseq's
_AHEAD = 4  # batches read ahead by each worker


class CountingIterator(Generic[T]):
    """An iterator that knows how many items it gave and how many there are.

    Args:
        items: what to iterate over.
        total: the number of items in all, those before `start` included.
        start: how many were given before.

    Attributes:
        n: items given so far, `start` included.
    """

    def __init__(self, items: Iterable[T], total: int, start: int = 0) -> None:
        self._items = iter(items)
        self._total = total
        self.n = start

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self.has_next():
            self.close()
            raise StopIteration
        item = next(self._items)
        self.n += 1
        return item

    def has_next(self) -> bool:
        """Whether there is another item."""
        return self.n < self._total

    def skip(self, count: int) -> CountingIterator[T]:
        """Read and drop `count` items."""
        for _ in range(count):
            next(self)
        return self

    def take(self, total: int) -> None:
        """Stop after `total` items, those given before included."""
        self._total = min(self._total, total)

    def close(self) -> None:
        """Stop reading ahead."""
        close = getattr(self._items, "close", None)
        if close is not None:
            close()


class GroupedIterator(CountingIterator[list[T]]):
    """Items in lists of `chunk_size`, the last one shorter (`--update-freq`).

    Args:
        items: a counting iterator, possibly begun.
        chunk_size: items a list.
        skip_remainder: leave out a last list that is shorter.
    """

    def __init__(
        self, items: CountingIterator[T], chunk_size: int, skip_remainder: bool = False
    ) -> None:
        start = math.ceil(items.n / chunk_size)
        left = len(items) - items.n
        if skip_remainder:
            # The source ends where we do: what asks it whether the epoch is over must hear yes.
            items.take(len(items) - left % chunk_size)
        groups = left // chunk_size if skip_remainder else math.ceil(left / chunk_size)
        super().__init__(_chunks(items, chunk_size), start + groups, start)


def _chunks(items: CountingIterator[T], size: int) -> Iterator[list[T]]:
    while items.has_next():
        # has_next first: taking the last item must not ask for one more.
        chunk: list[T] = []
        while len(chunk) < size and items.has_next():
            chunk.append(next(items))
        yield chunk


class EpochBatchIterator:
    """Epochs over a fixed list of batches.

    Args:
        dataset: its `collate` turns the indices of a batch into a sample.
        batches: indices of the examples of each batch, the same on every rank.
        seed: the order of epoch e is shuffled with seed + e.
        world_size: number of ranks.
        rank: batch k belongs to rank k modulo `world_size`.
        num_workers: threads that read ahead; 0 reads when asked.
        epoch: the epoch to begin with.
        collate: instead of `dataset.collate`.
        skip_remainder: leave out the last batch of every epoch, which may be smaller.
        disable_shuffling: keep the order of `batches` whatever is asked.
        pin_memory: copy samples into page-locked memory, from which GPUs read faster.

    Attributes:
        epoch: the epoch under way, or the one to begin with.
    """

    def __init__(
        self,
        dataset: Any,
        batches: Sequence[Batch],
        *,
        seed: int = 1,
        world_size: int = 1,
        rank: int = 0,
        num_workers: int = 0,
        epoch: int = 1,
        collate: Collate | None = None,
        skip_remainder: bool = False,
        disable_shuffling: bool = False,
        pin_memory: bool = False,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        self.dataset = dataset
        self.batches = batches
        self.seed = seed
        self.world_size, self.rank = world_size, rank
        self.num_workers = num_workers
        self.epoch = max(epoch, 1)
        self.shuffle = not disable_shuffling
        self._collate: Collate = dataset.collate if collate is None else collate
        self._skip_remainder = skip_remainder
        self._disable_shuffling = disable_shuffling
        self._pin_memory = pin_memory
        self._current: CountingIterator[Any] | None = None
        self._resumed: CountingIterator[Any] | None = None
        self._done_before = 0  # batches of all ranks that were done when this run's part began
        self._began_at = 0  # ... and this rank's count at that moment

    def __len__(self) -> int:
        """Batches an epoch on each rank."""
        return self._steps(len(self.batches))

    def _steps(self, batches: int) -> int:
        steps = -(-batches // self.world_size)
        return max(steps - 1, 0) if self._skip_remainder else steps

    @property
    def next_epoch_idx(self) -> int:
        """The epoch that `next_epoch_itr` will give."""
        if self._resumed is None and self._current is not None and self.end_of_epoch():
            return self.epoch + 1
        return self.epoch

    def next_epoch_itr(
        self,
        shuffle: bool = True,
        fix_batches_to_gpus: bool = False,
        set_dataset_epoch: bool = True,
    ) -> CountingIterator[Any]:
        """The samples of the next epoch, or the rest of the one that a state was loaded from.

        Args:
            shuffle: in an order of the epoch's own.
            fix_batches_to_gpus: accepted, as in fairseq; every rank keeps its share anyway.
            set_dataset_epoch: tell the dataset, if it wants to know.
        """
        self.close()
        self.epoch = self.next_epoch_idx
        self.shuffle = shuffle and not self._disable_shuffling
        if set_dataset_epoch and hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(self.epoch)
        if self._resumed is not None:
            self._current, self._resumed = self._resumed, None
        else:
            self._current = self._iterate(0, 0)
        return self._current

    def _order(self) -> npt.NDArray[np.int64]:
        if self.shuffle:
            return shuffled(len(self.batches), self.seed + self.epoch)
        return np.arange(len(self.batches), dtype=np.int64)

    def _iterate(self, done: int, start: int) -> CountingIterator[Any]:
        """This rank's samples of the epoch after the first `done` batches of all ranks."""
        rest = self._order()[done:]
        steps = self._steps(len(rest))
        mine = rest[self.rank :: self.world_size][:steps].tolist()
        self._done_before, self._began_at = done, start
        padded = [*mine, *[None] * (steps - len(mine))]
        return CountingIterator(self._samples(padded), start + steps, start)

    def _samples(self, numbers: Sequence[int | None]) -> Iterator[Any]:
        if self.num_workers <= 0:
            return map(self._sample, numbers)
        return _read_ahead(self._sample, numbers, self.num_workers)

    def _sample(self, number: int | None) -> Any:
        if number is None:
            return None
        sample = self._collate(self.batches[number])
        return _pinned(sample) if self._pin_memory else sample

    def first_batch(self) -> Any:
        """The sample of the first batch, which stands in for a dummy one.

        Raises:
            DataError: there is no batch at all.
        """
        if not self.batches:
            raise DataError("the dataset has no batch: it is empty, or every example was left out")
        return self._collate(self.batches[0])

    # -- where we are ------------------------------------------------------------------------------

    @property
    def iterations_in_epoch(self) -> int:
        """Batches this rank was given of the epoch under way."""
        for iterator in (self._current, self._resumed):
            if iterator is not None:
                return iterator.n
        return 0

    def end_of_epoch(self) -> bool:
        """Whether the epoch under way is used up."""
        return self._current is not None and not self._current.has_next()

    def state_dict(self) -> dict[str, Any]:
        """Where we are, in fairseq's form; at the end of an epoch, the start of the next one."""
        ended = self.end_of_epoch()
        state: dict[str, Any] = {
            "version": _VERSION,
            "epoch": self.epoch + 1 if ended else self.epoch,
            "iterations_in_epoch": 0 if ended else self.iterations_in_epoch,
            "shuffle": self.shuffle,
        }
        done = self._done_before + (self.iterations_in_epoch - self._began_at) * self.world_size
        if not ended and self.iterations_in_epoch:
            # Not fairseq's: lets another number of ranks read each remaining batch exactly once.
            state["batches_done"] = done
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            DataError: the epoch has fewer batches than were done, so the data or the batch size
                is another.
        """
        self.close()
        self._current = self._resumed = None
        self.epoch = int(state["epoch"])
        position = int(state.get("iterations_in_epoch", 0))
        self.shuffle = bool(state.get("shuffle", True)) and not self._disable_shuffling
        if position == 0:
            return
        done = int(state.get("batches_done", position * self.world_size))
        if done >= len(self.batches):
            if state.get("version", 1) == 1:  # an old state, taken at the very end of an epoch
                self.epoch += 1
                return
            raise DataError(
                f"the checkpoint was taken after {done:,} batches of epoch {self.epoch}, which now "
                f"has {len(self.batches):,}: data or batch size have changed; "
                "use --reset-dataloader to begin the epoch anew"
            )
        self._resumed = self._iterate(done, position)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._current is not None:
            self._current.close()


def _read_ahead(work: Callable[[Any], T], items: Sequence[Any], workers: int) -> Iterator[T]:
    """`map(work, items)` in order, done by threads up to a few items ahead."""
    pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="batches")
    waiting: deque[concurrent.futures.Future[T]] = deque()
    position = 0
    try:
        while position < len(items) or waiting:
            while position < len(items) and len(waiting) < workers * _AHEAD:
                waiting.append(pool.submit(work, items[position]))
                position += 1
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _pinned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _pinned(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_pinned(v) for v in value)
    return value.pin_memory() if hasattr(value, "pin_memory") else value
