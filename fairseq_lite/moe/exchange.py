"""Tokens travel to the ranks that own their experts, and what the experts make of them comes back.

In training all ranks of an exchange group run the same layers at the same time, and a layer is one
exchange there and one back. In generation they do not: see `FreeRunning`.

Axes: N rows (a token for each expert that it goes to), D width, E experts, P ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fairseq_lite.parallel.experts import ExpertLayout
from fairseq_lite.parallel.groups import Group

Compute = Callable[[Tensor, list[int]], Tensor]
"""Rows (N, D), sorted by expert, and the number of rows of each local expert -> rows (N, D)."""


class _AllToAll(torch.autograd.Function):
    """`Group.all_to_all`; gradients travel the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, group: Group, send: list[int], receive: list[int]
    ) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return group.all_to_all(rows, send, receive)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        back = ctx.group.all_to_all(grads[0].contiguous(), ctx.receive, ctx.send)
        return back, None, None, None


class Exchange:
    """The way from a rank's tokens to the experts of all ranks of its group, and back.

    Args:
        layout: where the experts are.
        group: this rank's exchange group.
    """

    def __init__(self, layout: ExpertLayout, group: Group) -> None:
        self.layout = layout
        self.group = group
        self.owned = layout.owned(group.place)

    def run(self, rows: Tensor, counts: Tensor, compute: Compute) -> Tensor:
        """Have every row computed by its expert, wherever that is.

        Args:
            rows: (N, D), sorted by expert.
            counts: (E,) int64 on the CPU: how many rows go to each expert.
            compute: runs this rank's own experts.

        Returns:
            (N, D) in the order of `rows`.
        """
        if self.group.size == 1:
            return compute(rows, counts.tolist())
        return self._in_step(rows, counts, compute)

    def _in_step(self, rows: Tensor, counts: Tensor, compute: Compute) -> Tensor:
        arriving = self._arriving(counts, rows.device)  # (P, local)
        sizes = self.layout.counts()
        send = [int(part.sum()) for part in counts.split(sizes)]
        receive = arriving.sum(dim=1).tolist()
        here = _all_to_all(rows, self.group, send, receive)
        order = _by_expert(arriving).to(here.device)
        done = compute(here.index_select(0, order), arriving.sum(dim=0).tolist())
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return _all_to_all(done.index_select(0, back), self.group, receive, send)

    def _arriving(self, counts: Tensor, device: torch.device) -> Tensor:
        """How many rows each rank sends to each expert here: (P, local) on the CPU."""
        sizes = self.layout.counts()
        most = max(sizes)
        table = torch.zeros(self.group.size, most, dtype=torch.int64)
        for row, part in zip(table, counts.split(sizes), strict=True):
            row[: len(part)] = part
        told = self.group.all_to_all_equal(table.to(device)).cpu()
        return told[:, : len(self.owned)]


def _all_to_all(rows: Tensor, group: Group, send: list[int], receive: list[int]) -> Tensor:
    out: Tensor = _AllToAll.apply(rows, group, send, receive)  # type: ignore[no-untyped-call]
    return out


def _by_expert(counts: Tensor) -> Tensor:
    """The order that turns rows by rank and expert into rows by expert and rank.

    Args:
        counts: (P, local), rows of each rank for each expert.
    """
    places, local = counts.shape
    flat = counts.flatten()
    starts = (flat.cumsum(0) - flat).view(places, local)
    pieces = [
        torch.arange(start, start + n)
        for start, n in zip(
            starts.t().flatten().tolist(), counts.t().flatten().tolist(), strict=True
        )
    ]
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
