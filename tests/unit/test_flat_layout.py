"""Rows of tensors dealt out to ranks: every number has one place, and comes back to it."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_lite.parallel.shards.flat import FlatLayout

SHAPES = st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=5)


@given(SHAPES, st.integers(1, 6))
def test_every_number_is_on_one_rank(shapes: list[list[int]], ranks: int) -> None:
    names = [f"t{i}" for i in range(len(shapes))]
    layout = FlatLayout.of(names, shapes, ranks)
    row = torch.arange(1.0, layout.each * ranks + 1)
    row[layout.numel :] = 0
    pieces = [row.narrow(0, r * layout.each, layout.each) for r in range(ranks)]
    start = 0.0
    for slot in layout.slots:
        found = torch.cat([layout.parts(p, r)[slot.name] for r, p in enumerate(pieces)])
        assert found.tolist() == [start + i + 1 for i in range(prod(slot.shape))]
        begins = [layout.range_of(slot, r)[0] for r in range(ranks)]
        assert begins == sorted(begins)
        start += slot.numel
    for rank, piece in enumerate(pieces):
        again = layout.piece(layout.parts(piece, rank), rank, like=piece)
        assert torch.equal(again, piece)


def test_pieces_are_fairscales() -> None:
    """As torch.chunk cuts, which may leave the last ranks without a number."""
    layout = FlatLayout.of(["a", "b"], [[3], [1]], 3)
    assert (layout.numel, layout.each) == (4, 2)
    assert [layout.range_of(layout.slots[0], r) for r in range(3)] == [(0, 2), (2, 3), (3, 3)]
    assert [layout.range_of(layout.slots[1], r) for r in range(3)] == [(0, 0), (0, 1), (1, 1)]


def test_what_is_missing_is_zero() -> None:
    layout = FlatLayout.of(["a", "b"], [[2], [2]], 1)
    piece = layout.piece({"b": torch.ones(2)}, 0, like=torch.empty(0, dtype=torch.float64))
    assert piece.tolist() == [0, 0, 1, 1]
    assert piece.dtype == torch.float64


def test_a_part_is_a_view() -> None:
    layout = FlatLayout.of(["a", "b"], [[2], [3]], 2)
    piece = torch.zeros(3)
    layout.parts(piece, 1)["b"].fill_(1)
    assert piece.tolist() == [1, 1, 0]
    with pytest.raises(KeyError):
        layout.parts(piece, 1)["c"]
