"""What the engines of `--ddp-backend fully_sharded` have in common: norm and checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_lite.parallel.api import Backend, Part, StatefulOptimizer
from fairseq_lite.parallel.local import norm_of
from fairseq_lite.parallel.shards import exchange, parted
from fairseq_lite.parallel.shards.spans import Holding
from fairseq_lite.parallel.world import World


class Engine(Backend):
    """A backend under which each rank holds a part of the parameters and of their gradients."""

    def __init__(self, cfg: Any, world: World, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(cfg, world, dtype=dtype)
        self.writes_shards = bool(cfg.use_sharded_state)

    @abstractmethod
    def holding(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        average: Mapping[str, Tensor] | None,
    ) -> Holding:
        """What this rank holds of a model in training, by name."""

    def grad_norm(self, model: nn.Module) -> Tensor:
        grads = (p.grad for p in model.parameters() if p.grad is not None)
        # In float64, where the square of a float32 does not overflow.
        square = norm_of(grads, self.world.device).double().square()
        return self.world.all_reduce(square).sqrt().float()

    def save_parts(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        average: Mapping[str, Tensor] | None = None,
    ) -> Mapping[str, Part]:
        holds, spread = self.holding(model, optimizer, average), self.spread(model)
        if self.writes_shards:
            return exchange.shard(self.world, holds, spread)
        if spread is not None:
            return parted.expert_parts(self.world, holds, spread)
        return exchange.gather(self.world, holds)

    def crash_parts(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        average: Mapping[str, Tensor] | None = None,
    ) -> Mapping[str, Part]:
        holds = self.holding(model, optimizer, average)
        return exchange.shard(self.world, holds, self.spread(model))
