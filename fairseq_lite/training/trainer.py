"""One update of the parameters, in the order it happens.

The trainer holds one backend and does not know how the model is spread; it holds one precision and
does not know how numbers are scaled. What it knows is the rule that makes every set-up train alike:
losses are sums, gradients are sums, and both are divided once, by the sample size of all ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from fairseq_lite.config.core import OptimizationConfig
from fairseq_lite.criteria.api import Criterion
from fairseq_lite.errors import TrainingError
from fairseq_lite.models.api import Model
from fairseq_lite.moe.experts import casts_kept
from fairseq_lite.optim.api import Optimizer, Schedule
from fairseq_lite.optim.precision import Precision
from fairseq_lite.parallel.api import Backend
from fairseq_lite.parallel.world import World
from fairseq_lite.tasks.api import Sample, Task, to_device
from fairseq_lite.training.diagnosis import describe_batch, explaining_failure, first_nonfinite
from fairseq_lite.training.ema import MovingAverage
from fairseq_lite.training.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Update:
    """What one update did, summed over micro-batches and ranks.

    Attributes:
        sums: the criterion's sums ("loss", "ntokens", "nsentences", "sample_size", …).
        grad_norm: norm of the averaged gradient, before clipping.
        lr: the learning rate set for the next update.
        loss_scale: of fp16, else None.
    """

    sums: Mapping[str, float]
    grad_norm: float
    lr: float
    loss_scale: float | None


class Trainer:
    """Makes updates; keeps no files, formats nothing.

    Args:
        cfg: the optimization section.
        seed: --seed.
        world: the group of processes.
        backend: how the model is spread over them.
        task: gives the meaning of a step.
        model: what the backend's `wrap` returned.
        criterion: the loss.
        optimizer: over the model's parameters.
        schedule: the learning rate as a function of updates and epoch.
        precision: how numbers are represented.
        state: the counters.
        average: a moving average of the weights to keep up, or None.

    Attributes:
        dummy_batch: what a rank computes on, with weight zero, when it has no data.
        stop_requested: whether a rank was asked to end (`request_stop`), known to all of them.
    """

    def __init__(
        self,
        *,
        cfg: OptimizationConfig,
        seed: int,
        world: World,
        backend: Backend,
        task: Task,
        model: Model,
        criterion: Criterion,
        optimizer: Optimizer,
        schedule: Schedule,
        precision: Precision,
        state: TrainState,
        average: MovingAverage | None = None,
    ) -> None:
        self.cfg = cfg
        self.seed = seed
        self.world = world
        self.backend = backend
        self.task = task
        self.model = model
        self.criterion = criterion
        self.optimizer = optimizer
        self.schedule = schedule
        self.precision = precision
        self.state = state
        self.average = average
        self.dummy_batch: Sample = {}
        self.stop_requested = False
        self._stop_asked = False

    # -- one update -----------------------------------------------------------------------------

    def train_step(self, batches: Sequence[Sample | None]) -> Update | None:
        """Make one update from one or more micro-batches.

        Args:
            batches: the micro-batches of this rank; None where it has no data, so that every rank
                makes the same number of steps.

        Returns:
            What was done; None when the gradient overflowed and the update was skipped.

        Raises:
            TrainingError: a loss or gradient that is not finite, or no memory left.
        """
        self._seed_step()
        self.model.train()
        self.criterion.train()
        self.optimizer.zero_grad()
        done = self._update(batches)
        if done is None:
            return None
        sums, norm = done
        return Update(
            sums=sums,
            grad_norm=norm,
            lr=self.optimizer.get_lr(),
            loss_scale=self.precision.loss_scale,
        )

    def _update(self, batches: Sequence[Sample | None]) -> tuple[dict[str, float], float] | None:
        totals = self._accumulate(batches)  # forward, backward, local sums
        totals["_stop"] = float(self._stop_asked)
        totals = self.world.sum(totals)  # one collective for loss, tokens, sentences
        self.stop_requested = totals.pop("_stop") > 0  # any rank's wish is everyone's
        self.backend.reduce_gradients(self.model)
        # Sums, divided once by the sample size of all ranks: an average per rank or per micro-batch
        # would give the tokens of short batches more weight. The backend has divided by the number
        # of ranks already, and fp16 has multiplied by its loss scale.
        self.optimizer.scale_gradients(
            self.world.size / (totals["sample_size"] or 1.0) * self.precision.unscale
        )
        norm = float(self.backend.grad_norm(self.model))
        self.optimizer.clip(norm, self.cfg.clip_norm)
        if not self.precision.finite(norm):  # the norm is global: every rank takes this branch,
            self._back_off(batches, norm)  # or none does
            return None
        self.optimizer.step()
        self.precision.succeeded()
        self.state.num_updates += 1
        if self.average is not None:
            self.average.update(self.model, self.state.num_updates)
        self.schedule.apply(self.optimizer, self.state.num_updates, self.state.epoch)
        return totals, norm

    def _accumulate(self, batches: Sequence[Sample | None]) -> dict[str, Any]:
        totals: dict[str, Any] = {}
        with casts_kept(self.model):  # no weight changes before the last of them
            for i, batch in enumerate(batches):
                with (
                    explaining_failure(self.world.rank, batch),
                    self.backend.accumulate(self.model, last=i == len(batches) - 1),
                ):
                    loss, batch_sums = self._forward(batch)
                    with self.precision.products():
                        self.backend.backward(self.model, self.precision.scale(loss))
                add_sums(totals, batch_sums)
        return totals

    def _forward(self, batch: Sample | None) -> tuple[Tensor, dict[str, Any]]:
        """Loss and sums of one micro-batch; a dummy batch, with weight zero, where there is none.

        The dummy keeps the collectives of all ranks in step.
        """
        sample = to_device(self.dummy_batch if batch is None else batch, self.world.device)
        with self.precision.autocast():
            loss, _, sums = self.task.train_step(sample, self.model, self.criterion)
        if batch is None:
            return loss * 0.0, zero_sums(sums)
        return loss, sums

    def _seed_step(self) -> None:
        # Dropout depends on the update alone: a resumed run draws what an uninterrupted one draws.
        torch.manual_seed(self.seed + self.state.num_updates)

    # -- the learning rate and the epoch --------------------------------------------------------

    def begin_epoch(self, epoch: int, *, resumed: bool = False) -> float:
        """Set the epoch; returns the learning rate.

        Args:
            epoch: its number, from 1.
            resumed: whether this is the rest of an epoch that an earlier run began.
        """
        logger.info("begin training epoch %d", epoch)
        self.state.epoch = epoch
        self.task.begin_epoch(epoch, self.model)
        if not resumed:
            self.schedule.begin_epoch(epoch, self.optimizer.get_lr())
        return self.schedule.apply(self.optimizer, self.state.num_updates, epoch)

    def end_epoch(self, epoch: int, metric: float | None) -> None:
        """Tell the schedule the validation metric; it may change the learning rate."""
        self.schedule.observe(metric, self.state.num_updates)
        self.schedule.apply(self.optimizer, self.state.num_updates, epoch)

    def request_stop(self) -> None:
        """Ask for an end after the update under way; may be called from a signal handler."""
        self._stop_asked = True

    # -- what goes wrong ------------------------------------------------------------------------

    def _back_off(self, batches: Sequence[Sample | None], norm: float) -> None:
        """Skip the update and lower the loss scale; without one, or below its minimum, stop."""
        try:
            self.precision.back_off()
        except TrainingError as error:
            self._stop(batches, norm, error)
        logger.info(
            "gradient overflow detected, ignoring gradient, setting loss scale to: %s",
            self.precision.loss_scale,
        )
        self.optimizer.zero_grad()

    def _stop(self, batches: Sequence[Sample | None], norm: float, why: TrainingError) -> NoReturn:
        self._seed_step()
        # All of them, on every rank: a model that is spread over ranks needs them all to take part.
        causes = [first_nonfinite(self.model, partial(self._forward, b)) for b in batches]
        cause = next((c for c in causes if c is not None), None)
        # Every rank says what it had: only the one with the bad batch finds a cause in its forward.
        texts = self.world.gather_objects(
            f"rank {self.world.rank}: {'; '.join(describe_batch(b) for b in batches)}: "
            + (f"{cause} is the first that is not finite" if cause else "the forward is finite")
        )
        raise TrainingError(
            f"update {self.state.num_updates + 1}: gradient norm {norm}: {why}. " + ". ".join(texts)
        ) from None


def add_sums(totals: dict[str, Any], sums: Mapping[str, Any]) -> None:
    """Add a batch's sums to `totals`; tensors stay on the device, so nothing waits for it."""
    for key, value in sums.items():
        if isinstance(value, Tensor):
            value = value.detach().double()  # thousands of batches add up without loss
        totals[key] = totals[key] + value if key in totals else value


def zero_sums(sums: Mapping[str, Any]) -> dict[str, Any]:
    """The same keys with nothing in them: what a dummy batch counts for."""
    return {key: value * 0 for key, value in sums.items()}
