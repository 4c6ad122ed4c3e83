"""Checkpoints of a model that is spread over ranks: one file, or one shard a rank.

`gather` collects one tensor after the other on rank 0's CPU, and the file is the one that
`legacy_ddp` writes. `shard` asks no other rank. `load` reads either: of shards, which may come
from any number of ranks, each rank reads its own numbers only; a whole file is read by rank 0,
which deals them out.

The first half is for models of torch's DTensors, the second for whatever can say what it holds.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fairseq_lite.parallel.agreement import on_main, together
from fairseq_lite.parallel.api import MAIN_PART, Part, PartReader, StatefulOptimizer
from fairseq_lite.parallel.local import local
from fairseq_lite.parallel.shards import held, parted, pieces, planning
from fairseq_lite.parallel.shards.experts import Spread
from fairseq_lite.parallel.shards.fitting import Fitting, fit, fitted, room_for
from fairseq_lite.parallel.shards.layout import Layout, gathered, outlined
from fairseq_lite.parallel.shards.sets import shard_name
from fairseq_lite.parallel.shards.spans import (
    Holding,
    NamedState,
    Span,
    whole_span,
)
from fairseq_lite.parallel.shards.stored import Stored
from fairseq_lite.parallel.world import World

logger = logging.getLogger(__name__)

# -- models of DTensors -------------------------------------------------------------------------


def load(
    world: World,
    model: nn.Module,
    optimizer: StatefulOptimizer | None,
    parts: PartReader,
    average: Mapping[str, Tensor] | None = None,
) -> None:
    """`parted.load` for a model whose parameters are DTensors.

    Args:
        world: the ranks.
        model: its parameters are split by their first axis over all ranks.
        optimizer: its state tensors are this rank's rows, or the same on all ranks.
        parts: the checkpoint.
        average: tensors by the names of the model's state, laid out alike.

    Raises:
        CheckpointError: on every rank, when a part is missing, damaged or does not fit.
    """
    spread = Spread.of(model)
    parted.load(world, model, optimizer, parts, average, spread, span_of=span_of, read=fill)


def holding(
    model: nn.Module,
    optimizer: StatefulOptimizer | None,
    average: Mapping[str, Tensor] | None = None,
) -> Holding:
    """What this rank holds of a model of DTensors (or plain tensors) in training."""
    return held.holding(model, optimizer, average, span_of)


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


# -- any engine: writing ------------------------------------------------------------------------


def shard(world: World, holds: Holding, spread: Spread | None = None) -> Mapping[str, Part]:
    """This rank's shard; asks no other rank.

    Args:
        world: the ranks.
        holds: this rank's spans.
        spread: how the model's experts lie; None: it has none.
    """
    planned = planning.collect(holds.every(Span))
    manifest: dict[str, Any] = {"world_size": world.size, "shard": world.rank}
    if spread is not None:
        manifest |= spread.manifest(holds.weights)
        holds = parted.named_for_all(holds, spread)
    part = pieces.to_part(holds.map(lambda key, value: planned.get(key, value)), manifest)
    return {shard_name(world.rank): part}


def gather(world: World, holds: Holding) -> Mapping[str, Part]:
    """All that ranks hold, on rank 0's CPU; nothing on other ranks. All take part."""
    found = gathered(world, holds)
    if not world.is_main:
        return {}
    found = found.map(lambda key, value: value.in_shape() if isinstance(value, Span) else value)
    optimizer = None if found.optimizer is None else found.optimizer.numbered()
    return {MAIN_PART: Part(found.weights, optimizer, found.average, {"world_size": world.size})}


# -- any engine: reading ------------------------------------------------------------------------


def fill(
    world: World,
    into: Holding,
    parts: PartReader,
    fitting: Fitting,
    optimized: list[str] | None = None,
    spread: Spread | None = None,
) -> NamedState | None:
    """Read what `into` holds, in place; all ranks take part.

    Args:
        world: the ranks.
        into: this rank's spans of weights and average.
        parts: the checkpoint.
        fitting: judges its names and shapes.
        optimized: the names of the optimizer's parameters in order; None: its state is not wanted.
        spread: how the model's experts lie; None: it has none.

    Returns:
        The optimizer's state, each tensor laid out as its parameter; None where there is none.

    Raises:
        CheckpointError: on every rank, when a part is missing, damaged or does not fit.
    """
    if spread is not None:
        return parted.fill(world, into, parts, fitting, optimized, spread)
    into = replace(into, optimizer=None)
    if not on_main(world, lambda: pieces.has_tables(parts)):
        return _deal_out(world, into, parts, fitting, optimized)
    shards = together(world.gather_objects, lambda: _open(world, parts))
    source = together(world.gather_objects, lambda: fitted(shards, into, fitting, optimized))
    if source is None:  # the model makes other tensors of them, which takes whole ones
        return _deal_out(world, into, parts, fitting, optimized)
    state = source.optimizer
    target = replace(into, optimizer=None if state is None else room_for(state, into.weights))
    together(world.gather_objects, lambda: _read(source, target))
    return target.optimizer


def _open(world: World, parts: PartReader) -> Holding:
    """Open all shards, and read some in full: between them the ranks verify every one."""
    parted.verify_share(world, parts)
    return pieces.open_parts(parts)


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
        pieces.verify_all(parts)
        part = pieces.whole(parts)
        average = None
        if into.average is not None:
            average = fit(fitting, part.average or {}, "its moving average: ")
        state = None
        if optimized is not None and part.optimizer is not None:
            shapes = [into.weights[n].shape if n in into.weights else None for n in optimized]
            state = pieces.named(part, optimized, shapes)
        whole = Holding(fit(fitting, part.model), state, average)
        lined_out = whole.map(
            lambda key, value: (
                tensors.update({key: value}) or outlined(value)
                if isinstance(value, Tensor)
                else value
            )
        )
        return lined_out.optimizer

    state = on_main(world, open_whole)
    target = replace(into, optimizer=None if state is None else room_for(state, into.weights))
    layout = Layout(world, target)
    for key, span in target.every(Span).items():
        layout.deal_out(key, span, tensors.get(key))
    return target.optimizer
