"""`--ddp-backend fully_sharded --fsdp-engine torch`: each rank holds a part of every parameter.

torch's `fully_shard` gathers the weights of a unit (a layer, or what is left of the model) before
it runs, frees them afterwards, and adds up its gradients over ranks so that each keeps its part.
What a rank holds of parameters, gradients and optimizer state is one part in `world.size`, and no
rank holds a whole model at any time: `parallel/fully_sharded/building.py` builds it.

Gradients are added up over ranks after every batch, also with --update-freq: waiting for the last
would keep whole gradients of the whole model in memory, which is what sharding avoids.

A unit must run on every rank or on none: other ranks wait for its weights. Parameters inside a unit
may be used by some ranks only.

The experts of a layer are spread over ranks as they are. Where several ranks own the same ones they
are a unit, split over these ranks; an expert of one rank stays whole, and is no part of any unit,
unless --cpu-offload asks for a unit that fetches it from host memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

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

from fairseq_lite.config.core import RunConfig
from fairseq_lite.errors import ConfigError
from fairseq_lite.parallel.api import M, Machine, PartReader, StatefulOptimizer
from fairseq_lite.parallel.experts import (
    ExpertLayout,
    expert_parameters,
    replicas_of,
    stores,
)
from fairseq_lite.parallel.free import free_running
from fairseq_lite.parallel.fully_sharded.building import Unmade
from fairseq_lite.parallel.fully_sharded.choice import log_units, sharding_reasons
from fairseq_lite.parallel.fully_sharded.engine import Engine
from fairseq_lite.parallel.local import local
from fairseq_lite.parallel.plan import common_reasons
from fairseq_lite.parallel.shards import exchange as shards
from fairseq_lite.parallel.shards.spans import Holding
from fairseq_lite.parallel.world import World


class TorchSharded(Engine):
    """Fully sharded training by torch's `fully_shard`."""

    def __init__(self, cfg: Any, world: World, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(cfg, world, dtype=dtype)
        self._freed: set[nn.Module] = set()  # units that are freed after their forward pass
        self._uses: _Uses | None = None

    @classmethod
    def reasons(cls, run: RunConfig, machine: Machine | None = None) -> list[str]:
        machine = machine or Machine.here()
        return common_reasons(run, machine) + sharding_reasons(run, machine)

    # -- building -------------------------------------------------------------------------------

    def wrap(self, build: Callable[[], M]) -> M:
        self.world.form_group()
        unmade = Unmade.of(build, self.world)
        model = unmade.model
        layers: list[nn.Module] = getattr(model, "layers_to_shard", list)()
        output = getattr(model, "output_weight", None)
        keep = self.cfg.no_reshard_after_forward
        mesh = init_device_mesh(self.world.device.type, (self.world.size,))
        offload = self._offload()
        with _refusing_in_one_line():
            whole = self._shard_experts(model)
            for layer in layers:
                # The criterion reads the output projection after the forward pass.
                holds_output = output is not None and any(p is output for p in layer.parameters())
                if not (keep or holds_output):
                    self._freed.add(layer)
                fully_shard(
                    layer,
                    mesh=mesh,
                    reshard_after_forward=layer in self._freed,
                    mp_policy=self._precision(self.dtype, self.world.size),
                    ignored_params=whole,
                    offload_policy=offload,
                )
            # The outermost unit stays gathered between forward and backward: the backward pass
            # begins with it, and most models have their output projection there.
            fully_shard(
                model,
                mesh=mesh,
                reshard_after_forward=False,
                mp_policy=self._precision(self._outer_dtype(), self.world.size),
                ignored_params=whole,
                offload_policy=offload,
            )
        unmade.make("cpu" if self.cfg.cpu_offload else self.world.device)
        with _refusing_in_one_line():
            # By itself this happens in the first forward, which may be that of a part of the model.
            fully_shard.state(model)._lazy_init()  # type: ignore[attr-defined]
        self._uses = _Uses(model, self.world) if self.world.size > 1 else None
        log_units(self.world, len(layers))
        return model

    def _shard_experts(self, model: nn.Module) -> set[nn.Parameter]:
        """Split experts with replicas over these.

        Returns:
            The parameters of the others, which no unit is to have.
        """
        whole: set[nn.Parameter] = set()
        meshes: dict[ExpertLayout, DeviceMesh] = {}
        for _, store, shard in stores(model):
            layout = shard.layout
            if layout.replicas == 1 and not self.cfg.cpu_offload:
                whole.update(store.to(self.world.device).parameters())
                continue
            if layout not in meshes:
                meshes[layout] = self._replica_mesh(layout)
            if not self.cfg.no_reshard_after_forward:
                self._freed.add(store)
            fully_shard(
                store,
                mesh=meshes[layout],
                reshard_after_forward=store in self._freed,
                mp_policy=self._precision(self.dtype, layout.replicas),
                offload_policy=self._offload(),
            )
        return whole

    def _replica_mesh(self, layout: ExpertLayout) -> DeviceMesh:
        """The owners of this rank's experts."""
        shape = (layout.replicas, layout.group_size)
        names = ("replica", "place")
        mesh = init_device_mesh(self.world.device.type, shape, mesh_dim_names=names)
        return mesh["replica"]

    def _offload(self) -> OffloadPolicy:
        if not self.cfg.cpu_offload:
            return OffloadPolicy()
        # Memory can be pinned for a GPU only.
        return CPUOffloadPolicy(pin_memory=self.world.device.type == "cuda")

    def _precision(self, dtype: torch.dtype | None, ranks: int) -> MixedPrecisionPolicy:
        """Weights of a unit are gathered in `dtype`; the parts that ranks hold stay float32."""
        summed = None
        if ranks > 1:
            summed = torch.float32 if self.cfg.fp32_reduce_scatter else self.dtype
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=summed)

    def _outer_dtype(self) -> torch.dtype | None:
        """What the outermost unit, with the embeddings, is gathered in.

        On a CPU float32, and autocast casts where it pays: torch's kernels there add up an
        embedding's gradient in the type of its weights, so that in bfloat16 a token that occurs
        4096 times counts as 256, and refuse float32 states under 16-bit layer norms.
        """
        return None if self.world.device.type == "cpu" else self.dtype

    # -- a step ---------------------------------------------------------------------------------

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        if self._uses is not None:
            self._uses.begin()
        return nullcontext()

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        if self._uses is not None:
            self._uses.fill_in()
        torch.autograd.backward(loss)

    def reduce_gradients(self, model: nn.Module) -> None:
        # Each backward pass has added up its gradients over ranks. What is left: a parameter that
        # was used by nobody has a gradient of zeros, where it should have none.
        if self._uses is None:
            return
        params = list(model.parameters())
        for number in self._uses.unused():
            params[number].grad = None
        by_factor: dict[float, list[Tensor]] = {}
        for param, shard in expert_parameters(model):
            if param.grad is not None:
                # Of replicas torch has taken the mean; to the whole they bring in their group's.
                factor = shard.gradient_factor / shard.layout.group_size
                by_factor.setdefault(factor, []).append(local(param.grad))
        for factor, grads in by_factor.items():
            torch._foreach_mul_(grads, factor)

    # -- outside training -----------------------------------------------------------------------

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """See the base class. Each rank holds the whole model inside, in the units' precision."""
        try:
            for unit in units(model):
                unit.set_reshard_after_forward(False, recurse=False)
                unit.unshard()
            with free_running([model], self.world):
                yield
        finally:
            for unit in units(model):
                unit.set_reshard_after_forward(unit in self._freed, recurse=False)
                unit.reshard()

    # -- checkpoints ----------------------------------------------------------------------------

    def holding(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        average: Mapping[str, Tensor] | None,
    ) -> Holding:
        return shards.holding(model, optimizer, average)

    def load_parts(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        parts: PartReader,
        average: Mapping[str, Tensor] | None = None,
    ) -> None:
        shards.load(self.world, model, optimizer, parts, average)


