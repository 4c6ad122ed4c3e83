"""`--ddp-backend fully_sharded --fsdp-engine fairscale`: fairscale's FullyShardedDataParallel.

The parameters of a layer lie in one row, of which each rank holds a piece; what belongs to no
layer, the embeddings for example, lies in a row of the outermost unit. The model is built as by the
engine `torch`, a tensor at a time, and is whole on a rank for one unit at a time. Checkpoints, full
or in shards, are that engine's too, and each reads the other's. That engine keeps every parameter
by itself, so here is different:

- A parameter that no batch used counts as one whose gradient is zero, as it shares the gradient of
  its layer: Adam's averages fade and weight decay pulls at it. A layer that was not used at all is
  an error, hence no `--encoder-layerdrop`.
- A layer is trained as a whole or not at all, and tensors that are shared lie in one layer.
- The experts of a layer lie in a row of their own, which their owners share.
- It needs a GPU: fairscale's streams are CUDA's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from fairseq_lite.config.core import RunConfig
from fairseq_lite.errors import TrainingError
from fairseq_lite.parallel.api import M, Machine, PartReader, StatefulOptimizer
from fairseq_lite.parallel.experts import ExpertShard, stores
from fairseq_lite.parallel.free import free_running
from fairseq_lite.parallel.fully_sharded.building import Unmade
from fairseq_lite.parallel.fully_sharded.choice import (
    WHOLE_TENSOR_OPTIMIZERS,
    log_units,
    sharding_reasons,
)
from fairseq_lite.parallel.fully_sharded.engine import Engine
from fairseq_lite.parallel.fully_sharded.fairscale_model import (
    USE_TORCH,
    Flat,
    ShardedModel,
    Unit,
    aliases_of,
    check_rows,
    clean,
    gather,
    put_in_place,
    split,
)
from fairseq_lite.parallel.plan import common_reasons
from fairseq_lite.parallel.shards import exchange as shards
from fairseq_lite.parallel.shards.experts import Spread
from fairseq_lite.parallel.shards.spans import Holding, NamedState, Span, whole_span


class FairscaleSharded(Engine):
    """Fully sharded training by fairscale."""

    @classmethod
    def reasons(cls, run: RunConfig, machine: Machine | None = None) -> list[str]:
        machine = machine or Machine.here()
        reasons = []
        if run.common.cpu or not machine.cuda_devices:
            reasons.append(
                f"--fsdp-engine fairscale needs a GPU, and this run has none: {USE_TORCH}"
            )
        reasons += common_reasons(run, machine) + sharding_reasons(run, machine)
        return reasons + _row_reasons(run)

    # -- building -------------------------------------------------------------------------------

    def wrap(self, build: Callable[[], M]) -> M:
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", module=r"fairscale\.")
        model = self._built(build)
        layers: list[nn.Module] = getattr(model, "layers_to_shard", list)()
        check_rows(model, layers)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        aliases = aliases_of(model)
        device = "cpu" if self.cfg.cpu_offload else self.world.device
        for _, store, shard in stores(model):
            gather(store, device)
            unit = Unit(store, **self._options(self._replicas(shard)))
            unit.expert = shard
            put_in_place(model, store, unit)
        options = self._options(self._all())
        for layer in layers:
            gather(layer, device)
            put_in_place(model, layer, Unit(layer, **options))
        gather(model, device)
        # The outermost unit stays whole between forward and backward: the backward pass begins with
        # it, and the fused loss reads its output projection.
        root = ShardedModel(model, **{**options, "reshard_after_forward": False})
        root.describe(shapes, aliases)
        # The root first, which makes the others inner ones. And now, in training mode: where a
        # validation comes first, fairscale would leave out the memory for offloaded gradients.
        for unit in root.units():
            unit._lazy_init()
        log_units(self.world, len(layers))
        return cast("M", root)

    def _built(self, build: Callable[[], M]) -> M:
        """The model; of several ranks each has some rows of every tensor."""
        unmade = Unmade.of(build, self.world)
        if self.world.size > 1:
            split(unmade.model, init_device_mesh(self.world.device.type, (self.world.size,)))
        unmade.make(self.world.device)
        return unmade.model

    def _all(self) -> list[Any]:
        """The groups of a row of shared parameters: to gather it, to add up its gradients."""
        if self.world.size == 1:
            return [_Alone()] * 2
        # A group of its own lets sums of gradients overlap with the gathering of weights.
        return [dist.group.WORLD, dist.new_group()]

    def _replicas(self, shard: ExpertShard) -> list[Any]:
        """The same of a row of experts: their owners."""
        group = self.world.split(shard.layout.replica_groups())
        return [_Alone() if group.handle is None else group.handle] * 2

    def _options(self, groups: list[Any]) -> dict[str, Any]:
        alone = isinstance(groups[0], _Alone)
        return {
            "process_group": groups[0],
            "process_group_reduce_scatter": groups[1],
            "reshard_after_forward": not self.cfg.no_reshard_after_forward,
            # One rank sends nothing, and autocast does the rest.
            "mixed_precision": self.dtype is not None and not alone,
            "compute_dtype": None if alone else self.dtype,
            "buffer_dtype": torch.float32,  # tables of positions do not survive a narrower one
            "fp32_reduce_scatter": (
                self.cfg.fp32_reduce_scatter and self.dtype is not None and not alone
            ),
            "move_params_to_cpu": self.cfg.cpu_offload,
            "compute_device": self.world.device,
        }

    def num_parameters(self, model: nn.Module) -> tuple[int, int]:
        flats = [flat for flat in _sharded(model).flats if flat.expert is None]
        trained = sum(flat.layout.numel for flat in flats if flat.param.requires_grad)
        return sum(flat.layout.numel for flat in flats), trained

    def num_expert_parameters(self, model: nn.Module) -> tuple[int, int]:
        return self._of_all_ranks(
            (flat.layout.numel, flat.param.requires_grad)
            for flat in _sharded(model).flats
            if flat.expert is not None and flat.expert.layout.replica(self.world.rank) == 0
        )

    # -- a step ---------------------------------------------------------------------------------

    def accumulate(self, model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()  # without `no_sync`, which keeps whole gradients until the last batch

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        # fairscale would overwrite the offloaded gradients of earlier batches.
        params = model.parameters() if self.cfg.cpu_offload else ()
        earlier = {p: p.grad.clone() for p in params if p.grad is not None}
        for param in earlier:
            param.grad = None
        with _explaining_unused():
            torch.autograd.backward(loss)
        for param, grad in earlier.items():
            param.grad = grad if param.grad is None else param.grad.add_(grad)

    def reduce_gradients(self, model: nn.Module) -> None:
        # Each backward pass has added its gradients over the ranks that share a row, and divided by
        # their number; for experts a division by that of the ranks that sent them tokens is left.
        for flat in _sharded(model).flats:
            if flat.expert is not None and flat.param.grad is not None:
                factor = flat.expert.gradient_factor / flat.expert.layout.group_size
                flat.param.grad.mul_(factor)

    # -- outside training -----------------------------------------------------------------------

    @contextmanager
    def whole(self, model: nn.Module) -> Iterator[None]:
        """See the base class. Every rank holds the whole model inside, in float32."""
        with _sharded(model).summon_full_params(volatile=True), free_running([model], self.world):
            yield

    # -- checkpoints ----------------------------------------------------------------------------

    def holding(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        average: Mapping[str, Tensor] | None,
    ) -> Holding:
        return _holding(_sharded(model), optimizer, average)

    def spread(self, model: nn.Module) -> Spread | None:
        return Spread.of(model, clean)

    def load_parts(
        self,
        model: nn.Module,
        optimizer: StatefulOptimizer | None,
        parts: PartReader,
        average: Mapping[str, Tensor] | None = None,
    ) -> None:
        root = _sharded(model)
        into = _holding(root, None, average)
        names = None if optimizer is None else _optimized(root, optimizer)
        spread = self.spread(model)
        state = shards.fill(self.world, into, parts, root.fitting_weights, names, spread)
        root.forget_gathered()
        for name, first in root.aliases.items():
            if average is not None:
                average[name].copy_(average[first])
        if optimizer is not None and state is not None:
            optimizer.load_state_dict(_in_rows(root, optimizer, state))


class _Alone:
    """A process group of one, which fairscale takes for a stand-in and exchanges nothing over."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def _row_reasons(run: RunConfig) -> list[str]:
    """Why the parameters of `run` cannot lie in rows: one line each."""
    reasons = []
    for side in ("encoder", "decoder"):
        if getattr(run.model.config, f"{side}_layerdrop", 0) > 0:
            reasons.append(
                f"--{side}-layerdrop leaves out layers, and --fsdp-engine fairscale waits for all "
                f"of them: {USE_TORCH}"
            )
    for flag, on in (
        (f"--optimizer {run.optimizer.name}", run.optimizer.name in WHOLE_TENSOR_OPTIMIZERS),
        ("--fp16-adam-stats", getattr(run.optimizer.config, "fp16_adam_stats", False)),
    ):
        if on:
            reasons.append(
                f"{flag} looks at whole parameters, and --fsdp-engine fairscale puts those of a "
                f"layer in one row: {USE_TORCH}"
            )
    return reasons


