"""When a checkpoint is written and what a run restores, on all ranks.

The training loop calls `save` and `load` on every rank and knows no file name. Which names are
written and removed is `naming`'s, how a file gets to the disk is `store`'s, what a part holds is
the backend's.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

import fairseq_lite
from fairseq_lite.config import serial
from fairseq_lite.config.core import Choice, RunConfig
from fairseq_lite.criteria.api import Criterion
from fairseq_lite.errors import CheckpointError, ConfigError, FliteError
from fairseq_lite.optim.api import Optimizer, Schedule
from fairseq_lite.parallel.agreement import on_main, together
from fairseq_lite.parallel.api import Backend, Part
from fairseq_lite.parallel.shards import sets
from fairseq_lite.parallel.world import World
from fairseq_lite.tasks.api import Task
from fairseq_lite.training.checkpoint import bundle, convert, naming, parts, store
from fairseq_lite.training.checkpoint.writing import CheckpointWriter, Job, ready

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
_FORMAT = 1

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Saving:
    """What the training loop hands over at a save.

    Attributes:
        epoch: the epoch being trained; at its end still this one.
        updates: optimizer steps so far.
        end_of_epoch: whether the epoch's data is used up.
        val_loss: the best-checkpoint metric just measured, or None.
        best: the best value so far, whether or not `val_loss` is counted in.
        model, optimizer, criterion, schedule: the live objects.
        train_iterator: the iterator's state, at an epoch's end that of the next epoch.
        training_time: seconds trained, earlier runs included.
        metrics: in fairseq's form: {aggregator: [(priority, key, meter class, state), …]}.
        extra: what else a bit-exact resume needs; plain values.
        average: the moving average of the weights, or None.
        loss_scale: of fp16, or None.
    """

    epoch: int
    updates: int
    end_of_epoch: bool
    val_loss: float | None
    best: float | None
    model: nn.Module
    optimizer: Optimizer
    criterion: Criterion
    schedule: Schedule
    train_iterator: Mapping[str, Any]
    training_time: float = 0.0
    metrics: Any = dataclasses.field(default_factory=OrderedDict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    average: Mapping[str, Tensor] | None = None
    loss_scale: float | None = None

    @property
    def moment(self) -> naming.Moment:
        """Where in training this is."""
        return naming.Moment(self.epoch, self.updates, self.end_of_epoch, self.val_loss, self.best)


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a run takes over from a checkpoint; None where a `--reset-*` flag says so.

    Attributes:
        path: the file.
        num_updates: 0 when the optimizer starts anew.
        epoch: the epoch to go on with.
        train_iterator: the iterator's state.
        schedule: the schedule's state.
        metrics: the meters', None also at the start of an epoch.
        best: the best validation metric so far.
        previous_training_time: seconds.
        extra: `Saving.extra` of the run that wrote it; empty for fairseq's files.
        average: whether the moving average was restored too.
        loss_scale: of fp16; None where the file has none.
    """

    path: Path
    num_updates: int = 0
    epoch: int = 1
    train_iterator: Mapping[str, Any] | None = None
    schedule: Mapping[str, Any] | None = None
    metrics: Any = None
    best: float | None = None
    previous_training_time: float = 0.0
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    average: bool = False
    loss_scale: float | None = None


@dataclasses.dataclass(frozen=True)
class _Resets:
    optimizer: bool
    schedule: bool
    meters: bool
    dataloader: bool


