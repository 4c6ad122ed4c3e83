"""Linear maps of which every stretch of rows has its own: what experts compute.

Row after row would be slow, and a batched product wants stretches of one length. So on a CPU there
is one product for each expert, straight from its rows and into its place of the result; on CUDA,
where so many small products would leave the device idle between them, one grouped product.

Axes: N rows, E experts here, D width of the input, F of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Counts = Sequence[int] | Tensor
"""How many rows each expert has: numbers, or a tensor (E,) on any device."""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type in which products of `x` are computed: autocast's, where it is on."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def takes_grouped_products(rows: Tensor, *widths: int) -> bool:
    """Whether `linear_grouped` can do it, one product for all experts.

    Args:
        rows: what will be multiplied.
        widths: D, F.
    """
    return (
        rows.is_cuda
        and rows.size(0) > 0
        and rows.dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(rows.device) >= (8, 0)
        and not any(width % 8 for width in widths)  # a row begins at a multiple of 16 bytes
    )


def linear_by_expert(
    rows: Tensor,
    counts: Sequence[int],
    params: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> Tensor:
    """rows_e · weight_eᵀ + bias_e for each expert e.

    Args:
        rows: (N, D), sorted by expert.
        counts: rows of each.
        params: of all experts the weight, then of all the bias, where there are biases: what gets
            the gradients.
        weights: (F, D) each, of the type of `rows`: the parameters, or copies of them.
        biases: (F,) each, likewise; none without biases.

    Returns:
        (N, F).
    """
    out: Tensor = _ByExpert.apply(rows, list(counts), weights, biases, *params)  # type: ignore[no-untyped-call]
    return out


def linear_grouped(
    rows: Tensor,
    ends: Tensor,
    params: Sequence[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """As `linear_by_expert`, in one product.

    The product wants all weights in one tensor. A copy that the caller keeps anyway may as well be
    kept for the backward pass. Without one, that pass gets the parameters and makes its own:
    between the passes sharded ones are freed and fetched again, which no copy would be.

    Args:
        rows: (N, D), sorted by expert.
        ends: (E,) int32, where each expert's rows end.
        params: as there.
        weight: (E, F, D) of the type of `rows`, a copy that is kept; None: there is none.
        bias: (E, F), likewise; None where there are no biases, too.
    """
    out: Tensor = _Grouped.apply(rows, ends, weight, bias, *params)  # type: ignore[no-untyped-call]
    return out


def stacked(params: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A copy of tensors of one shape, (E, …), without their history."""
    first = params[0]
    out = torch.empty((len(params), *first.shape), dtype=dtype, device=first.device)
    torch._foreach_copy_(list(out.unbind(0)), [p.detach() for p in params])
    return out


def wants_even_counts(rows: Tensor) -> bool:
    """Whether products are faster where each expert's rows are a multiple of `EVEN`.

    In 16 bits on a CPU the library makes a program for each shape that it meets, which takes as
    long as a product of a hundred rows, and no two batches would have the same shapes.
    """
    return rows.device.type == "cpu" and rows.dtype.itemsize == 2


EVEN = 16


