"""Some ranks of a world that exchange data among themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

ReduceOp = Literal["sum", "max", "min"]
REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class Group:
    """Ranks that exchange data; a group of one exchanges nothing and needs no torch group.

    Every method must be called by all of the group's ranks, in the same order.

    Attributes:
        ranks: their numbers in the world.
        place: this process among them.
        handle: torch's group; None for a group of one.
    """

    def __init__(
        self, ranks: Sequence[int], rank: int, handle: dist.ProcessGroup | None = None
    ) -> None:
        self.ranks = tuple(ranks)
        self.place = self.ranks.index(rank)
        self.handle = handle

    @property
    def size(self) -> int:
        """How many ranks there are."""
        return len(self.ranks)

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> Tensor:
        """Combine `tensor` over the group, in place, and return it."""
        if self.size > 1:
            dist.all_reduce(tensor, REDUCE_OPS[op], group=self.handle)
        return tensor

    def all_reduce_start(self, tensor: Tensor) -> Callable[[], object]:
        """Begin to sum `tensor` in place; call what is returned to wait for the end."""
        if self.size == 1:
            return _nothing
        wait: Callable[[], object] = dist.all_reduce(tensor, group=self.handle, async_op=True).wait
        return wait

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite `tensor` with that of the first of the group's ranks, and return it."""
        if self.size > 1:
            dist.broadcast(tensor, self.ranks[0], group=self.handle)
        return tensor

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send rows to each rank and get those that each sends here.

        Args:
            rows: (sum(send), …), first those for the first rank of the group.
            send: how many go to each.
            receive: how many come from each.

        Returns:
            (sum(receive), …), first those of the first rank.
        """
        if self.size == 1:
            return rows
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), list(receive), list(send), group=self.handle)
        return out

    def all_to_all_equal(self, tensor: Tensor) -> Tensor:
        """The same with as many rows for each: row block i of the result is what rank i sent."""
        if self.size == 1:
            return tensor
        out = torch.empty_like(tensor)
        dist.all_to_all_single(out, tensor.contiguous(), group=self.handle)
        return out


def _nothing() -> None:
    pass
