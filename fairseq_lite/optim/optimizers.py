"""Every optimizer's registration, and those that are a few lines each.

Names, flags and defaults are fairseq's. Weight decay is decoupled (p = p - lr wd p) in nag, adamax
and adafactor, and added to the gradient in sgd, adagrad and adadelta, as there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairseq_lite.config.flags import flag
from fairseq_lite.errors import ConfigError
from fairseq_lite.optim.adafactor import Adafactor
from fairseq_lite.optim.adam import Adam, AdamConfig
from fairseq_lite.optim.api import OPTIMIZERS, Optimizer, check_betas
from fairseq_lite.optim.lamb import Lamb
from fairseq_lite.parallel.local import local

__all__ = ["SGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "Adamax", "CPUAdam", "Lamb", "Nag"]

logger = logging.getLogger(__name__)

States = list[dict[str, Any]]


def _decay_flag() -> Any:
    return flag(0.0, "weight decay", aliases=("--wd",))


@dataclass(frozen=True)
class SGDConfig:
    """Stochastic gradient descent."""

    momentum: float = flag(0.0, "momentum")
    weight_decay: float = _decay_flag()


@OPTIMIZERS.register("sgd", config=SGDConfig)
class SGD(Optimizer):
    """Gradient descent with momentum.

    Formula::

        g = g + wd p
        buf = momentum buf + g        (g itself at the first update)
        p = p - lr buf
    """

    fairseq_name = "SGD"

    def __init__(self, params: Iterable[Tensor], cfg: SGDConfig, *, lr: float) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=cfg.momentum,
            dampening=0,
            weight_decay=cfg.weight_decay,
            nesterov=False,
        )

    def update(self, params: list[Tensor], grads: list[Tensor], states: States) -> None:
        """See the class docstring."""
        momentum = self.hyper["momentum"]
        _add_decay(params, grads, self.hyper["weight_decay"])
        if momentum != 0:
            for g, state in zip(grads, states, strict=True):
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = g.clone()
                else:
                    state["momentum_buffer"].mul_(momentum).add_(g)
            grads = [state["momentum_buffer"] for state in states]
        torch._foreach_add_(params, grads, alpha=-self.get_lr())


@dataclass(frozen=True)
class NagConfig:
    """Nesterov's accelerated gradient."""

    momentum: float = flag(0.99, "momentum")
    weight_decay: float = _decay_flag()


@OPTIMIZERS.register("nag", config=NagConfig)
class Nag(Optimizer):
    """Nesterov's accelerated gradient, whose momentum follows the learning rate.

    Formula, with c = lr / (the learning rate of the update before)::

        p = p - lr wd p + momentum² c buf - (1 + momentum) lr g
        buf = momentum c buf - lr g
    """

    fairseq_name = "FairseqNAG"

    def __init__(self, params: Iterable[Tensor], cfg: NagConfig, *, lr: float) -> None:
        super().__init__(
            params, lr=lr, lr_old=lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay
        )

    def fresh(self, param: Tensor) -> dict[str, Any]:
        """See the base class."""
        return {"momentum_buffer": _zeros(self, param, "momentum_buffer")}

    def update(self, params: list[Tensor], grads: list[Tensor], states: States) -> None:
        """See the class docstring."""
        lr, old, momentum = self.get_lr(), self.hyper["lr_old"], self.hyper["momentum"]
        # After an update at rate 0, the first of a warm-up, the buffer is 0 and c does not matter.
        correct = lr / old if old > 0 else 1.0
        buffers = [state["momentum_buffer"] for state in states]
        _decouple_decay(params, lr * self.hyper["weight_decay"])
        torch._foreach_add_(params, buffers, alpha=momentum * momentum * correct)
        torch._foreach_add_(params, grads, alpha=-(1 + momentum) * lr)
        torch._foreach_mul_(buffers, momentum * correct)
        torch._foreach_add_(buffers, grads, alpha=-lr)
        self.hyper["lr_old"] = lr


