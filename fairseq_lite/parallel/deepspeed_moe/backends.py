"""The backends behind `--ddp-backend deepspeed_moe`: ZeRO 0, and ZeRO 1 and 2.

At every stage each rank has the whole model, but for experts that others own, and DeepSpeed forms
its groups: an expert group of the ranks that exchange tokens, which they do as with `legacy_ddp`,
and an expert-data group of those that own the same experts, over which ZeRO works. Stage 0 reduces
gradients and steps as `legacy_ddp` does. At stage 1 a rank holds its piece of the
optimizer's state, at stage 2 of gradients too: what batches of one update have in common is then
one piece, and whole gradients live for one batch.

Parameters stay float32 in every precision, and autocast computes in 16 bits, so DeepSpeed's own
precisions are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from fairseq_lite.parallel.api import M, OptimizerT, PartReader, StatefulOptimizer
from fairseq_lite.parallel.deepspeed_moe import comm
from fairseq_lite.parallel.deepspeed_moe.partition import Partition
from fairseq_lite.parallel.deepspeed_moe.settings import ZeroSettings
from fairseq_lite.parallel.experts import ExpertLayout, expert_parameters
from fairseq_lite.parallel.holding import HoldsParts
from fairseq_lite.parallel.legacy_ddp import LegacyDDP
from fairseq_lite.parallel.shards import exchange, held
from fairseq_lite.parallel.shards.fitting import fitting_of
from fairseq_lite.parallel.shards.spans import (
    Holding,
    NamedState,
    Span,
    parameter_names,
    whole_span,
)
from fairseq_lite.parallel.world import World


class Replicated(LegacyDDP):
    """ZeRO 0: DeepSpeed's groups, and whole gradients and optimizer state on every rank.

    Nothing here asks the groups for more than their ranks. They are for DeepSpeed's own code in a
    plugin or around a model, at every stage alike: its layer of experts looks for the group of its
    name and forms one if there is none, and its gradient norm and ZeRO find the groups of an
    expert's parameter by the name that it bears.
    """

    cfg: ZeroSettings

    def __init__(
        self, cfg: ZeroSettings, world: World, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(cfg, world, dtype=dtype)

    def wrap(self, build: Callable[[], M]) -> M:
        self.world.form_group()
        comm.ensure_comm(self.world.device)
        model = super().wrap(build)
        self._expert_groups(model)
        return model

    def _expert_groups(self, model: nn.Module) -> dict[nn.Parameter, tuple[str, float]]:
        """DeepSpeed's groups of each expert parameter, and the factor of its gradients.

        DeepSpeed knows such parameters by two attributes, which they get here.
        """
        names: dict[ExpertLayout, str] = {}
        found = {}
        for param, shard in expert_parameters(model):
            if shard.layout not in names:
                names[shard.layout] = comm.form_groups(shard.layout)
            param.allreduce = False  # type: ignore[attr-defined]
            param.group_name = names[shard.layout]  # type: ignore[attr-defined]
            found[param] = names[shard.layout], shard.gradient_factor
        return found


class ZeroSharded(HoldsParts, Replicated):
    """ZeRO 1 and 2: each rank updates a piece of all parameters, and fetches the others' pieces.

    Gradients are reduced when a backward pass is over, at stage 1 once an update: in the middle of
    it, ranks that use different parameters would wait for each other. After `reduce_gradients` they
    are on the optimizer's parts, none on the parameters.
    """

    def __init__(
        self, cfg: ZeroSettings, world: World, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(cfg, world, dtype=dtype)
        self._last = True
        self._optimized: list[str] = []

    # -- building -------------------------------------------------------------------------------

    def wrap(self, build: Callable[[], M]) -> M:
        model = super().wrap(build)
        self.partition = Partition(model, self.world, self.cfg, self._expert_groups(model))
        return model

    def adapt_optimizer(self, model: nn.Module, optimizer: OptimizerT) -> OptimizerT:
        self._optimized = parameter_names(model, optimizer)
        fragments = self.partition.fragments
        params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        # What is not the model's, a criterion's parameter in a run of one process, stays whole.
        parts = [
            fragments[name].tensor if name in fragments else param
            for name, param in zip(self._optimized, params, strict=True)
        ]
        optimizer.update_parts(parts, self.partition.gather)
        return optimizer

    # -- a step ---------------------------------------------------------------------------------

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        self._last = last
        return nullcontext()

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        torch.autograd.backward(loss)
        if self.cfg.stage == 2:
            self.partition.reduce(last=self._last)

    def reduce_gradients(self, model: nn.Module) -> None:
        if self.cfg.stage == 1:
            self.partition.reduce(last=True)

    def gradients(self, model: nn.Module) -> Iterable[Tensor]:
        # Every number of every parameter lies in one piece, an expert's in one of its owners'.
        parts = (fragment.tensor for fragment in self.partition.fragments.values())
        return (part.grad for part in parts if part.grad is not None)

    # -- checkpoints ----------------------------------------------------------------------------

    def load_parts(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        parts: PartReader,
        average: Mapping[str, Tensor] | None = None,
    ) -> None:
        into = self.holding(model, None, average)
        names = None if optimizer is None else self._optimized
        state = exchange.fill(self.world, into, parts, fitting_of(model), names, self.spread(model))
        self.partition.gather()
        if optimizer is not None and state is not None:
            optimizer.load_state_dict(state.numbered())

    def holding(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        average: Mapping[str, Tensor] | None,
    ) -> Holding:
        """What this rank holds: fragments of what is trained, and all of everything else.

        It has whole weights too, but every rank's optimizer state lies as its fragments do.
        """
        holds = held.holding(model, None, average, self.partition.span_of)
        return replace(holds, optimizer=None if optimizer is None else self._named(optimizer))

    def _named(self, optimizer: StatefulOptimizer) -> NamedState:
        """The optimizer's state by the names of the parameters whose fragments it updates."""
        state = optimizer.state_dict()
        entries = {}
        for number, entry in state["state"].items():
            name = self._optimized[number]
            entries[name] = {
                key: self._state_span(name, value) if isinstance(value, Tensor) else value
                for key, value in entry.items()
            }
        hyper = {k: v for k, v in state["param_groups"][0].items() if k != "params"}
        return NamedState(list(self._optimized), entries, hyper)

    def _state_span(self, name: str, value: Tensor) -> Span:
        fragment = self.partition.fragments.get(name)
        # Rules that do not go element by element keep tensors of other shapes, in one process.
        if fragment is None or value.shape != fragment.tensor.shape:
            return whole_span(value)
        return replace(fragment.span, values=value.detach().reshape(-1))