def evened(rows: Tensor, counts: list[int]) -> tuple[Tensor, list[int]]:
    """Rows with zeros after those of each expert, up to a multiple of `EVEN`.

    Returns:
        The rows, and how many each expert has now.
    """
    sizes = [-(-n // EVEN) * EVEN for n in counts]
    out: Tensor = _Evened.apply(rows, counts, sizes)  # type: ignore[no-untyped-call]
    return out, sizes


def uneven(rows: Tensor, counts: list[int], sizes: list[int]) -> Tensor:
    """The rows without those that `evened` put in.

    Args:
        rows: (sum of sizes, D).
        counts: rows of each expert, as at first.
        sizes: as `evened` returned them.
    """
    out: Tensor = _Uneven.apply(rows, counts, sizes)  # type: ignore[no-untyped-call]
    return out


class _Evened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], sizes: list[int]) -> Tensor:
        ctx.lengths = counts, sizes
        return _with_gaps(rows, counts, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _without_gaps(grads[0], *ctx.lengths), None, None


class _Uneven(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], sizes: list[int]) -> Tensor:
        ctx.lengths = counts, sizes
        return _without_gaps(rows, counts, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _with_gaps(grads[0], *ctx.lengths), None, None


def _with_gaps(rows: Tensor, counts: list[int], sizes: list[int]) -> Tensor:
    gap = rows.new_zeros(EVEN, rows.size(1))
    parts = []
    for part, size in zip(torch.split(rows, counts), sizes, strict=True):
        parts += [part, gap[: size - part.size(0)]]
    return torch.cat(parts)


def _without_gaps(rows: Tensor, counts: list[int], sizes: list[int]) -> Tensor:
    parts = zip(torch.split(rows, sizes), counts, strict=True)
    return torch.cat([part[:n] for part, n in parts])


class _ByExpert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        counts: list[int],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        *params: Tensor,
    ) -> Tensor:
        ctx.counts = counts
        ctx.types = [p.dtype for p in params]
        ctx.save_for_backward(rows, *weights)
        out = rows.new_empty(rows.size(0), weights[0].size(0))
        for part, into, weight, bias in zip_longest(
            torch.split(rows, counts), torch.split(out, counts), weights, biases
        ):
            _product(part, weight.t(), into, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        grad, counts = grads[0].contiguous(), ctx.counts
        needed = ctx.needs_input_grad
        result: list[Tensor | None] = [None] * len(needed)
        parts = torch.split(grad, counts)
        if needed[0]:
            grad_rows = torch.empty_like(rows)
            for part, into, weight in zip(
                parts, torch.split(grad_rows, counts), weights, strict=True
            ):
                _product(part, weight, into)
            result[0] = grad_rows
        scratch: Tensor | None = None
        for i, (part, taken) in enumerate(zip(parts, torch.split(rows, counts), strict=True)):
            if needed[4 + i]:
                wide = torch.empty_like(weights[i], dtype=ctx.types[i])
                into = wide
                if wide.dtype != grad.dtype:  # one small buffer for all, which stays in the cache
                    scratch = torch.empty_like(weights[i]) if scratch is None else scratch
                    into = scratch
                _product(part.t(), taken, into)
                result[4 + i] = wide if into is wide else wide.copy_(into)
            j = 4 + len(weights) + i
            if j < len(needed) and needed[j]:
                result[j] = part.sum(dim=0, dtype=ctx.types[j - 4])
        return tuple(result)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        ends: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *params: Tensor,
    ) -> Tensor:
        ctx.types = [p.dtype for p in params]
        weights, biases = params[: ends.size(0)], params[ends.size(0) :]
        ctx.kept = weight is not None
        ctx.save_for_backward(rows, ends, *(weights if weight is None else [weight]))
        if weight is None:
            weight = stacked(weights, rows.dtype)
        if bias is None and biases:
            bias = stacked(biases, rows.dtype)
        out = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
        if bias is not None:
            number = torch.arange(rows.size(0), dtype=ends.dtype, device=ends.device)
            expert = torch.searchsorted(ends, number, right=True)
            out += bias.index_select(0, expert)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, ends, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        count = ends.size(0)
        result: list[Tensor | None] = [None] * len(needed)
        grad = grads[0].contiguous()
        if needed[0]:
            weight = weights[0] if ctx.kept else stacked(weights, rows.dtype)
            result[0] = F.grouped_mm(grad, weight, offs=ends)
            del weight  # before gradients as large as it
        empty = ends.diff(prepend=ends.new_zeros(1)) == 0  # of which the product may say anything
        if any(needed[4 : 4 + count]):
            wide = F.grouped_mm(grad.t(), rows, offs=ends).to(ctx.types[0])
            wide.masked_fill_(empty[:, None, None], 0.0)
            result[4 : 4 + count] = wide.unbind(0)
        if any(needed[4 + count :]):
            # A sum over rows is a product with ones, of which the kernel wants 16 bytes.
            ones = rows.new_ones(rows.size(0), 8)
            sums = F.grouped_mm(grad.t(), ones, offs=ends)[..., 0].to(ctx.types[-1])
            result[4 + count :] = sums.masked_fill_(empty[:, None], 0.0).unbind(0)
        return tuple(g if wanted else None for g, wanted in zip(result, needed, strict=True))


def _product(a: Tensor, b: Tensor, into: Tensor, bias: Tensor | None = None) -> None:
    """a · b + bias, written to `into`; zero without terms."""
    if a.numel() == 0 or b.numel() == 0:
        into.zero_()
    elif a.dtype == torch.float16 and not a.is_cuda:
        # `Float16Products` knows these, and not those which write to a given place.
        into.copy_(torch.mm(a, b) if bias is None else torch.addmm(bias, a, b))
    elif bias is None:
        torch.mm(a, b, out=into)
    else:
        torch.addmm(bias, a, b, out=into)
