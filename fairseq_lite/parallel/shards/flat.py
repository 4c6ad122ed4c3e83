"""Several tensors in one row, dealt out to ranks in pieces of equal length.

fairscale keeps the parameters of a layer so: one vector, of which a rank holds a piece that may
begin and end in the middle of a tensor. This says which numbers belong to which name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """The place of one tensor.

    Attributes:
        name: its name in the model.
        shape: its shape.
        start: where in the row it begins.
    """

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return prod(self.shape)


@dataclass(frozen=True)
class FlatLayout:
    """A row of tensors over ranks.

    Attributes:
        slots: the tensors, in order, without gaps.
        ranks: how many ranks share the row.
    """

    slots: tuple[Slot, ...]
    ranks: int

    @staticmethod
    def of(names: Sequence[str], shapes: Sequence[Sequence[int]], ranks: int) -> FlatLayout:
        """Lay out tensors one after another."""
        slots: list[Slot] = []
        start = 0
        for name, shape in zip(names, shapes, strict=True):
            slots.append(Slot(name, tuple(shape), start))
            start += slots[-1].numel
        return FlatLayout(tuple(slots), ranks)

    @property
    def numel(self) -> int:
        """Numbers in the row."""
        return sum(slot.numel for slot in self.slots)

    @property
    def each(self) -> int:
        """Numbers a rank holds; the last pieces are filled up with zeros."""
        return -(-self.numel // self.ranks)

    def range_of(self, slot: Slot, rank: int) -> tuple[int, int]:
        """Which numbers of a tensor a rank holds: (first, one past the last), equal for none."""
        first = rank * self.each - slot.start
        begin = min(max(first, 0), slot.numel)
        return begin, max(begin, min(first + self.each, slot.numel))

    def parts(self, piece: Tensor, rank: int) -> dict[str, Tensor]:
        """What a rank holds of each tensor: views (1-dim, often empty) of its piece."""
        parts = {}
        for slot in self.slots:
            begin, end = self.range_of(slot, rank)
            place = slot.start + begin - rank * self.each
            parts[slot.name] = piece.narrow(0, place if end > begin else 0, end - begin)
        return parts

    def piece(self, parts: Mapping[str, Tensor], rank: int, like: Tensor) -> Tensor:
        """The reverse of `parts`; zeros for a name that is missing, and where nothing is.

        Args:
            parts: 1-dim.
            rank: whose they are.
            like: has the type and device of the result.
        """
        piece = like.new_zeros(self.each)
        for name, place in self.parts(piece, rank).items():
            if name in parts:
                place.copy_(parts[name])
        return piece
