"""Checkpoints of a model with experts: a part that all ranks share, and one of each expert.

No rank collects what others hold of experts: the first owner of an expert writes it. Every rank
reads the part that all share and those of its own experts, from whatever the checkpoint is made of.
So what a file holds does not depend on the number of ranks, and any number of them can read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fairseq_lite.errors import CheckpointError
from fairseq_lite.parallel.agreement import together
from fairseq_lite.parallel.api import MAIN_PART, Part, PartReader, StatefulOptimizer
from fairseq_lite.parallel.shards import held, pieces
from fairseq_lite.parallel.shards.experts import Spread
from fairseq_lite.parallel.shards.fitting import Fitting, fit, fitted, fitting_of, room_for
from fairseq_lite.parallel.shards.layout import Layout, agreed, once
from fairseq_lite.parallel.shards.sets import SHARED_PART, expert_name, head
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

# -- writing ------------------------------------------------------------------------------------


def expert_parts(world: World, holds: Holding, spread: Spread) -> Mapping[str, Part]:
    """The parts that this rank writes; all ranks take part.

    Args:
        world: the ranks.
        holds: this rank's spans. Of shared tensors it may have any stretch, or all; of its experts'
            too, between it and the ranks that own the same. Of a tensor of the optimizer's state
            that other ranks hold alone it has an empty span.
        spread: how the experts lie.
    """
    if holds.optimizer is not None:
        holds = replace(holds, optimizer=agreed(world, holds.optimizer, holds.weights))
    layout = Layout(world, holds)
    replicas = world.split(spread.layout.replica_groups())

    def gather_experts(key: str, span: Span) -> Tensor | None:
        return layout.gather_in(replicas, key, span)

    found: dict[str, Holding] = {SHARED_PART: once(_of(holds, spread, None), layout.gather)}
    for expert in spread.owned(world.rank):
        found[expert_name(expert)] = once(_of(holds, spread, expert), gather_experts)
    return _as_parts(world, found, holds, spread)


def whole_parts(world: World, holds: Holding, spread: Spread) -> Mapping[str, Part]:
    """The same for ranks that hold whole tensors; asks no other rank."""
    found = {SHARED_PART: _of(holds, spread, None)}
    for expert in spread.owned(world.rank):
        found[expert_name(expert)] = _of(holds, spread, expert)
    return _as_parts(world, found, holds, spread)


def _as_parts(
    world: World, found: Mapping[str, Holding], holds: Holding, spread: Spread
) -> dict[str, Part]:
    """Those that this rank writes."""
    manifest = {"world_size": world.size, **spread.manifest(holds.weights)}
    parts: dict[str, Part] = {}
    if world.is_main:
        common = named_for_all(found[SHARED_PART], spread)
        parts[SHARED_PART] = pieces.to_part(common, manifest)
    for expert in spread.written_by(world.rank):
        own = named_for_all(found[expert_name(expert)], spread)
        parts[expert_name(expert)] = pieces.to_part(own, {**manifest, "expert": expert})
    return parts


def named_for_all(holds: Holding, spread: Spread) -> Holding:
    """The same with the optimizer's parameters listed as all ranks list them."""
    if holds.optimizer is None:
        return holds
    names = spread.templates(holds.optimizer.names)
    return replace(holds, optimizer=replace(holds.optimizer, names=names))


def _of(holds: Holding, spread: Spread, expert: int | None) -> Holding:
    """The tensors of one expert; None: those that no expert has."""

    def chosen(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: v for name, v in values.items() if spread.expert_of(name) == expert}

    optimizer = holds.optimizer
    if optimizer is not None:
        optimizer = replace(optimizer, entries=chosen(optimizer.entries))
    average = None if holds.average is None else chosen(holds.average)
    return Holding(chosen(holds.weights), optimizer, average)


# -- reading ------------------------------------------------------------------------------------


def fill(
    world: World,
    into: Holding,
    parts: PartReader,
    fitting: Fitting,
    optimized: list[str] | None = None,
    spread: Spread | None = None,
) -> NamedState | None:
    """Read what `into` holds, in place, from any checkpoint; all ranks take part and see its files.

    Args:
        world: the ranks.
        into: this rank's spans of weights and average.
        parts: the checkpoint.
        fitting: judges its names and shapes; it passes over experts that this rank has not.
        optimized: the names of this rank's parameters in the optimizer's order; None: its state is
            not wanted.
        spread: how the experts lie; None: the model has none.

    Returns:
        The optimizer's state, each tensor laid out as its parameter; None where there is none.

    Raises:
        CheckpointError: on every rank, when a part is missing, damaged or does not fit.
    """
    into = replace(into, optimizer=None)
    reading = _Reading(world, into, parts, fitting, optimized, spread)
    together(world.gather_objects, lambda: verify_share(world, parts))
    reading.check_visible()
    source = together(world.gather_objects, reading.source)
    state = source.optimizer
    target = replace(into, optimizer=None if state is None else room_for(state, into.weights))
    together(world.gather_objects, lambda: _copy(source, target))
    return target.optimizer


Read = Callable[
    [World, Holding, PartReader, Fitting, "list[str] | None", "Spread | None"], "NamedState | None"
]


