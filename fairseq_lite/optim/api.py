"""What an optimizer and a learning-rate schedule promise, and the registries that hold them.

An optimizer owns the parameters and the state of the update rule; a schedule is a formula from the
number of updates (and the epoch) to a learning rate. Neither knows of the other: the trainer asks
the schedule and tells the optimizer.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fairseq_lite.config.core import OptimizationConfig
from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.parallel.local import is_spread, local, rows_of
from fairseq_lite.parallel.shards.spans import cut_flat
from fairseq_lite.registry import Registry

logger = logging.getLogger(__name__)

OPTIMIZERS = Registry("optimizer", "--optimizer")
SCHEDULES = Registry("learning-rate schedule", "--lr-scheduler")

_WIDE = (torch.float32, torch.float64)


def check_betas(name: str, betas: tuple[float, ...]) -> None:
    """Raise ConfigError unless `betas` are two numbers in [0, 1)."""
    if len(betas) != 2 or not all(0.0 <= b < 1.0 for b in betas):
        text = ",".join(f"{b:g}" for b in betas)
        raise ConfigError(f"{name} {text}: expected two numbers in [0, 1), as in 0.9,0.98")


class Optimizer(ABC):
    """One group of parameters, their state, and a rule that changes both.

    Not a `torch.optim.Optimizer`, because making the first of those in a process imports torch's
    compiler, a second or more of every start. The state dictionary has the same layout.

    Of a parameter that is spread over ranks only this rank's part is updated, and the state is as
    large as that part: rules that go element by element need no more.

    Args:
        params: what to optimize; parameters that need no gradient are left out.
        **hyper: the hyper-parameters of the group, with `lr` first, in the order in which they
            stand in a checkpoint's `param_groups[0]`.

    Attributes:
        fairseq_name: the class name that fairseq writes to `optimizer_history`.
        params: the parameters, in the order that numbers them in a checkpoint.
        hyper: the hyper-parameters, by name.
        state: the state of each parameter that has been updated, by name.
    """

    fairseq_name: ClassVar[str]

    def __init__(self, params: Iterable[Tensor], **hyper: Any) -> None:
        self.params: list[Tensor] = [p for p in params if p.requires_grad]
        if not self.params:
            raise ConfigError("the optimizer was given no parameter that needs a gradient")
        if not self.elementwise and any(map(_is_split, self.params)):
            raise ConfigError(
                f"{type(self).__name__} looks at whole parameters, and this --ddp-backend spreads "
                "them over ranks: use --optimizer adam, or --ddp-backend legacy_ddp"
            )
        self.hyper: dict[str, Any] = hyper
        self.state: dict[Tensor, dict[str, Any]] = {}
        self._factor: float | Tensor | None = None  # waits for step(), which multiplies anyway
        self._after_step: Callable[[], None] | None = None

    @abstractmethod
    def update(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]
    ) -> None:
        """Change `params` and `states` in place.

        Args:
            params: float32 (or float64) tensors; 16-bit parameters come as copies, which are
                written back afterwards.
            grads: their gradients in the same type, scaled and clipped. May be overwritten.
            states: their states, made by `fresh` and updated by this method before.
        """

    def fresh(self, param: Tensor) -> dict[str, Any]:
        """The state of a parameter before its first update."""
        return {}

    def step(self) -> None:
        """Update every parameter that has a gradient, under the pending clip factor."""
        params, grads = self._with_gradients()
        if params:
            with torch.no_grad():
                states = [self._state_of(p) for p in params]
                self._step([local(p) for p in params], grads, states)
        self._factor = None
        if self._after_step is not None:
            self._after_step()

    def update_parts(self, parts: list[Tensor], after_step: Callable[[], None]) -> None:
        """Update these tensors in place of the parameters, in the same order, from now on.

        Args:
            parts: what this rank updates of each parameter: a part of it, all or nothing. They
                share memory with the parameters; gradients are expected on them.
            after_step: called after each step.
        """
        assert len(parts) == len(self.params) and not self.state, "before the first update"
        self.params, self._after_step = parts, after_step

    def _step(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]
    ) -> None:
        masters = [p if p.dtype in _WIDE else p.float() for p in params]
        grads = [g.to(m.dtype) for g, m in zip(grads, masters, strict=True)]
        if self._factor is not None:
            torch._foreach_mul_(grads, self._factor)
        self.update(masters, grads, states)
        for p, m in zip(params, masters, strict=True):
            if m is not p:
                p.copy_(m)

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state = self.state.get(param)
        if state is None:
            state = self.state[param] = self.fresh(local(param))
        return state

    def zero_grad(self) -> None:
        """Forget all gradients (and a pending clip factor: an update may have been skipped)."""
        for p in self.params:
            p.grad = None
        self._factor = None

    def scale_gradients(self, factor: float | Tensor) -> None:
        """Multiply every gradient by `factor`, now."""
        _, grads = self._with_gradients()
        if grads and not (isinstance(factor, (int, float)) and factor == 1):
            with torch.no_grad():
                torch._foreach_mul_(grads, factor)

    def clip(self, norm: float | Tensor, max_norm: float) -> None:
        """Clip by the global norm of the gradients, which the backend has computed.

        The factor min(1, max_norm / (norm + 1e-6)) is applied by `step`, in the same pass as the
        update; a `max_norm` of 0 switches clipping off.
        """
        if max_norm > 0:
            self._factor = _clip_factor(norm, max_norm)

    def scale_and_clip(self, norm: float | Tensor, scale: float, max_norm: float) -> float | Tensor:
        """`scale_gradients` and `clip` without a pass of their own over the gradients.

        Args:
            norm: the global norm of the gradients as they are, unscaled.
            scale: what they are to be multiplied by.
            max_norm: the largest norm after scaling; 0: no clipping.

        Returns:
            The norm after scaling and before clipping: what the log shows.
        """
        scaled = norm * scale
        factor: float | Tensor = scale
        if max_norm > 0:
            factor = _clip_factor(scaled, max_norm) * scale
        self._factor = None if isinstance(factor, (int, float)) and factor == 1 else factor
        return scaled

    def get_lr(self) -> float:
        """The learning rate of the next update."""
        return float(self.hyper["lr"])

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next update."""
        self.hyper["lr"] = lr

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The one group in torch's form, the parameters themselves under "params"."""
        return [{**self.hyper, "params": self.params}]

    def state_dict(self) -> dict[str, Any]:
        """The state in the layout of torch's optimizers, which is what fairseq writes.

        Parameters are numbered; tensors are the live ones, not copies.
        """
        return {
            "state": {i: dict(self.state[p]) for i, p in enumerate(self.params) if p in self.state},
            "param_groups": [{**self.hyper, "params": list(range(len(self.params)))}],
        }

    def load_state_dict(
        self, state: Mapping[str, Any], overrides: Mapping[str, Any] | None = None
    ) -> None:
        """Take over a state written by `state_dict`, by fairseq or by a torch optimizer.

        fairseq's --fp16 keeps one flat tensor for all parameters; it is cut up here. Of the
        hyper-parameters, only those that change during training (`carried`) are taken: the others
        are what this run's flags say. fairseq silently keeps the old ones instead.

        Args:
            state: the dictionary under `last_optimizer_state`.
            overrides: hyper-parameters to set afterwards (`--optimizer-overrides`).

        Raises:
            CheckpointError: the state belongs to other parameters.
            ConfigError: an override this optimizer does not have.
        """
        groups: Sequence[Mapping[str, Any]] = state["param_groups"]
        numbers = [n for group in groups for n in group["params"]]
        entries: Mapping[int, Mapping[str, Any]] = state["state"]
        if len(numbers) == 1 and len(self.params) > 1:
            shapes = [tuple(p.shape) for p in self.params]
            by_param: Sequence[Mapping[str, Any]] = cut_flat(entries.get(numbers[0], {}), shapes)
        elif len(numbers) == len(self.params):
            by_param = [entries.get(n, {}) for n in numbers]
        else:
            raise CheckpointError(
                f"the optimizer state is for {len(numbers)} parameters, the model has "
                f"{len(self.params)}: use --reset-optimizer"
            )
        loaded = {
            p: {k: self._load_value(p, k, v) for k, v in entry.items()}
            for p, entry in zip(self.params, by_param, strict=True)
            if entry
        }
        self.state = loaded
        self._take_hyper(groups[0])
        for name, value in (overrides or {}).items():
            if name not in self.hyper:
                raise ConfigError(
                    f"--optimizer-overrides {name!r}: expected one of {', '.join(self.hyper)}"
                )
            old = self.hyper[name]
            self.hyper[name] = tuple(value) if isinstance(old, tuple) else value

    def _take_hyper(self, group: Mapping[str, Any]) -> None:
        for name, value in group.items():
            if name in self.carried and name in self.hyper:
                self.hyper[name] = value
            elif name in self.hyper and _plain(value) != _plain(self.hyper[name]):
                logger.info(
                    "the checkpoint's optimizer had %s %s; now it is %s",
                    name,
                    value,
                    self.hyper[name],
                )

    def _load_value(self, param: Tensor, key: str, value: Any) -> Any:
        if key == "step":
            return int(value)
        if not isinstance(value, Tensor):
            return value
        part = local(param)
        if value.dim() > 0 and key in self.like_parameter:
            value = rows_of(value, param)
            if value.shape != part.shape:
                raise CheckpointError(
                    f"the optimizer state {key!r} has shape {tuple(value.shape)}, its parameter "
                    f"{tuple(param.shape)}: use --reset-optimizer"
                )
        dtype = self.state_dtype(part, key) if value.is_floating_point() else value.dtype
        return value.detach().to(device=part.device, dtype=dtype, copy=True)

    #: Whether each element of a parameter is updated by itself, so that a part is as good as all.
    elementwise: ClassVar[bool] = True

    #: Hyper-parameters that change during training, so that a checkpoint's values count.
    carried: ClassVar[frozenset[str]] = frozenset(("lr", "lr_old", "step"))

    #: State tensors that have the shape of their parameter.
    like_parameter: ClassVar[frozenset[str]] = frozenset(
        ("exp_avg", "exp_avg_sq", "exp_inf", "momentum_buffer", "sum", "square_avg", "acc_delta")
    )

    def state_dtype(self, param: Tensor, key: str) -> torch.dtype:
        """The type a state tensor is kept in: float32 also for 16-bit parameters."""
        return torch.float64 if param.dtype == torch.float64 else torch.float32

    def _with_gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Parameters that have a gradient, and the gradients' parts on this rank."""
        params = [p for p in self.params if p.grad is not None]
        return params, [local(p.grad) for p in params if p.grad is not None]


