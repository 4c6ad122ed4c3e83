"""The engine `fairscale` trains a model with experts as one process does (a stand-in for a GPU)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_lite.parallel.world import SingleWorld, World
from fairseq_lite.training.trainer import Trainer
from tests.helpers import fairscale_shim
from tests.helpers.distributed import run_distributed
from tests.helpers.moe import Case, Trained, assert_alike, train

pytestmark = [
    pytest.mark.timeout(600),
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


def undivided(trainer: Trainer) -> None:
    """Experts' gradients are the mean over their owners, and not divided further."""
    right = trainer.backend.reduce_gradients

    def wrong(model: Any) -> None:
        right(model)
        for flat in model.flats:
            if flat.expert is not None:
                flat.param.grad.mul_(flat.expert.layout.group_size)

    trainer.backend.reduce_gradients = wrong  # type: ignore[method-assign]


def left_out_of_the_norm(trainer: Trainer) -> None:
    """The norm is that of the shared gradients."""

    def wrong(model: Any) -> Tensor:
        rows = [flat.param.grad for flat in model.flats if flat.expert is None]
        square = torch.stack([row.square().sum() for row in rows]).sum()
        return trainer.world.all_reduce(square).sqrt()

    trainer.backend.grad_norm = wrong  # type: ignore[method-assign]


FAULTS = {fault.__name__: fault for fault in (undivided, left_out_of_the_norm)}


def run_cases(world: World, data: Path, cases: Sequence[Case]) -> dict[str, Trained]:
    fairscale_shim.install()
    found = {str(case): train(world, data, case.flags) for case in cases}
    found["bf16"] = train(world, data, [*BASE.flags, *BF16])
    for name, fault in FAULTS.items() if world.size > 1 else ():
        found[name] = train(world, data, BASE.flags, plant=fault)
    return found


@cache
def on_ranks(ranks: int, data: Path) -> list[dict[str, Trained]]:
    """By rank, then by case. One rank runs beside another: the stand-in needs its own process."""
    if ranks == 1:
        return [run_distributed(alone_in_two, 2, data, timeout=560)[0]]
    return run_distributed(run_cases, ranks, data, CASES[ranks], timeout=560)


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
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_bug_is_noticed(fault: str, ranks: int, toy_data: Path) -> None:
    outcomes = [rank[fault] for rank in on_ranks(ranks, toy_data)]
    with pytest.raises(AssertionError):
        assert_alike(alone(BASE.reference, toy_data), outcomes)


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