class _Uses:
    """Which parameters batches make use of, so that all ranks add up the same ones.

    torch adds up the gradients that a unit has; with a parameter that one rank used and another did
    not, their sums would not fit together. So units fill in zeros.

    Args:
        model: sharded.
        world: its ranks.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self._frozen = [not p.requires_grad for p in model.parameters()]  # nobody waits for those
        self._used = list(self._frozen)
        self._hooked: set[nn.Module] = set()
        self._units = list(units(model))
        self._ran: set[nn.Module] = set()
        self._device = world.device
        self._askers = _askers(model, world)
        for unit, places in _own_parameters(model).items():
            # After torch's own hook, which puts whole parameters in place of the sharded ones.
            unit.register_forward_pre_hook(partial(self._before_forward, places))

    def begin(self) -> None:
        """A batch begins."""
        self._ran.clear()

    def fill_in(self) -> None:
        """Have units that ran fill in gradients; one that was left out by all ranks has none."""
        for unit in self._units:
            if hasattr(unit, "set_reduce_scatter_unused_params"):  # not in every torch we allow
                unit.set_reduce_scatter_unused_params(unit in self._ran, recurse=False)

    def unused(self) -> list[int]:
        """The numbers of parameters that no rank has used since the last call; all ranks ask."""
        mine, self._used = self._used, list(self._frozen)
        found = []
        for numbers, largest in self._askers:
            used = torch.tensor([mine[n] for n in numbers], dtype=torch.float32)
            used = largest(used.to(self._device))
            if not all(mine[n] for n in numbers):  # else no need to wait for what a GPU says
                pairs = zip(numbers, used.tolist(), strict=True)
                found += [number for number, count in pairs if count == 0]
        return found

    def _before_forward(
        self, places: list[tuple[int, nn.Module, str]], unit: nn.Module, _: Any
    ) -> None:
        self._ran.add(unit)
        if unit in self._hooked:
            return
        self._hooked.add(unit)
        for number, module, name in places:
            param = module._parameters[name]
            if param is not None and param.requires_grad:
                note = partial(self._note, number)
                param.register_post_accumulate_grad_hook(note)  # type: ignore[no-untyped-call]

    def _note(self, number: int, _: Tensor) -> None:
        self._used[number] = True


def _askers(model: nn.Module, world: World) -> list[tuple[list[int], Callable[[Tensor], Tensor]]]:
    """Of parameters that the same ranks have their numbers, and what gives these ranks' maxima."""
    numbers = {id(p): i for i, p in enumerate(model.parameters())}
    own = {id(p) for p, _ in expert_parameters(model)}
    shared = [number for param, number in numbers.items() if param not in own]
    found: list[tuple[list[int], Callable[[Tensor], Tensor]]] = [
        (shared, lambda used: world.all_reduce(used, "max"))
    ]
    for group, experts in replicas_of(model, world):
        theirs = [numbers[id(p)] for module, _ in experts for p in module.parameters()]
        found.append((theirs, partial(group.all_reduce, op="max")))
    return found


