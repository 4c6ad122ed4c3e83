"""Adafactor: Adam's second moment in the memory of its rows and columns."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq_lite.config.flags import flag
from fairseq_lite.errors import ConfigError
from fairseq_lite.optim.api import OPTIMIZERS, Optimizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdafactorConfig:
    """Adafactor, by default with the schedule's learning rate."""

    adafactor_eps: tuple[float, ...] = flag(
        (1e-30, 1e-3), "added to squared gradients, and the smallest scale of a parameter"
    )
    clip_threshold: float = flag(1.0, "largest root mean square of an update, before the rate")
    decay_rate: float = flag(-0.8, "exponent of the second moment's decay")
    beta1: float | None = flag(None, "decay of the first moment; none is kept by default")
    weight_decay: float = flag(
        0.0, "share of each parameter taken away, times the learning rate", aliases=("--wd",)
    )
    scale_parameter: bool = flag(False, "scale steps by the root mean square of the parameter")
    relative_step: bool = flag(False, "step sizes follow 1 / sqrt(t) instead of the schedule")
    warmup_init: bool = flag(False, "with --relative-step, start with very small steps")

    def __post_init__(self) -> None:
        if len(self.adafactor_eps) != 2:
            raise ConfigError(
                f"--adafactor-eps {self.adafactor_eps}: expected two numbers, as in 1e-30,1e-3"
            )
        if self.warmup_init and not self.relative_step:
            raise ConfigError("--warmup-init needs --relative-step")


@OPTIMIZERS.register("adafactor", config=AdafactorConfig)
class Adafactor(Optimizer):
    """Adafactor (Shazeer and Stern, 2018).

    With d = 1 - t^decay_rate, and r and c the running means over rows and columns of a matrix (v
    of all elements for a vector)::

        r = d r + (1 - d) mean_columns(g² + eps1),  c likewise over rows
        u = g / sqrt(r c / mean(r))                      (g / sqrt(v) for a vector)
        u = u / max(1, rms(u) / clip_threshold)
        a = rate * (max(eps2, rms(p)) with --scale-parameter, else 1)
        m = beta1 m + (1 - beta1) a u                    (with --beta1, else m = a u)
        p = p - a wd p - m

    rate is the schedule's learning rate, or with --relative-step min(s, 1 / sqrt(t)), where s is
    0.01, or 1e-6 t with --warmup-init. fairseq lets the scaled rate of one parameter become the
    rate of the next within an update; here each starts from the same rate.
    """

    fairseq_name = "FairseqAdafactor"
    elementwise = False

    def __init__(self, params: Iterable[Tensor], cfg: AdafactorConfig, *, lr: float) -> None:
        super().__init__(
            params,
            lr=lr,
            eps=tuple(cfg.adafactor_eps),
            clip_threshold=cfg.clip_threshold,
            decay_rate=cfg.decay_rate,
            beta1=cfg.beta1,
            weight_decay=cfg.weight_decay,
            scale_parameter=cfg.scale_parameter,
            relative_step=cfg.relative_step,
            warmup_init=cfg.warmup_init,
        )
        if cfg.relative_step:
            self.hyper["lr"] = self._relative(1)
            logger.info("--relative-step sets the step sizes: --lr and its schedule are not used")

    def set_lr(self, lr: float) -> None:
        """Set the learning rate, unless --relative-step makes it."""
        if not self.hyper["relative_step"]:
            super().set_lr(lr)

    def fresh(self, param: Tensor) -> dict[str, Any]:
        """See the base class."""
        dtype = self.state_dtype(param, "exp_avg")
        state: dict[str, Any] = {"step": 0}
        if self.hyper["beta1"] is not None:
            state["exp_avg"] = torch.zeros_like(param, dtype=dtype)
        if param.dim() >= 2:
            shape = tuple(param.shape)
            state["exp_avg_sq_row"] = param.new_zeros(shape[:-1], dtype=dtype)
            state["exp_avg_sq_col"] = param.new_zeros(shape[:-2] + shape[-1:], dtype=dtype)
        else:
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=dtype)
        state["RMS"] = 0.0
        return state

    def update(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]
    ) -> None:
        """See the class docstring."""
        for p, g, state in zip(params, grads, states, strict=True):
            state["step"] += 1
            self._update_one(p, g, state)

    def _update_one(self, p: Tensor, g: Tensor, state: dict[str, Any]) -> None:
        if self.hyper["relative_step"]:
            self.hyper["lr"] = self._relative(state["step"])
        rate: float | Tensor = self.get_lr()
        state["RMS"] = _rms(p)
        if self.hyper["scale_parameter"]:
            rate = rate * state["RMS"].clamp(min=self.hyper["eps"][1])
        u = self._direction(g, state)
        u.div_((_rms(u) / self.hyper["clip_threshold"]).clamp_(min=1.0))
        u.mul_(rate)
        beta1 = self.hyper["beta1"]
        if beta1 is not None:
            u = state["exp_avg"].mul_(beta1).add_(u, alpha=1 - beta1)
        if self.hyper["weight_decay"] != 0:
            p.mul_(1 - rate * self.hyper["weight_decay"])
        p.sub_(u)

    def _direction(self, g: Tensor, state: dict[str, Any]) -> Tensor:
        decay = 1.0 - math.pow(state["step"], self.hyper["decay_rate"])
        square = g.square().add_(self.hyper["eps"][0])
        if "exp_avg_sq" in state:
            second: Tensor = state["exp_avg_sq"].lerp_(square, 1 - decay)
            return second.rsqrt().mul_(g)
        row: Tensor = state["exp_avg_sq_row"].lerp_(square.mean(dim=-1), 1 - decay)
        column: Tensor = state["exp_avg_sq_col"].lerp_(square.mean(dim=-2), 1 - decay)
        by_row = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        by_column = column.unsqueeze(-2).rsqrt()
        return by_row * by_column * g

    def _relative(self, t: int) -> float:
        smallest = 1e-6 * t if self.hyper["warmup_init"] else 1e-2
        return float(min(smallest, 1.0 / math.sqrt(t)))


def _rms(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm / math.sqrt(x.numel())
