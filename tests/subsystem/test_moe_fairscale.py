"""The engine `fairscale` trains a model with experts as one process does (a stand-in for a GPU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from fairseq_lite.parallel.world import SingleWorld, World
from tests.helpers import fairscale_shim
from tests.helpers.distributed import run_distributed
from tests.helpers.moe import Case, Trained, assert_alike, train

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_spec("fairscale") is None, reason="fairscale is not installed"),
]

FAIRSCALE = ("--fsdp-engine", "fairscale")
BASE = Case(2, backend="fully_sharded", more=FAIRSCALE)


def with_flags(*flags: str, experts: int = 2) -> Case:
    return replace(BASE, experts=experts, more=(*FAIRSCALE, *flags))


SAVING = ("--checkpoint-activations", "--offload-activations")
CASES = {
    1: [BASE],
    2: [with_flags(experts=3), with_flags(*SAVING), with_flags("--cpu-offload")],
    4: [
        with_flags(experts=8),
        BASE,
        with_flags("--cpu-offload"),
        with_flags(*SAVING),
        with_flags("--no-reshard-after-forward"),
        with_flags("--min-params-to-wrap", "100000"),
    ],
}
BF16 = ("--bf16", "--fp32-reduce-scatter")


def run_cases(world: World, data: Path, cases: Sequence[Case]) -> dict[str, Trained]:
    fairscale_shim.install()
    found = {str(case): train(world, data, case.flags) for case in cases}
    found["bf16"] = train(world, data, [*BASE.flags, *BF16])
    return found


@cache
def on_ranks(ranks: int, data: Path) -> list[dict[str, Trained]]:
    """By rank, then by case. One rank runs beside another: the stand-in needs its own process."""
    if ranks == 1:
        return [run_distributed(alone_in_two, 2, data, timeout=280)[0]]
    return run_distributed(run_cases, ranks, data, CASES[ranks], timeout=280)


def alone_in_two(world: World, data: Path) -> dict[str, Trained]:
    return run_cases(SingleWorld(), data, CASES[1]) if world.is_main else {}


@cache
def alone(case: Case, data: Path) -> Trained:
    return train(SingleWorld(), data, case.flags)


@pytest.mark.parametrize(
    ("ranks", "case"), [(ranks, case) for ranks, cases in CASES.items() for case in cases], ids=str
)
def test_ranks_train_as_one_process(ranks: int, case: Case, toy_data: Path) -> None:
    outcomes = [rank[str(case)] for rank in on_ranks(ranks, toy_data)]
    assert_alike(alone(case.reference, toy_data), outcomes)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sixteen_bits(ranks: int, toy_data: Path) -> None:
    one = alone(BASE.reference, toy_data)
    for rank in on_ranks(ranks, toy_data):
        assert rank["bf16"].losses != one.losses
        assert rank["bf16"].losses == pytest.approx(one.losses, rel=2e-2)
        assert rank["bf16"].norms == pytest.approx(one.norms, rel=1e-1)


def test_a_rank_holds_a_part_of_its_experts(toy_data: Path) -> None:
    outcomes = [rank[str(BASE)] for rank in on_ranks(4, toy_data)]
    (shared, _), (experts, _) = outcomes[0].parameters
    for outcome in outcomes:
        assert outcome.held < 1.1 * (shared + experts) / 4
