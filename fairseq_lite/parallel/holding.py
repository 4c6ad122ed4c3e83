"""What backends share under which a rank holds a part of a model: the norm, and checkpoints."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from fairseq_lite.parallel.api import Backend, Part, StatefulOptimizer
from fairseq_lite.parallel.local import norm_of
from fairseq_lite.parallel.shards import exchange, parted
from fairseq_lite.parallel.shards.spans import Holding


class HoldsParts(Backend):
    """A backend that says what a rank holds; how it is written and measured follows from that."""

    @abstractmethod
    def holding(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        average: Mapping[str, Tensor] | None,
    ) -> Holding:
        """What this rank holds of a model in training, by name."""

    def gradients(self, model: nn.Module) -> Iterable[Tensor]:
        """This rank's gradients: over all ranks, each number of each parameter once."""
        return (p.grad for p in model.parameters() if p.grad is not None)

    def grad_norm(self, model: nn.Module) -> Tensor:
        # In float64, where the square of a float32 does not overflow.
        square = norm_of(self.gradients(model), self.world.device).double().square()
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
