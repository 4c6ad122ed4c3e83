"""Going through a split without learning: losses, and what else the task measures (BLEU)."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from fairseq_lite.criteria.api import Criterion
from fairseq_lite.moe.experts import casts_kept
from fairseq_lite.optim.precision import Precision
from fairseq_lite.parallel.api import Backend
from fairseq_lite.parallel.free import free_running
from fairseq_lite.parallel.world import World
from fairseq_lite.tasks.api import Sample, Task, to_device
from fairseq_lite.training.diagnosis import explaining_failure
from fairseq_lite.training.loggers import Progress
from fairseq_lite.training.metrics import Derive, Meters
from fairseq_lite.training.trainer import add_sums, zero_sums

logger = logging.getLogger(__name__)

T = TypeVar("T")


def metrics_of(task: Task, criterion: Criterion) -> Derive:
    """What is shown of a run's sums: the criterion's metrics, then the task's."""
    return lambda sums: {**criterion.metrics(sums), **task.extra_metrics(sums)}


class Validator:
    """Sums a criterion over a split, on every rank at once.

    Args:
        world: the group of processes.
        task: gives the meaning of a validation step.
        model: what is validated.
        criterion: the loss.
        precision: how numbers are represented.
        backend: how the model is spread over the ranks; None: each has it whole.
    """

    def __init__(
        self,
        *,
        world: World,
        task: Task,
        model: nn.Module,
        criterion: Criterion,
        precision: Precision,
        backend: Backend | None = None,
    ) -> None:
        self.world = world
        self.task = task
        self.model = model
        self.criterion = criterion
        self.precision = precision
        self.backend = backend

    def run(
        self,
        split: str,
        batches: Iterable[Sample | None],
        dummy: Sample,
        progress: Progress,
        *,
        max_steps: int | None = None,
        log_interval: int | None = None,
        total: int | None = None,
    ) -> Meters:
        """Validate one split.

        Args:
            split: its name.
            batches: this rank's batches; None where it has none left. As many on every rank.
            dummy: a batch to compute on, with weight zero, in place of None.
            progress: shown as batches are done.
            max_steps: stop after this many batches of each rank.
            log_interval: report the figures so far every N batches of each rank.
            total: batches of all ranks, where sizes are to be given by batch; None: as in training,
                those of all ranks together count as one.

        Returns:
            The sums over all batches of all ranks.
        """
        meters = Meters(metrics_of(self.task, self.criterion))
        alone = self.task.generates_in_validation
        if alone:
            meters.start()
        done = 0
        with self._ready(split):
            # Ranks that generate go their own ways, up to where figures are wanted.
            size = (log_interval or sys.maxsize) if alone else 1
            for group in _groups(itertools.islice(batches, max_steps), size):
                steps, sums = self._together(group, dummy, progress)
                before, done = done, done + steps
                weight = steps
                if total is not None:
                    weight = min(done * self.world.size, total) - before * self.world.size
                meters.add(self.world.sum(sums), batches=weight)
                if log_interval is not None and done % log_interval == 0:
                    progress.log(meters.values(), tag=split, num_updates=done)
        self.task.end_validation(split, self.world)
        return meters

    def _together(
        self, batches: Iterable[Sample | None], dummy: Sample, progress: Progress
    ) -> tuple[int, dict[str, Any]]:
        """How many batches this rank was given, None included, and the sums of them."""
        sums: dict[str, Any] = {}
        steps = 0
        with self._alone():
            for batch in batches:
                steps += 1
                # Where ranks need each other in every layer, one without a batch computes another.
                if batch is not None or not self.task.generates_in_validation:
                    add_sums(sums, self.step(batch, dummy))
                progress.advance()
        return steps, sums

    def probe(self, split: str, sample: Sample) -> dict[str, float]:
        """The metrics of one batch: to know which there will be."""
        meters = Meters(metrics_of(self.task, self.criterion))
        with self._ready(split):
            with self._alone():
                sums = self.step(sample, sample)
            meters.add(self.world.sum(sums))
        return meters.values()

    @contextmanager
    def _ready(self, split: str) -> Iterator[None]:
        """Model, criterion and task made ready for a split."""
        self.model.eval()
        self.criterion.eval()
        self.task.begin_validation(split, self.model)  # type: ignore[arg-type]
        with casts_kept(self.model):
            yield

    def _alone(self) -> AbstractContextManager[None]:
        """Inside, ranks take different numbers of steps, if the task has them do so."""
        if not self.task.generates_in_validation:
            return nullcontext()
        if self.backend is not None:
            return self.backend.whole(self.model)
        return free_running([self.model], self.world)

    def step(self, batch: Sample | None, dummy: Sample) -> dict[str, Any]:
        """The sums of one batch of this rank, zero where it has none."""
        sample = to_device(dummy if batch is None else batch, self.world.device)
        with (
            torch.no_grad(),
            explaining_failure(self.world.rank, batch),
            self.precision.autocast(),
        ):
            _, _, sums = self.task.valid_step(sample, self.model, self.criterion)  # type: ignore[arg-type]
        totals: dict[str, Any] = {}
        add_sums(totals, zero_sums(sums) if batch is None else sums)
        return totals


def _groups(items: Iterable[T], size: int) -> Iterator[Iterator[T]]:
    """Items in groups, each of which is to be used up before the next."""
    items = iter(items)
    for first in items:
        yield itertools.chain([first], itertools.islice(items, size - 1))
