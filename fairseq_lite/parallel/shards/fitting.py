"""Whether a checkpoint's tensors are those of a model, and by which names the model has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_lite.errors import CheckpointError
from fairseq_lite.parallel.shards.experts import without_others
from fairseq_lite.parallel.shards.layout import Outline
from fairseq_lite.parallel.shards.spans import (
    Holding,
    NamedState,
    Span,
    check_optimized,
    whole_span,
)
from fairseq_lite.parallel.shards.stored import Stored

Fitting = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Checks a checkpoint's names and shapes against the model, and gives them today's names."""


def fitting_of(model: nn.Module) -> Fitting:
    """The model's own judgement of a checkpoint's tensors, or a plain comparison."""
    own = getattr(model, "fitting_weights", None)
    if own is not None:
        fitting: Fitting = own
        return fitting

    def compare(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        state = without_others(model, state)
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


def fitted(
    shards: Holding, into: Holding, fitting: Fitting, optimized: list[str] | None
) -> Holding | None:
    """What to read, by the names it has in the model; None where there is no such thing."""
    weights = renamed(fitting, shards.weights)
    average = None
    if into.average is not None:
        average = renamed(fitting, shards.average or {}, "its moving average: ")
    if weights is None or (into.average is not None and average is None):
        return None
    state = None if optimized is None else shards.optimizer
    if state is not None and optimized is not None:
        check_optimized(state.names, optimized)
    return Holding(weights, state, average)


def renamed(
    fitting: Fitting, stored: Mapping[str, Stored], what: str = ""
) -> dict[str, Stored] | None:
    """The tensors by the names that the model gives them; None if it has made other ones."""
    outlines = {name: _meta(each) for name, each in stored.items()}
    known = {id(outline): stored[name] for name, outline in outlines.items()}
    fitting_ones = fit(fitting, outlines, what)
    if any(id(outline) not in known for outline in fitting_ones.values()):
        return None
    return {name: known[id(outline)] for name, outline in fitting_ones.items()}


def _meta(stored: Stored) -> Tensor:
    # What lies in one file is there without being read; a model may look at such, at the version
    # of its layout for example.
    if len(stored.spans) == 1:
        return stored.spans[0].in_shape()
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


def fit(fitting: Fitting, state: Mapping[str, Tensor], what: str = "") -> Mapping[str, Tensor]:
    """What `fitting` makes of a state.

    Raises:
        CheckpointError: as `fitting` says, with `what` before it.
    """
    try:
        return fitting(state)
    except CheckpointError as e:
        raise CheckpointError(f"{what}{e}") from e


def room_for(state: NamedState, weights: Mapping[str, Span]) -> NamedState:
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
