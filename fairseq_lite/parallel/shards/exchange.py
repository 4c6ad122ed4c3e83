"""Checkpoints of a model that is spread over ranks: one file, or one shard a rank.

`gather` collects one tensor after the other on rank 0's CPU, and the file is the one that
`legacy_ddp` writes. `shard` asks no other rank. `load` reads either: of shards, which may come
from any number of ranks, each rank reads its own numbers only; a whole file is read by rank 0,
which deals them out.

The first half is for models of torch's DTensors, the second for whatever can say what it holds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fairseq_lite.errors import CheckpointError
from fairseq_lite.parallel.agreement import on_main, together
from fairseq_lite.parallel.api import MAIN_PART, Part, PartReader, StatefulOptimizer
from fairseq_lite.parallel.local import local
from fairseq_lite.parallel.shards import pieces, planning
from fairseq_lite.parallel.shards.spans import (
    Holding,
    NamedState,
    Span,
    check_optimized,
    parameter_names,
    whole_span,
)
from fairseq_lite.parallel.shards.stored import Stored
from fairseq_lite.parallel.world import World

logger = logging.getLogger(__name__)

Fitting = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Checks a checkpoint's names and shapes against the model, and gives them today's names."""


# -- models of DTensors -------------------------------------------------------------------------


def load(
    world: World,
    model: nn.Module,
    optimizer: StatefulOptimizer | None,
    parts: PartReader,
    average: Mapping[str, Tensor] | None = None,
) -> None:
    """Fill a model, its optimizer and its average from any checkpoint. All ranks take part.

    Args:
        world: the ranks.
        model: its parameters are DTensors, split by their first axis over all ranks.
        optimizer: its state tensors are this rank's rows, or the same on all ranks.
        parts: the checkpoint.
        average: tensors by the names of the model's state, laid out alike.

    Raises:
        CheckpointError: on every rank, when a part is missing, damaged or does not fit.
    """
    into = holding(model, None, average)
    names = None if optimizer is None else parameter_names(model, optimizer)
    state = fill(world, into, parts, fitting_of(model), names)
    _put_back(into.weights, model.state_dict())
    if into.average is not None and average is not None:
        _put_back(into.average, average)
    if optimizer is not None and state is not None:
        optimizer.load_state_dict(state.numbered())


@torch.no_grad()
def _put_back(spans: Mapping[str, Span], tensors: Mapping[str, Tensor]) -> None:
    """Copy what was read beside a tensor that does not lie in memory in the order of its rows."""
    for name, span in spans.items():
        part = local(tensors[name])
        if not part.is_contiguous():
            part.copy_(span.in_shape())


def holding(
    model: nn.Module,
    optimizer: StatefulOptimizer | None,
    average: Mapping[str, Tensor] | None = None,
) -> Holding:
    """What this rank holds of a model of DTensors (or plain tensors) in training."""
    # Before its parameters are looked at: it puts back the sharded ones where a forward has left
    # whole ones in their place.
    state = model.state_dict()
    first = {id(p): name for name, p in model.named_parameters()}
    again = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
    shared: dict[str, Span] = {}
    weights = {n: shared.setdefault(again.get(n, n), span_of(t)) for n, t in state.items()}
    spans = None
    if average is not None:
        kept: dict[str, Span] = {}
        spans = {
            name: kept.setdefault(again.get(name, name), span_like(average[name], span))
            for name, span in weights.items()
        }
    named = None if optimizer is None else _named_state(model, optimizer, shared)
    return Holding(weights, named, spans)


def span_of(tensor: Tensor) -> Span:
    """What this rank holds of a tensor, sharing memory."""
    if not isinstance(tensor, DTensor):
        return whole_span(tensor)
    mesh, placements = tensor.device_mesh, tensor.placements
    assert all(p.is_replicate() or p == Shard(0) for p in placements), placements
    _, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    values = local(tensor).detach().reshape(-1)
    start = offset[0] * prod(tensor.shape[1:]) if tensor.dim() and values.numel() else 0
    return Span(tuple(tensor.shape), start, values)


