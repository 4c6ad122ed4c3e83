"""Tokens become rows, one for each expert that a token goes to, and rows become tokens again.

Both directions are gathers, so that no two rows write to one place: an addition by index would go
row after row on a CPU and in random order on a GPU. On a CPU a gather is an embedding bag, which
reads each row once, adds up in float32 and writes the sum, and leaves no tensor between.

Axes: S tokens, K choices of a token, N rows (the choices that found a place), D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Places(NamedTuple):
    """Which row is whose.

    Attributes:
        choice: (N,) of each row, the choice it is: token * K + number of the choice.
        token: (N,) of each row, its token.
        row: (S, K) of each choice, its row; N where it has none.
        all: whether every choice has a row.
    """

    choice: Tensor
    token: Tensor
    row: Tensor
    all: bool

    @classmethod
    def of(cls, order: Tensor, tokens: int, choices: int) -> Places:
        """The places of rows in a given order.

        Args:
            order: (N,), the choices as token * K + number.
            tokens: S.
            choices: K.
        """
        count = order.size(0)
        complete = count == tokens * choices
        rows = order.new_empty(tokens * choices)
        if not complete:
            rows.fill_(count)
        rows[order] = torch.arange(count, device=order.device)
        token = order if choices == 1 else order.div(choices, rounding_mode="floor")
        return cls(order, token, rows.view(tokens, choices), complete)


def dispatch(x: Tensor, places: Places) -> Tensor:
    """(S, D) -> (N, D): each token once for each of its rows."""
    rows: Tensor = _Dispatch.apply(x, places)  # type: ignore[no-untyped-call]
    return rows


def combine(rows: Tensor, weights: Tensor, places: Places) -> Tensor:
    """(N, D) -> (S, D): the weighted sum of each token's rows; zero for a token without any.

    Args:
        rows: (N, D).
        weights: (S, K) float32, of each choice.
        places: which row is whose.

    Returns:
        Of the type of `rows`; products and sums are in float32.
    """
    out: Tensor = _Combine.apply(rows, weights, places)  # type: ignore[no-untyped-call]
    return out


def permute(rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
    """Rows in another order.

    Args:
        rows: (N, D).
        order: (N,), the number of the row that comes to each place.
        back: the permutation that undoes it.
    """
    out: Tensor = _Permute.apply(rows, order, back)  # type: ignore[no-untyped-call]
    return out


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return _take(x, places.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sums(grads[0], None, ctx.places), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, places: Places) -> Tensor:
        ctx.places = places
        ctx.save_for_backward(rows, weights)
        return _sums(rows, weights, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights = ctx.saved_tensors
        places: Places = ctx.places
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[1]:
            dots = _dots(grads[0], places.token, rows).to(weights.dtype)
            grad_weights = torch.stack(_of_choices(dots, places), dim=1)
        if ctx.needs_input_grad[0]:
            weight = weights.flatten().index_select(0, places.choice)
            grad_rows = _take(grads[0], places.token, weight)
        return grad_rows, grad_weights, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return _take(rows, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return _take(grads[0], back), None, None


def _take(rows: Tensor, index: Tensor, weights: Tensor | None = None) -> Tensor:
    """rows[index], each times its weight."""
    if _in_bags(rows):
        return _bags(rows, index, torch.arange(index.size(0)), weights)
    taken = rows.index_select(0, index)
    if weights is not None:
        taken = (taken * weights[:, None]).to(rows.dtype)
    return taken


def _sums(rows: Tensor, weights: Tensor | None, places: Places) -> Tensor:
    """(S, D): the sum of each token's rows, times their weights (S, K)."""
    if _in_bags(rows):
        tokens, choices = places.row.shape
        index = places.row.flatten()
        starts = torch.arange(0, tokens * choices, choices)
        weight = None if weights is None else weights.flatten()
        if not places.all:
            real = index < places.choice.size(0)
            sizes = real.view(tokens, choices).sum(1)
            index, starts = index[real], sizes.cumsum(0) - sizes
            weight = None if weight is None else weight[real]
        return _bags(rows, index, starts, weight)
    total = None
    for k, part in enumerate(_of_choices(rows, places)):
        term = part if weights is None else part * weights[:, k, None]
        total = term if total is None else total + term
    assert total is not None
    return total.to(rows.dtype)


def _dots(grad: Tensor, token: Tensor, rows: Tensor) -> Tensor:
    """(N,) float32: of each row, its product with the gradient (S, D) of its token.

    Block after block, so that what is between stays in a processor's cache.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    out = torch.empty(rows.size(0), dtype=wide, device=rows.device)
    size = _BLOCK if rows.device.type == "cpu" else max(rows.size(0), 1)
    for part, which, into in zip(rows.split(size), token.split(size), out.split(size), strict=True):
        torch.sum(grad.index_select(0, which) * part, dim=1, dtype=wide, out=into)
    return out


_BLOCK = 512


def _in_bags(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.size(0) > 0


def _bags(rows: Tensor, index: Tensor, starts: Tensor, weights: Tensor | None) -> Tensor:
    """The sums of bags of rows.

    Args:
        rows: (N, D).
        index: (M,) numbers of rows, bag after bag.
        starts: (B,) where in `index` each bag begins.
        weights: (M,) of each number.

    Returns:
        (B, D).
    """
    if weights is not None and weights.dtype != rows.dtype:
        # The kernel wants weights of the type of the rows. In 16 bits a second one, for the rest
        # that the first leaves, makes up for it.
        high = weights.to(rows.dtype)
        low = (weights - high).to(rows.dtype)
        weights = torch.stack([high, low], dim=1).flatten()
        index, starts = index.repeat_interleave(2), starts * 2
    if index.numel() == 0:
        return rows.new_zeros(starts.size(0), rows.size(1))
    out: Tensor = torch.embedding_bag(rows, index, starts, False, 0, False, weights)[0]
    return out


def _of_choices(rows: Tensor, places: Places) -> list[Tensor]:
    """K tensors (S, …): the row of each token's first choice, of its second; zero without one."""
    if not places.all:
        rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
    return [rows.index_select(0, row) for row in places.row.unbind(1)]
