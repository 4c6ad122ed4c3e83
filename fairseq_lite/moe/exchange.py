"""Tokens travel to the ranks that own their experts, and what the experts make of them comes back.

In training all ranks of an exchange group run the same layers at the same time, and a layer is one
exchange there and one back. In generation they do not: see `parallel/free.py`.

Axes: N rows (a token for each expert that it goes to), D width, E experts, P ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_lite.moe.products import Counts
from fairseq_lite.moe.rows import permute
from fairseq_lite.parallel.experts import ExpertLayout
from fairseq_lite.parallel.free import Rounds
from fairseq_lite.parallel.groups import Group

Compute = Callable[[Tensor, Counts], Tensor]
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
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        back = ctx.group.all_to_all(grads[0].contiguous(), ctx.receive, ctx.send)
        return back, None, None, None


class Exchange:
    """The way from a rank's tokens to the experts of all ranks of its group, and back.

    Args:
        layout: where the experts are.
        group: this rank's exchange group.

    Attributes:
        owned: this rank's experts.
        rounds: where ranks run freely, who is asked instead of exchanging in step; else None.
    """

    def __init__(self, layout: ExpertLayout, group: Group) -> None:
        self.layout = layout
        self.group = group
        self.owned = layout.owned(group.place)
        self.rounds: Rounds | None = None
        # Counts travel as a table with a row for each rank, as wide as the one with most experts.
        sizes = layout.counts()
        self._width = max(sizes)
        self._slots = [p * self._width + i for p, size in enumerate(sizes) for i in range(size)]
        # Made at the first pass: a model may be built without memory, and tensors have no content.
        self._slots_there: Tensor | None = None

    def run(self, rows: Tensor, counts: Tensor, compute: Compute) -> Tensor:
        """Have every row computed by its expert, wherever that is.

        Args:
            rows: (N, D), sorted by expert.
            counts: (E,) int64, on any device: how many rows go to each expert.
            compute: runs this rank's own experts.

        Returns:
            (N, D) in the order of `rows`.
        """
        if self.group.size == 1:
            return compute(rows, counts)
        if self.rounds is not None:
            return self.rounds.ask(self, rows, counts.cpu())
        return self._in_step(rows, counts, compute)

    def _in_step(self, rows: Tensor, counts: Tensor, compute: Compute) -> Tensor:
        going, coming = self._tell(counts.to(rows.device))
        send, receive = going.sum(dim=1).tolist(), coming.sum(dim=1).tolist()
        here = _all_to_all(rows, self.group, send, receive)
        numbers = coming.sum(dim=0).tolist()
        if len(numbers) == 1:  # the rows of all ranks are for the one expert
            return _all_to_all(compute(here, numbers), self.group, receive, send)
        order = _by_expert(coming).to(here.device)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.size(0), device=order.device)
        done = compute(permute(here, order, back), numbers)
        return _all_to_all(permute(done, back, order), self.group, receive, send)

    def _tell(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """How many rows go from here to each expert, and come here.

        Args:
            counts: (E,) on the device of the group.

        Returns:
            On the CPU: (P, most experts of a rank), rows for each expert of each rank, and
            (P, experts here), rows from each rank for each expert.
        """
        if self._slots_there is None or self._slots_there.device != counts.device:
            self._slots_there = torch.tensor(self._slots, device=counts.device)
        table = counts.new_zeros(self.group.size * self._width)
        table[self._slots_there] = counts
        table = table.view(self.group.size, self._width)
        told = self.group.all_to_all_equal(table)
        going, coming = torch.stack([table, told]).cpu()  # the one time that the host waits
        return going, coming[:, : len(self.owned)]


def _all_to_all(rows: Tensor, group: Group, send: list[int], receive: list[int]) -> Tensor:
    out: Tensor = _AllToAll.apply(rows, group, send, receive)  # type: ignore[no-untyped-call]
    return out


def _by_expert(counts: Tensor) -> Tensor:
    """The order that turns rows by rank and expert into rows by expert and rank.

    Args:
        counts: (P, local), rows of each rank for each expert.

    Returns:
        (N,), of each row by expert and rank, where it stood.
    """
    stood = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).t().flatten()
    sizes = counts.t().flatten()
    stands = sizes.cumsum(0) - sizes
    moved = (stood - stands).repeat_interleave(sizes)
    return torch.arange(moved.size(0)) + moved
