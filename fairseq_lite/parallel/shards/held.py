"""What a rank holds of a model in training, found by asking the model and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fairseq_lite.parallel.api import StatefulOptimizer
from fairseq_lite.parallel.local import is_spread, local
from fairseq_lite.parallel.shards.spans import (
    Holding,
    NamedState,
    Span,
    parameter_names,
    whole_span,
)

SpanOf = Callable[[Tensor], Span]


def holding(
    model: nn.Module,
    optimizer: StatefulOptimizer | None,
    average: Mapping[str, Tensor] | None = None,
    span_of: SpanOf = whole_span,
) -> Holding:
    """What this rank holds of a model in training.

    Args:
        model: the model.
        optimizer: None: its state is not wanted.
        average: the moving average, laid out as the model's state.
        span_of: tells what this rank holds of a tensor of the model.
    """
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
            name: kept.setdefault(again.get(name, name), span_like(average[name], span, span_of))
            for name, span in weights.items()
        }
    named = None if optimizer is None else _named_state(model, optimizer, shared, span_of)
    return Holding(weights, named, spans)


def span_like(tensor: Tensor, like: Span, span_of: SpanOf) -> Span:
    """The span of a tensor that lies as `like` does: a DTensor, this rank's part, or all of it."""
    if is_spread(tensor):
        return span_of(tensor)
    if not like.is_whole and tensor.numel() == like.values.numel():
        return replace(like, values=tensor.detach().reshape(-1))
    return whole_span(tensor)


def _named_state(
    model: nn.Module, optimizer: StatefulOptimizer, weights: Mapping[str, Span], span_of: SpanOf
) -> NamedState:
    names = parameter_names(model, optimizer)
    state = optimizer.state_dict()
    entries = {
        names[number]: {
            key: _state_span(v, weights.get(names[number]), span_of) if isinstance(v, Tensor) else v
            for key, v in entry.items()
        }
        for number, entry in state["state"].items()
    }
    hyper = {k: v for k, v in state["param_groups"][0].items() if k != "params"}
    return NamedState(names, entries, hyper)


def _state_span(value: Tensor, weight: Span | None, span_of: SpanOf) -> Span:
    # Rules that do not go element by element keep tensors of fewer axes, on one rank.
    if weight is None or value.dim() != len(weight.shape):
        return whole_span(value)
    return span_like(value, weight, span_of)


@torch.no_grad()
def put_back(spans: Mapping[str, Span], tensors: Mapping[str, Tensor]) -> None:
    """Copy what was read beside a tensor that does not lie in memory in the order of its rows."""
    for name, span in spans.items():
        part = local(tensors[name])
        if not part.is_contiguous():
            part.copy_(span.in_shape())
