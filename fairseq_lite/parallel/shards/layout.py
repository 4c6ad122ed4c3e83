"""Which rank holds which numbers, and tensors that travel between them accordingly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairseq_lite.parallel.groups import Group
from fairseq_lite.parallel.shards.spans import Holding, NamedState, Span, whole_span
from fairseq_lite.parallel.world import World


class Layout:
    """What each rank holds of every tensor: found out once, so that later only numbers travel."""

    def __init__(self, world: World, held: Holding) -> None:
        self._world = world
        mine = {key: (span.start, span.values.numel()) for key, span in held.every(Span).items()}
        self._ranks: list[dict[str, tuple[int, int]]] = world.gather_objects(mine)

    def _of(self, key: str) -> list[tuple[int, int]]:
        return [rank[key] for rank in self._ranks]

    def gather_in(self, group: Group, key: str, span: Span) -> Tensor | None:
        """A tensor of which only a group's ranks hold parts: whole on its first rank's CPU."""
        places = [self._ranks[rank][key] for rank in group.ranks]
        first = group.place == 0
        if all(length == span.total for _, length in places):
            return span.values.cpu().view(span.shape) if first else None
        lengths = [length for _, length in places]
        send = [0] * group.size
        send[0] = span.values.numel()
        receive = lengths if first else [0] * group.size
        values = span.values.to(self._world.device)
        pieces = torch.split(group.all_to_all(values, send, receive).cpu(), receive)
        if not first:
            return None
        whole = torch.empty(span.total, dtype=values.dtype)
        for (start, length), piece in zip(places, pieces, strict=True):
            whole[start : start + length] = piece
        return whole.view(span.shape)

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


def outlined(value: Any) -> Any:
    """A tensor's outline; other values as they are."""
    if isinstance(value, Span):
        return Outline(value.shape, value.values.dtype)
    return Outline(tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def agreed(world: World, state: NamedState, weights: Mapping[str, Span]) -> NamedState:
    """The same entries on every rank: one without rows of a parameter may have no state of it."""
    joint: dict[str, dict[str, Any]] = {}
    for entries in world.gather_objects(
        {name: {k: outlined(v) for k, v in entry.items()} for name, entry in state.entries.items()}
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


def gathered(world: World, held: Holding) -> Holding:
    """All that ranks hold, whole spans in place of parts, on rank 0's CPU; None on other ranks.

    All ranks take part and hold parts of the same tensors.
    """
    if held.optimizer is not None:
        held = replace(held, optimizer=agreed(world, held.optimizer, held.weights))
    layout = Layout(world, held)
    return once(held, layout.gather)


def once(held: Holding, change: Callable[[str, Span], Tensor | None]) -> Holding:
    """Replace every span by that of a whole tensor; one of several names once for all of them."""
    done: dict[int, Span | None] = {}

    def replaced(key: str, value: Any) -> Any:
        if not isinstance(value, Span):
            return value
        if id(value) not in done:
            whole = change(key, value)
            done[id(value)] = None if whole is None else whole_span(whole)
        return done[id(value)]

    return held.map(replaced)