def span_like(tensor: Tensor, like: Span) -> Span:
    """The span of a tensor that lies as `like` does: a DTensor, this rank's part, or all of it."""
    if isinstance(tensor, DTensor):
        return span_of(tensor)
    if not like.is_whole and tensor.numel() == like.values.numel():
        return replace(like, values=tensor.detach().reshape(-1))
    return whole_span(tensor)


def _named_state(
    model: nn.Module, optimizer: StatefulOptimizer, weights: Mapping[str, Span]
) -> NamedState:
    names = parameter_names(model, optimizer)
    state = optimizer.state_dict()
    entries = {
        names[number]: {
            key: _state_span(v, weights.get(names[number])) if isinstance(v, Tensor) else v
            for key, v in entry.items()
        }
        for number, entry in state["state"].items()
    }
    hyper = {k: v for k, v in state["param_groups"][0].items() if k != "params"}
    return NamedState(names, entries, hyper)


def _state_span(value: Tensor, weight: Span | None) -> Span:
    # Rules that do not go element by element keep tensors of fewer axes, on one rank.
    if weight is None or value.dim() != len(weight.shape):
        return whole_span(value)
    return span_like(value, weight)


def fitting_of(model: nn.Module) -> Fitting:
    """The model's own judgement of a checkpoint's tensors, or a plain comparison."""
    own = getattr(model, "fitting_weights", None)
    if own is not None:
        fitting: Fitting = own
        return fitting

    def compare(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        stored = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name in sorted(shapes.keys() | stored.keys()):
            if shapes.get(name) != stored.get(name):
                raise CheckpointError(
                    f"the checkpoint does not fit the model: {name} has shape "
                    f"{stored.get(name, 'none')} in it and {shapes.get(name, 'none')} in the model"
                )
        return state

    return compare


# -- any engine: writing ------------------------------------------------------------------------


def shard(world: World, held: Holding) -> Mapping[str, Part]:
    """This rank's shard; asks no other rank.

    Args:
        world: the ranks.
        held: this rank's spans.
    """
    planned = planning.collect(held.every(Span))
    manifest = {"world_size": world.size, "shard": world.rank}
    part = pieces.to_part(held.map(lambda key, value: planned.get(key, value)), manifest)
    return {pieces.shard_name(world.rank): part}


def gather(world: World, held: Holding) -> Mapping[str, Part]:
    """All that ranks hold, on rank 0's CPU; nothing on other ranks. All take part."""
    if held.optimizer is not None:
        held = replace(held, optimizer=_agreed(world, held.optimizer, held.weights))
    layout = _Layout(world, held)
    done: dict[int, Tensor | None] = {}

    def whole(key: str, value: Any) -> Any:
        if not isinstance(value, Span):
            return value
        if id(value) not in done:  # a shared tensor travels once and stays shared
            done[id(value)] = layout.gather(key, value)
        return done[id(value)]

    found = held.map(whole)
    if not world.is_main:
        return {}
    optimizer = None if found.optimizer is None else found.optimizer.numbered()
    return {MAIN_PART: Part(found.weights, optimizer, found.average, {"world_size": world.size})}


class _Layout:
    """What each rank holds of every tensor: found out once, so that later only numbers travel."""

    def __init__(self, world: World, held: Holding) -> None:
        self._world = world
        mine = {key: (span.start, span.values.numel()) for key, span in held.every(Span).items()}
        self._ranks: list[dict[str, tuple[int, int]]] = world.gather_objects(mine)

    def _of(self, key: str) -> list[tuple[int, int]]:
        return [rank[key] for rank in self._ranks]

    def gather(self, key: str, span: Span) -> Tensor | None:
        """A whole tensor on rank 0's CPU; None elsewhere."""
        places = self._of(key)
        if all(length == span.total for _, length in places):  # the same on every rank
            return span.values.cpu().view(span.shape) if self._world.is_main else None
        # Collectives want equal lengths.
        row = torch.zeros(
            max(length for _, length in places),
            dtype=span.values.dtype,
            device=self._world.device,
        )
        row[: span.values.numel()] = span.values
        rows = self._world.gather(row)
        if rows is None:
            return None
        whole = torch.empty(span.total, dtype=row.dtype)
        for (start, length), piece in zip(places, rows, strict=True):
            whole[start : start + length] = piece[:length]
        return whole.view(span.shape)

    def deal_out(self, key: str, span: Span, whole: Tensor | None) -> None:
        """Fill `span` on every rank from rank 0's whole tensor, of any type."""
        places, device = self._of(key), self._world.device
        flat = None if whole is None else whole.reshape(-1)
        if all(length == span.total for _, length in places):
            row = span.values.to(device) if flat is None else flat.to(device, span.values.dtype)
            span.values.copy_(self._world.broadcast(row))
            return
        longest = max(length for _, length in places)
        rows = None
        if flat is not None:
            rows = torch.zeros(len(places), longest, dtype=span.values.dtype, device=device)
            for (start, length), row in zip(places, rows, strict=True):
                row[:length] = flat[start : start + length]
        mine = torch.empty(longest, dtype=span.values.dtype, device=device)
        self._world.scatter(None if rows is None else list(rows), mine)
        span.values.copy_(mine[: span.values.numel()])


class Outline(NamedTuple):
    """A tensor without its numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _outlined(value: Any) -> Any:
    if isinstance(value, Span):
        return Outline(value.shape, value.values.dtype)
    return Outline(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def _agreed(world: World, state: NamedState, weights: Mapping[str, Span]) -> NamedState:
    """The same entries on every rank: one without rows of a parameter may have no state of it."""
    joint: dict[str, dict[str, Any]] = {}
    for entries in world.gather_objects(
        {name: {k: _outlined(v) for k, v in entry.items()} for name, entry in state.entries.items()}
    ):
        for name, entry in entries.items():
            joint.setdefault(name, {}).update(entry)

    def own(name: str, key: str, outlined: Any) -> Any:
        entry = state.entries.get(name, {})
        if key in entry or not isinstance(outlined, Outline):
            return entry.get(key, outlined)
        return weights[name].zeros(outlined.dtype)

    return replace(
        state,
        entries={
            name: {key: own(name, key, outlined) for key, outlined in joint[name].items()}
            for name in state.names
            if name in joint
        },
    )


# -- any engine: reading ------------------------------------------------------------------------


def fill(
    world: World,
    into: Holding,
    parts: PartReader,
    fitting: Fitting,
    optimized: list[str] | None = None,
) -> NamedState | None:
    """Read what `into` holds, in place; all ranks take part.

    Args:
        world: the ranks.
        into: this rank's spans of weights and average.
        parts: the checkpoint.
        fitting: judges its names and shapes.
        optimized: the names of the optimizer's parameters in order; None: its state is not wanted.

    Returns:
        The optimizer's state, each tensor laid out as its parameter; None where there is none.

    Raises:
        CheckpointError: on every rank, when a part is missing, damaged or does not fit.
    """
    into = replace(into, optimizer=None)
    if not on_main(world, lambda: pieces.is_own(parts)):
        return _deal_out(world, into, parts, fitting, optimized)
    shards = together(world.gather_objects, lambda: _open(world, parts))
    source = together(world.gather_objects, lambda: _fitted(shards, into, fitting, optimized))
    if source is None:  # the model makes other tensors of them, which takes whole ones
        return _deal_out(world, into, parts, fitting, optimized)
    state = source.optimizer
    target = replace(into, optimizer=None if state is None else _room_for(state, into.weights))
    together(world.gather_objects, lambda: _read(source, target))
    return target.optimizer


def _open(world: World, parts: PartReader) -> Holding:
    """Open all shards, and read some in full: between them the ranks verify every one."""
    for name in parts.names():
        number = pieces.shard_number(name)
        if number is not None and number % world.size == world.rank:
            parts.verify(name)
    return pieces.open_shards(parts)


def _fitted(
    shards: Holding, into: Holding, fitting: Fitting, optimized: list[str] | None
) -> Holding | None:
    """What to read, by the names it has in the model; None where there is no such thing."""
    weights = _renamed(fitting, shards.weights)
    average = None
    if into.average is not None:
        average = _renamed(fitting, shards.average or {}, "its moving average: ")
    if weights is None or (into.average is not None and average is None):
        return None
    state = None if optimized is None else shards.optimizer
    if state is not None and optimized is not None:
        check_optimized(state.names, optimized)
    return Holding(weights, state, average)


def _renamed(
    fitting: Fitting, stored: Mapping[str, Stored], what: str = ""
) -> dict[str, Stored] | None:
    """The tensors by the names that the model gives them; None if it has made other ones."""
    outlines = {name: _meta(each) for name, each in stored.items()}
    known = {id(outline): stored[name] for name, outline in outlines.items()}
    fitted = _fit(fitting, outlines, what)
    if any(id(outline) not in known for outline in fitted.values()):
        return None
    return {name: known[id(outline)] for name, outline in fitted.items()}


def _meta(stored: Stored) -> Tensor:
    # What lies in one file is there without being read; a model may look at such, at the version
    # of its layout for example.
    if len(stored.spans) == 1:
        return stored.spans[0].in_shape()
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


def _fit(fitting: Fitting, state: Mapping[str, Tensor], what: str = "") -> Mapping[str, Tensor]:
    try:
        return fitting(state)
    except CheckpointError as e:
        raise CheckpointError(f"{what}{e}") from e


def _room_for(state: NamedState, weights: Mapping[str, Span]) -> NamedState:
    """Zeros for this rank's part of a state.

    Args:
        state: its tensors have a `shape` and a `dtype`.
        weights: this rank's spans of the parameters; a tensor shaped as its parameter is laid out
            as this, others are whole on every rank.
    """

    def room(name: str, value: Any) -> Any:
        if not isinstance(value, (Stored, Outline)):
            return value
        weight = weights.get(name)
        if weight is not None and weight.shape == value.shape:
            return weight.zeros(value.dtype)
        return whole_span(torch.zeros(value.shape, dtype=value.dtype))

    return replace(
        state,
        entries={
            name: {key: room(name, value) for key, value in entry.items()}
            for name, entry in state.entries.items()
        },
    )


def _read(source: Holding, target: Holding) -> None:
    stored = source.every(Stored)
    spans = target.every(Span)
    count = planning.read(stored, spans)
    logger.debug("read %d of %d numbers", count, sum(span.total for span in spans.values()))


def _deal_out(
    world: World,
    into: Holding,
    parts: PartReader,
    fitting: Fitting,
    optimized: list[str] | None,
) -> NamedState | None:
    """Rank 0 reads the checkpoint, and every rank gets what it holds of one tensor after another.

    A file that only rank 0 can see is enough.
    """
    tensors: dict[str, Tensor] = {}

    def open_whole() -> NamedState | None:
        for name in parts.names():
            if pieces.shard_number(name) is not None:  # a whole file is verified as it is opened
                parts.verify(name)
        part = pieces.whole(parts)
        average = None
        if into.average is not None:
            average = _fit(fitting, part.average or {}, "its moving average: ")
        state = None
        if optimized is not None and part.optimizer is not None:
            shapes = [into.weights[n].shape if n in into.weights else None for n in optimized]
            state = pieces.named(part, optimized, shapes)
        whole = Holding(_fit(fitting, part.model), state, average)
        outlined = whole.map(
            lambda key, value: (
                tensors.update({key: value}) or _outlined(value)
                if isinstance(value, Tensor)
                else value
            )
        )
        return outlined.optimizer

    state = on_main(world, open_whole)
    target = replace(into, optimizer=None if state is None else _room_for(state, into.weights))
    layout = _Layout(world, target)
    for key, span in target.every(Span).items():
        layout.deal_out(key, span, tensors.get(key))
    return target.optimizer
