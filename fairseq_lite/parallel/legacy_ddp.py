"""`--ddp-backend legacy_ddp`: every rank holds the whole model and shares gradients once an update.

Gradients travel in a few large buffers after the last backward. Nothing hooks into backward itself,
so ranks may use different parameters and never wait for each other in the middle. fairseq's other
names for data parallel training mean the same here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fairseq_lite.config.core import RunConfig
from fairseq_lite.errors import CheckpointError, FliteError
from fairseq_lite.parallel.api import (
    BACKENDS,
    MAIN_PART,
    Backend,
    LoadsWeights,
    M,
    Machine,
    Part,
    PartReader,
    StatefulOptimizer,
)
from fairseq_lite.parallel.experts import (
    expert_modules,
    expert_parameters,
    has_experts,
    replicas_of,
    shared_parameters,
    spread_over,
)
from fairseq_lite.parallel.local import norm_of
from fairseq_lite.parallel.plan import common_reasons
from fairseq_lite.parallel.shards import held, parted, pieces
from fairseq_lite.parallel.shards.spans import parameter_names

# Elements in one buffer, and buffers on their way at a time. Large enough that latency does not
# count, few enough that a large model's gradients are not held twice.
BUCKET_ELEMENTS = 1 << 24
BUCKETS_IN_FLIGHT = 3

T = TypeVar("T", bound=Tensor)


class _Sum(NamedTuple):
    """Parameters whose gradients are added up over the same ranks.

    Attributes:
        params: them.
        start: begins to sum a tensor over these ranks.
        factor: what gradients are multiplied by.
    """

    params: list[nn.Parameter]
    start: Callable[[Tensor], Callable[[], object]]
    factor: float


class _Sent(NamedTuple):
    """A buffer on its way."""

    bucket: list[nn.Parameter]
    flat: Tensor
    wait: Callable[[], object]


@BACKENDS.register("legacy_ddp", aliases=("no_c10d", "c10d", "pytorch_ddp"))
class LegacyDDP(Backend):
    """Data parallel training by one reduction of all gradients an update."""

    @classmethod
    def reasons(cls, run: RunConfig, machine: Machine | None = None) -> list[str]:
        return common_reasons(run, machine or Machine.here())

    def wrap(self, build: Callable[[], M]) -> M:
        with spread_over(self.world):
            model = build().to(self.world.device)
        if self.world.size > 1:
            # Ranks seed alike, but a plugin may not; and a restored rank 0 is the one that counts.
            self._broadcast(tensor.data for tensor in _shared_tensors(model))
            for group, experts in replicas_of(model, self.world):
                if group.size > 1:
                    tensors = chain.from_iterable(_tensors(module) for module, _ in experts)
                    _overwrite((tensor.data for tensor in tensors), group.broadcast)
        return model

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    def reduce_gradients(self, model: nn.Module) -> None:
        if self.world.size == 1:
            return
        in_flight: deque[_Sent] = deque()
        for summed in self._sums(model):
            for bucket in _buckets(p for p in summed.params if p.requires_grad):
                in_flight.append(self._start(bucket, summed))
                if len(in_flight) == BUCKETS_IN_FLIGHT:
                    self._finish(in_flight.popleft())
        while in_flight:
            self._finish(in_flight.popleft())

    def _sums(self, model: nn.Module) -> Iterator[_Sum]:
        """What is added up over which ranks, in the same order on all of them."""
        yield _Sum(shared_parameters(model), self.world.all_reduce_start, 1 / self.world.size)
        for group, experts in replicas_of(model, self.world):
            by_factor: dict[float, list[nn.Parameter]] = {}
            for module, shard in experts:
                factor = shard.gradient_factor / self.world.size
                by_factor.setdefault(factor, []).extend(module.parameters())
            for factor, params in by_factor.items():
                if group.size > 1:
                    yield _Sum(params, group.all_reduce_start, factor)
                else:  # nobody else has them: nothing needs to go into a buffer
                    grads = [p.grad for p in params if p.grad is not None]
                    if grads:
                        torch._foreach_mul_(grads, factor)

    def _start(self, bucket: list[nn.Parameter], summed: _Sum) -> _Sent:
        """Send one buffer: the gradients times a factor, then a 1 for each that exists.

        Multiplying first keeps a half precision sum in range.
        """
        exist = bucket[0].new_tensor([float(p.grad is not None) for p in bucket])
        flat = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket]
            + [exist]
        )
        flat.mul_(summed.factor)
        return _Sent(bucket, flat, summed.start(flat))

    def _finish(self, sent: _Sent) -> None:
        sent.wait()
        bucket, flat = sent.bucket, sent.flat
        split = torch.split(flat, [p.numel() for p in bucket] + [len(bucket)])
        # Only a rank that lacks a gradient asks whether another had one: the question waits for
        # the GPU.
        used = [1.0] * len(bucket)
        if any(p.grad is None for p in bucket):
            used = split[-1].tolist()
        for param, piece, count in zip(bucket, split, used, strict=False):
            # A view of the buffer, not a copy of it.
            param.grad = piece.view_as(param) if count > 0 else None

    def grad_norm(self, model: nn.Module) -> Tensor:
        # Gradients of shared parameters are equal on all ranks by now, to the bit: no rank asks.
        norm = local_norm(shared_parameters(model), self.world.device)
        if not has_experts(model):
            return norm
        # In float64, where the square of a float32 does not overflow. A replica counts in part.
        by_replicas: dict[int, list[nn.Parameter]] = {}
        for param, shard in expert_parameters(model):
            by_replicas.setdefault(shard.layout.replicas, []).append(param)
        square = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for replicas, params in by_replicas.items():
            square += local_norm(params, self.world.device).double().square() / replicas
        return (norm.double().square() + self.world.all_reduce(square)).sqrt().float()

    def save_parts(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        average: Mapping[str, Tensor] | None = None,
    ) -> Mapping[str, Part]:
        spread = self.spread(model)
        if spread is not None:
            holds = held.holding(model, optimizer, average)
            return parted.whole_parts(self.world, holds, spread)
        if not self.world.is_main:
            return {}
        state = None if optimizer is None else optimizer.state_dict()
        manifest = {"world_size": self.world.size}
        return {MAIN_PART: Part(model.state_dict(), state, average, manifest)}

    def load_parts(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        parts: PartReader,
        average: Mapping[str, Tensor] | None = None,
    ) -> None:
        spread = self.spread(model)
        if spread is not None:
            parted.load(self.world, model, optimizer, parts, average, spread)
            return
        part, error = None, None
        if self.world.is_main:
            try:
                pieces.verify_all(parts)
                part = pieces.whole(parts)
                _load_weights(model, part.model)
                if optimizer is not None and part.optimizer is not None:
                    pieces.check_names(part, parameter_names(model, optimizer))
                if average is not None:
                    _load_average(model, average, part.average or {})
            except FliteError as e:
                error = e
        # Rank 0 alone reads: a checkpoint need not be visible elsewhere. Ranks that would wait for
        # its tensors hear first that there are none.
        error = self.world.broadcast_object(error)
        if error is not None:
            raise error
        self._broadcast(tensor.data for tensor in _tensors(model))
        if average is not None:
            self._broadcast(average.values())
        if optimizer is not None:
            state = self.world.broadcast_state(None if part is None else part.optimizer)
            if state is not None:
                optimizer.load_state_dict(state)

    def _broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with rank 0's, in large buffers."""
        if self.world.size == 1:
            return
        _overwrite(tensors, self.world.broadcast)