class CheckpointManager:
    """Writes and restores the checkpoints of a run. Every method is called on every rank.

    Args:
        run: the whole configuration.
        world: the processes.
        backend: gives and takes the parts of the model.
        task: its config, state and files belong to a checkpoint.
    """

    def __init__(self, run: RunConfig, world: World, backend: Backend, task: Task) -> None:
        # The task's own config: it has filled in what the command line left open (the languages).
        self._run = dataclasses.replace(run, task=Choice(run.task.name, task.cfg))
        self._cfg = run.checkpoint
        self._world = world
        self._backend = backend
        self._task = task
        self._folder = Path(run.checkpoint.save_dir)
        self._history: list[dict[str, Any]] = []
        self._bundle: bundle.Bundle | None = None
        self._writer = CheckpointWriter(run.checkpoint, world)
        # What tells the shards of one save from those of another.
        self._run_id: str = world.broadcast_object(secrets.token_hex(4))
        self._saves = 0

    # -- before training ------------------------------------------------------------------------

    def prepare(self, model: nn.Module | None = None) -> None:
        """Make the folder ready and complete: the configuration and the model's files go in first.

        Args:
            model: what will be saved: of one with experts more ranks write.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        self._together(lambda: self._prepare(model))

    def _prepare(self, model: nn.Module | None) -> None:
        if self._cfg.no_save or not (self._world.is_main or self._backend.writes(model)):
            return
        store.check_writable(self._folder)
        if not self._world.is_main:
            return
        parts.finish_renaming(self._folder)
        files = self._files()
        for name, data in files.files.items():
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
            store.save_bytes(self._folder / name, data)
        store.save_text(self._folder / CONFIG_FILE, serial.dump_yaml(self._run))

    def _files(self) -> bundle.Bundle:
        if self._bundle is None:
            self._bundle = bundle.collect(self._run, self._task.files())
        return self._bundle

    # -- saving ---------------------------------------------------------------------------------

    def save(self, saving: Saving) -> Path | None:
        """Write what is due at this moment, and remove what retention no longer keeps.

        Returns:
            The file written first, the others being copies of it; None when nothing is due.

        Raises:
            CheckpointError: on every rank, when one could not write. What was there before is
                intact.
        """
        # Rank 0's view of the folder decides for all.
        existing = os.listdir(self._folder) if self._is_main_with_folder() else []
        names = naming.names_to_write(self._cfg, saving.moment, parts.whole_names(existing))
        self._saves += 1
        names = self._world.broadcast_object(names)
        return self._save_as(names, saving)

    def save_crash(self, saving: Saving) -> Path | None:
        """Write `crash.pt`: the state in which training could not go on."""
        if self._cfg.no_save:
            return None
        # No waiting for other ranks: one that ran out of memory is alone here. And no error either:
        # it would take the place of the one that stops the run.
        try:
            self._writer.finish()
            own = self._backend.crash_parts(saving.model, saving.optimizer, saving.average)
            states = self._states(saving, own, f"{self._run_id}-crash-{saving.updates}")
            for name, state in states.items():
                path = parts.part_path(self._folder / naming.CRASH, name)
                store.save(path, ready(name, state, path))
        except FliteError as e:
            logger.warning("%s could not be written: %s", naming.CRASH, e)
            return None
        return self._folder / naming.CRASH

    def _is_main_with_folder(self) -> bool:
        return self._world.is_main and self._folder.is_dir()

    def _save_as(self, names: list[str], saving: Saving) -> Path | None:
        if not names:
            return None
        optimizer = None if self._cfg.no_save_optimizer_state else saving.optimizer
        own = self._backend.save_parts(saving.model, optimizer, saving.average)
        save = f"{self._run_id}-{self._saves}"
        states = self._together(lambda: self._ready(saving, own, save))
        self._writer.submit(Job(names, saving.moment, states))
        return self._folder / names[0]

    def _ready(self, saving: Saving, own: Mapping[str, Part], save: str) -> dict[str, Any]:
        """The content of this rank's files, once an earlier save is done."""
        self._writer.finish()
        states = self._states(saving, own, save)
        if self._cfg.write_checkpoints_asynchronously:
            # Training changes the tensors in place while the thread writes: it gets a copy.
            states = store.snapshot(states)
        return states

    def _states(self, saving: Saving, own: Mapping[str, Part], save: str) -> dict[str, Any]:
        header = self._header(saving) if own else {}
        return {
            name: _with_part(_header_for(header, part), part, saving.loss_scale, save)
            for name, part in own.items()
        }

    def _header(self, saving: Saving) -> dict[str, Any]:
        """Everything but the weights and the optimizer's state, under fairseq's keys."""
        criterion_state = (
            saving.criterion.state_dict() if _has_parameters(saving.criterion) else None
        )
        extra_state: dict[str, Any] = {
            "train_iterator": dict(saving.train_iterator),
            "val_loss": saving.val_loss,
        }
        better = naming.better_of(
            saving.val_loss, saving.best, self._cfg.maximize_best_checkpoint_metric
        )
        if better is not None:
            extra_state["best"] = better
        extra_state["metrics"] = saving.metrics
        extra_state["previous_training_time"] = saving.training_time
        entry = {
            "criterion_name": saving.criterion.fairseq_name,
            "optimizer_name": saving.optimizer.fairseq_name,
            "lr_scheduler_state": dict(saving.schedule.state_dict()),
            "num_updates": saving.updates,
        }
        return {
            "args": None,
            "cfg": convert.to_cfg(self._run),
            "model": OrderedDict(),
            "criterion": criterion_state,
            "optimizer_history": [*self._history, entry],
            "task_state": self._task.state_dict(),
            "extra_state": extra_state,
            parts.OWN_KEY: {
                "format": _FORMAT,
                "version": fairseq_lite.__version__,
                "bundle": self._files().to_state(),
                "extra": dict(saving.extra),
            },
        }

    def close(self) -> None:
        """Wait for a write in the background.

        Raises:
            CheckpointError: on every rank, when it failed.
        """
        self._together(self._writer.finish)
        self._writer.close()

    # -- restoring ------------------------------------------------------------------------------

    def load(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        criterion: Criterion,
        average: Mapping[str, Tensor] | None = None,
    ) -> Restored | None:
        """Restore what `--restore-file` and its relatives say.

        Args:
            model: is filled.
            optimizer: is filled, unless the flags say otherwise.
            criterion: is filled where it has parameters.
            average: the moving average's tensors; filled where the checkpoint has one.

        Returns:
            What the loop takes over; None when there is nothing to start from.

        Raises:
            CheckpointError: a file that was named does not exist, or one does not fit. On every
                rank.
        """
        found = on_main(self._world, self._find)
        if found is None:
            return None
        path, resets = found
        files = parts.CheckpointFiles(path, shard_count=self._cfg.checkpoint_shard_count)
        header = on_main(self._world, lambda: _header_of(_first_state(files)))
        use_optimizer = not resets.optimizer and bool(header["has_optimizer"])
        if resets.optimizer or not header["has_average"]:
            average = None
        overriding: _Overriding | None = None
        if optimizer is not None and use_optimizer:
            _check_same(path, header["optimizer_history"], criterion, optimizer)
            overriding = _Overriding(optimizer, self._cfg.optimizer_overrides)
        try:
            self._backend.load_parts(model, overriding, files, average)
        except CheckpointError as e:
            named = str(parts.whole_name(path).with_suffix("")) in str(e)
            raise e if named else CheckpointError(f"{path}: {e}") from e
        if header["criterion"] and _has_parameters(criterion):
            criterion.load_state_dict(header["criterion"])
        self._task.load_state_dict(header["task_state"])
        self._history = list(header["optimizer_history"])
        restored = _restored(path, header, resets, use_optimizer)
        restored = dataclasses.replace(restored, average=average is not None)
        if not use_optimizer and not resets.optimizer:
            logger.warning(
                "%s holds no optimizer state: the optimizer starts anew, updates count from 0", path
            )
        logger.info(
            "Loaded checkpoint %s (epoch %d @ %d updates)",
            path,
            restored.epoch,
            restored.num_updates,
        )
        return restored

    def _find(self) -> tuple[Path, _Resets] | None:
        """The file to start from and what not to take from it; None to start afresh."""
        cfg = self._cfg
        resets = _Resets(
            cfg.reset_optimizer, cfg.reset_lr_scheduler, cfg.reset_meters, cfg.reset_dataloader
        )
        if cfg.restore_file != naming.LAST:
            if cfg.finetune_from_model is not None:
                raise ConfigError(
                    "--finetune-from-model and --restore-file both name a model: leave one out"
                )
            path = naming.with_suffix(cfg.restore_file, cfg.checkpoint_suffix)
            return _named(path, "--restore-file", self._folder), resets
        last = self._folder / naming.with_suffix(naming.LAST, cfg.checkpoint_suffix)
        if parts.readable_files(last):
            for name in ("continue_once", "finetune_from_model"):
                if getattr(cfg, name) is not None:
                    flag = f"--{name.replace('_', '-')} {getattr(cfg, name)}"
                    logger.info("%s is there: it goes on, and %s is not read", last, flag)
            return last, resets
        if cfg.continue_once is not None:
            return _named(cfg.continue_once, "--continue-once"), resets
        if cfg.finetune_from_model is not None:
            path = str(_named(cfg.finetune_from_model, "--finetune-from-model"))
            logger.info(
                "loading pretrained model from %s: optimizer, lr scheduler, meters, dataloader "
                "will be reset",
                path,
            )
            return Path(path), _Resets(True, True, True, True)
        logger.info("No existing checkpoint found %s", last)
        return None

    def _together(self, action: Callable[[], T]) -> T:
        return together(self._world.gather_objects, action)


