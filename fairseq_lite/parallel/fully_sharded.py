"""`--ddp-backend fully_sharded --fsdp-engine torch`: each rank holds a part of every parameter.

torch's `fully_shard` gathers a layer's weights before it runs, frees them afterwards, and scatters
the sums of its gradients. What a rank keeps of parameters, gradients and optimizer state is one
part in `world.size`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from fairseq_lite.config.core import RunConfig
from fairseq_lite.parallel.api import (
    MAIN_PART,
    Backend,
    LoadsWeights,
    M,
    Machine,
    Part,
    PartReader,
    StatefulOptimizer,
)
from fairseq_lite.parallel.local import local, norm_of, rows_of
from fairseq_lite.parallel.plan import common_reasons

logger = logging.getLogger(__name__)


class TorchSharded(Backend):
    """Fully sharded training by torch's `fully_shard`."""

    @classmethod
    def reasons(cls, run: RunConfig, machine: Machine | None = None) -> list[str]:
        return common_reasons(run, machine or Machine.here())

    # -- building -------------------------------------------------------------------------------

    def wrap(self, build: Callable[[], M]) -> M:
        model = build().to(self.world.device)
        mesh = self._mesh()
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": self._precision(),
            "offload_policy": self._offload(),
        }
        find = getattr(model, "layers_to_shard", list)
        for layer in find():
            fully_shard(
                layer, reshard_after_forward=not self.cfg.no_reshard_after_forward, **options
            )
        # The outermost unit stays gathered between forward and backward: the backward pass begins
        # with it, and the fused loss reads its output projection.
        fully_shard(model, reshard_after_forward=False, **options)
        return model

    def _mesh(self) -> DeviceMesh:
        self.world.form_group()
        return init_device_mesh(self.world.device.type, (self.world.size,))

    def _precision(self) -> MixedPrecisionPolicy:
        wide = torch.float32 if self.cfg.fp32_reduce_scatter else None
        return MixedPrecisionPolicy(param_dtype=self.dtype, reduce_dtype=wide)

    def _offload(self) -> OffloadPolicy:
        if not self.cfg.cpu_offload:
            return OffloadPolicy()
        # Memory can be pinned for a GPU only.
        return CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda")

    # -- a step ---------------------------------------------------------------------------------

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def reduce_gradients(self, model: nn.Module) -> None:
        pass  # each backward pass has added its gradients over the ranks, and divided

    def grad_norm(self, model: nn.Module) -> Tensor:
        grads = (p.grad for p in model.parameters() if p.grad is not None)
        return self.world.all_reduce(norm_of(grads, self.world.device).square()).sqrt()

    # -- checkpoints ----------------------------------------------------------------------------

    def save_parts(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        average: Mapping[str, Tensor] | None = None,
    ) -> Mapping[str, Part]:
        weights = {name: _whole(tensor) for name, tensor in model.state_dict().items()}
        state = None if optimizer is None else _whole_state(model, optimizer.state_dict())
        if not self.world.is_main:
            return {}
        return {MAIN_PART: Part(weights, state, manifest={"world_size": self.world.size})}

    def load_parts(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        parts: PartReader,
        average: Mapping[str, Tensor] | None = None,
    ) -> None:
        part = parts.read(MAIN_PART) if self.world.is_main else None
        weights = self.world.broadcast_state(None if part is None else part.model)
        cast("LoadsWeights", model).load_weights(
            {name: _spread(weights[name], own) for name, own in model.state_dict().items()}
        )
        if optimizer is not None:
            state = self.world.broadcast_state(None if part is None else part.optimizer)
            if state is not None:
                optimizer.load_state_dict(state)


def units(model: nn.Module) -> Iterator[FSDPModule]:
    """The modules that are gathered and freed as one, the model itself among them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module


def _whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.full_tensor()
    return tensor


def _whole_state(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    params = [p for p in model.parameters() if p.requires_grad]

    def whole(param: nn.Parameter, value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape == local(param).shape:
            return _whole(_wrapped(value, param))
        return value

    entries = {
        i: {key: whole(params[i], value) for key, value in entry.items()}
        for i, entry in state["state"].items()
    }
    return {**state, "state": entries}


def _wrapped(value: Tensor, param: nn.Parameter) -> Tensor:
    if not isinstance(param, DTensor):
        return value
    return DTensor.from_local(
        value,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def _spread(value: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return value
    part = rows_of(value, like).to(like.to_local())
    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
