"""Adam as fairseq computes it, in one fused pass where torch has the kernel."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq_lite.config.flags import flag
from fairseq_lite.errors import ConfigError
from fairseq_lite.optim.api import OPTIMIZERS, Optimizer, check_betas

_HALF_MAX = float(torch.finfo(torch.float16).max)
_HALF_TINY = 1e-30


@dataclass(frozen=True)
class AdamConfig:
    """Adam with decoupled weight decay."""

    adam_betas: tuple[float, ...] = flag((0.9, 0.999), "decay of the two running means")
    adam_eps: float = flag(1e-8, "added to the denominator")
    weight_decay: float = flag(0.0, "share of each parameter taken away, times the learning rate")
    fp16_adam_stats: bool = flag(False, "keep the running means in float16, scaled by tensor")

    def __post_init__(self) -> None:
        check_betas("--adam-betas", self.adam_betas)
        if self.adam_eps < 0:
            raise ConfigError(f"--adam-eps {self.adam_eps:g}: expected 0 or more")


@OPTIMIZERS.register("adam", config=AdamConfig)
class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015) with decoupled weight decay (Loshchilov and Hutter, 2019).

    With g the gradient and t the update, from 1::

        m = b1 m + (1 - b1) g
        v = b2 v + (1 - b2) g²
        p = p - lr wd p
        p = p - lr sqrt(1 - b2^t) / (1 - b1^t) · m / (sqrt(v) + eps)

    eps is added to the uncorrected sqrt(v), as in fairseq; torch adds it to the corrected one.
    torch's fused kernel therefore gets eps / sqrt(1 - b2^t), which is the same number, and the
    clip factor too, so that one pass over memory reads the gradient and writes everything.
    """

    fairseq_name = "FairseqAdam"

    def __init__(self, params: Iterable[Tensor], cfg: AdamConfig, *, lr: float) -> None:
        b1, b2 = cfg.adam_betas
        super().__init__(
            params,
            lr=lr,
            betas=(b1, b2),
            eps=cfg.adam_eps,
            weight_decay=cfg.weight_decay,
            amsgrad=False,
        )
        self.half_state = cfg.fp16_adam_stats

    def fresh(self, param: Tensor) -> dict[str, Any]:
        """See the base class."""
        state: dict[str, Any] = {
            "step": 0,
            "exp_avg": torch.zeros_like(param, dtype=self.state_dtype(param, "exp_avg")),
            "exp_avg_sq": torch.zeros_like(param, dtype=self.state_dtype(param, "exp_avg_sq")),
        }
        if self.half_state:
            state["exp_avg_scale"] = state["exp_avg_sq_scale"] = 1.0
        return state

    def _step(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]
    ) -> None:
        if self.half_state:
            self._half_step(params, grads, states)
        elif _has_fused(params, grads):
            for members, step in _counted(states):
                self._fused(
                    [params[i] for i in members],
                    [grads[i] for i in members],
                    [states[i] for i in members],
                    step,
                )
        else:
            super()._step(params, grads, states)

    def update(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]
    ) -> None:
        """See the class docstring; for types and devices without a fused kernel."""
        for members, step in _counted(states):
            self._apply(
                [params[i] for i in members],
                [grads[i] for i in members],
                [states[i]["exp_avg"] for i in members],
                [states[i]["exp_avg_sq"] for i in members],
                step,
            )

    def state_dtype(self, param: Tensor, key: str) -> torch.dtype:
        """float16 with --fp16-adam-stats."""
        if self.half_state and key in ("exp_avg", "exp_avg_sq"):
            return torch.float16
        return super().state_dtype(param, key)

    def _fused(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        states: list[dict[str, Any]],
        step: int,
    ) -> None:
        b1, b2 = self.hyper["betas"]
        device = params[0].device
        # A fill on the device, not a copy to it, so that the host need not wait.
        count = torch.full((), float(step), dtype=torch.float32, device=device)
        torch._fused_adamw_(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [count] * len(params),
            amsgrad=False,
            lr=self.get_lr(),
            beta1=b1,
            beta2=b2,
            weight_decay=self.hyper["weight_decay"],
            eps=self.hyper["eps"] / math.sqrt(1 - b2**step),
            maximize=False,
            grad_scale=_reciprocal(self._factor, device),  # the kernel divides by it
        )

    def _half_step(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]
    ) -> None:
        """One parameter at a time, so that only one is ever held in float32 besides."""
        for p, g, state in zip(params, grads, states, strict=True):
            wide = {
                "step": state["step"],
                "exp_avg": state["exp_avg"].float() * state.get("exp_avg_scale", 1.0),
                "exp_avg_sq": state["exp_avg_sq"].float() * state.get("exp_avg_sq_scale", 1.0),
            }
            super()._step([p], [g], [wide])
            state["step"] = wide["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                # The largest value becomes the largest float16: the widest range there is.
                scale = (wide[key].abs().max() / _HALF_MAX).clamp_min(_HALF_TINY)
                state[key].copy_(wide[key] / scale)
                state[f"{key}_scale"] = scale

    def _apply(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        firsts: list[Tensor],
        seconds: list[Tensor],
        step: int,
    ) -> None:
        lr, wd = self.get_lr(), self.hyper["weight_decay"]
        b1, b2 = self.hyper["betas"]
        torch._foreach_lerp_(firsts, grads, 1 - b1)
        torch._foreach_mul_(seconds, b2)
        torch._foreach_addcmul_(seconds, grads, grads, value=1 - b2)
        denominators = torch._foreach_sqrt(seconds)
        torch._foreach_add_(denominators, self.hyper["eps"])
        if wd != 0:
            torch._foreach_mul_(params, 1 - lr * wd)
        size = lr * math.sqrt(1 - b2**step) / (1 - b1**step)
        torch._foreach_addcdiv_(params, firsts, denominators, value=-size)


def _counted(states: list[dict[str, Any]]) -> list[tuple[list[int], int]]:
    """Count an update in each state; groups of those that share a count (usually all do)."""
    groups: dict[int, list[int]] = {}
    for i, state in enumerate(states):
        state["step"] += 1
        groups.setdefault(state["step"], []).append(i)
    return [(members, step) for step, members in groups.items()]


def _reciprocal(factor: float | Tensor | None, device: torch.device) -> Tensor | None:
    if factor is None:
        return None
    if isinstance(factor, Tensor):
        return factor.to(device=device, dtype=torch.float32).reciprocal()
    return torch.full((), 1.0 / factor, dtype=torch.float32, device=device)


def _has_fused(params: list[Tensor], grads: list[Tensor]) -> bool:
    device = params[0].device
    return device.type in ("cpu", "cuda") and all(
        p.dtype == g.dtype == torch.float32 and p.device == device and not g.is_sparse
        for p, g in zip(params, grads, strict=True)
    )
