"""Tokens become rows, one for each expert that a token goes to, and rows become tokens again.

Both directions are gathers, so that no two rows write to one place: an addition by index would go
row after row on a CPU and in random order on a GPU.

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
        return x.index_select(0, places.token)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total, *others = _of_choices(grads[0], ctx.places)
        for other in others:
            total += other
        return total, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, places: Places) -> Tensor:
        ctx.places = places
        ctx.save_for_backward(rows, weights)
        wide = weights.dtype
        parts = zip(_of_choices(rows, places), weights.unbind(1), strict=True)
        (part, weight), *others = parts
        total = part.to(wide) * weight[:, None]
        for part, weight in others:
            total = torch.addcmul(total, part.to(wide), weight[:, None])
        return total.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights = ctx.saved_tensors
        places: Places = ctx.places
        grad_rows = grad_weights = None
        grad = grads[0].index_select(0, places.token).to(weights.dtype)  # (N, D)
        if ctx.needs_input_grad[1]:
            dots = (grad * rows).sum(dim=1)
            grad_weights = torch.stack(_of_choices(dots, places), dim=1)
        if ctx.needs_input_grad[0]:
            weight = weights.flatten().index_select(0, places.choice)
            grad_rows = grad.mul_(weight[:, None]).to(rows.dtype)
        return grad_rows, grad_weights, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return grads[0].index_select(0, back), None, None


def _of_choices(rows: Tensor, places: Places) -> list[Tensor]:
    """K tensors (S, …): the row of each token's first choice, of its second; zero without one."""
    if not places.all:
        rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
    return [rows.index_select(0, row) for row in places.row.unbind(1)]