@contextmanager
def _explaining_unused() -> Iterator[None]:
    """Name the likely cause of the one complaint fairscale has about a backward pass.

    Raises:
        TrainingError: a unit has seen no backward pass.
    """
    try:
        yield
    except ValueError as e:
        if "expected to be in states" not in str(e):
            raise
        raise TrainingError(
            "a layer was not used in the forward pass, and --fsdp-engine fairscale waits for all "
            f"of them: {USE_TORCH}"
        ) from e


def _sharded(model: nn.Module) -> ShardedModel:
    assert isinstance(model, ShardedModel)
    return model


# -- rows and names -----------------------------------------------------------------------------


def _holding(
    model: ShardedModel,
    optimizer: StatefulOptimizer | None,
    average: Mapping[str, Tensor] | None,
) -> Holding:
    """What this rank holds of a model in training, by name."""
    weights = model.weights()
    spans = None
    if average is not None:
        first = {name: model.aliases.get(name, name) for name in weights}
        own = {n: replace(weights[n], values=average[n]) for n in first.values()}
        spans = {name: own[first[name]] for name in weights}
    state = None if optimizer is None else _named_state(model, optimizer)
    return Holding(weights, state, spans)


def _numbers(optimizer: StatefulOptimizer) -> dict[int, int]:
    """The numbers of an optimizer's parameters, by identity."""
    return {id(p): number for number, p in enumerate(optimizer.param_groups[0]["params"])}


