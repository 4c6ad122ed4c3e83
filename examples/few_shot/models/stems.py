"""What token sequences begin with in common, as a tree: what is read once for several of them.

Pure functions over ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from examples.few_shot.models.api import Ids
from fairseq_lite.generation.branch_plan import shared_length, sort_key

# A stem of fewer tokens costs as much as reading it with every sequence: it is a pass of its own,
# and sequences behind different stems cannot be read in one batch.
SHORTEST = 32


@dataclass(frozen=True)
class Stem:
    """A place in the tree.

    Attributes:
        depth: how many tokens lead here.
        leaves: numbers of the sequences that go on from here alone.
        branches: stems that go on from here.
        first: the number of a sequence that comes through here.
    """

    depth: int
    leaves: tuple[int, ...]
    branches: tuple[Stem, ...]
    first: int


def grow(sequences: Sequence[Ids], shortest: int = SHORTEST) -> Stem:
    """The tree of some sequences; every one has at least one token behind its stem.

    Args:
        sequences: each of one token at least.
        shortest: tokens that a stem adds at least.
    """
    order = sorted(range(len(sequences)), key=lambda i: sort_key(sequences[i]))
    shared = [
        min(shared_length(sequences[a], sequences[b]), len(sequences[a]) - 1, len(sequences[b]) - 1)
        for a, b in pairwise(order)
    ]
    return _stem(order, shared, 0, shortest)


def _stem(order: list[int], shared: list[int], depth: int, shortest: int) -> Stem:
    """The stem of consecutive sequences, which have `depth` tokens in common.

    Args:
        order: their numbers.
        shared: how many tokens each has in common with the next.
        depth: where the stem ends.
        shortest: as for `grow`.
    """
    leaves: list[int] = []
    branches = []
    begin = 0
    for end in range(1, len(order) + 1):
        if end < len(order) and shared[end - 1] >= depth + shortest:
            continue
        if end - begin > 1:
            inside = shared[begin : end - 1]
            branches.append(_stem(order[begin:end], inside, min(inside), shortest))
        else:
            leaves.append(order[begin])
        begin = end
    return Stem(depth, tuple(leaves), tuple(branches), order[0] if order else 0)


def batches(
    numbers: Sequence[int],
    sequences: Sequence[Ids],
    depth: int,
    *,
    max_tokens: int,
    max_cells: int,
    max_rows: int | None,
) -> Iterator[list[int]]:
    """Sequences of equal length together, the longest first; nothing is padded.

    Args:
        numbers: of the sequences.
        sequences: all of them.
        depth: how many tokens of each are read already.
        max_tokens: read at a time.
        max_cells: remembered at a time, those that are read already included.
        max_rows: sequences at a time; None: any number.
    """
    by_length: dict[int, list[int]] = {}
    for number in numbers:
        by_length.setdefault(len(sequences[number]), []).append(number)
    for length in sorted(by_length, reverse=True):
        rows = max(1, min(max_tokens // max(1, length - depth), max_cells // length))
        rows = min(rows, max_rows or rows)
        members = by_length[length]
        for start in range(0, len(members), rows):
            yield members[start : start + rows]