def _own_parameters(model: nn.Module) -> dict[nn.Module, list[tuple[int, nn.Module, str]]]:
    """For each unit its parameters: their numbers, and the places where they are found."""
    numbers = {id(p): i for i, p in enumerate(model.parameters())}
    found: dict[nn.Module, list[tuple[int, nn.Module, str]]] = {}

    def visit(module: nn.Module, unit: nn.Module) -> None:
        unit = module if isinstance(module, FSDPModule) else unit
        for name, param in module._parameters.items():
            number = None if param is None else numbers.pop(id(param), None)  # shared ones once
            if number is not None:
                found.setdefault(unit, []).append((number, module, name))
        for child in module.children():
            visit(child, unit)

    visit(model, model)
    return found


def units(model: nn.Module) -> Iterator[Any]:
    """The modules that are gathered and freed as one, the model itself among them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            yield module


@contextmanager
def _refusing_in_one_line() -> Iterator[None]:
    """Turn torch's complaints about a model into an error for its user.

    Raises:
        ConfigError: with the first line of what torch says.
    """
    try:
        yield
    except (ValueError, AssertionError, NotImplementedError, TypeError) as e:
        line = (str(e) or type(e).__name__).splitlines()[0]
        raise ConfigError(
            f"--ddp-backend fully_sharded cannot split this model: {line}; use --ddp-backend "
            "legacy_ddp"
        ) from e