def _others(model: ShardedModel, optimizer: StatefulOptimizer) -> dict[str, int]:
    """Parameters that are not the model's, a criterion's for example: their names and numbers."""
    rows = {id(flat.param) for flat in model.flats}
    numbers = [n for param, n in _numbers(optimizer).items() if param not in rows]
    count = len(model.trained())
    return {f"parameter{count + i}": number for i, number in enumerate(numbers)}


def _optimized(model: ShardedModel, optimizer: StatefulOptimizer) -> list[str]:
    return [*model.trained(), *_others(model, optimizer)]


def _named_state(model: ShardedModel, optimizer: StatefulOptimizer) -> NamedState:
    """An optimizer's state by parameter instead of by row."""
    saved, numbers = optimizer.state_dict(), _numbers(optimizer)
    entries: dict[str, dict[str, Any]] = {}
    for flat in model.flats:
        entry = saved["state"].get(numbers.get(id(flat.param)), {})
        for key, value in entry.items():
            in_row = isinstance(value, Tensor) and value.shape == flat.piece.shape
            spans = flat.spans(value) if in_row else {}
            for slot in flat.layout.slots:
                entries.setdefault(slot.name, {})[key] = spans.get(slot.name, value)
    for name, number in _others(model, optimizer).items():
        entry = saved["state"].get(number, {})
        entries[name] = {k: whole_span(v) if isinstance(v, Tensor) else v for k, v in entry.items()}
    hyper = {k: v for k, v in saved["param_groups"][0].items() if k != "params"}
    names = _optimized(model, optimizer)
    return NamedState(names, {name: entries[name] for name in names if entries.get(name)}, hyper)


def _in_rows(
    model: ShardedModel, optimizer: StatefulOptimizer, state: NamedState
) -> dict[str, Any]:
    """The reverse of `_named_state`, in torch's layout."""
    numbers, entries = _numbers(optimizer), state.entries
    rows: dict[int, dict[str, Any]] = {}
    for flat in model.flats:
        found = {s.name: entries[s.name] for s in flat.layout.slots if s.name in entries}
        if found:
            rows[numbers[id(flat.param)]] = _row(flat, found)
    for name, number in _others(model, optimizer).items():
        rows[number] = {
            key: value.in_shape() if isinstance(value, Span) else value
            for key, value in entries.get(name, {}).items()
        }
    return {
        "state": rows,
        "param_groups": [{**state.hyper, "params": list(range(len(numbers)))}],
    }


def _row(flat: Flat, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The state of a row from those of its parameters."""
    row: dict[str, Any] = {}
    for key in {key: None for entry in entries.values() for key in entry}:
        values = {name: entry[key] for name, entry in entries.items() if key in entry}
        spans = {name: value for name, value in values.items() if isinstance(value, Span)}
        if spans:
            row[key] = flat.joined(spans)
        else:
            # Parameters that few batches used were updated less often; a row has one count.
            row[key] = max(values.values()) if key == "step" else next(iter(values.values()))
    return row
