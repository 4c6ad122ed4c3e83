"""The layer: a gate, experts, and the sum of what they make of a token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_lite.moe.experts import Experts
from fairseq_lite.moe.options import MoEOptions
from fairseq_lite.moe.router import Router, RouterReport


class MoELayer(nn.Module):
    """A feed-forward block whose weights depend on the token.

    Args:
        dim: D.
        options: of the stack.
        make: makes one expert, (N, D) -> (N, D).
        name: the layer's, as in `decoder.layers.1`.
    """

    def __init__(
        self, dim: int, options: MoEOptions, make: Callable[[], nn.Module], name: str
    ) -> None:
        super().__init__()
        self.gate = Router(dim, options.router)
        self.experts = Experts(
            options.router.num_experts, make, name, sqrt_gradients=options.sqrt_gradients
        )

    def forward(self, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, RouterReport]:
        """Run the layer.

        Args:
            x: (…, D).
            padding: (…), True on padding; None where there is none.

        Returns:
            (…, D), zero for tokens that no expert took, and what the router reports.
        """
        flat = x.reshape(-1, x.size(-1))
        routed = None
        if padding is not None and self.gate.options.mask_padding:
            routed = ~padding.reshape(-1)
        routing = self.gate(flat, routed)
        top_k = routing.experts.size(1)
        experts = routing.experts.flatten()
        if routing.kept is not None:  # those dropped come last
            experts = experts.masked_fill(~routing.kept.flatten(), self.gate.options.num_experts)
        counts = routing.report.load.cpu()
        order = experts.argsort(stable=True)[: int(counts.sum())]
        token = order.div(top_k, rounding_mode="floor")
        rows = self.experts.exchange.run(flat.index_select(0, token), counts, self.experts)
        weighted = rows * routing.weights.flatten().index_select(0, order)[:, None]
        out = torch.zeros(flat.shape, dtype=weighted.dtype, device=flat.device)
        out = out.index_add(0, token, weighted).to(x.dtype).view_as(x)
        report = routing.report
        out, balance, z = _Together.apply(out, report.balance, report.z)  # type: ignore[no-untyped-call]
        return out, report._replace(balance=balance, z=z)


class _Together(torch.autograd.Function):
    """Tensors as they are; their gradients go on only when all of them have come.

    The balance loss would otherwise reach the gate before the layer's output has, and a sharded
    backend fetches a layer's weights when its output's gradient comes.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads
