"""Experts on several ranks compute what one process computes that has them all.

Each rank has tokens of its own, of different number, and some have none. Gradients of experts are
added up over the ranks that own one, those of the gate over all ranks, which is the backend's work.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_lite.moe import exchange
from fairseq_lite.moe.layer import MoELayer
from fairseq_lite.moe.options import MoEOptions, RouterOptions
from fairseq_lite.parallel.experts import spread_over
from fairseq_lite.parallel.world import SingleWorld, World
from tests.helpers.distributed import run_distributed

pytestmark = pytest.mark.timeout(180)

DIM = 6
# Tokens of each rank, in two micro-batches.
TOKENS = ((7, 3), (0, 12), (1, 0), (16, 2))


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(DIM, 10)
        self.fc2 = nn.Linear(10, DIM)

    def between(self, inner: Tensor) -> Tensor:
        return F.relu(inner)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.between(self.fc1(x)))


@dataclass(frozen=True)
class Case:
    """One layer."""

    experts: int
    top_k: Any
    capacity: float | None = None
    group_size: int | None = None
    bf16: bool = False


CASES = (
    Case(4, 1),
    Case(4, 2),
    Case(8, 2, capacity=1.0),
    Case(3, 2),  # on two ranks one has two of them
    Case(2, 1),  # on four ranks each is owned twice
    Case(5, 2, capacity=0.5, group_size=2),
    Case(4, 2, group_size=1),
    Case(4, 2, bf16=True),
)


def build(case: Case, world: World) -> MoELayer:
    torch.manual_seed(3)
    options = RouterOptions(
        case.experts, case.top_k, second_policy="all", capacity_factor=case.capacity, gate_fp32=True
    )
    with spread_over(world, regroup=world.size == 1):
        layer = MoELayer(
            DIM, MoEOptions(1, options, 10), Feed, "decoder.layers.1", group_size=case.group_size
        )
    nn.init.normal_(layer.gate.wg.weight, generator=torch.Generator().manual_seed(8))
    return layer if case.bf16 else layer.double()


def tokens_of(rank: int, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * rank + batch)
    return torch.randn(TOKENS[rank][batch], DIM, dtype=torch.float64, generator=generator)


def pass_over(layer: MoELayer, case: Case, rank: int, batch: int) -> dict[str, Tensor]:
    """Forward and backward over a micro-batch of one rank."""
    x = tokens_of(rank, batch).to(next(layer.parameters()).dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.bf16):
        out, report = layer(x)
    towards = torch.linspace(-1, 1, out.numel()).view_as(out)
    ((out * towards).sum() + report.balance + report.z).backward()
    assert x.grad is not None
    key = f"{rank}.{batch}"
    return {
        f"out {key}": out.detach().float(),
        f"grad {key}": x.grad,
        f"load {key}": report.load,
        f"dropped {key}": report.dropped,
        f"balance {key}": report.balance.detach(),
    }


def on_rank(world: World, case: Case) -> dict[str, Tensor]:
    layer = build(case, world)
    found: dict[str, Tensor] = {}
    for batch in range(2):
        found |= pass_over(layer, case, world.rank, batch)
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        found[f"param {name}"] = p.grad
    layer.eval()
    with torch.no_grad():
        found[f"eval {world.rank}"] = layer(tokens_of(world.rank, 0).to(p.dtype))[0]
    return found


def expected(case: Case, ranks: int) -> dict[str, Tensor]:
    layer = build(case, SingleWorld())
    found: dict[str, Tensor] = {}
    for rank in range(ranks):
        for batch in range(2):
            found |= pass_over(layer, case, rank, batch)
    found |= {f"param {n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    layer.eval()
    with torch.no_grad():
        for rank in range(ranks):
            found[f"eval {rank}"] = layer(tokens_of(rank, 0).to(p_type(layer)))[0]
    return found


def p_type(layer: MoELayer) -> torch.dtype:
    return layer.gate.wg.weight.dtype


def added(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What the ranks found, gradients of one parameter added up."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            total[name] = total[name] + tensor if name in total else tensor
    return total


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], case: Case) -> None:
    assert got.keys() == want.keys()
    close = {"rtol": 0.02, "atol": 0.02} if case.bf16 else {"rtol": 1e-9, "atol": 1e-11}
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, msg=f"{case}: {name}", **close)


# -- on the ranks ---------------------------------------------------------------------------------


class _SameWayBack(exchange._AllToAll):
    """Gradients of one half of the way are not sent back."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        back = ctx.group.all_to_all(grads[0].contiguous(), ctx.receive, ctx.send)
        return torch.zeros_like(back), None, None, None


def _as_they_came(counts: Tensor) -> Tensor:
    return torch.arange(int(counts.sum()))


BUGS = {"gradients stay": ("_AllToAll", _SameWayBack), "unsorted": ("_by_expert", _as_they_came)}


def work(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {str(case): on_rank(world, case) for case in CASES}
    for bug, (name, wrong) in BUGS.items():
        right = getattr(exchange, name)
        setattr(exchange, name, wrong)
        found[bug] = on_rank(world, CASES[2])
        setattr(exchange, name, right)
    found["collectives"] = _collectives(world)
    return found


def _collectives(world: World) -> list[tuple[str, ...]]:
    """Names of what is exchanged in a forward and backward pass, and in forward alone."""
    names = ("all_to_all_single", "all_reduce", "all_gather", "broadcast", "all_gather_object")
    calls: list[str] = []
    originals = {name: getattr(dist, name) for name in names}

    def counted(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    layer = build(CASES[1], world)
    for name in names:
        setattr(dist, name, counted(name))
    try:
        pass_over(layer, CASES[1], world.rank, 0)
        both = tuple(calls)
        calls.clear()
        with torch.no_grad():
            layer(tokens_of(world.rank, 1))
        return [both, tuple(calls)]
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@cache
def results(ranks: int) -> list[dict[str, Any]]:
    return run_distributed(work, ranks, timeout=150.0)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_numbers_are_those_of_one_process(ranks: int, case: Case) -> None:
    got = added([part[str(case)] for part in results(ranks)])
    assert_same(got, expected(case, ranks), case)


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_bug_in_the_exchange_is_noticed(ranks: int, bug: str) -> None:
    got = added([part[bug] for part in results(ranks)])
    with pytest.raises(AssertionError):
        assert_same(got, expected(CASES[2], ranks), CASES[2])


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_layer_exchanges_counts_and_rows_and_nothing_else(ranks: int) -> None:
    for part in results(ranks):
        both, forward = part["collectives"]
        assert both == ("all_to_all_single",) * 5  # counts, rows, rows; rows, rows
        assert forward == ("all_to_all_single",) * 3