@dataclass(frozen=True)
class AdagradConfig:
    """Adagrad."""

    weight_decay: float = _decay_flag()


@OPTIMIZERS.register("adagrad", config=AdagradConfig)
class Adagrad(Optimizer):
    """Adagrad (Duchi et al., 2011).

    Formula::

        g = g + wd p
        sum = sum + g²
        p = p - lr g / (sqrt(sum) + 1e-10)
    """

    fairseq_name = "Adagrad"

    def __init__(self, params: Iterable[Tensor], cfg: AdagradConfig, *, lr: float) -> None:
        super().__init__(
            params,
            lr=lr,
            lr_decay=0,
            eps=1e-10,
            weight_decay=cfg.weight_decay,
            initial_accumulator_value=0,
        )

    def fresh(self, param: Tensor) -> dict[str, Any]:
        """See the base class."""
        return {"step": 0, "sum": _zeros(self, param, "sum")}

    def update(self, params: list[Tensor], grads: list[Tensor], states: States) -> None:
        """See the class docstring."""
        _count(states)
        _add_decay(params, grads, self.hyper["weight_decay"])
        sums = [state["sum"] for state in states]
        torch._foreach_addcmul_(sums, grads, grads, value=1)
        roots = torch._foreach_sqrt(sums)
        torch._foreach_add_(roots, self.hyper["eps"])
        torch._foreach_addcdiv_(params, grads, roots, value=-self.get_lr())


@dataclass(frozen=True)
class AdadeltaConfig:
    """Adadelta."""

    adadelta_rho: float = flag(0.9, "decay of the running means")
    adadelta_eps: float = flag(1e-6, "added under the roots")
    weight_decay: float = _decay_flag()
    anneal_eps: bool = flag(False, "accepted with a warning: it has no effect in fairseq either")


@OPTIMIZERS.register("adadelta", config=AdadeltaConfig)
class Adadelta(Optimizer):
    """Adadelta (Zeiler, 2012).

    Formula::

        g = g + wd p
        v = rho v + (1 - rho) g²
        d = sqrt(a + eps) / sqrt(v + eps) g
        a = rho a + (1 - rho) d²
        p = p - lr d
    """

    fairseq_name = "Adadelta"

    def __init__(self, params: Iterable[Tensor], cfg: AdadeltaConfig, *, lr: float) -> None:
        if cfg.anneal_eps:
            logger.warning("--anneal-eps has no effect, as in fairseq")
        super().__init__(
            params,
            lr=lr,
            rho=cfg.adadelta_rho,
            eps=cfg.adadelta_eps,
            weight_decay=cfg.weight_decay,
        )

    def fresh(self, param: Tensor) -> dict[str, Any]:
        """See the base class."""
        return {
            "step": 0,
            "square_avg": _zeros(self, param, "square_avg"),
            "acc_delta": _zeros(self, param, "acc_delta"),
        }

    def update(self, params: list[Tensor], grads: list[Tensor], states: States) -> None:
        """See the class docstring."""
        _count(states)
        rho, eps = self.hyper["rho"], self.hyper["eps"]
        _add_decay(params, grads, self.hyper["weight_decay"])
        squares = [state["square_avg"] for state in states]
        deltas = [state["acc_delta"] for state in states]
        torch._foreach_mul_(squares, rho)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - rho)
        steps = torch._foreach_add(deltas, eps)
        torch._foreach_div_(steps, torch._foreach_add(squares, eps))
        torch._foreach_sqrt_(steps)
        torch._foreach_mul_(steps, grads)
        torch._foreach_mul_(deltas, rho)
        torch._foreach_addcmul_(deltas, steps, steps, value=1 - rho)
        torch._foreach_add_(params, steps, alpha=-self.get_lr())


