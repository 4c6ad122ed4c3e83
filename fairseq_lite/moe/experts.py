"""The experts of a layer that this rank owns, each a feed-forward network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fairseq_lite.moe.exchange import Exchange
from fairseq_lite.parallel.experts import ExpertShard, drawn_for, mark, site


class Experts(nn.Module):
    """All experts of a layer, of which this rank holds its own.

    The children are named by the experts' numbers among all, so a name means the same on every rank
    and at every world size.

    Args:
        num_experts: E.
        make: makes one expert, (N, D) -> (N, D).
        name: the layer's, which the experts' first weights depend on.
        sqrt_gradients: see `MoEOptions`.
        group_size: of an exchange group; None: as large as it can be.
    """

    def __init__(
        self,
        num_experts: int,
        make: Callable[[], nn.Module],
        name: str,
        *,
        sqrt_gradients: bool = False,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        world, layout = site(num_experts, group_size)
        self.layout = layout
        self.exchange = Exchange(layout, world.split(layout.exchange_groups()))
        factor = layout.group_size**0.5 if sqrt_gradients else 1.0
        for expert in self.exchange.owned:
            with drawn_for(name, expert):
                module = make()
            mark(module, ExpertShard(expert, layout, factor))
            self.add_module(str(expert), module)

    def forward(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Run this rank's experts.

        A sharded backend has their weights whole in here and nowhere else: callers call the module,
        and nobody outside looks at weights.

        Args:
            rows: (N, D), sorted by expert.
            counts: rows of each.

        Returns:
            (N, D).
        """
        # An expert without a row computes none, too: its gradient is then zero on every rank.
        parts = [
            expert(part) for expert, part in zip(self.children(), rows.split(counts), strict=True)
        ]
        return torch.cat(parts)
