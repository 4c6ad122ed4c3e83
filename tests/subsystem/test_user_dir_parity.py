"""DeepSpeed's layer and the native one on several ranks train as one process does.

Several rows share their processes: starting those takes longer than training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fairseq_lite.parallel.world import SingleWorld, World
from fairseq_lite.training.trainer import Trainer
from tests.helpers import moe
from tests.helpers.distributed import run_distributed
from tests.helpers.user_dir import TINY, USER_DIR, needs_deepspeed

pytestmark = [pytest.mark.timeout(600), needs_deepspeed]

# Batches differ in size, so with a capacity the processes of a group have different ones.
DROPLESS, TIGHT = ("--no-drop-tokens",), ("--capacity-factor", "0.7")
BACKENDS = moe.BACKENDS | moe.ZERO


class Row(NamedTuple):
    """A row of the table; `ep` is --ep-world-size, `top` the choices of a token."""

    processes: int
    ep: int
    top: int
    layer: str = "deepspeed"
    capacity: tuple[str, ...] = DROPLESS
    backend: str = "legacy_ddp"
    experts: int = 4

    def __str__(self) -> str:
        words = [f"{self.processes}ranks", f"ep{self.ep}", self.backend, self.layer]
        words += [f"E{self.experts}", f"top{self.top}", *(w.strip("-") for w in self.capacity)]
        return "-".join(words)


# Processes, experts, choices and backends: any two values meet in a row, or all in all rows.
# Four ranks with two experts have each of them twice.
PROCESSES, EXPERTS, TOPS = (1, 2, 4), (2, 4, 8), (1, 2)
TABLE = [
    Row(processes, min(processes, experts), top, backend=backend, experts=experts)
    for (p, processes), (e, experts), (t, top), (b, backend) in itertools.product(
        *map(enumerate, (PROCESSES, EXPERTS, TOPS, BACKENDS))
    )
    if moe.WHOLE_TABLES or ((p + e + b) % 3 == 0 and (p + b) % 2 == t)
]
MORE = [
    Row(1, 1, 2, capacity=TIGHT),
    Row(2, 1, 1),
    Row(2, 1, 2, "native"),
    Row(2, 2, 1, "native"),
    Row(2, 2, 2, capacity=TIGHT),
    Row(2, 2, 2, "native", TIGHT),
    Row(2, 1, 2, capacity=TIGHT, backend="fully_sharded"),
    Row(2, 1, 1, backend="zero2"),
    Row(4, 2, 1),
    Row(4, 4, 2, capacity=TIGHT),
]


def flags(row: Row) -> list[str]:
    return [
        *("--user-dir", str(USER_DIR), *TINY),
        *("--deepspeed_moe", "enc,dec", "--num-experts", str(row.experts)),
        *("--top-k", str(row.top), "--moe-layer", row.layer),
        *("--ep-world-size", str(row.ep), *row.capacity),
        *("--criterion", "model_and_base", "--base-criterion", "label_smoothed_cross_entropy"),
        *("--base-criterion-config", '{"label_smoothing": 0.1}'),
        *("--loss-weights", '{"base_crit": 1, "experts_gate_loss": 3}'),
        *moe.TRAINING,
        *BACKENDS[row.backend],
        *("--distributed-world-size", str(row.processes)),
    ]


BUGS = (moe.undivided, moe.gate_alone, moe.own_experts_in_the_norm)
FAULTY = Row(2, 2, 2)
FULL = Row(2, 2, 1, capacity=TIGHT)
RANDOM = Row(2, 2, 1, capacity=(*TIGHT, "--use-rts"))

Run = tuple[Row, Callable[[Trainer], None] | None]
"""A row, and the bug that is put in."""


def runs(processes: int) -> list[Run]:
    rows: list[Run] = [(row, None) for row in (*TABLE, *MORE) if row.processes == processes]
    more: list[Run] = [(FULL, None), (RANDOM, None), *((FAULTY, bug) for bug in BUGS)]
    return [*rows, *more] if processes == 2 else rows


def _train_all(world: World, data: str, todo: Sequence[Run]) -> list[moe.Trained]:
    try:
        return [moe.train(world, Path(data), flags(row), plant=bug) for row, bug in todo]
    finally:
        if world.size == 1:
            world.close()  # what a sharded run of one process formed


@cache
def on_ranks(data: str, processes: int) -> list[dict[Run, Any]]:
    """By rank, then by row and bug."""
    todo = runs(processes)
    ranks = run_distributed(
        *(_train_all, processes, data, todo), user_dir=str(USER_DIR), timeout=560
    )
    return [dict(zip(todo, rank, strict=True)) for rank in ranks]


def one_process(data: str, row: Row) -> moe.Trained:
    """What one process does, with the native layer."""
    return _one_process(data, row._replace(processes=1, ep=1, layer="native", backend="legacy_ddp"))


@cache
def _one_process(data: str, row: Row) -> moe.Trained:
    return moe.train(SingleWorld(), Path(data), flags(row))


@pytest.mark.parametrize("row", [*TABLE, *MORE], ids=str)
def test_ranks_train_as_one_process(toy_data, row):
    ranks = on_ranks(str(toy_data), row.processes)
    moe.assert_alike(one_process(str(toy_data), row), [rank[row, None] for rank in ranks])


def test_any_two_values_meet():
    columns = ("processes", "experts", "top", "backend")
    values = dict(zip(columns, (PROCESSES, EXPERTS, TOPS, BACKENDS), strict=True))
    for one, other in itertools.combinations(columns, 2):
        met = {(getattr(row, one), getattr(row, other)) for row in TABLE}
        assert met == set(itertools.product(values[one], values[other])), (one, other)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_bug_put_in_is_noticed(toy_data, bug):
    several = [rank[FAULTY, bug] for rank in on_ranks(str(toy_data), 2)]
    assert several[0].losses
    with pytest.raises(AssertionError):
        moe.assert_alike(one_process(str(toy_data), FAULTY), several)


def test_a_full_top_1_expert_takes_no_process_down(toy_data):
    ranks = on_ranks(str(toy_data), 2)
    for found in (rank[row, None] for rank in ranks for row in (FULL, RANDOM)):
        assert all(torch.isfinite(torch.tensor([*found.losses, *found.norms])))
    one = moe.train(SingleWorld(), toy_data, flags(FULL._replace(processes=1, ep=1)))
    moe.assert_alike(one, [rank[FULL, None] for rank in ranks])
