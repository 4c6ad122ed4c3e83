"""What token sequences begin with in common, as a tree: what is read once for several of them.

Pure functions over ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from examples.few_shot.models.api import Ids
from fairseq_lite.generation.branch_plan import shared_length, sort_key

# Tokens that a stem has at least: it is a pass of its own, and sequences behind different stems
# cannot be read in one batch.
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


def grow(sequences: Sequence[Ids], shortest: int = SHORTEST, saves: int = 0) -> Stem:
    """The tree of some sequences; every one has at least one token behind its stem.

    Args:
        sequences: each of one token at least.
        shortest: tokens that a stem adds at least.
        saves: tokens that need not be read again for a stem's sake at least.
    """
    order = sorted(range(len(sequences)), key=lambda i: sort_key(sequences[i]))
    shared = [
        min(shared_length(sequences[a], sequences[b]), len(sequences[a]) - 1, len(sequences[b]) - 1)
        for a, b in pairwise(order)
    ]
    return _stem(order, shared, 0, shortest, saves)


def _stem(order: list[int], shared: list[int], depth: int, shortest: int, saves: int) -> Stem:
    """The stem of consecutive sequences, which have `depth` tokens in common.

    Args:
        order: their numbers.
        shared: how many tokens each has in common with the next.
        depth: where the stem ends.
        shortest: as for `grow`.
        saves: as for `grow`.
    """
    leaves: list[int] = []
    branches = []
    begin = 0
    for end in range(1, len(order) + 1):
        if end < len(order) and shared[end - 1] >= depth + shortest:
            continue
        inside = shared[begin : end - 1]
        if inside and len(inside) * (min(inside) - depth) >= saves:
            branches.append(_stem(order[begin:end], inside, min(inside), shortest, saves))
        else:
            leaves += order[begin:end]
        begin = end
    return Stem(depth, tuple(leaves), tuple(branches), order[0] if order else 0)


# Lengths that a batch has at most: how to divide n of them is found in n times so many steps.
_KINDS = 64


def batches(
    numbers: Sequence[int],
    lengths: Sequence[int],
    depth: int,
    *,
    max_tokens: int,
    max_cells: int,
    max_rows: int | None,
    pass_costs: int | None,
) -> Iterator[list[int]]:
    """Sequences of like length together, the longest first, so that all takes the least time.

    Args:
        numbers: of the sequences.
        lengths: of all of them.
        depth: how many tokens of each are read already.
        max_tokens: read at a time, padding included.
        max_cells: remembered at a time, those that are read already included.
        max_rows: sequences at a time; None: any number.
        pass_costs: tokens that can be read in the time that a pass takes however few it reads.
            None: nothing may be padded.
    """

    def rows(longest: int) -> int:
        """How many sequences are read at a time, if they are so long."""
        read = max(longest - depth, 1)
        return max(1, min(max_tokens // read, max_cells // max(longest, 1), max_rows or len(order)))

    order = sorted(numbers, key=lengths.__getitem__, reverse=True)
    # Where each length begins, and the end of all.
    starts = [i for i, n in enumerate(order) if not i or lengths[n] < lengths[order[i - 1]]]
    starts.append(len(order))
    # For every length the least cost of those before it, and where its last batches begin.
    best: list[tuple[int, int]] = [(0, 0)]
    for end in range(1, len(starts)):
        first = end - 1 if pass_costs is None else max(0, end - _KINDS)
        found = []
        for begin in range(first, end):
            longest, count = lengths[order[starts[begin]]], starts[end] - starts[begin]
            passes = -(-count // rows(longest))
            cost = passes * (pass_costs or 0) + count * (longest - depth)
            found.append((best[begin][0] + cost, begin))
        best.append(min(found))
    cuts = [len(starts) - 1]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    for begin, end in pairwise(reversed(cuts)):
        step = rows(lengths[order[starts[begin]]])
        for start in range(starts[begin], starts[end], step):
            yield order[start : min(start + step, starts[end])]
