"""What ranks make one by one, at their own pace, in the order in which one process makes it.

And how fast they were together.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from fairseq_lite.parallel.world import World

T = TypeVar("T")


class Ordered(Generic[T]):
    """Brings items to rank 0, in the order of their numbers: item k is from rank k modulo the size.

    A thread of each rank hands its items on, so no rank waits for another before it makes the next.
    An item is held only until all before it have come. Made and used on every rank::

        stream = Ordered(world, total)
        for k in range(world.rank, total, world.size):
            stream.put(make(k))
            for item in stream.ready():
                ...
        for item in stream.rest():
            ...

    Args:
        world: the ranks.
        total: how many items all ranks make. They can be pickled.
    """

    def __init__(self, world: World, total: int) -> None:
        self._rank, self._size, self._total = world.rank, world.size, total
        self._mine: SimpleQueue[T] = SimpleQueue()
        self._here: SimpleQueue[list[T] | BaseException] = SimpleQueue()
        self._left = -(-total // world.size)  # times that each rank hands an item on
        if world.size > 1 and total:
            self._gather = world.gather_aside(main_only=True)
            threading.Thread(
                target=self._hand_on, args=(self._left,), name="results", daemon=True
            ).start()

    def put(self, item: T) -> None:
        """Give this rank's next item."""
        if self._size == 1:
            self._here.put([item])
        else:
            self._mine.put(item)

    def ready(self) -> Iterator[T]:
        """On rank 0 the next items, as far as they have come; elsewhere none."""
        while self._left and not self._here.empty():
            yield from self._take()

    def rest(self) -> Iterator[T]:
        """On rank 0 all other items, as they come; elsewhere none, when rank 0 has them all."""
        while self._left:
            yield from self._take()

    def _take(self) -> list[T]:
        found = self._here.get()
        if isinstance(found, BaseException):
            raise found
        self._left -= 1
        return found

    def _hand_on(self, times: int) -> None:
        try:
            for first in range(0, times * self._size, self._size):
                here = min(self._size, self._total - first)
                own: Any = self._mine.get() if self._rank < here else None
                self._here.put(self._gather(own)[:here])
        except BaseException as e:  # for the thread that waits
            self._here.put(e)


@dataclass(frozen=True)
class Worked:
    """What ranks did side by side.

    Attributes:
        counts: of all of them.
        seconds: of the one that took longest.
        speeds: counts a second; those of the ranks are added up.
    """

    counts: dict[str, int]
    seconds: float
    speeds: dict[str, float]


def worked(world: World, counts: Mapping[str, int], seconds: float) -> Worked:
    """What all ranks did; every rank calls this.

    Args:
        world: the ranks.
        counts: what this rank did, the same names on every rank.
        seconds: how long it took.
    """
    speeds = {f"{name}/s": count / max(seconds, 1e-9) for name, count in counts.items()}
    sums = world.sum({**counts, **speeds})
    return Worked(
        {name: round(sums[name]) for name in counts},
        world.max(seconds),
        {name: sums[f"{name}/s"] for name in counts},
    )