def _overwrite(tensors: Iterable[Tensor], receive: Callable[[Tensor], Tensor]) -> None:
    """Overwrite tensors, in large buffers, with what `receive` makes of a buffer on every rank."""
    for bucket in _buckets(tensors):
        flat = receive(torch.cat([t.flatten() for t in bucket]))
        split = torch.split(flat, [t.numel() for t in bucket])
        for tensor, piece in zip(bucket, split, strict=True):
            tensor.copy_(piece.view_as(tensor))


def local_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """The 2-norm of the gradients this rank holds: float32, 0-dim.

    Args:
        parameters: each once; `Module.parameters()` leaves out the second name of a shared one.
        device: where the result goes.
    """
    return norm_of((p.grad for p in parameters if p.grad is not None), device)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer once."""
    yield from model.parameters()
    yield from model.buffers()


def _shared_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Those that every rank has."""
    own = {id(t) for _, expert, _ in expert_modules(model) for t in _tensors(expert)}
    return (tensor for tensor in _tensors(model) if id(tensor) not in own)


def _buckets(tensors: Iterable[T]) -> Iterator[list[T]]:
    """Group tensors of one dtype and device, in order, into buckets of limited size."""
    open_: dict[tuple[torch.device, torch.dtype], list[T]] = {}
    for tensor in tensors:
        key = (tensor.device, tensor.dtype)
        bucket = open_.setdefault(key, [])
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > BUCKET_ELEMENTS:
            yield open_[key]
            bucket = open_[key] = []
        bucket.append(tensor)
    yield from open_.values()


def _load_weights(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    if isinstance(model, LoadsWeights):
        model.load_weights(state)
        return
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        line = " ".join(str(e).split())
        raise CheckpointError(f"the checkpoint does not fit the model: {line}") from e


def _load_average(
    model: nn.Module, average: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    if isinstance(model, LoadsWeights):
        state = model.upgrade_state_dict(state)
    for name, tensor in average.items():
        if name not in state or state[name].shape != tensor.shape:
            raise CheckpointError(
                f"the checkpoint's moving average does not fit the model: {name} "
                + ("is missing" if name not in state else f"has shape {tuple(state[name].shape)}")
            )
        tensor.copy_(state[name])