class _Overriding:
    """An optimizer that takes `--optimizer-overrides` over what a checkpoint holds."""

    def __init__(self, optimizer: Optimizer, overrides: Mapping[str, Any]) -> None:
        self._optimizer = optimizer
        self._overrides = overrides

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def state_dict(self) -> dict[str, Any]:
        return self._optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self._optimizer.load_state_dict(state_dict, self._overrides)


def _named(path: str, flag: str, folder: Path | None = None) -> Path:
    if not parts.readable_files(Path(path)):
        # fairseq starts afresh here, and the user finds out days later.
        inside = parts.readable_files(folder / path) if folder is not None else {}
        hint = f"; did you mean {folder}/{path}?" if inside else ""
        raise CheckpointError(f"{flag} {path}: no such checkpoint{hint}")
    return Path(path)


def _first_state(files: parts.CheckpointFiles) -> dict[str, Any]:
    """The first part of a checkpoint, with the fields older versions of fairseq lack."""
    return convert.upgraded_state(files.header(), files.where(sets.head(files.names())))


def _header_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """What every rank needs to know of a checkpoint: little, and no weights."""
    # In several files of fairseq's the state goes by positions, not by names.
    optimizer = None if parts.has_numbered_state(state) else state.get("last_optimizer_state")
    averages = (parts.AVERAGE_KEY, parts.WIDE_AVERAGE_KEY)
    extra = dict(parts.own(state).get("extra") or {})
    older = extra.pop("ema", None)  # where this project kept the moving average at first
    if isinstance(older, Mapping):
        extra["ema_since"] = older.get("_since", 0)
    return {
        "has_optimizer": optimizer is not None,
        "has_average": parts.average_of(state) is not None,
        "loss_scale": optimizer.get("loss_scale") if isinstance(optimizer, Mapping) else None,
        "optimizer_history": state["optimizer_history"],
        "extra_state": {k: v for k, v in state["extra_state"].items() if k not in averages},
        "criterion": state.get("criterion"),
        "task_state": state.get("task_state") or {},
        "extra": extra,
    }


