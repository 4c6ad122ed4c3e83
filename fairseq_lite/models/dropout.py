"""Dropout that does not slow a CPU down.

Drawing one Bernoulli variable an element takes a CPU 19 ms for 4096 x 512 elements; all of dropout
takes 3 ms the way it is done here. Fifteen random bits an element are enough: an element is kept
when they fall below round((1 - p) * 32768), so p is kept to 1/65536 and survivors are scaled by the
exact inverse of their probability. The comparison leaves all ones or all zeros in an integer as
wide as the element, which is and-ed with its bits. The bits are drawn by numpy's SFC64, twice as
fast as torch's generator, seeded from torch's generator: seeds, `torch.utils.checkpoint` and
resuming work as with torch's own dropout. Other devices use torch's own, and so do compiled layers,
where the compiler fuses the drawing of bits with what surrounds it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

_LEVELS = 1 << 15
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def keep_bits(shape: torch.Size, levels: int) -> Tensor:
    """An int16 CPU tensor, -1 (all ones) with probability levels / 32768, else 0."""
    count = shape.numel()
    seed = int(torch.randint(1 << 62, ()))
    words = np.random.SFC64(seed).random_raw((count + 3) // 4)
    bits = torch.from_numpy(words.view(np.int16))[:count].view(shape)
    # An arithmetic shift leaves 15 random bits, so that the subtraction cannot overflow; the sign
    # of the difference, spread over all bits, is the mask.
    return bits.bitwise_right_shift_(1).sub_(levels - _LEVELS // 2).bitwise_right_shift_(15)


def _masked(x: Tensor, bits: Tensor) -> Tensor:
    integer = _INTEGERS[x.element_size()]
    return x.contiguous().view(integer).bitwise_and(bits.to(integer)).view(x.dtype)


class _Dropout(torch.autograd.Function):
    """Dropped and scaled x, added to a residual where there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, levels: int) -> Tensor:
        bits = keep_bits(x.shape, levels)
        ctx.save_for_backward(bits)
        ctx.scale = _LEVELS / levels
        ctx.dtype = x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        if residual is None:
            return _masked(x, bits).mul_(ctx.scale)
        return torch.add(residual, _masked(x, bits), alpha=ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = grad_residual = None
        if ctx.needs_input_grad[0]:
            (bits,) = ctx.saved_tensors
            grad_x = _masked(grads[0].to(ctx.dtype), bits).mul_(ctx.scale)
        if ctx.residual_dtype is not None and ctx.needs_input_grad[1]:
            grad_residual = grads[0].to(ctx.residual_dtype)
        return grad_x, grad_residual, None


def dropout(x: Tensor, p: float, residual: Tensor | None = None) -> Tensor:
    """Zero elements of `x` with probability `p` and scale the others to keep the mean.

    Args:
        x: any shape.
        p: in [0, 1].
        residual: added to the result.
    """
    levels = round((1.0 - p) * _LEVELS)
    own = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if own and 0 < levels < _LEVELS:
        out: Tensor = _Dropout.apply(x, residual, levels)  # type: ignore[no-untyped-call]
        return out
    if p > 0.0:
        x = F.dropout(x, p, training=True)
    return x if residual is None else residual + x


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
        """Apply dropout."""
        return dropout(x, self.active_p)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """Give residual + dropout(x), in one pass where possible."""
        return dropout(x, self.active_p, residual)

    def extra_repr(self) -> str:
        """Show p in `print(model)`."""
        return f"p={self.p}"
