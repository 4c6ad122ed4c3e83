"""A model whose parameters fairscale keeps in rows, one a layer, and what a rank holds of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fairscale.nn.data_parallel import FullyShardedDataParallel, TrainingState
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fairseq_lite.errors import CheckpointError, ConfigError
from fairseq_lite.parallel.experts import ExpertShard, stores
from fairseq_lite.parallel.shards.experts import without_others
from fairseq_lite.parallel.shards.flat import FlatLayout
from fairseq_lite.parallel.shards.spans import Span, whole_span

USE_TORCH = "use --fsdp-engine torch"


class Unit(FullyShardedDataParallel):  # type: ignore[misc]
    """Modules whose parameters are gathered and freed together.

    Attributes:
        expert: the mark of the first of its experts; None for a unit of shared parameters.
    """

    expert: ExpertShard | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.training_state is TrainingState.SUMMON_FULL_PARAMS:
            return self.module.module(*args, **kwargs)  # all is here, and stays
        if self.training_state is TrainingState.BACKWARD_PRE:
            # Run again for --checkpoint-activations. The weights are here for the backward pass;
            # fairscale's own forward would free them at its end.
            return self.module(*args, **kwargs)
        return super().forward(*args, **kwargs)


@dataclass(frozen=True)
class Flat:
    """The parameters of a unit, as one.

    Attributes:
        param: what is trained: this rank's piece of the row.
        layout: where in the row each parameter lies.
        rank: this rank, among those that have a piece.
        expert: the mark of the first of its experts; None for a row of shared parameters.
    """

    param: nn.Parameter
    layout: FlatLayout
    rank: int
    expert: ExpertShard | None = None

    @property
    def piece(self) -> Tensor:
        """This rank's numbers, also while `param` shows the whole row in a forward pass."""
        piece: Tensor = self.param._fp32_shard  # type: ignore[attr-defined]
        return piece

    def spans(self, piece: Tensor) -> dict[str, Span]:
        """What a piece holds of each parameter, sharing memory."""
        parts = self.layout.parts(piece.detach(), self.rank)
        return {
            slot.name: Span(slot.shape, self.layout.range_of(slot, self.rank)[0], parts[slot.name])
            for slot in self.layout.slots
        }

    def joined(self, spans: Mapping[str, Span]) -> Tensor:
        """A piece made of spans; zeros for parameters that have none."""
        like = next(iter(spans.values())).values.to(self.piece.device)
        parts = {name: span.values for name, span in spans.items()}
        return self.layout.piece(parts, self.rank, like)


class ShardedModel(Unit):
    """The outermost unit: what the trainer calls. Attributes it lacks are those of the model."""

    def describe(self, shapes: Mapping[str, torch.Size], aliases: Mapping[str, str]) -> None:
        """Remember how the model looked before its parameters were put in rows.

        Args:
            shapes: of its state, by name and in order.
            aliases: the further names of a shared tensor -> its first.
        """
        self.shapes = dict(shapes)
        self.aliases = dict(aliases)
        self.flats = [
            Flat(unit.params[0], _layout(path, unit), unit.rank, unit.expert)
            for path, unit in self.named_modules()
            if isinstance(unit, Unit) and unit.params
        ]

    def units(self) -> Iterator[Unit]:
        """This and all inner units."""
        return (module for module in self.modules() if isinstance(module, Unit))

    def trained(self) -> list[str]:
        """The parameters that need gradients, in the order in which optimizers number them."""
        names = {s.name for f in self.flats if f.param.requires_grad for s in f.layout.slots}
        return [name for name in self.shapes if name in names]

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """The buffers under the names they have in the model."""
        for name, buffer in super().named_buffers(*args, **kwargs):
            yield clean(name), buffer

    def weights(self) -> dict[str, Span]:
        """What this rank holds of the model's state; a shared tensor is one object."""
        spans = {name: whole_span(buffer) for name, buffer in self.named_buffers()}
        for flat in self.flats:
            spans.update(flat.spans(flat.piece))
        return {name: spans[self.aliases.get(name, name)] for name in self.shapes}

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """This rank's part of every tensor (1-dim, sharing memory) by its name in the model.

        While all is gathered (`FairscaleSharded.whole`), whole tensors.
        """
        if self.training_state is TrainingState.SUMMON_FULL_PARAMS:
            return super().state_dict(*args, **kwargs)
        return {name: span.values for name, span in self.weights().items()}

    def upgrade_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What this rank would hold of a checkpoint's tensors, as `state_dict` has it.

        Raises:
            CheckpointError: they do not fit the model.
        """
        whole = self.fitting_weights(state)
        return {
            name: whole[name].reshape(-1)[span.start : span.start + span.values.numel()]
            for name, span in self.weights().items()
        }

    def fitting_weights(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A checkpoint's tensors, whole, under the names the model uses today.

        Raises:
            CheckpointError: one is missing, unknown or of another shape.
        """
        upgrade = getattr(self.module.module, "upgrade_state_dict", dict)
        state = without_others(self, upgrade(state), clean)
        for name in sorted(self.shapes.keys() | state.keys()):
            own = self.shapes.get(name)
            other = state[name].shape if name in state else None
            if own != other:
                raise CheckpointError(
                    f"the checkpoint does not fit the model: {name} has shape "
                    f"{tuple(other) if other is not None else 'none'} in it and "
                    f"{tuple(own) if own is not None else 'none'} in the model"
                )
        return state

    def forget_gathered(self) -> None:
        """Free rows that were gathered before this rank's pieces changed."""
        for unit in self.units():
            unit._free_full_params()


