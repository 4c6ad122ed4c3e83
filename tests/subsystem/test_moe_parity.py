"""Any number of ranks trains a model with experts as one process that has all experts does.

Through the real trainer, on batches of unequal size, of which ranks have unequal numbers. Processes
take longer to start than to train, so each number of ranks is started once and goes through all its
cases. A backend or a layer enters the table by a line in `tests/helpers/moe.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fairseq_lite.builtins import load_builtins
from fairseq_lite.moe.layer import MoELayer
from fairseq_lite.moe.options import MoEOptions, RouterOptions
from fairseq_lite.parallel.experts import expert_modules, expert_parameters, spread_over
from fairseq_lite.parallel.local import local
from fairseq_lite.parallel.world import SingleWorld, World
from fairseq_lite.training.trainer import Trainer
from tests.helpers.distributed import run_distributed
from tests.helpers.moe import (
    BACKENDS,
    BUGS,
    LAYERS,
    UPDATES,
    WHOLE_BUGS,
    WHOLE_TABLES,
    Case,
    Trained,
    assembled,
    assert_alike,
    gates_in_no_unit,
    make_lm_data,
    reduce_gates,
    train,
)
from tests.helpers.parity import NOISE
from tests.helpers.toy import ADAM

pytestmark = pytest.mark.timeout(600)

BACKEND_ENTRIES = load_builtins()["ddp_backend"]
EMA = ("--store-ema", "--ema-decay", "0.9")
WITH_ADAM = (*ADAM, "--clip-norm", "0.5", *EMA)
SHARDED = "fully_sharded"


def table(ranks: int) -> list[Case]:
    """Experts x choices x backends x layers, and what one more or fewer experts make uneven."""
    even = [(experts, top) for experts in (2, 4, 8) for top in (1, 2)] if ranks > 1 else [(8, 1)]
    uneven = {1: [(3, 2)], 2: [(3, 2)], 4: [(3, 2), (6, 1)]}[ranks]
    return [
        Case(experts, top, MODEL_OF[experts, top], backend, layer)
        for experts, top in (*even, *uneven)
        for backend in BACKENDS
        for layer in LAYERS
        if ranks > 1 or backend == SHARDED  # else it is what the others are compared with
        if WHOLE_TABLES or backend != SHARDED or (experts, top) in SHARDED_ON[ranks]
    ]


# Sharding takes most of the time. Any two of experts, choices and ranks meet.
SHARDED_ON = {
    1: [(8, 1), (3, 2)],
    2: [(2, 1), (4, 2), (8, 1), (3, 2)],
    4: [(2, 2), (4, 1), (8, 2), (3, 2), (6, 1)],
}
# Each model with each number of experts and of choices.
MODEL_OF = {
    (2, 1): "lm",
    (2, 2): "pair",
    (4, 1): "pair",
    (4, 2): "lm",
    (8, 1): "lm",
    (8, 2): "pair",
    (3, 2): "pair",
    (6, 1): "pair",
}


def more(ranks: int) -> list[Case]:
    """What else there is to turn on."""
    few = Case(2, backend=SHARDED)  # on four ranks with replicas
    many = Case(4, 1, backend=SHARDED)
    saving = ("--checkpoint-activations", "--offload-activations")
    found = [
        replace(many, more=("--cpu-offload",)),
        replace(many, more=saving),
        replace(few, more=("--cpu-offload", *saving)),
        replace(few, more=("--no-reshard-after-forward",)),
        replace(few, more=("--min-params-to-wrap", "100000000")),
        replace(many, backend="legacy_ddp", more=("--checkpoint-activations",)),
        replace(few, training=WITH_ADAM),
        Case(2, training=WITH_ADAM),
        Case(3, training=("--optimizer", "adafactor", "--lr", "0.01", "--clip-norm", "0.5")),
    ]
    return {1: found[:1], 2: [], 4: found}[ranks]


TABLE = {ranks: [*table(ranks), *more(ranks)] for ranks in (1, 2, 4)}


# -- what ranks do ------------------------------------------------------------------------------


def overflow(trainer: Trainer) -> None:
    """In the second update one rank's expert has a gradient that is not finite."""
    right, calls = trainer.backend.reduce_gradients, []

    def then(model: nn.Module) -> None:
        right(model)
        calls.append(1)
        if len(calls) == 2 and trainer.world.rank == trainer.world.size - 1:
            grads = [p.grad for p, _ in expert_parameters(model) if p.grad is not None]
            local(grads[0])[:1] = math.inf

    trainer.backend.reduce_gradients = then  # type: ignore[method-assign]