def load(
    world: World,
    model: nn.Module,
    optimizer: StatefulOptimizer | None,
    parts: PartReader,
    average: Mapping[str, Tensor] | None = None,
    spread: Spread | None = None,
    *,
    span_of: held.SpanOf = whole_span,
    read: Read = fill,
) -> None:
    """Fill a model, its optimizer and its average; all ranks take part.

    Args:
        world: the ranks.
        model: its shared tensors are whole on every rank, its experts' on their owners; else
            `span_of` tells what this rank holds of them.
        optimizer: laid out likewise; None: its state is not wanted.
        parts: the checkpoint.
        average: tensors by the names of the model's state, laid out likewise.
        spread: how the experts lie; None: the model has none.
        span_of: what this rank holds of a tensor.
        read: fills spans, as `fill` does.

    Raises:
        CheckpointError: on every rank, when a part is missing, damaged or does not fit.
    """
    into = held.holding(model, None, average, span_of)
    names = None if optimizer is None else parameter_names(model, optimizer)
    state = read(world, into, parts, fitting_of(model), names, spread)
    held.put_back(into.weights, model.state_dict())
    if into.average is not None and average is not None:
        held.put_back(into.average, average)
    if optimizer is not None and state is not None:
        optimizer.load_state_dict(state.numbered())


def load_weights(world: World, model: nn.Module, parts: PartReader) -> None:
    """Fill a model of plain tensors, which may have been built under `spread_over`.

    Args:
        world: the ranks over which its experts are spread; all of them take part.
        model: has all experts, or those of this rank.
        parts: the checkpoint, whatever it is made of.

    Raises:
        CheckpointError: on every rank, when a part is missing, damaged or does not fit.
    """
    load(world, model, None, parts, spread=Spread.of(model))


def verify_share(world: World, parts: PartReader) -> None:
    """Compare some parts with their checksums: between them the ranks compare every one.

    Raises:
        CheckpointError: one of this rank's share is missing or damaged.
    """
    for number, name in enumerate(pieces.needed(parts)):
        if number % world.size == world.rank:
            parts.verify(name)


@dataclass(frozen=True)
class _Reading:
    """What `fill` was asked for."""

    world: World
    into: Holding
    parts: PartReader
    fitting: Fitting
    optimized: list[str] | None
    spread: Spread | None

    def check_visible(self) -> None:
        """Refuse a checkpoint of which some ranks see other files than the first."""
        seen: list[tuple[str, ...]] = self.world.gather_objects(self.parts.names())
        for rank, names in enumerate(seen):
            for name in sorted(set(seen[0]) ^ set(names)):
                raise CheckpointError(
                    f"{self.parts.where(name)}: rank 0 and rank {rank} do not both see it: every "
                    "rank reads its experts, so put checkpoints where all of them can"
                )

    def source(self) -> Holding:
        """What to read, by the names it has in the model, as `Stored`."""
        opened = self._opened()
        named = replace(opened, optimizer=None)
        found = fitted(named, self.into, self.fitting, None)
        if found is None:  # the model makes other tensors of them, which takes whole ones
            found = self._remade(named)
        return replace(found, optimizer=self._optimizer(opened.optimizer))

    def _opened(self) -> Holding:
        parts, spread = self.parts, self.spread
        if not pieces.is_in_parts(parts):
            part = parts.open(MAIN_PART)
            state = None
            if self.optimized is not None and part.optimizer is not None:
                state = pieces.named(part, *self._all_optimized())
            return pieces.stored_whole(Holding(part.model, state, part.average))
        if spread is None:
            return pieces.open_parts(parts)
        count = pieces.num_experts(parts)
        if count not in (None, spread.num_experts):
            raise CheckpointError(
                f"{parts.where(head(parts.names()))}: is of {count} experts, the model has "
                f"{spread.num_experts}: give the flags it was trained with"
            )
        return pieces.open_parts(parts, spread.owned(self.world.rank))

    def _all_optimized(self) -> tuple[list[str], list[tuple[int, ...] | None]]:
        """The names and shapes of one process's parameters, in the optimizer's order."""
        assert self.optimized is not None
        names, weights = self.optimized, self.into.weights
        own = {name: name for name in names}
        if self.spread is not None:
            names = self.spread.everywhere(names)
            own = self.spread.counterparts()
        own_names = [own.get(name, name) for name in names]
        return names, [weights[n].shape if n in weights else None for n in own_names]

    def _optimizer(self, state: NamedState | None) -> NamedState | None:
        """What this rank's parameters have of a state."""
        if state is None or self.optimized is None:
            return None
        check_optimized(state.names, self._all_optimized()[0])
        entries = {n: state.entries[n] for n in self.optimized if n in state.entries}
        return NamedState(self.optimized, entries, state.hyper)

    def _remade(self, opened: Holding) -> Holding:
        """The tensors that a model makes of what was stored, in memory."""
        whole = pieces.assembled(opened, pieces.in_memory)
        average = None
        if self.into.average is not None:
            average = fit(self.fitting, whole.average or {}, "its moving average: ")
        return pieces.stored_whole(Holding(fit(self.fitting, whole.model), None, average))


def _copy(source: Holding, target: Holding) -> None:
    stored = source.every(Stored)
    for key, span in target.every(Span).items():
        stored[key].copy_to(span)
