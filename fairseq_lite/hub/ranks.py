"""Work that the ranks of a world share out; every rank gets all results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from fairseq_lite.data.prompts import PromptDataset
from fairseq_lite.generation.branch_plan import Unit, shares
from fairseq_lite.generation.branches import Numbers
from fairseq_lite.generation.session import DEFAULT_MAX_TOKENS, unchanging
from fairseq_lite.models.api import Model
from fairseq_lite.parallel.free import free_running
from fairseq_lite.parallel.world import World

R = TypeVar("R")


class Ranks:
    """The ranks that have a model together.

    Every rank calls these methods with the same arguments. They work at their own pace, and with
    experts for each other.

    Args:
        world: the ranks.
        models: those that are called; each rank has all, but for experts of others.
    """

    def __init__(self, world: World, models: Sequence[Model]) -> None:
        self.world = world
        self.models = models

    def batches(
        self, dataset: PromptDataset, work: Callable[[Sequence[int]], Mapping[int, R]]
    ) -> list[R]:
        """Do something with every batch of a dataset.

        Args:
            dataset: what it is done with.
            work: from a batch to a result for each of its examples, by their numbers.

        Returns:
            The results in the order of the dataset.
        """
        found: dict[int, R] = {}
        with self._alone():
            for batch in self._cut(dataset)[self.world.rank :: self.world.size]:
                found.update(work(batch))
        for each in self.world.gather_objects(found) if self.world.size > 1 else []:
            found.update(each)
        return [found[number] for number in range(len(dataset))]

    def _cut(self, dataset: PromptDataset) -> Sequence[Any]:
        """Batches; of few examples one for each rank."""
        total = int(dataset.sizes.sum()) if len(dataset) else 0
        most = min(DEFAULT_MAX_TOKENS, -(-total // self.world.size))
        return dataset.batches(max_tokens=DEFAULT_MAX_TOKENS if self.world.size == 1 else most)

    def units(self, units: Sequence[Unit], work: Callable[[Sequence[Unit]], Numbers]) -> Numbers:
        """Do something with all units; each rank has neighbours.

        Args:
            units: in order.
            work: from neighbours to arrays with a row for each of their results.

        Returns:
            The arrays of all.
        """
        mine = shares(units, self.world.size)[self.world.rank]
        with self._alone():
            found = work(units[mine.first : mine.last])
        if self.world.size == 1:
            return found
        every = self.world.gather_objects(found)
        return tuple(
            # Of nothing, arrays may have another width.
            np.concatenate([part for part in parts if len(part)] or parts[:1])
            for parts in zip(*every, strict=True)
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside, no weight changes, and any rank may call any model."""
        with unchanging(self.models), free_running(self.models, self.world):
            yield