def _layout(path: str, unit: Unit) -> FlatLayout:
    names, shapes, _ = unit.module.metadata(0)
    prefix = f"{path}." if path else ""
    return FlatLayout.of([clean(prefix + name) for name in names], shapes, unit.world_size)


def clean(path: str) -> str:
    """A name without fairscale's wrappers in it."""
    own = ("_fsdp_wrapped_module", "_fpw_module")
    return ".".join(word for word in path.split(".") if word not in own)


# -- before a model is sharded ------------------------------------------------------------------


def check_rows(model: nn.Module, layers: list[nn.Module]) -> None:
    """Refuse what one row of parameters a layer cannot hold.

    Raises:
        ConfigError: a tensor is shared between two layers, or a layer is trained in part.
    """
    names = {id(m): name for name, m in model.named_modules()}
    own = [*(names[id(layer)] for layer in layers), *(name for name, _, _ in stores(model))]
    paths = sorted(own, key=len, reverse=True)
    rows: dict[nn.Parameter, tuple[str, str]] = {}
    trained: dict[str, tuple[str, bool]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        row = next((path for path in paths if name.startswith(f"{path}.")), "")
        other, place = rows.setdefault(param, (name, row))
        if place != row:
            raise ConfigError(
                f"--fsdp-engine fairscale cannot share {other} with {name} of another layer: "
                f"{USE_TORCH}"
            )
        other, trains = trained.setdefault(row, (name, param.requires_grad))
        if trains != param.requires_grad:
            raise ConfigError(
                f"--fsdp-engine fairscale trains all of a layer or nothing, and {other} and "
                f"{name} differ: {USE_TORCH}"
            )


def aliases_of(model: nn.Module) -> dict[str, str]:
    """The further names of shared parameters -> their first."""
    first: dict[nn.Parameter, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: first[p] for name, p in named if first.setdefault(p, name) != name}


def split(model: nn.Module, mesh: DeviceMesh) -> None:
    """Deal out the rows of a model on the meta device, as torch deals them; experts stay whole."""

    def rows_of(param: nn.Parameter) -> nn.Parameter:
        if not param.dim() or not param.is_meta:
            return param
        each = -(-param.size(0) // mesh.size())
        start = min(param.size(0), each * mesh.get_local_rank())
        rows = param.detach().narrow(0, start, min(each, param.size(0) - start))
        spread = DTensor.from_local(
            rows, mesh, [Shard(0)], run_check=False, shape=param.shape, stride=param.stride()
        )
        return nn.Parameter(spread, requires_grad=param.requires_grad)

    _exchange(model, rows_of)


def gather(module: nn.Module, device: torch.device | str) -> None:
    """Make parameters that were dealt out whole; fairscale begins with those."""

    def whole(param: nn.Parameter) -> nn.Parameter:
        tensor = param.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        return nn.Parameter(tensor.to(device), requires_grad=param.requires_grad)

    _exchange(module, whole)


def _exchange(module: nn.Module, change: Callable[[nn.Parameter], nn.Parameter]) -> None:
    """Replace parameters, except fairscale's rows; shared ones stay shared."""
    changed: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, param in part._parameters.items():
            if param is not None and not hasattr(param, "_is_sharded"):
                if param not in changed:
                    changed[param] = change(param)
                part._parameters[name] = changed[param]


def put_in_place(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Let every module that has `old` have `new`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is old:
                setattr(parent, name, new)
