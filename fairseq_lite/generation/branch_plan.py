"""What is read once when many continuations of shared contexts are scored: a plan, without a model.

    requests -> units      a context with all that is asked behind it; equal contexts are one
    units    -> rows       a context and the tree of its continuations: what they begin with in
                           common stands there once, and of each all but its last token
    rows     -> steps      a stem, which many rows begin with, is read once for all of them; stems
                           lie behind other stems

A step says how much of what was read before it builds on, so that only one way from the root to a
stem is ever remembered. Places of tokens count the start symbol, which is at 0. Everything is in
the order of the contexts' tokens: requests in another order give the same plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fairseq_lite.data.indexed import Ids

# Tokens of a row's tree: each is compared with all others of the row.
_TREE_TOKENS = 256


@dataclass(frozen=True)
class Branches:
    """Continuations that share a context.

    Attributes:
        context: ids without a start symbol; there may be none.
        continuations: ids of each; there may be none.
    """

    context: Ids
    continuations: tuple[Ids, ...]


# -- units ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """A context and all that is asked behind it.

    Attributes:
        prefix: the start symbol and the context.
        continuations: distinct, in order.
        first: the place of its first result.
        context_scores: whether the context's tokens have results too, which come first.
        requests: how many requests it answers.
    """

    prefix: Ids
    continuations: tuple[Ids, ...]
    first: int
    context_scores: bool
    requests: int

    @property
    def results(self) -> int:
        """How many there are: one for each token that is scored."""
        return self.in_context + sum(map(len, self.continuations))

    @property
    def in_context(self) -> int:
        """How many of them are of the context."""
        return len(self.prefix) - 1 if self.context_scores else 0


@dataclass(frozen=True)
class Places:
    """Where the results of a request are.

    Attributes:
        context: those of its context; None: not asked for.
        continuations: those of each continuation.
    """

    context: slice | None
    continuations: tuple[slice, ...]


def collect(
    requests: Sequence[Branches], start: int, *, context_scores: bool = False
) -> tuple[list[Unit], list[Places]]:
    """Units in the order of their contexts, and the places of each request's results."""
    found: dict[bytes, list[int]] = {}
    for number, request in enumerate(requests):
        found.setdefault(sort_key(request.context), []).append(number)
    units: list[Unit] = []
    places: dict[int, Places] = {}
    first = 0
    for key in sorted(found):
        numbers = found[key]
        distinct = {sort_key(c): c for i in numbers for c in requests[i].continuations}
        ordered = sorted(distinct)
        context = np.asarray(requests[numbers[0]].context, dtype=np.int64)
        unit = Unit(
            np.concatenate([[start], context]),
            tuple(np.asarray(distinct[k], dtype=np.int64) for k in ordered),
            first,
            context_scores,
            len(numbers),
        )
        units.append(unit)
        at = first + unit.in_context
        own = slice(first, at) if context_scores else None
        where: dict[bytes, slice] = {}
        for k, continuation in zip(ordered, unit.continuations, strict=True):
            where[k] = slice(at, at + len(continuation))
            at += len(continuation)
        for i in numbers:
            places[i] = Places(own, tuple(where[sort_key(c)] for c in requests[i].continuations))
        first = at
    return units, [places[i] for i in range(len(requests))]


def sort_key(ids: Ids) -> bytes:
    """Bytes that sort as the ids do."""
    return np.asarray(ids).astype(">i4").tobytes()


def shared_length(a: Ids, b: Ids) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n


# -- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tree:
    """Tokens of continuations behind a context, each after those it follows.

    Attributes:
        tokens: (N,).
        depths: (N,) how many others a token follows.
        paths: of each continuation the tokens that are read: all but its last.
    """

    tokens: Ids
    depths: Ids
    paths: tuple[Ids, ...]

    def sight(self) -> npt.NDArray[np.bool_]:
        """(N, N), True where the first index's token follows the second's, or is it."""
        seen = np.zeros((len(self.tokens),) * 2, dtype=np.bool_)
        known = 0
        for path in self.paths:
            if len(path) and path[-1] >= known:
                old = int(np.searchsorted(path, known))
                seen[np.ix_(path[old:], path[:old])] = True
                seen[known : path[-1] + 1, known : path[-1] + 1] = np.tri(
                    len(path) - old, dtype=np.bool_
                )
                known = int(path[-1]) + 1
        return seen


