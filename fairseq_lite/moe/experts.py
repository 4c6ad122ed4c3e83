"""The experts of a layer that this rank owns, each a feed-forward network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_lite.moe.exchange import Exchange
from fairseq_lite.moe.products import (
    Counts,
    compute_dtype,
    evened,
    linear_by_expert,
    linear_grouped,
    stacked,
    takes_grouped_products,
    uneven,
    wants_even_counts,
)
from fairseq_lite.parallel.experts import ExpertShard, drawn_for, mark, site
from fairseq_lite.parallel.free import ExpertHost
from fairseq_lite.parallel.local import is_spread


class Experts(ExpertHost):
    """All experts of a layer, of which this rank holds its own.

    The children are named by the experts' numbers among all, so a name means the same on every rank
    and at every world size.

    An expert is any module (N, D) -> (N, D). Of those that are `fc2(between(fc1(x)))`, with two
    linear maps of these names and a method `between` that goes row by row, the products of all
    experts are computed together; `between`, where it has no parameters, runs once for all rows.

    Args:
        num_experts: E.
        make: makes one expert.
        name: the layer's, which the experts' first weights depend on.
        sqrt_gradients: see `MoEOptions`.
        group_size: of an exchange group; None: as large as it can be.
    """

    exchange: Exchange

    def __init__(
        self,
        num_experts: int,
        make: Callable[[], nn.Module],
        name: str,
        *,
        sqrt_gradients: bool = False,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        world, layout = site(num_experts, group_size)
        self.name = name
        self.layout = layout
        self.exchange = Exchange(layout, world.split(layout.exchange_groups()))
        self._casts: dict[tuple[str, torch.dtype], Tensor] | None = None
        factor = layout.group_size**0.5 if sqrt_gradients else 1.0
        for expert in self.exchange.owned:
            with drawn_for(name, expert):
                module = make()
            mark(module, ExpertShard(expert, layout, factor))
            self.add_module(str(expert), module)

    def reset_parameters(self) -> None:
        """Draw each expert's weights again, from its own random numbers."""
        for expert, module in zip(self.exchange.owned, self.children(), strict=True):
            with drawn_for(self.name, expert):
                for part in module.modules():
                    reset = getattr(part, "reset_parameters", None)
                    if reset is not None:
                        reset()

    def forward(self, rows: Tensor, counts: Counts) -> Tensor:
        """Run this rank's experts.

        A sharded backend has their weights whole in here and nowhere else: callers call the module,
        and nobody outside looks at weights.

        Args:
            rows: (N, D), sorted by expert.
            counts: rows of each.

        Returns:
            (N, D).
        """
        experts = list(self.children())
        if all(map(_is_two_products, experts)):
            return self._together(experts, rows.to(compute_dtype(rows)), counts)
        # An expert without a row computes none, too: its gradient is then zero on every rank.
        parts = torch.split(rows, _numbers(counts))
        return torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])

    def _together(self, experts: list[Any], rows: Tensor, counts: Counts) -> Tensor:
        first = experts[0].fc1
        if takes_grouped_products(rows, first.in_features, first.out_features):
            return self._two_products(experts, rows, torch.as_tensor(counts, device=rows.device))
        numbers = _numbers(counts)
        if not wants_even_counts(rows):
            return self._two_products(experts, rows, numbers)
        rows, sizes = evened(rows, numbers)
        return uneven(self._two_products(experts, rows, sizes), numbers, sizes)

    def _two_products(self, experts: list[Any], rows: Tensor, counts: Tensor | list[int]) -> Tensor:
        inner = self._linear("fc1", [e.fc1 for e in experts], rows, counts)
        if _is_bare(experts[0]):
            inner = experts[0].between(inner)
        else:
            parts = torch.split(inner, _numbers(counts))
            inner = torch.cat([e.between(part) for e, part in zip(experts, parts, strict=True)])
        return self._linear("fc2", [e.fc2 for e in experts], inner, counts)

    def _linear(
        self, name: str, layers: list[nn.Linear], rows: Tensor, counts: Tensor | list[int]
    ) -> Tensor:
        weights = [layer.weight for layer in layers]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        params = weights + biases
        if isinstance(counts, Tensor):
            ends = counts.cumsum(0, dtype=torch.int32)
            weight = self._kept(f"{name}.weight", weights, rows.dtype)
            bias = self._kept(f"{name}.bias", biases, rows.dtype)
            return linear_grouped(rows, ends, params, weight, bias)
        as_rows: list[Sequence[Tensor]] = [
            each
            if _are(each, rows.dtype)
            else self._in_type(f"{name}.{kind}", each, rows.dtype).unbind(0)
            for kind, each in (("weight", weights), ("bias", biases))
        ]
        return linear_by_expert(rows, counts, params, *as_rows)

    def _kept(self, name: str, params: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
        """Copies that live on after a product: of another type, while no weight changes."""
        if self._casts is None or _are(params, dtype):
            return None
        return self._in_type(name, params, dtype)

    def _in_type(self, name: str, params: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """(E, …) copies of the experts' parameters, stacked."""
        if self._casts is None:
            return stacked(params, dtype)
        if (name, dtype) not in self._casts:
            self._casts[name, dtype] = stacked(params, dtype)
        return self._casts[name, dtype]


@contextmanager
def casts_kept(model: nn.Module) -> Iterator[None]:
    """Inside, copies of experts' weights in another type are made once and used again.

    For code during which no weight changes: the micro-batches of one update, with what activation
    checkpointing runs again of them, or a validation. Nobody could tell afterwards that a copy
    has become old: backends change weights behind torch's counters of changes. Weights that ranks
    share out are left alone, since whole copies would undo that; and weights that have the type
    already, of which copies would be as large again as the model's experts.

    Args:
        model: whose experts.
    """
    found = [
        module
        for module in model.modules()
        if isinstance(module, Experts) and _holds_its_weights(module)
    ]
    for experts in found:
        experts._casts = {}
    try:
        yield
    finally:
        for experts in found:
            experts._casts = None


def _holds_its_weights(experts: Experts) -> bool:
    """Whether this rank has them whole all the time: they are neither spread nor in a row."""
    params = list(experts.parameters())
    return bool(params) and not any(map(is_spread, params))


def _are(params: Sequence[Tensor], dtype: torch.dtype) -> bool:
    return all(p.dtype == dtype for p in params)


def _is_two_products(expert: nn.Module) -> bool:
    """Whether an expert is `fc2(between(fc1(x)))` and nothing hangs on calls of its parts."""
    parts = vars(expert)["_modules"]  # not by attribute: wrappers pass attributes on
    linear = [parts.get("fc1"), parts.get("fc2")]
    return (
        all(isinstance(p, nn.Linear) and type(p).forward is nn.Linear.forward for p in linear)
        and callable(getattr(expert, "between", None))
        and not any(m._forward_hooks or m._forward_pre_hooks for m in (expert, *linear))
    )


def _is_bare(expert: Any) -> bool:
    """Whether there are no parameters between an expert's two products."""
    known = sum(len(list(layer.parameters())) for layer in (expert.fc1, expert.fc2))
    return len(list(expert.parameters())) == known


def _numbers(counts: Counts) -> list[int]:
    return counts.tolist() if isinstance(counts, Tensor) else list(counts)
