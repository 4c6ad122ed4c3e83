"""Numeric precision of a training step: autocast, and the loss scale of float16.

Parameters and optimizer state are always float32; `--bf16`, `--fp16` and `--amp` compute forward
and backward in 16 bits through autocast. bfloat16 has float32's range and needs no scaling;
float16 multiplies the loss so that small gradients do not vanish, and skips an update whose global
gradient norm is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from fairseq_lite.config.core import CommonConfig
from fairseq_lite.errors import ConfigError, TrainingError
from fairseq_lite.optim.float16 import Float16Products, cpu_knows_float16


class LossScaler:
    """A power of two that grows while updates succeed and halves when one overflows.

    Args:
        scale: the initial scale.
        window: updates without overflow before the scale doubles.
        tolerance: share of the updates since the last change that may overflow before it halves.
        minimum: training stops when the scale would fall to this.
        threshold: the scale is never lowered below this.
    """

    def __init__(
        self,
        scale: float,
        *,
        window: int,
        tolerance: float = 0.0,
        minimum: float = 1e-4,
        threshold: float | None = None,
    ) -> None:
        self.scale = float(scale)
        self.window = window
        self.tolerance = tolerance
        self.minimum = minimum
        self.threshold = threshold
        self._updates = 0
        self._last_overflow = -1
        self._last_change = -1
        self._overflows = 0

    def succeeded(self) -> None:
        """An update was made; double the scale at the end of each window."""
        if (self._updates - self._last_overflow) % self.window == 0:
            self.scale *= 2
            self._last_change = self._updates
        self._updates += 1

    def overflowed(self) -> None:
        """An update was skipped; halve the scale once more than `tolerance` of them were.

        Raises:
            TrainingError: the scale would fall to the minimum.
        """
        since = self._updates - self._last_change or 1000  # right after a change: one of many
        self._last_overflow = self._updates
        self._overflows += 1
        if self._overflows / since >= self.tolerance:
            lower = self.scale / 2
            if self.threshold is not None:
                lower = max(lower, self.threshold)
            if lower <= self.minimum:
                raise TrainingError(
                    f"the loss scale has reached its minimum ({self.minimum:g}): the loss is "
                    "probably exploding. Try a lower --lr, --clip-norm, a larger batch, or --bf16, "
                    "which needs no loss scale"
                )
            self.scale = lower
            self._last_change = self._updates
            self._overflows = 0
        self._updates += 1

    def state_dict(self) -> dict[str, int]:
        """The counters; the scale itself is stored where fairseq has it."""
        return {
            "updates": self._updates,
            "last_overflow": self._last_overflow,
            "last_change": self._last_change,
            "overflows": self._overflows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the counters."""
        self._updates = int(state["updates"])
        self._last_overflow = int(state["last_overflow"])
        self._last_change = int(state["last_change"])
        self._overflows = int(state["overflows"])


class Precision:
    """What the trainer does differently in 16 bits; in float32 every method is a no-op.

    Args:
        dtype: what autocast computes in, or None for float32.
        device_type: "cpu" or "cuda".
        scaler: the loss scale of float16.
    """

    def __init__(
        self,
        dtype: torch.dtype | None = None,
        device_type: str = "cpu",
        scaler: LossScaler | None = None,
    ) -> None:
        self.dtype = dtype
        self.device_type = device_type
        self.scaler = scaler

    def autocast(self) -> AbstractContextManager[Any]:
        """Wrap forward pass and loss in this."""
        if self.dtype is None:
            return nullcontext()
        stack = ExitStack()
        stack.enter_context(torch.autocast(self.device_type, dtype=self.dtype))
        stack.enter_context(self.products())
        return stack

    def products(self) -> AbstractContextManager[Any]:
        """Wrap the backward pass in this: what runs again there must compute as it did before."""
        slow = self.dtype == torch.float16 and self.device_type == "cpu"
        if not slow or cpu_knows_float16():
            return nullcontext()
        return Float16Products()  # type: ignore[no-untyped-call]

    def scale(self, loss: Tensor) -> Tensor:
        """The loss to call backward on."""
        return loss if self.scaler is None else loss * self.scaler.scale

    @property
    def loss_scale(self) -> float | None:
        """The present loss scale, for the log; None where there is none."""
        return None if self.scaler is None else self.scaler.scale

    @property
    def unscale(self) -> float:
        """What gradients are multiplied by to undo `scale`; the trainer folds it into its own."""
        return 1.0 if self.scaler is None else 1.0 / self.scaler.scale

    def finite(self, norm: float | Tensor) -> bool:
        """Whether the global gradient norm is finite; the same answer on every rank."""
        return math.isfinite(float(norm))

    def back_off(self) -> None:
        """The norm was not finite: lower the loss scale, so that the update may be skipped.

        Raises:
            TrainingError: there is no loss scale, or it has reached its minimum.
        """
        if self.scaler is None:
            raise TrainingError(
                "the gradient is not finite (NaN or Inf): try a lower --lr, a longer "
                "--warmup-updates or --clip-norm; if it happens at the first update, look for "
                "empty or damaged examples"
            )
        self.scaler.overflowed()

    def succeeded(self) -> None:
        """An update was made."""
        if self.scaler is not None:
            self.scaler.succeeded()

    def state_dict(self) -> dict[str, Any]:
        """Keys to merge into `last_optimizer_state`, of which fairseq knows `loss_scale`."""
        if self.scaler is None:
            return {}
        return {"loss_scale": self.scaler.scale, "loss_scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the loss scale from `last_optimizer_state`, where it has one."""
        if self.scaler is not None and "loss_scale" in state:
            self.scaler.scale = float(state["loss_scale"])
            if "loss_scaler" in state:
                self.scaler.load_state_dict(state["loss_scaler"])


def make_precision(
    common: CommonConfig,
    device: torch.device,
    *,
    update_freq: Sequence[int] = (1,),
    world_size: int = 1,
) -> Precision:
    """The precision the flags ask for.

    Args:
        common: `--bf16`, `--fp16`, `--amp` and the settings of the loss scale.
        device: where the model is. `--amp` means float16 on CUDA and bfloat16 elsewhere.
        update_freq: `--update-freq`; with `world_size` it sets the default window, 2**14 batches.
        world_size: number of processes.

    Raises:
        ConfigError: the default window is undefined because `--update-freq` changes by epoch.
    """
    if common.bf16 or common.memory_efficient_bf16:
        return Precision(torch.bfloat16, device.type)
    amp16 = common.amp and device.type == "cuda"
    if common.amp and not amp16:
        return Precision(torch.bfloat16, device.type)
    if not (common.fp16 or common.memory_efficient_fp16 or amp16):
        return Precision(device_type=device.type)
    window = common.amp_scale_window if amp16 else common.fp16_scale_window
    if window is None:
        if len(update_freq) > 1:
            name = "--amp-scale-window" if amp16 else "--fp16-scale-window"
            raise ConfigError(f"{name} N is needed when --update-freq changes by epoch")
        window = max(1, int(2**14 / world_size / update_freq[0]))
    scaler = LossScaler(
        common.amp_init_scale if amp16 else common.fp16_init_scale,
        window=window,
        tolerance=common.fp16_scale_tolerance,
        minimum=common.min_loss_scale,
        threshold=common.threshold_loss_scale,
    )
    return Precision(torch.float16, device.type, scaler)
