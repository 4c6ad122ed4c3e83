"""Matrix products in float16 on CPUs that have no instructions for them.

There torch falls back to plain loops, 20 times slower than its products in float32, and --fp16
would be of no use. Here factors, which are float16 numbers, are multiplied and added up in float32
and the result is rounded to float16: what a GPU does. Nothing else changes, neither types nor what
autograd keeps, so overflow and underflow are those of float16, in the backward pass too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        _aten.addbmm.default,
        _aten.addmm.default,
        _aten.addmv.default,
        _aten.baddbmm.default,
        _aten.bmm.default,
        _aten.convolution.default,
        _aten.convolution_backward.default,
        _aten.dot.default,
        _aten.mm.default,
        _aten.mv.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
    }
)


def cpu_knows_float16() -> bool:
    """Whether this CPU multiplies matrices of float16 by itself."""
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None)
    return known is not None and bool(known())


class Float16Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, products of float16 factors on the CPU take this way."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in _PRODUCTS or not any(map(_is_half, args)):
            return func(*args, **kwargs)
        args = tuple(a.float() if _is_half(a) else a for a in args)
        kwargs = {k: v.float() if _is_half(v) else v for k, v in kwargs.items()}
        out = func(*args, **kwargs)
        if func is _aten._scaled_dot_product_flash_attention_for_cpu.default:
            return out[0].half(), out[1]  # the second is kept in float32 for the backward pass
        if isinstance(out, Tensor):
            return out.half()
        return tuple(None if o is None else o.half() for o in out)


def _is_half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float16 and value.device.type == "cpu"