def grow(continuations: Sequence[Ids]) -> Tree:
    """The tree of continuations that are in order."""
    tokens: list[Ids] = []
    depths: list[Ids] = []
    paths: list[Ids] = []
    count, before, path = 0, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    for continuation in continuations:
        read = continuation[:-1]
        old = shared_length(before, read)
        new = len(read) - old
        tokens.append(read[old:])
        depths.append(np.arange(old, len(read)))
        path = np.concatenate([path[:old], np.arange(count, count + new)])
        paths.append(path)
        count, before = count + new, read
    if not paths:
        return Tree(before, before, ())
    return Tree(np.concatenate(tokens), np.concatenate(depths), tuple(paths))


@dataclass(frozen=True)
class Row:
    """A context and (some of) its continuations, read together.

    Attributes:
        unit: whose it is: a number in the list of units.
        prefix: the start symbol and the context.
        tree: the continuations.
        at: (M,) after which token something is asked: its number, the prefix's first, then the
            tree's.
        targets: (M,) what is asked for there.
        into: (M,) where the results belong.
    """

    unit: int
    prefix: Ids
    tree: Tree
    at: Ids
    targets: Ids
    into: Ids

    @property
    def size(self) -> int:
        """How many tokens it has."""
        return len(self.prefix) + len(self.tree.tokens)


def rows_of(number: int, unit: Unit, tree_tokens: int) -> Iterator[Row]:
    """The rows of a unit: one, or several that have about `tree_tokens` tokens behind the context.

    Args:
        number: the unit's.
        unit: what is asked.
        tree_tokens: more are in a tree only where a single continuation has more.
    """
    last, into = len(unit.prefix) - 1, unit.first + unit.in_context
    context = np.arange(unit.in_context)
    for part in _parts(unit.continuations, tree_tokens):
        tree = grow(part)
        # The first token of each is asked for behind the context.
        at = [np.concatenate([[last], last + 1 + path]) for path in tree.paths]
        asked = [a[: len(c)] for a, c in zip(at, part, strict=True)]
        count = sum(map(len, part))
        # The last token of a context that nothing is asked behind need not be read.
        prefix = unit.prefix if count else unit.prefix[:-1]
        yield Row(
            number,
            prefix,
            tree,
            np.concatenate([context, *asked]),
            np.concatenate([unit.prefix[1 : 1 + len(context)], *part]),
            np.concatenate([unit.first + context, np.arange(into, into + count)]),
        )
        context = context[:0]
        into += count


def _parts(continuations: Sequence[Ids], tree_tokens: int) -> Iterator[Sequence[Ids]]:
    """Stretches of them; one that is empty where there are none."""
    first, size = 0, 0
    for i, continuation in enumerate(continuations):
        read = len(continuation[:-1])
        before = continuations[i - 1] if i > first else continuation[:0]
        new = read - shared_length(before[:-1], continuation[:-1])
        if i > first and size + new > tree_tokens:
            yield continuations[first:i]
            first, size, new = i, 0, read
        size += new
    yield continuations[first:]


# -- stems ----------------------------------------------------------------------------------------


@dataclass
class Step:
    """A stem, read behind part of those before, and the rows that begin with it.

    Attributes:
        keep: how many tokens of those read before this stem begins with.
        stem: all its tokens, those included; none where rows begin with nothing in common.
        rows: those that are read behind it.
        batches: the same, as many at a time as may be.
    """

    keep: int
    stem: Ids
    rows: list[Row] = field(default_factory=list)
    batches: list[list[Row]] = field(default_factory=list)

    @property
    def room(self) -> int:
        """The most tokens of a row with its stem; zero without a stem."""
        return max((row.size for row in self.rows), default=0) if len(self.stem) else 0


def plan(
    units: Sequence[Unit], *, max_tokens: int, worth: int, tree_tokens: int = _TREE_TOKENS
) -> list[Step]:
    """How to answer units.

    Args:
        units: in order.
        max_tokens: of a batch; a single row may have more.
        worth: a stem is read by itself where that saves so many tokens.
        tree_tokens: of a row.

    Returns:
        Steps, to be done in this order.
    """
    tree_tokens = max(1, min(tree_tokens, max_tokens))
    rows = [
        row
        for number, unit in enumerate(units)
        for row in rows_of(number, unit, tree_tokens)
        if len(row.at)
    ]
    steps = _steps(rows, worth)
    for step in steps:
        step.batches = _batches(step.rows, len(step.stem), max_tokens)
    return [step for step in steps if step.rows or len(step.stem)]


