"""`flite-train` from its configuration on: put the parts together, then epoch after epoch.

`train` is what `parallel.launch` calls in every process.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairseq_lite.config.core import RunConfig
from fairseq_lite.config.serial import to_plain
from fairseq_lite.data.iterators import EpochBatchIterator, GroupedIterator
from fairseq_lite.errors import ConfigError, TrainingError
from fairseq_lite.moe.watch import shown_layers
from fairseq_lite.parallel.world import World
from fairseq_lite.tasks.api import BatchLimits, Sample, build_task, resolve_max_positions
from fairseq_lite.training.allocator import keep_freed_memory
from fairseq_lite.training.assembly import build_trainer, check
from fairseq_lite.training.checkpoint import parts
from fairseq_lite.training.checkpoint.manager import CheckpointManager, Restored, Saving
from fairseq_lite.training.decisions import decide
from fairseq_lite.training.ema import MovingAverage
from fairseq_lite.training.loggers import Progress, ProgressLogs, setup_logging
from fairseq_lite.training.metrics import Meters, TrainMetrics, valid_report
from fairseq_lite.training.profiling import UpdateProfiler, profiled
from fairseq_lite.training.state import EarlyStopping, is_better
from fairseq_lite.training.trainer import Trainer
from fairseq_lite.training.validation import Validator, metrics_of

logger = logging.getLogger(__name__)

_GIB = 1024.0**3


def train(run: RunConfig, world: World) -> None:
    """Train as `run` says, as one process of `world`."""
    setup_logging(run.common, is_main=world.is_main)
    if world.device.type == "cpu":
        keep_freed_memory()
    with TrainingRun(run, world) as training:
        training.go()


class TrainingRun:
    """A run of training: the parts, and the loop over epochs that drives them.

    Args:
        run: the configuration.
        world: the group of processes.
    """

    def __init__(self, run: RunConfig, world: World) -> None:
        self.run = run
        self.world = world
        check(run)
        if world.is_main:
            logger.info("%s", json.dumps(to_plain(run), ensure_ascii=False))
        np.random.seed(run.common.seed)
        torch.manual_seed(run.common.seed)
        self.task = build_task(run)
        self.trainer = build_trainer(run, world, self.task)
        self.state = self.trainer.state
        self.valid_subsets = self._load_valid_subsets()
        self.metrics = TrainMetrics(metrics_of(self.task, self.trainer.criterion))
        self.stopping = EarlyStopping(
            run.checkpoint.patience, run.checkpoint.maximize_best_checkpoint_metric
        )
        self.validator = Validator(
            world=world,
            backend=self.trainer.backend,
            task=self.task,
            model=self.trainer.model,
            criterion=self.trainer.criterion,
            precision=self.trainer.precision,
        )
        self.checkpoints = CheckpointManager(run, world, self.trainer.backend, self.task)
        self.profiler = UpdateProfiler()
        self.logs = ProgressLogs(
            run.common, is_main=world.is_main, name=Path(run.checkpoint.save_dir).name
        )
        self._valid_iterators: dict[str, EpochBatchIterator] = {}
        self._valid_dummies: dict[str, Sample] = {}

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(self, *exc: object) -> None:
        self.logs.close()

    def _load_valid_subsets(self) -> list[str]:
        cfg = self.run.dataset
        if cfg.disable_validation:
            return []
        if cfg.combine_valid_subsets:
            self.task.load_dataset("valid", combine=True)
            return self.task.validated_splits(["valid"])
        subsets = [name.strip() for name in cfg.valid_subset.split(",") if name.strip()]
        for name in subsets:
            self.task.load_dataset(name)
        unused = self.task.unused_valid_subsets(subsets)
        if unused and not cfg.ignore_unused_valid_subsets:
            raise ConfigError(
                f"the data folder has valid splits that would not be used: {', '.join(unused)}; "
                f"name them (--valid-subset {','.join([*subsets, *unused])}), join them "
                "(--combine-valid-subsets) or leave them out (--ignore-unused-valid-subsets)"
            )
        return self.task.validated_splits(subsets)

    # -- the epochs -----------------------------------------------------------------------------

    def go(self) -> None:
        """Train until a limit is reached."""
        run = self.run
        data = self._restore()
        self._check_validation()
        max_epoch = run.optimization.max_epoch or math.inf
        profile = run.common.profile and self.world.is_main
        trace = Path(run.checkpoint.save_dir, "profile.json")
        with _signals_noticed(self.trainer), profiled(profile, trace) as self.profiler:
            while data.next_epoch_idx <= max_epoch and not self._had_ended():
                lr = self.trainer.optimizer.get_lr()
                if lr <= run.optimization.stop_min_lr:
                    logger.info(
                        "stopping training because current learning rate (%s) is smaller than or "
                        "equal to minimum learning rate (--stop-min-lr=%s)",
                        lr,
                        run.optimization.stop_min_lr,
                    )
                    break
                metric, stop = self._epoch(data)
                if stop:
                    break
                self.trainer.end_epoch(data.epoch, metric)
                if data.next_epoch_idx <= max_epoch:
                    data = self._next_epoch(data)
            self.checkpoints.close()
        logger.info("done training in %.1f seconds", self.state.run_time())

    def _had_ended(self) -> bool:
        """Whether the run is over: a job that is started again must not go beyond its limit."""
        decision = decide(
            self.run,
            epoch=self.state.epoch,
            num_updates=self.state.num_updates,
            end_of_epoch=False,
            hours=self.state.training_time() / 3600,
            updated=False,
        )
        if decision.stop is not None:
            logger.info(decision.stop)
        return decision.stop is not None

    def _epoch(self, data: EpochBatchIterator) -> tuple[float | None, bool]:
        """One pass over the training data, or what is left of it after a restart.

        Returns:
            The validation metric at its end, if there was a validation, and whether to stop.
        """
        optimization, trainer = self.run.optimization, self.trainer
        steps = data.next_epoch_itr(shuffle=True)
        per_epoch = optimization.update_freq
        groups = GroupedIterator(
            steps,
            per_epoch[min(data.epoch, len(per_epoch)) - 1],
            skip_remainder=optimization.skip_remainder_batch,
        )
        if not len(groups):
            raise ConfigError(
                f"--skip-remainder-batch leaves out every update: an epoch has {len(data)} batches "
                f"and --update-freq asks for {per_epoch[min(data.epoch, len(per_epoch)) - 1]}"
            )
        trainer.begin_epoch(data.epoch, resumed=groups.n > 0)
        logger.info("Start iterating over samples")
        metric, stop = None, False
        with self.logs.begin(epoch=data.epoch, size=len(groups), offset=groups.n) as progress:
            for batches in groups:
                updated = self._update(data, batches, progress)
                metric, stop = self._after_update(data, groups, updated)
                if stop:
                    break
            logger.info("end of epoch %d (average epoch stats below)", data.epoch)
            progress.summary(
                self.metrics.report(self.metrics.epoch),
                tag="train",
                num_updates=self.state.num_updates,
            )
            self._log_layers(progress, self.metrics.epoch, "train")
        self.metrics.epoch.reset()
        return metric, stop

    def _update(
        self, data: EpochBatchIterator, batches: list[Sample | None], progress: Progress
    ) -> bool:
        """One update and its place in the log; False when it was skipped for an overflow."""
        started = time.perf_counter()
        try:
            update = self.trainer.train_step(batches)
        except TrainingError:
            self.checkpoints.save_crash(self._saving(data, None, end_of_epoch=False))
            raise
        seconds = time.perf_counter() - started
        progress.advance()
        self.profiler.updated()
        if update is None:
            self.metrics.add_seconds(seconds)
            return False
        num_updates = self.state.num_updates
        self.metrics.add(
            update.sums,
            grad_norm=update.grad_norm,
            clip_norm=self.run.optimization.clip_norm,
            num_updates=num_updates,
            lr=update.lr,
            seconds=seconds,
            loss_scale=update.loss_scale,
            gb_free=_gb_free(self.world.device),
        )
        if num_updates % self.run.common.log_interval == 0:
            progress.log(
                self.metrics.report(self.metrics.inner), tag="train_inner", num_updates=num_updates
            )
            self._log_layers(progress, self.metrics.inner, "train_inner")
            self.metrics.inner.reset()
        return True

    def _log_layers(self, progress: Progress, meters: Meters, tag: str) -> None:
        """What became of tokens in layers of experts, if there are any."""
        progress.layers(shown_layers(meters.sums), tag=tag, num_updates=self.state.num_updates)

    def _after_update(
        self, data: EpochBatchIterator, groups: GroupedIterator, updated: bool
    ) -> tuple[float | None, bool]:
        """Validate, save and stop when their time has come."""
        end_of_epoch = not groups.has_next()
        decision = decide(
            self.run,
            epoch=data.epoch,
            num_updates=self.state.num_updates,
            end_of_epoch=end_of_epoch,
            hours=self.state.training_time() / 3600,
            updated=updated,
            signalled=self.trainer.stop_requested,
        )
        if decision.stop is not None:
            logger.info(decision.stop)
        metric = self._validate(data.epoch) if decision.validate else None
        early = self.stopping.observe(metric)
        if early:
            logger.info(
                "early stop since valid performance hasn't improved for last %d runs",
                self.stopping.patience,
            )
        if decision.save or early:
            self._save(data, metric, end_of_epoch)
        return metric, decision.stop is not None or early

    # -- validation -----------------------------------------------------------------------------

    def _check_validation(self) -> None:
        """Let what would stop the first validation stop the run now, not after hours of training.

        Raises:
            DataError: a subset that is empty, lacks its target side or has too long an example.
            ConfigError: --best-checkpoint-metric is none of what validation gives.
        """
        for subset in self.valid_subsets:
            self._valid_iterator(subset)
        if self.valid_subsets and self.run.checkpoint.best_checkpoint_metric != "loss":
            first = self.valid_subsets[0]
            self._metric(self.validator.probe(first, self._valid_dummies[first]), first)

    def _validate(self, epoch: int) -> float | None:
        """Go through the valid subsets; returns the metric of the first, which counts."""
        cfg = self.run.dataset
        if cfg.fixed_validation_seed is not None:
            torch.manual_seed(cfg.fixed_validation_seed)
        metrics = []
        for subset in self.valid_subsets:
            logger.info('begin validation on "%s" subset', subset)
            batches = self._valid_iterator(subset).next_epoch_itr(shuffle=False)
            with self.logs.begin_validation(subset, epoch=epoch, size=len(batches)) as progress:
                meters = self.validator.run(
                    subset,
                    batches,
                    self._valid_dummies[subset],
                    progress,
                    max_steps=cfg.max_valid_steps,
                )
                metrics.append(self._metric(meters.values(), subset))
                values = valid_report(
                    meters,
                    num_updates=self.state.num_updates,
                    best=self._best_after(metrics[0]) if len(metrics) == 1 else None,
                )
                progress.summary(values, tag=subset, num_updates=self.state.num_updates)
                self._log_layers(progress, meters, subset)
        return metrics[0] if metrics else None

    def _metric(self, values: dict[str, float], subset: str) -> float:
        name = self.run.checkpoint.best_checkpoint_metric
        if name not in values:
            raise ConfigError(
                f"--best-checkpoint-metric {name}: validation on {subset!r} gives "
                f"{', '.join(values)}" + ("; add --eval-bleu" if name == "bleu" else "")
            )
        return values[name]

    def _best_after(self, value: float) -> tuple[str, float] | None:
        """The best metric, this one included; not shown before the first save, as in fairseq."""
        best, cfg = self.state.best, self.run.checkpoint
        if best is None:
            return None
        better = is_better(value, best, cfg.maximize_best_checkpoint_metric)
        return f"best_{cfg.best_checkpoint_metric}", value if better else best

    # -- checkpoints ----------------------------------------------------------------------------

    def _restore(self) -> EpochBatchIterator:
        """Take over a checkpoint if there is one; returns the data from where it stopped."""
        trainer, state = self.trainer, self.state
        self.checkpoints.prepare(trainer.model)
        average = trainer.average
        restored = self.checkpoints.load(
            trainer.model,
            trainer.optimizer,
            trainer.criterion,
            None if average is None else average.weights,
        )
        if restored is None:
            data = self._train_iterator(1)
        else:
            state.num_updates, state.best = restored.num_updates, restored.best
            state.previous_training_time = restored.previous_training_time
            if restored.schedule is not None:
                trainer.schedule.load_state_dict(restored.schedule)
            if restored.metrics is not None:
                self.metrics.load_state_dict(restored.metrics)
            self._load_extra(restored, metrics_too=restored.metrics is None)
            data = self._train_iterator(restored.epoch)
            if restored.train_iterator is not None:
                data.load_state_dict(restored.train_iterator)
        if average is not None and (restored is None or not restored.average):
            self._begin_average(average)
        state.epoch = data.epoch
        trainer.schedule.apply(trainer.optimizer, state.num_updates, state.epoch)
        return data

    def _load_extra(self, restored: Restored, metrics_too: bool) -> None:
        """Take over what fairseq's files do not hold, or in another place."""
        extra = restored.extra
        scale = {} if restored.loss_scale is None else {"loss_scale": restored.loss_scale}
        self.trainer.precision.load_state_dict({**scale, **extra.get("precision", {})})
        if self.trainer.average is not None:
            self.trainer.average.since = int(extra.get("ema_since", 0))
        if not self.run.checkpoint.reset_meters:
            if "early_stopping" in extra:
                self.stopping.load_state_dict(extra["early_stopping"])
            if metrics_too and "train_inner" in extra:
                # At the start of an epoch only the epoch's own meters begin anew.
                self.metrics.load_state_dict({"train_inner": extra["train_inner"]})

    def _begin_average(self, average: MovingAverage) -> None:
        """The moving average begins with --ema-seed-model, or with the weights as they are."""
        seed = self.run.ema.ema_seed_model
        if seed is not None:
            state = parts.whole_state(Path(seed), optimizer=False)
            average.load(self.trainer.model.upgrade_state_dict(state["model"]))
        else:
            average.load(self.trainer.model.state_dict())

    def _save(self, data: EpochBatchIterator, metric: float | None, end_of_epoch: bool) -> None:
        self.checkpoints.save(self._saving(data, metric, end_of_epoch))
        if metric is not None:
            self.state.observe_best(metric, self.run.checkpoint.maximize_best_checkpoint_metric)

    def _saving(self, data: EpochBatchIterator, metric: float | None, end_of_epoch: bool) -> Saving:
        trainer, state = self.trainer, self.state
        return Saving(
            epoch=data.epoch,
            updates=state.num_updates,
            end_of_epoch=end_of_epoch,
            val_loss=metric,
            best=state.best,
            model=trainer.model,
            optimizer=trainer.optimizer,
            criterion=trainer.criterion,
            schedule=trainer.schedule,
            train_iterator=data.state_dict(),
            training_time=state.training_time(),
            metrics=self.metrics.state_dict(),
            extra=self._extra(),
            average=None if trainer.average is None else trainer.average.weights,
            loss_scale=trainer.precision.loss_scale,
        )

    def _extra(self) -> dict[str, Any]:
        """What an exact restart needs beyond fairseq's keys."""
        extra: dict[str, Any] = {
            "precision": self.trainer.precision.state_dict(),
            "early_stopping": self.stopping.state_dict(),
            "train_inner": self.metrics.inner.state(),
        }
        if self.trainer.average is not None:
            extra["ema_since"] = self.trainer.average.since
        return extra

    # -- data -----------------------------------------------------------------------------------

    def _train_iterator(self, epoch: int) -> EpochBatchIterator:
        cfg = self.run.dataset
        logger.info("loading train data for epoch %d", epoch)
        self.task.load_dataset(cfg.train_subset, epoch=epoch, combine=True)
        data = self.task.batch_iterator(
            cfg.train_subset,
            self._limits(cfg.max_tokens, cfg.batch_size, skip_invalid=True),
            seed=self.run.common.seed,
            epoch=epoch,
            **self._sharing(),
        )
        self.trainer.dummy_batch = data.first_batch()
        return data

    def _next_epoch(self, data: EpochBatchIterator) -> EpochBatchIterator:
        if self.task.changes_with_epoch():
            return self._train_iterator(data.next_epoch_idx)
        return data

    def _valid_iterator(self, subset: str) -> EpochBatchIterator:
        if subset not in self._valid_iterators:
            cfg = self.run.dataset
            self._valid_iterators[subset] = self.task.batch_iterator(
                subset,
                self._limits(
                    cfg.max_tokens_valid or cfg.max_tokens,
                    cfg.batch_size_valid or cfg.batch_size,
                    skip_invalid=cfg.skip_invalid_size_inputs_valid_test,
                ),
                seed=self.run.common.seed,
                **self._sharing(),
            )
            self._valid_dummies[subset] = self._valid_iterators[subset].first_batch()
        return self._valid_iterators[subset]

    def _sharing(self) -> dict[str, Any]:
        world = self.world
        return {
            "world_size": world.size,
            "rank": world.rank,
            "num_workers": self.run.dataset.num_workers,
            "pin_memory": world.device.type == "cuda",
        }

    def _limits(
        self, max_tokens: int | None, batch_size: int | None, *, skip_invalid: bool
    ) -> BatchLimits:
        return BatchLimits(
            max_tokens=max_tokens,
            max_sentences=batch_size,
            required_multiple=self.run.dataset.required_batch_size_multiple,
            max_positions=resolve_max_positions(
                self.task.max_positions(), self.trainer.model.max_positions(), max_tokens
            ),
            skip_invalid=skip_invalid,
        )


def _gb_free(device: torch.device) -> float | None:
    """GPU memory that the last update left free at its peak; None on a CPU."""
    if device.type != "cuda":
        return None
    used = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return (torch.cuda.get_device_properties(device).total_memory - used) / _GIB


@contextmanager
def _signals_noticed(trainer: Trainer) -> Iterator[None]:
    """SIGTERM and SIGUSR1 (a cluster's warning) end training after the update under way."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(number: int, frame: Any) -> None:
        trainer.request_stop()

    old = {s: signal.signal(s, request) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
