"""LAMB: Adam whose step is scaled, parameter by parameter, to the size of the parameter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq_lite.config.flags import flag
from fairseq_lite.optim.api import OPTIMIZERS, Optimizer, check_betas

_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class LambConfig:
    """LAMB."""

    lamb_betas: tuple[float, ...] = flag((0.9, 0.999), "decay of the two running means")
    lamb_eps: float = flag(1e-8, "added to the denominator")
    weight_decay: float = flag(0.0, "weight decay", aliases=("--wd",))

    def __post_init__(self) -> None:
        check_betas("--lamb-betas", self.lamb_betas)


@OPTIMIZERS.register("lamb", config=LambConfig)
class Lamb(Optimizer):
    """LAMB (You et al., 2020), with the choices of apex's FusedLAMB, which fairseq runs.

    Formula::

        g = g / max(1, |all gradients|)
        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g²
        u = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd p
        p = p - lr |p| / |u| u          (the ratio is 1 where a norm is 0, or wd is 0)

    The first line is apex's own clipping, on top of --clip-norm; it sees the gradients of this
    process, so it is for backends in which each process has them all.
    """

    fairseq_name = "FairseqLAMB"
    elementwise = False

    def __init__(self, params: Iterable[Tensor], cfg: LambConfig, *, lr: float) -> None:
        b1, b2 = cfg.lamb_betas
        super().__init__(
            params,
            lr=lr,
            bias_correction=True,
            betas=(b1, b2),
            eps=cfg.lamb_eps,
            weight_decay=cfg.weight_decay,
            grad_averaging=True,
            max_grad_norm=_MAX_GRAD_NORM,
            step=0,  # apex counts updates in the group
        )

    def fresh(self, param: Tensor) -> dict[str, Any]:
        """See the base class."""
        dtype = self.state_dtype(param, "exp_avg")
        return {
            "exp_avg": torch.zeros_like(param, dtype=dtype),
            "exp_avg_sq": torch.zeros_like(param, dtype=dtype),
        }

    def update(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]]
    ) -> None:
        """See the class docstring."""
        self.hyper["step"] += 1
        b1, b2 = self.hyper["betas"]
        decay, t = self.hyper["weight_decay"], self.hyper["step"]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]

        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_div_(grads, (norm / self.hyper["max_grad_norm"]).clamp(min=1.0))
        torch._foreach_lerp_(means, grads, 1 - b1)
        torch._foreach_mul_(squares, b2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - b2)

        denominators = torch._foreach_div(squares, 1 - b2**t)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, self.hyper["eps"])
        updates = torch._foreach_div(means, 1 - b1**t)
        torch._foreach_div_(updates, denominators)
        if decay != 0:
            torch._foreach_add_(updates, params, alpha=decay)
            for u, p in zip(updates, params, strict=True):
                size, length = p.norm(), u.norm()
                ratio = torch.where((size > 0) & (length > 0), size / length, 1.0)
                u.mul_(ratio)
        torch._foreach_add_(params, updates, alpha=-self.get_lr())
