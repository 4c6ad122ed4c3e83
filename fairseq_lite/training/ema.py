"""An exponential moving average of the weights (`--store-ema`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fairseq_lite.config.core import EMAConfig
from fairseq_lite.parallel.local import is_spread, local, rows_of


class MovingAverage:
    """The average of a model's weights over its updates; of sharded weights, part by part.

    After update u::

        average = weights                                      u < --ema-start-update
        average = decay * average + (1 - decay) * weights      otherwise, every --ema-update-freq

    Weights are float32 here whatever precision computes with them, so the average is too, and
    --ema-fp32 asks for nothing more. Buffers are copied, as in fairseq: the mean of equal numbers
    may round to another, and the version of a model's layout must not become an earlier one.

    Args:
        cfg: the flags.
        model: the model; its present weights begin the average.

    Attributes:
        weights: the average, under the model's names.
        since: updates of the model not taken in yet (--ema-update-freq).
    """

    def __init__(self, cfg: EMAConfig, model: nn.Module) -> None:
        self.cfg = cfg
        self.weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.since = 0

    @torch.no_grad()
    def update(self, model: nn.Module, num_updates: int) -> None:
        """Take an update of `model` into the average."""
        self.since += 1
        if self.since < self.cfg.ema_update_freq:
            return
        self.since = 0
        decay = 0.0 if num_updates < self.cfg.ema_start_update else self.cfg.ema_decay
        copied = {name for name, _ in model.named_buffers()}
        for name, value in model.state_dict().items():
            average, value = local(self.weights[name]), local(value)
            if name not in copied:
                average.mul_(decay).add_(value.to(average), alpha=1 - decay)
            else:
                average.copy_(value)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Go on from an average, or begin with the weights of a model, whole or spread alike."""
        for name, average in self.weights.items():
            given = weights[name]
            part = local(given) if is_spread(given) else rows_of(given, average)
            local(average).copy_(part)
