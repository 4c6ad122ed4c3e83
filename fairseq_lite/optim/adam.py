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
from fairseq_lite.optim.api import OPTIMIZERS, Optimizer

_HALF_MAX = float(torch.finfo(torch.float16).max)
_HALF_TINY = 1e-30


def check_betas(name: str, betas: tuple[float, ...]) -> None:
    """Raise ConfigError unless `betas` are two numbers in [0, 1)."""
    if len(betas) != 2 or not all(0.0 <= b < 1.0 for b in betas):
        text = ",".join(f"{b:g}" for b in betas)
        raise ConfigError(f"{name} {text}: expected two numbers in [0, 1), as in 0.9,0.98")


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

    def _step(self, params: list[Tensor], grads: list[Tensor]) -> None:
        for step, members in self._by_step(params).items():
            ps = [params[i] for i in members]
            gs = [grads[i] for i in members]
            if self.half_state:
                self._scaled_half(ps, gs, step)
            elif _has_fused(ps, gs):
                self._fused(ps, gs, step)
            else:
                self._foreach(ps, gs, step)

    def update(self, params: list[Tensor], grads: list[Tensor]) -> None:
        """See the base class; `step` is what the trainer calls."""
        self._step(params, grads)

    def _by_step(self, params: list[Tensor]) -> dict[int, list[int]]:
        """Count the update; the indices of the parameters that share a count (usually all)."""
        groups: dict[int, list[int]] = {}
        for i, p in enumerate(params):
            state = self.state.get(p)
            if state is None:
                state = self.state[p] = self._fresh(p)
            state["step"] += 1
            groups.setdefault(state["step"], []).append(i)
        return groups

    def _fresh(self, p: Tensor) -> dict[str, Any]:
        dtype = self.state_dtype(p, "exp_avg")
        state: dict[str, Any] = {
            "step": 0,
            "exp_avg": torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format),
        }
        if self.half_state:
            state["exp_avg_scale"] = state["exp_avg_sq_scale"] = 1.0
        return state

    def state_dtype(self, param: Tensor, key: str) -> torch.dtype:
        """float16 with --fp16-adam-stats."""
        if self.half_state and key in ("exp_avg", "exp_avg_sq"):
            return torch.float16
        return super().state_dtype(param, key)

    def _fused(self, params: list[Tensor], grads: list[Tensor], step: int) -> None:
        b1, b2 = self.hyper["betas"]
        device = params[0].device
        # A fill on the device, not a copy to it, so that the host need not wait.
        count = torch.full((), float(step), dtype=torch.float32, device=device)
        torch._fused_adamw_(
            params,
            grads,
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
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

    def _foreach(self, params: list[Tensor], grads: list[Tensor], step: int) -> None:
        masters = [p if p.dtype in (torch.float32, torch.float64) else p.float() for p in params]
        grads = [g.to(m.dtype) for g, m in zip(grads, masters, strict=True)]
        if self._factor is not None:
            grads = list(torch._foreach_mul(grads, self._factor))
        firsts = [self.state[p]["exp_avg"] for p in params]
        seconds = [self.state[p]["exp_avg_sq"] for p in params]
        self._apply(masters, grads, firsts, seconds, step)
        for p, m in zip(params, masters, strict=True):
            if m is not p:
                p.copy_(m)

    def _scaled_half(self, params: list[Tensor], grads: list[Tensor], step: int) -> None:
        """One parameter at a time, so that only one is ever held in float32 besides."""
        for p, g in zip(params, grads, strict=True):
            state = self.state[p]
            first = state["exp_avg"].float() * state.get("exp_avg_scale", 1.0)
            second = state["exp_avg_sq"].float() * state.get("exp_avg_sq_scale", 1.0)
            master = p if p.dtype == torch.float32 else p.float()
            g = g.float() if self._factor is None else g.float() * self._factor
            self._apply([master], [g], [first], [second], step)
            if master is not p:
                p.copy_(master)
            for key, value in (("exp_avg", first), ("exp_avg_sq", second)):
                # The largest value becomes the largest float16: the widest range there is.
                scale = (value.abs().max() / _HALF_MAX).clamp_min(_HALF_TINY)
                state[key].copy_(value / scale)
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
