"""This rank's part of tensors that are spread over ranks (torch's `DTensor`).

Told by their methods and not by their class: importing that takes half a second, and runs that do
not shard need not.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def is_spread(tensor: Tensor) -> bool:
    """Whether each rank holds a part of `tensor` only."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this rank holds, sharing memory; a tensor of one rank as it is."""
    if not is_spread(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def rows_of(whole: Tensor, like: Any) -> Tensor:
    """The rows of `whole` that this rank holds of `like`, a view.

    Rows are dealt as torch deals them: the same number to each rank, rounded up, and what is left
    to the last ones, which may get none.

    Args:
        whole: a tensor with the global shape of `like`, or any other shape, which no rank shares.
        like: a parameter, spread over ranks by its first axis or held by one.
    """
    if not is_spread(like) or whole.shape != like.shape:
        return whole
    mesh = like.device_mesh
    each = -(-whole.size(0) // mesh.size())
    start = min(whole.size(0), each * mesh.get_local_rank())
    return whole.narrow(0, start, min(each, whole.size(0) - start))


def norm_of(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """The 2-norm of this rank's part of all `tensors` together: float32, 0-dim, on `device`."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for part in map(local, tensors):
        groups.setdefault((part.device, part.dtype), []).append(part)
    if not groups:
        return torch.zeros((), device=device)
    # In float32 whatever the tensors are: squares of half precision numbers overflow.
    norms = [
        torch.stack(torch._foreach_norm(parts, 2.0, dtype=_norm_dtype(dtype))).to(device)
        for (_, dtype), parts in groups.items()
    ]
    total: Tensor = torch.linalg.vector_norm(torch.cat(norms), dtype=torch.float32)
    return total


def _norm_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32