def _check_same(
    path: Path, history: list[dict[str, Any]], criterion: Criterion, optimizer: Optimizer
) -> None:
    """Refuse an optimizer state that another loss or another rule has made."""
    last = history[-1]
    for what, key, mine in (
        ("Criterion", "criterion_name", criterion.fairseq_name),
        ("Optimizer", "optimizer_name", optimizer.fairseq_name),
    ):
        if last.get(key) != mine:
            raise CheckpointError(
                f"{path}: {what} does not match; please reset the optimizer (--reset-optimizer). "
                f"{last.get(key)} vs {mine}"
            )


def _restored(
    path: Path, header: Mapping[str, Any], resets: _Resets, use_optimizer: bool
) -> Restored:
    extra = header["extra_state"]
    last = header["optimizer_history"][-1]
    iterator = extra.get("train_iterator")
    at_start = bool(iterator) and iterator.get("iterations_in_epoch", 0) == 0
    keep_iterator = iterator is not None and not resets.dataloader
    return Restored(
        path=path,
        num_updates=int(last.get("num_updates", 0)) if use_optimizer else 0,
        epoch=int(iterator["epoch"]) if keep_iterator else 1,
        train_iterator=iterator if keep_iterator else None,
        schedule=last.get("lr_scheduler_state") if use_optimizer and not resets.schedule else None,
        metrics=None if resets.meters or at_start else extra.get("metrics"),
        best=None if resets.optimizer or resets.meters else extra.get("best"),
        previous_training_time=float(extra.get("previous_training_time") or 0.0),
        extra={} if resets.optimizer else header["extra"],
        loss_scale=header["loss_scale"] if use_optimizer else None,
    )


def _header_for(header: Mapping[str, Any], part: Part) -> Mapping[str, Any]:
    """What a part's file says of the run; those of experts, of which there may be many, little."""
    if "expert" not in part.manifest:
        return header
    own = {key: header[parts.OWN_KEY][key] for key in ("format", "version")}
    return {
        "model": OrderedDict(),
        "optimizer_history": header["optimizer_history"],
        "extra_state": {},
        parts.OWN_KEY: own,
    }


def _with_part(
    header: Mapping[str, Any], part: Part, loss_scale: float | None, save: str
) -> dict[str, Any]:
    """One file's content: the header, and the part in fairseq's places."""
    state = dict(header)
    state["model"] = OrderedDict(part.model)
    if part.average is not None:
        state["extra_state"] = {
            **state["extra_state"],
            parts.AVERAGE_KEY: OrderedDict(part.average),
        }
    if part.optimizer is not None:
        own = state.pop(parts.OWN_KEY)
        state["last_optimizer_state"] = dict(part.optimizer)
        if loss_scale is not None:
            state["last_optimizer_state"]["loss_scale"] = loss_scale
        state[parts.OWN_KEY] = own
    manifest = {**part.manifest, "save": save}
    state[parts.OWN_KEY] = {**state[parts.OWN_KEY], "manifest": manifest}
    return state


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
