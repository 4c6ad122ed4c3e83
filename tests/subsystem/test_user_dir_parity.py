"""DeepSpeed's layer and the native one on several ranks train as one process does.

Several cases share their processes: starting those takes longer than training.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_lite.parallel.world import SingleWorld, World
from tests.helpers import moe
from tests.helpers.distributed import run_distributed
from tests.helpers.user_dir import TINY, USER_DIR, needs_deepspeed

pytestmark = [pytest.mark.timeout(240), needs_deepspeed]

# (processes, ep-world-size, top-k, layer, capacity flags, backend). Batches differ in size, so with
# a capacity the processes of a group have different ones.
DROPLESS, TIGHT = ("--no-drop-tokens",), ("--capacity-factor", "0.7")
CASES = [
    (2, 1, 1, "deepspeed", DROPLESS, "legacy_ddp"),
    (2, 1, 2, "native", DROPLESS, "legacy_ddp"),
    (2, 2, 1, "deepspeed", DROPLESS, "legacy_ddp"),
    (2, 2, 1, "native", DROPLESS, "legacy_ddp"),
    (2, 2, 2, "deepspeed", DROPLESS, "legacy_ddp"),
    (2, 2, 2, "deepspeed", TIGHT, "legacy_ddp"),
    (2, 2, 2, "native", TIGHT, "legacy_ddp"),
    (2, 2, 1, "deepspeed", DROPLESS, "fully_sharded"),
    (2, 1, 2, "deepspeed", TIGHT, "fully_sharded"),
    (2, 2, 2, "deepspeed", DROPLESS, "zero1"),
    (2, 1, 1, "deepspeed", DROPLESS, "zero2"),
    (4, 2, 1, "deepspeed", DROPLESS, "legacy_ddp"),
    (4, 4, 2, "deepspeed", TIGHT, "legacy_ddp"),
]


def flags(top_k: int, layer: str, capacity: tuple[str, ...], ep: int = 1) -> list[str]:
    return [
        *("--user-dir", str(USER_DIR), *TINY),
        *("--deepspeed_moe", "enc,dec", "--num-experts", "4", "--top-k", str(top_k)),
        *("--moe-layer", layer, "--ep-world-size", str(ep), *capacity),
        *("--criterion", "model_and_base", "--base-criterion", "label_smoothed_cross_entropy"),
        *("--base-criterion-config", '{"label_smoothing": 0.1}'),
        *("--loss-weights", '{"base_crit": 1, "experts_gate_loss": 3}'),
        *moe.TRAINING,
    ]


def _train_all(world: World, data: str, cases: list[Any], bugs: list[Any] | None = None) -> Any:
    """Each case in turn, or the one case with each bug in turn."""
    found = []
    for (_, ep, top_k, layer, capacity, backend), bug in (
        [(case, None) for case in cases] if bugs is None else [(cases[0], bug) for bug in bugs]
    ):
        made = [*flags(top_k, layer, capacity, ep), *(moe.BACKENDS | moe.ZERO)[backend]]
        made += ["--distributed-world-size", str(world.size)]
        found.append(moe.train(world, Path(data), made, plant=bug))
    return found


@cache
def one_process(data: str, top_k: int, capacity: tuple[str, ...]) -> moe.Trained:
    return moe.train(SingleWorld(), Path(data), flags(top_k, "native", capacity))


@pytest.mark.parametrize("processes", [2, 4])
def test_ranks_train_as_one_process(toy_data, processes):
    cases = [case for case in CASES if case[0] == processes]
    ranks = run_distributed(
        *(_train_all, processes, str(toy_data), cases), user_dir=str(USER_DIR), timeout=200
    )
    for i, case in enumerate(cases):
        one = one_process(str(toy_data), case[2], case[4])
        moe.assert_alike(one, [rank[i] for rank in ranks])


def test_one_process_with_deepspeeds_layer(toy_data):
    for top_k, capacity in ((1, DROPLESS), (2, TIGHT)):
        found = moe.train(SingleWorld(), toy_data, flags(top_k, "deepspeed", capacity))
        moe.assert_alike(one_process(str(toy_data), top_k, capacity), [found])


def test_a_bug_put_in_is_noticed(toy_data):
    case = (2, 2, 2, "deepspeed", DROPLESS, "legacy_ddp")
    bugs = [moe.undivided, moe.gate_alone, moe.own_experts_in_the_norm]
    ranks = run_distributed(
        *(_train_all, 2, str(toy_data), [case], bugs), user_dir=str(USER_DIR), timeout=100
    )
    for i, bug in enumerate(bugs):
        one, several = one_process(str(toy_data), 2, DROPLESS), [rank[i] for rank in ranks]
        with pytest.raises(AssertionError):
            moe.assert_alike(one, several)
        assert several[0].losses, bug.__name__


def test_a_full_top_1_expert_takes_no_process_down(toy_data):
    cases = [
        (2, 2, 1, "deepspeed", TIGHT, "legacy_ddp"),
        (2, 2, 1, "deepspeed", (*TIGHT, "--use-rts"), "legacy_ddp"),
    ]
    ranks = run_distributed(
        *(_train_all, 2, str(toy_data), cases), user_dir=str(USER_DIR), timeout=100
    )
    for found in (each for rank in ranks for each in rank):
        assert all(torch.isfinite(torch.tensor([*found.losses, *found.norms])))
    one = moe.train(SingleWorld(), toy_data, flags(1, "deepspeed", TIGHT))
    moe.assert_alike(one, [rank[0] for rank in ranks])
