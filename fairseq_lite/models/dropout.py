"""Dropout that does not slow a CPU down.

Drawing one Bernoulli variable an element takes 17 % of a bf16 training step on a CPU. Sixteen random
bits an element are enough: an element is dropped when they fall below round(p * 65536), so p is kept to
1/65536 and the survivors are scaled by the exact keep probability. The bits depend on torch's default
generator alone, so seeds, `torch.utils.checkpoint` and resuming work as with torch's own dropout. Other
devices use torch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEVELS = 1 << 16


def keep_mask(shape: torch.Size, threshold: int) -> Tensor:
    """A boolean CPU tensor, False with probability threshold / 65536."""
    count = shape.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[:count]
    return (bits >= threshold - _LEVELS // 2).view(shape)


class _MaskedScale(torch.autograd.Function):
    """x * mask * scale, keeping one byte an element for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return (x * mask).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return (grads[0] * mask).mul_(ctx.scale), None, None


def dropout(x: Tensor, p: float) -> Tensor:
    """Zero elements of `x` with probability `p` and scale the others to keep the mean.

    Args:
        x: any shape.
        p: in [0, 1].
    """
    if p <= 0.0:
        return x
    threshold = round(p * _LEVELS)
    if x.device.type != "cpu" or not 0 < threshold < _LEVELS:
        return F.dropout(x, p, training=True)
    mask = keep_mask(x.shape, threshold)
    return torch.Tensor(_MaskedScale.apply(x, mask, _LEVELS / (_LEVELS - threshold)))


class Dropout(nn.Module):
    """Dropout that knows whose it is.

    Args:
        p: the probability of dropping an element.
        owner: the class name `--retain-dropout-modules` selects it by.
    """

    def __init__(self, p: float, owner: str) -> None:
        super().__init__()
        self.p = p
        self.owner = owner
        self.apply_during_inference = False

    @property
    def active_p(self) -> float:
        """The probability that applies now; 0 in evaluation."""
        return self.p if self.training or self.apply_during_inference else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.active_p)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + dropout(x)."""
        return residual + dropout(x, self.active_p)

    def extra_repr(self) -> str:
        return f"p={self.p}"
