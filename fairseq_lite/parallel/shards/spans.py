"""What one rank holds of a tensor, and of everything a checkpoint keeps.

A `Span` is a stretch of a tensor's numbers in row-major order. Whole tensors, the rows that torch's
`fully_shard` gives to a rank and the pieces of fairscale's flat parameters are all spans, so that
one format of shards serves every engine and every number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fairseq_lite.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """A stretch of a tensor.

    Attributes:
        shape: of the whole tensor.
        start: how many of its numbers come before, row by row.
        values: the numbers (1-dim); shares memory with what it was made of.
    """

    shape: tuple[int, ...]
    start: int
    values: Tensor

    @property
    def total(self) -> int:
        """How many numbers the whole tensor has."""
        return prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return self.values.numel() == self.total

    def zeros(self, dtype: torch.dtype) -> Span:
        """The same stretch of a tensor of zeros."""
        return replace(self, values=torch.zeros_like(self.values, dtype=dtype))

    def in_shape(self) -> Tensor:
        """The numbers as the whole tensor, or as its rows; 1-dim where a row is cut."""
        if self.is_whole:
            return self.values.view(self.shape)
        row = prod(self.shape[1:])
        if self.start % row or self.values.numel() % row:
            return self.values
        return self.values.view(self.values.numel() // row, *self.shape[1:])


def whole_span(tensor: Tensor) -> Span:
    """The span of a tensor that this rank holds in full."""
    return Span(tuple(tensor.shape), 0, tensor.detach().reshape(-1))


@dataclass(frozen=True)
class NamedState:
    """An optimizer's state by the names of its parameters.

    Attributes:
        names: of all parameters, in the order that numbers them in torch's layout.
        entries: name -> key -> a tensor (in the form that the `Holding` has) or a plain value; a
            parameter that was never updated has none.
        hyper: the hyper-parameters.
    """

    names: list[str]
    entries: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    hyper: Mapping[str, Any] = field(default_factory=dict)

    def numbered(self) -> dict[str, Any]:
        """In torch's layout, spans in their shapes."""
        return {
            "state": {
                number: {
                    key: value.in_shape() if isinstance(value, Span) else value
                    for key, value in self.entries[name].items()
                }
                for number, name in enumerate(self.names)
                if name in self.entries
            },
            "param_groups": [{**self.hyper, "params": list(range(len(self.names)))}],
        }


@dataclass(frozen=True)
class Holding:
    """The tensors of a model in training: spans that a rank holds, or another form of them.

    Attributes:
        weights: by the names of the model's state, in its order. Names of one shared tensor have
            the same object.
        optimizer: its state, or None.
        average: the moving average, laid out as `weights`, or None.
    """

    weights: Mapping[str, Any]
    optimizer: NamedState | None = None
    average: Mapping[str, Any] | None = None

    def map(self, change: Callable[[str, Any], Any]) -> Holding:
        """The same with every value replaced.

        Args:
            change: gets the key of a value (`model.NAME`, `average.NAME`, `optimizer.NAME.KEY`)
                and the value; plain values of the optimizer's state too.
        """

        def section(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: change(f"{kind}.{name}", value) for name, value in values.items()}

        optimizer = self.optimizer
        if optimizer is not None:
            entries = {n: section(f"optimizer.{n}", e) for n, e in optimizer.entries.items()}
            optimizer = replace(optimizer, entries=entries)
        average = None if self.average is None else section("average", self.average)
        return Holding(section("model", self.weights), optimizer, average)

    def every(self, kind: type[T]) -> dict[str, T]:
        """The values of one type, by key."""
        found: dict[str, T] = {}
        self.map(lambda key, v: found.update({key: v}) if isinstance(v, kind) else None)
        return found


def parameter_names(model: nn.Module, optimizer: Any) -> list[str]:
    """The names of an optimizer's parameters, in its order.

    Of a shared parameter it is the first name; one that is not the model's is only numbered.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    params: Iterable[Tensor] = (p for group in optimizer.param_groups for p in group["params"])
    return [names.get(id(p), f"parameter{number}") for number, p in enumerate(params)]


def check_optimized(stored: list[str], wanted: list[str]) -> None:
    """Refuse an optimizer state that was made for other parameters.

    Raises:
        CheckpointError: naming the first.
    """
    if stored != wanted:
        odd = sorted(set(stored) ^ set(wanted)) or ["their order"]
        raise CheckpointError(
            f"the optimizer state is for {len(stored)} parameters, the model has {len(wanted)}; "
            f"they differ in {odd[0]}: use --reset-optimizer"
        )


def cut_flat(
    entry: Mapping[str, Any], shapes: Sequence[tuple[int, ...] | None]
) -> list[dict[str, Any]]:
    """One flat state tensor for all parameters, as fairseq's fp16 writes it, cut by parameter.

    Raises:
        CheckpointError: it has another length.
    """
    sizes = [prod(shape or ()) for shape in shapes]
    cut: list[dict[str, Any]] = [{} for _ in shapes]
    for key, value in entry.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            for each in cut:
                each[key] = value
            continue
        if value.numel() != sum(sizes):
            raise CheckpointError(
                f"the optimizer state {key!r} has {value.numel()} values, the model {sum(sizes)} "
                "parameters: use --reset-optimizer"
            )
        views = torch.split(value.flatten(), sizes)
        for each, shape, view in zip(cut, shapes, views, strict=True):
            each[key] = view.view(shape or ())
    return cut


def digest(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's numbers as they lie in memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: object, where: str) -> torch.dtype:
    """The reverse of `dtype_name`.

    Raises:
        CheckpointError: there is no such type.
    """
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"{where}: holds numbers of the unknown type {name!r}")
    return found