@dataclass(frozen=True)
class AdamaxConfig:
    """Adamax with decoupled weight decay."""

    adamax_betas: tuple[float, ...] = flag((0.9, 0.999), "decay of the running mean and maximum")
    adamax_eps: float = flag(1e-8, "added to the denominator")
    weight_decay: float = _decay_flag()
    no_bias_correction: bool = flag(False, "do not enlarge the first steps")

    def __post_init__(self) -> None:
        check_betas("--adamax-betas", self.adamax_betas)


@OPTIMIZERS.register("adamax", config=AdamaxConfig)
class Adamax(Optimizer):
    """Adamax (Kingma and Ba, 2015), with decoupled weight decay.

    Formula::

        m = b1 m + (1 - b1) g
        u = max(b2 u, |g|)
        p = p - lr wd p
        p = p - lr / (1 - b1^t) m / (u + eps)
    """

    fairseq_name = "FairseqAdamax"

    def __init__(self, params: Iterable[Tensor], cfg: AdamaxConfig, *, lr: float) -> None:
        b1, b2 = cfg.adamax_betas
        super().__init__(
            params,
            lr=lr,
            betas=(b1, b2),
            eps=cfg.adamax_eps,
            weight_decay=cfg.weight_decay,
            bias_correction=not cfg.no_bias_correction,
        )

    def fresh(self, param: Tensor) -> dict[str, Any]:
        """See the base class."""
        return {
            "step": 0,
            "exp_avg": _zeros(self, param, "exp_avg"),
            "exp_inf": _zeros(self, param, "exp_inf"),
        }

    def update(self, params: list[Tensor], grads: list[Tensor], states: States) -> None:
        """See the class docstring."""
        _count(states)
        b1, b2 = self.hyper["betas"]
        lr = self.get_lr()
        means = [state["exp_avg"] for state in states]
        peaks = [state["exp_inf"] for state in states]
        torch._foreach_lerp_(means, grads, 1 - b1)
        torch._foreach_mul_(peaks, b2)
        torch._foreach_maximum_(peaks, torch._foreach_abs(grads))
        _decouple_decay(params, lr * self.hyper["weight_decay"])
        denominators = torch._foreach_add(peaks, self.hyper["eps"])
        corrected = self.hyper["bias_correction"]
        sizes = [-lr / (1 - b1 ** s["step"]) if corrected else -lr for s in states]
        torch._foreach_addcdiv_(params, means, denominators, scalars=sizes)


@OPTIMIZERS.register("cpu_adam", config=AdamConfig)
class CPUAdam(Adam):
    """Adam over parameters in host memory (`--cpu-offload`), as any: torch's kernel is fused there.

    Raises:
        ConfigError: the parameters are on a GPU.
    """

    fairseq_name = "FairseqCPUAdam"

    def __init__(self, params: Iterable[Tensor], cfg: AdamConfig, *, lr: float) -> None:
        super().__init__(params, cfg, lr=lr)
        if any(local(p).device.type != "cpu" for p in self.params):
            raise ConfigError(
                "--optimizer cpu_adam updates parameters in host memory: add --ddp-backend "
                "fully_sharded --cpu-offload, or use --optimizer adam"
            )


@OPTIMIZERS.register("composite")
def composite(*_: object, **__: object) -> Optimizer:
    """Several optimizers for groups of parameters, which is not here.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "--optimizer composite: fairseq-lite has one optimizer a run: choose adam or another"
    )


def _zeros(optimizer: Optimizer, param: Tensor, key: str) -> Tensor:
    return torch.zeros_like(param, dtype=optimizer.state_dtype(param, key))


def _count(states: States) -> None:
    for state in states:
        state["step"] += 1


def _add_decay(params: list[Tensor], grads: list[Tensor], decay: float) -> None:
    """Weight decay as a term of the loss (L2)."""
    if decay != 0:
        torch._foreach_add_(grads, params, alpha=decay)


def _decouple_decay(params: list[Tensor], share: float) -> None:
    """Weight decay beside the gradient step."""
    if share != 0:
        torch._foreach_mul_(params, 1 - share)