def _steps(rows: Sequence[Row], worth: int) -> list[Step]:
    """A step for what has no stem, then one for each stem, those they lie behind first."""
    steps = [Step(0, np.empty(0, dtype=np.int64))]
    owner = np.zeros(len(rows), dtype=np.int64)
    ways = [(len(rows), 0)]  # of the stems around: rows that begin with them end there, and tokens
    for family, readers in zip(*_readers(rows, worth), strict=True):
        while ways[-1][0] <= family.first:
            ways.pop()
        keep = ways[-1][1]
        if (readers - 1) * (family.depth - keep) >= worth:
            owner[family.first : family.last] = len(steps)
            steps.append(Step(keep, rows[family.first].prefix[: family.depth]))
            ways.append((family.last, family.depth))
    for row, number in zip(rows, owner.tolist(), strict=True):
        steps[number].rows.append(row)
    return steps


class _Family(NamedTuple):
    """Neighbours, `rows[first:last]`, that begin with more tokens in common than with others.

    Attributes:
        depth: how many tokens.
    """

    first: int
    last: int
    depth: int


def _readers(rows: Sequence[Row], worth: int) -> tuple[list[_Family], list[int]]:
    """Families, those within others behind them; how often each would read what it shares.

    Rows of a family within it that is worth a stem, counted from where it parts, are one reader.
    """
    families = sorted(_families(rows), key=lambda f: (f.first, -f.last))
    around: list[int] = []
    parents: list[int | None] = []
    for number, family in enumerate(families):
        while around and families[around[-1]].last <= family.first:
            around.pop()
        parents.append(around[-1] if around else None)
        around.append(number)
    readers = [family.last - family.first for family in families]
    for number in reversed(range(len(families))):
        family, parent = families[number], parents[number]
        if parent is None:
            continue
        length = family.depth - families[parent].depth
        left = 1 if (readers[number] - 1) * length >= worth else readers[number]
        readers[parent] -= family.last - family.first - left
    return families, readers


def _families(rows: Sequence[Row]) -> Iterator[_Family]:
    """The inner nodes of the tree that the prefixes make, which are in order.

    They are the intervals of their longest common prefixes (Abouelhoda et al. 2004, section 2.2).
    """
    depths = [shared_length(a.prefix, b.prefix) for a, b in pairwise(rows)]
    around: list[tuple[int, int]] = [(0, 0)]
    for last, depth in enumerate([*depths, 0], start=1):
        first = last - 1
        while around[-1][1] > depth:
            first, deeper = around.pop()
            yield _Family(first, last, deeper)
        if around[-1][1] < depth:
            around.append((first, depth))


def _batches(rows: Sequence[Row], read: int, max_tokens: int) -> list[list[Row]]:
    """Rows, shortest first, in batches of at most `max_tokens` tokens behind the stem."""
    found: list[list[Row]] = []
    room = 0
    for row in sorted(rows, key=lambda row: row.size):
        size = row.size - read
        if not found or size > room:
            found.append([])
            room = max_tokens
        found[-1].append(row)
        room -= size
    return found


# -- ranks ----------------------------------------------------------------------------------------


class Share(NamedTuple):
    """Consecutive units: `units[first:last]`."""

    first: int
    last: int


def shares(units: Sequence[Unit], size: int) -> list[Share]:
    """Divide units among ranks: neighbours stay together, so that few stems are read twice.

    The greatest number of tokens that a rank has to read is as small as that allows, counting what
    each unit does not share with the one before it.
    """
    whole = np.array([len(u.prefix) + u.results - u.in_context for u in units], dtype=np.int64)
    saved = [shared_length(a.prefix, b.prefix) for a, b in pairwise(units)]
    upto = np.cumsum(whole - np.array([0, *saved], dtype=np.int64)[: len(units)])

    def divided(limit: int) -> list[Share]:
        found, first = [], 0
        for _ in range(size):
            last = first
            if first < len(units):
                # The first of a rank is read whole; it is there, however large.
                budget = upto[first] + max(limit - whole[first], 0)
                last = int(np.searchsorted(upto, budget, side="right"))
            found.append(Share(first, last))
            first = last
        return found

    low, high = 0, int(whole.sum())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if divided(middle)[-1].last == len(units) else (middle + 1, high)
    return divided(low)
