"""The layer: a gate, experts, and the sum of what they make of a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_lite.moe.experts import Experts
from fairseq_lite.moe.options import MoEOptions
from fairseq_lite.moe.products import compute_dtype
from fairseq_lite.moe.router import Router, RouterReport
from fairseq_lite.moe.rows import Places, combine, dispatch


class MoELayer(nn.Module):
    """A feed-forward block whose weights depend on the token.

    Args:
        dim: D.
        options: of the stack.
        make: makes one expert, (N, D) -> (N, D).
        name: the layer's, as in `decoder.layers.1`.
        gate: with rules of its own; None: a `Router` of `options.router`.
        group_size: see `Experts`.
    """

    def __init__(
        self,
        dim: int,
        options: MoEOptions,
        make: Callable[[], nn.Module],
        name: str,
        *,
        gate: Router | None = None,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        self.gate = Router(dim, options.router) if gate is None else gate
        self.experts = Experts(
            options.router.num_experts,
            make,
            name,
            sqrt_gradients=options.sqrt_gradients,
            group_size=group_size,
        )

    def forward(self, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, RouterReport]:
        """Run the layer.

        Args:
            x: (…, D).
            padding: (…), True on padding; None where there is none.

        Returns:
            (…, D) of the type that is computed in, zero for tokens that no expert took, and what
            the router reports.
        """
        flat = x.reshape(-1, x.size(-1))
        routing = self.gate(flat, self.routed(padding))
        places = Places.of(routing.order, *routing.experts.shape)
        rows = dispatch(flat.to(compute_dtype(flat)), places)
        rows = self.experts.exchange.run(rows, routing.report.load, self.experts)
        out = combine(rows, routing.weights, places).view_as(x)
        report = routing.report
        out, balance, z = together(out, report.balance, report.z)
        return out, report._replace(balance=balance, z=z)

    def routed(self, padding: Tensor | None) -> Tensor | None:
        """(S,) which tokens go to experts; None: all.

        In evaluation padding never does: that moves no result, and reports are of real tokens.

        Args:
            padding: (…), True on padding; None where there is none.
        """
        if padding is None or (self.training and not self.gate.options.mask_padding):
            return None
        return ~padding.reshape(-1)


def together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as they are; their gradients go on only when all of them have come.

    The balance loss would otherwise reach the gate before the layer's output has, and a sharded
    backend fetches a layer's weights when its output's gradient comes.
    """
    out: tuple[Tensor, ...] = _Together.apply(*tensors)  # type: ignore[no-untyped-call]
    return out


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a loss that nobody uses costs nothing
        # No views: torch's sharding warns of those, as what is done to them in place escapes it.
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return grads
