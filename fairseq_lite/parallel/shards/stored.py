"""Tensors that lie in several files, found but not yet read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from fairseq_lite.errors import CheckpointError
from fairseq_lite.parallel.shards.spans import Span

Allocate = Callable[[tuple[int, ...], torch.dtype], Tensor]


@dataclass
class Stored:
    """A tensor that lies in several shards.

    Attributes:
        shape: of the whole.
        dtype: of its numbers.
        spans: where it is; once they are in order, without gaps or overlaps.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    spans: list[Span] = field(default_factory=list)

    @property
    def total(self) -> int:
        """How many numbers the whole tensor has."""
        return prod(self.shape)

    @property
    def place(self) -> tuple[object, ...]:
        """Equal for two names of one shared tensor only."""
        places = ((span.values.data_ptr(), span.values.numel()) for span in self.spans)
        return (self.shape, self.dtype, *places)

    def put_in_order(self, where: str) -> None:
        """Keep the spans that make up the tensor, each number once.

        Raises:
            CheckpointError: some numbers are in no shard.
        """
        kept: list[Span] = []
        reached = 0
        for span in sorted(self.spans, key=lambda s: (s.start, -s.values.numel())):
            end = span.start + span.values.numel()
            if end <= reached:
                continue  # empty, or a copy: what is not spread over ranks is in every shard
            kept.append(span)
            reached = end
        lack = self.total - sum(span.values.numel() for span in kept)
        if lack:
            raise CheckpointError(
                f"{where}: {lack} of its {self.total} numbers are in no shard, or in two"
            )
        self.spans = kept or self.spans[:1]

    def copy_to(self, target: Span) -> None:
        """Overwrite a stretch of the tensor with the numbers stored."""
        end = target.start + target.values.numel()
        for span in self.spans:
            first = max(span.start, target.start)
            last = min(span.start + span.values.numel(), end)
            if first < last:
                source = span.values[first - span.start : last - span.start]
                target.values[first - target.start : last - target.start].copy_(source)

    def read(self, allocate: Allocate) -> Tensor:
        """The whole tensor; the stored one itself where a single shard has all of it."""
        if len(self.spans) == 1:
            return self.spans[0].in_shape()
        whole = allocate(self.shape, self.dtype)
        flat = whole.view(-1)
        for span in self.spans:
            flat[span.start : span.start + span.values.numel()] = span.values
        return whole
