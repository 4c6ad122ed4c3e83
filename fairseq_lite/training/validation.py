"""Going through a split without learning: losses, and what else the task measures (BLEU)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from fairseq_lite.criteria.api import Criterion
from fairseq_lite.optim.precision import Precision
from fairseq_lite.parallel.api import Backend
from fairseq_lite.parallel.world import World
from fairseq_lite.tasks.api import Sample, Task, to_device
from fairseq_lite.training.diagnosis import explaining_failure
from fairseq_lite.training.loggers import Progress
from fairseq_lite.training.metrics import Derive, Meters
from fairseq_lite.training.trainer import add_sums, zero_sums

logger = logging.getLogger(__name__)


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
    ) -> Meters:
        """Validate one split.

        Args:
            split: its name.
            batches: this rank's batches; None where it has none left.
            dummy: a batch to compute on, with weight zero, in place of None.
            progress: shown as batches are done.
            max_steps: stop after this many batches of each rank.
            log_interval: report the figures so far every N batches.

        Returns:
            The sums over all batches of all ranks.
        """
        meters = Meters(metrics_of(self.task, self.criterion))
        with self._ready(split):
            for i, batch in enumerate(batches):
                if max_steps is not None and i >= max_steps:
                    break
                meters.add(self.world.sum(self.step(batch, dummy)))
                progress.advance()
                if log_interval is not None and (i + 1) % log_interval == 0:
                    progress.log(meters.values(), tag=split, num_updates=i + 1)
        return meters

    def probe(self, split: str, sample: Sample) -> dict[str, float]:
        """The metrics of one batch: to know which there will be."""
        meters = Meters(metrics_of(self.task, self.criterion))
        with self._ready(split):
            meters.add(self.world.sum(self.step(sample, sample)))
        return meters.values()

    @contextmanager
    def _ready(self, split: str) -> Iterator[None]:
        """Model, criterion and task made ready for a split."""
        self.model.eval()
        self.criterion.eval()
        with ExitStack() as stack:
            if self.backend is not None and self.task.generates_in_validation:
                stack.enter_context(self.backend.whole(self.model))
            self.task.begin_validation(split, self.model)  # type: ignore[arg-type]
            yield

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