class Network(nn.Module):
    """D -> D."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 9)
        self.other = nn.Linear(9, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x).relu())  # type: ignore[no-any-return]


def identical(world: World) -> tuple[float, float]:
    """How far a layer of equal experts is from the network that each of them is."""
    torch.manual_seed(5)
    dense = Network()
    options = MoEOptions(every=1, router=RouterOptions(3, second_policy="all"), ffn_dim=9)
    with spread_over(world):
        layer = MoELayer(6, options, Network, "layer")
    for _, expert, _ in expert_modules(layer):
        expert.load_state_dict(dense.state_dict())
    torch.manual_seed(6 + world.rank)
    x = torch.randn(7 * world.rank + 5, 6)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with_experts, plain = layer(inputs[0])[0], dense(inputs[1])
    for out in (with_experts, plain):
        out.square().sum().backward()
    assert inputs[0].grad is not None and inputs[1].grad is not None
    return (
        float((with_experts - plain).detach().abs().max()),
        float((inputs[0].grad - inputs[1].grad).abs().max()),
    )


class Idle(Network):
    """An expert with a part that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(6, 6)


class Sometimes(nn.Module):
    """A layer of experts that some updates do without."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        options = MoEOptions(every=1, router=RouterOptions(2, second_policy="all"), ffn_dim=9)
        self.mixture = MoELayer(6, options, Idle, "layer")

    def forward(self, x: Tensor, with_experts: bool) -> Tensor:
        x = self.before(x)
        return self.mixture(x)[0] if with_experts else x  # type: ignore[no-any-return]


def without_gradient(world: World, name: str) -> list[list[str]]:
    """The parameters that have none, in an update without the experts and in one with them."""
    entry = BACKEND_ENTRIES.get(name)
    backend: Any = entry.factory(entry.config(), world)
    torch.manual_seed(5)
    model = backend.wrap(Sometimes)
    found = []
    for with_experts in (False, True):
        model.zero_grad()
        for last in (False, True):
            with backend.accumulate(model, last=last):
                out = model(torch.ones(3 + world.rank, 6), with_experts)
                backend.backward(model, out.square().sum())
        backend.reduce_gradients(model)
        found.append([n for n, p in model.named_parameters() if p.grad is None])
    return found


FAULTY: dict[str, tuple[Case, Callable[[Trainer], None]]] = {
    **{f"whole {bug.__name__}": (Case(2), bug) for bug in (*BUGS, *WHOLE_BUGS)},
    **{f"sharded {bug.__name__}": (Case(2, backend=SHARDED), bug) for bug in BUGS},
    **{f"beside {bug.__name__}": (Case(4, 1, backend=SHARDED), bug) for bug in BUGS},
}
# A gate that every rank keeps for itself: as planted, and with its gradients added up in its place.
GATES: dict[str, tuple[Case, Callable[[Trainer], None] | None]] = {
    f"{kind} gate {how}": (case, repair)
    for kind, case in (
        ("sharded", Case(2, backend=SHARDED)),
        ("beside", Case(4, 1, backend=SHARDED)),
    )
    for how, repair in (("alone", None), ("reduced", reduce_gates))
}
SQRT = ("--moe-normalize-expert-grad", "sqrt_world_size")
FP16 = ("--fp16", "--fp16-init-scale", "4")
# Experts that are whole on one owner, that are whole on two, and that two share.
KINDS = [Case(4, 1), Case(2), Case(2, backend=SHARDED), Case(4, 1, backend=SHARDED)]
BF16 = {
    **{f"bf16 {case}": (case, ("--bf16",)) for case in KINDS},
    "wide": (KINDS[2], ("--bf16", "--fp32-reduce-scatter")),
}


def on_four_more(world: World, data: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"identical": identical(world)}
    for backend in BACKENDS:
        found[f"without {backend}"] = without_gradient(world, backend)
    for name, (case, bug) in FAULTY.items():
        found[name] = train(world, data, case.flags, updates=1, plant=bug)
    for name, (case, repair) in GATES.items():
        with gates_in_no_unit():
            found[name] = train(world, data, case.flags, updates=1, plant=repair)
    found["right"] = train(world, data, Case(2).flags, updates=1)
    for name, (case, flags) in BF16.items():
        found[name] = train(world, data, [*case.flags, *flags])
    for case in KINDS:
        flags = [*case.flags, *FP16]
        found[f"overflow {case}"] = train(world, data, flags, updates=3, plant=overflow)
        found[f"sqrt {case}"] = train(world, data, [*case.flags, *SQRT], updates=1)
    return found


def run_cases(world: World, data: Path, lm_data: Path, cases: Sequence[Case]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = {
            str(case): train(world, lm_data if case.model == "lm" else data, case.flags)
            for case in cases
        }
        if world.size == 4:
            found |= on_four_more(world, data)
        return found
    finally:
        if world.size == 1:
            world.close()  # what a sharded run of one process formed


@cache
def on_ranks(ranks: int, data: Path, lm_data: Path) -> list[dict[str, Any]]:
    """By rank, then by case."""
    return run_distributed(run_cases, ranks, data, lm_data, TABLE[ranks], timeout=560)


def alone(case: Case, data: Path, updates: int = UPDATES) -> Trained:
    """What one process does."""
    return _alone(case.reference, data, updates)


@cache
def _alone(case: Case, data: Path, updates: int) -> Trained:
    return train(SingleWorld(), data, case.flags, updates=updates)


@pytest.fixture(scope="module")
def lm_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lm_data(tmp_path_factory.mktemp("moe-lm"))


def of(name: str, ranks: Sequence[dict[str, Any]]) -> list[Trained]:
    return [rank[name] for rank in ranks]


# -- what must hold -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "case"),
    [(ranks, case) for ranks, cases in TABLE.items() for case in cases],
    ids=str,
)
def test_ranks_train_as_one_process(ranks: int, case: Case, toy_data: Path, lm_data: Path) -> None:
    outcomes = of(str(case), on_ranks(ranks, toy_data, lm_data))
    one = alone(case, lm_data if case.model == "lm" else toy_data)
    assert_alike(one, outcomes, without=() if case.training[1] == "nag" else (NOISE,))


@pytest.mark.parametrize("name", FAULTY)
def test_a_planted_bug_is_noticed(name: str, toy_data: Path, lm_data: Path) -> None:
    one = alone(FAULTY[name][0], toy_data, 1)
    with pytest.raises(AssertionError):
        assert_alike(one, of(name, on_ranks(4, toy_data, lm_data)))


def test_that_is_because_of_the_bug(toy_data: Path, lm_data: Path) -> None:
    assert_alike(alone(Case(2), toy_data, 1), of("right", on_ranks(4, toy_data, lm_data)))


@pytest.mark.parametrize("name", GATES)
def test_a_gate_that_is_not_reduced_is_noticed(name: str, toy_data: Path, lm_data: Path) -> None:
    case, repair = GATES[name]
    one, ranks = alone(case, toy_data, 1), of(name, on_ranks(4, toy_data, lm_data))
    assert ranks[0].losses == pytest.approx(one.losses, rel=1e-5)
    if repair is not None:
        assert_alike(one, ranks)
        return
    with pytest.raises(AssertionError, match=r"\.gate\.\S+ is another one on rank"):
        assembled([rank.gradients[0] for rank in ranks])
    with pytest.raises(AssertionError):
        assert_alike(one, ranks)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_a_rank_holds_its_experts_only(case: Case, toy_data: Path, lm_data: Path) -> None:
    outcomes = of(str(case), on_ranks(4, toy_data, lm_data))
    (shared, _), (experts, _) = outcomes[0].parameters
    assert experts > 0 and experts % case.experts == 0
    held = [outcome.held for outcome in outcomes]
    if case.backend == SHARDED:
        assert sum(held) == shared + experts
        assert max(held) < 1.15 * (shared + experts) / 4
    else:
        assert held == [shared + experts // min(case.experts, 4)] * 4


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_an_overflow_of_one_rank_is_everybodys(case: Case, toy_data: Path, lm_data: Path) -> None:
    outcomes = of(f"overflow {case}", on_ranks(4, toy_data, lm_data))
    one = alone(case, toy_data)
    for outcome in outcomes:
        assert outcome.losses[0] != one.losses[0]
        assert outcome.losses[0] == pytest.approx(one.losses[0], rel=2e-3)
        assert outcome.norms[0] == pytest.approx(one.norms[0], rel=1e-2)
        assert outcome.scales == [4.0, 2.0, 2.0]
        assert len(outcome.losses) == 2  # the second update was skipped
        assert all(map(math.isfinite, outcome.norms))
    assembled([outcome.weights for outcome in outcomes])  # which compares what several have


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_experts_can_be_divided_by_a_square_root(case: Case, toy_data: Path, lm_data: Path) -> None:
    """By that of the number of ranks whose tokens come to them."""
    ranks = on_ranks(4, toy_data, lm_data)
    usual = assembled([outcome.gradients[0] for outcome in of(str(case), ranks)])
    large = assembled([outcome.gradients[0] for outcome in of(f"sqrt {case}", ranks)])
    assert large.keys() == usual.keys()
    for name, grad in large.items():
        factor = math.sqrt(case.experts) if ".experts." in name else 1.0
        torch.testing.assert_close(grad, usual[name] * factor, msg=name)


@pytest.mark.parametrize("name", BF16)
def test_in_bfloat16(name: str, toy_data: Path, lm_data: Path) -> None:
    outcomes = of(name, on_ranks(4, toy_data, lm_data))
    one = alone(BF16[name][0], toy_data)
    for outcome in outcomes:
        assert outcome.losses != one.losses
        assert outcome.losses == pytest.approx(one.losses, rel=1e-2)
        assert outcome.norms == pytest.approx(one.norms, rel=1e-1)
        assert outcome.norms == outcomes[0].norms
        assert {values.dtype for _, _, values in outcome.weights.values()} == {torch.float32}
    assembled([outcome.weights for outcome in outcomes])


def test_equal_experts_are_the_dense_network(toy_data: Path, lm_data: Path) -> None:
    ranks = on_ranks(4, toy_data, lm_data)
    for found in (identical(SingleWorld()), *(rank["identical"] for rank in ranks)):
        assert max(found) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_nobody_used_has_no_gradient(backend: str, toy_data: Path, lm_data: Path) -> None:
    for place, rank in enumerate(on_ranks(4, toy_data, lm_data)):
        idle = [f"mixture.experts.{place % 2}.idle.{kind}" for kind in ("weight", "bias")]
        without, with_experts = rank[f"without {backend}"]
        assert {name.split(".")[0] for name in without} == {"mixture"}
        assert with_experts == idle