def _is_split(param: Any) -> bool:
    return is_spread(param) and param.device_mesh.size() > 1


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _clip_factor(norm: float | Tensor, max_norm: float) -> float | Tensor:
    if isinstance(norm, Tensor):
        return (max_norm / (norm + 1e-6)).clamp(max=1.0)  # stays on the device: no wait for it
    return min(1.0, max_norm / (norm + 1e-6))


class Schedule(ABC):
    """A learning rate for every number of updates.

    Args:
        cfg: the entry's own configuration.
        optimization: the shared one, for `lr` and `max_update`.
        maximize: the validation metric is better when larger
            (`--maximize-best-checkpoint-metric`).

    Attributes:
        cfg: the entry's own configuration.
        lrs: the values of --lr.
        peak: the first of them.
        max_update: as in the shared configuration.
        best: the best validation value seen, or None before the first.
    """

    #: Several values of --lr, one an epoch, make sense for this schedule.
    takes_lr_by_epoch: ClassVar[bool] = False

    def __init__(
        self, cfg: Any, optimization: OptimizationConfig, *, maximize: bool = False
    ) -> None:
        if len(optimization.lr) > 1 and not self.takes_lr_by_epoch:
            given = ",".join(f"{lr:g}" for lr in optimization.lr)
            raise ConfigError(
                f"--lr {given}: this --lr-scheduler takes one learning rate; --lr-scheduler fixed "
                "takes one an epoch"
            )
        self.cfg = cfg
        self.lrs: tuple[float, ...] = tuple(optimization.lr)
        self.peak: float = self.lrs[0]
        self.max_update: int = optimization.max_update
        self.maximize = maximize
        self.best: float | None = None
        self.prepare()

    def prepare(self) -> None:  # noqa: B027 - many have nothing to prepare
        """Work out, once, what `lr` needs.

        Raises:
            ConfigError: a configuration that cannot work.
        """

    @abstractmethod
    def lr(self, num_updates: int, epoch: int) -> float:
        """The learning rate after `num_updates` updates, in `epoch` (from 1).

        The first update therefore runs with lr(0), as in fairseq.
        """

    def apply(self, optimizer: Optimizer, num_updates: int, epoch: int) -> float:
        """Set the optimizer's learning rate for the next update; returns it."""
        lr = self.lr(num_updates, epoch)
        optimizer.set_lr(lr)
        return optimizer.get_lr()

    def begin_epoch(self, epoch: int, lr: float) -> None:  # noqa: B027 - most ignore it
        """Told when an epoch begins, and the learning rate at that moment."""

    def observe(self, value: float | None, num_updates: int) -> None:
        """Told the validation value at the end of an epoch; None: there was no validation."""
        if value is not None:
            better = max if self.maximize else min
            self.best = value if self.best is None else better(self.best, value)

    def state_dict(self) -> dict[str, Any]:
        """What fairseq stores under `lr_scheduler_state`, plus what an exact resume needs."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state written by `state_dict` or by fairseq."""
        best = state.get("best")
        self.best = None if best is None else float(best)
